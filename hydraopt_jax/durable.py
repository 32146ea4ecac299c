"""Files and folders that survive a crash of the machine."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file, or the entries of a folder, survive a crash of the machine."""
    if path.is_dir() and os.name != "posix":  # pragma: no cover - folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """`sync` of everything in a folder, of the folder, and of its entry."""
    every = [*folder.rglob("*"), folder, folder.parent]
    # a journal commits what several threads wait for together
    with ThreadPoolExecutor(len(every)) as pool:
        list(pool.map(sync, every))
