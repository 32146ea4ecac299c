"""Replace a folder at once, one writer at a time.

A new folder is written beside the old one, made durable, and exchanged with it by one system call. Where the
system has no such call, the old folder steps aside under a name that readers know, so that there is always
one whole folder to be read. A lock that the kernel drops with its process keeps writers apart.
"""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hydraopt_jax.errors import HydraOptError

# files that wait for the disk together
SYNCING = 16
AT_FDCWD = {"linux": -100, "darwin": -2}
# renameat2(RENAME_EXCHANGE) and renameatx_np(RENAME_SWAP): one name, one flag on each system
EXCHANGE = {"linux": ("renameat2", 2), "darwin": ("renameatx_np", 2)}


def beside(path: Path, role: str) -> Path:
    """A hidden name beside a store: `.NAME.lock`, `.NAME.job`, `.NAME.writing` or `.NAME.previous`."""
    return path.with_name(f".{path.name}.{role}")


def current(path: Path) -> Path:
    """Where the store at `path` is: there, or aside if a writer died between two renames."""
    aside = beside(path, "previous")
    return aside if not path.exists() and aside.is_dir() else path


def exchange(one: Path, two: Path) -> bool:
    """Exchange two existing folders at once; False where the system cannot."""
    if sys.platform not in EXCHANGE:
        return False
    name, flag = EXCHANGE[sys.platform]
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if call is None:
        return False
    here = AT_FDCWD[sys.platform]
    if call(here, os.fsencode(one), here, os.fsencode(two), flag) == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(two))


def replace(new: Path, path: Path) -> None:
    """Put the folder `new` in the place of `path`, whatever is there; both lie in one folder."""
    aside = beside(path, "previous")
    if not path.exists():
        os.replace(new, path)
    elif exchange(new, path):
        sync(path.parent)
        shutil.rmtree(new, ignore_errors=True)
    else:
        os.replace(path, aside)
        os.replace(new, path)
    sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


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
    """`sync` of everything in a folder, and of the folder."""
    every = sorted(folder.rglob("*"), reverse=True)
    # a journal commits what several threads wait for together
    with ThreadPoolExecutor(SYNCING) as pool:
        list(pool.map(sync, (x for x in every if not x.is_dir())))
    for path in (*(x for x in every if x.is_dir()), folder):
        sync(path)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Hold the lock of a store and give a new, empty place to write it to; what dead writers left is mended.

    Raises:
      HydraOptError: another process writes the store, or its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            if not path.exists() and current(path) != path:
                os.replace(current(path), path)
            place = beside(path, "writing")
            for left in (place, beside(path, "previous")):
                shutil.rmtree(left, ignore_errors=True)
            place.mkdir()
            try:
                yield place
            finally:
                shutil.rmtree(place, ignore_errors=True)
    except OSError as error:
        raise HydraOptError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def locked(path: Path, role: str = "lock", again: bool = False) -> Iterator[None]:
    """Hold the lock of what is written at a path, `.NAME.lock`, and remove its file after.

    Args:
      path: what is written.
      role: what the lock is called, see `beside`.
      again: whether this thread may hold it already.

    Raises:
      HydraOptError: another process, or another writer in this one, holds it.
    """
    file = beside(path, role)
    lock = FileLock(file, timeout=0, is_singleton=again)
    try:
        lock.acquire()
    except Timeout:
        raise HydraOptError(f"{path}: another process is writing it: try again when it is done") from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            # whoever opened it meanwhile sees that it is gone, and opens another
            with suppress(OSError):
                file.unlink()
        lock.release()
