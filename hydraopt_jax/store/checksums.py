"""Checksums of the files that a segment's checkpoint has."""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def checksum(folder: Path, arrays: Sequence[str]) -> str:
    """The first 16 digits of a SHA-256 over names, sizes and bytes of all files of a checkpoint's arrays.

    Orbax's own files with times and paths do not count.
    """
    whole = hashlib.sha256()
    for x in sorted(x for name in arrays for x in (folder / name).rglob("*")):
        if x.is_file():
            with x.open("rb") as file:
                pieces = iter(functools.partial(file.read, 1 << 20), b"")
                hash_file(whole, x.relative_to(folder).as_posix(), x.stat().st_size, pieces)
    return whole.hexdigest()[:16]


def hash_file(whole: Any, name: str, size: int, pieces: Iterable[bytes]) -> None:
    """Add a file to a checksum: its name in the checkpoint, its size, and its bytes in pieces."""
    whole.update(f"{name}\n{size}\n".encode())
    for piece in pieces:
        whole.update(piece)
