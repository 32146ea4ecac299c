"""Bytes of a store on disk, in total and per task, computed without writing anything."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from hydraopt_jax import buckets, remote
from hydraopt_jax.deferred import size_of
from hydraopt_jax.store import bucket, folder, manifest, portable, segment_data
from hydraopt_jax.store.store import Segment, Store

Path_ = str | os.PathLike


class Account(NamedTuple):
    """Bytes of a store on disk in three parts, which add up to the whole.

    Attributes:
      factors: compressed factors, and the headers that are compressed along with plain ones in a folder.
      heads: full tensors beside the factors, which a budget given as a fraction does not count.
      metadata: the rest: manifest, headers, errors, checksums, and overhead of checkpoints.
    """

    factors: int
    heads: int
    metadata: int


def account(path: Path_, store: Store) -> Account:
    """The `Account` of a store that was opened from a path."""
    whole = size_on_disk(path)
    heads = factors = 0
    for x in store.segments:
        for name, leaf in x.leaves.items():
            heads += size_of(leaf) if name.startswith("tensors_") else 0
            factors += size_of(leaf) if name.startswith(("shared", "task_", "head_", "prediction")) else 0
    # plain factors may be compressed on disk
    factors = min(factors, array_bytes(path, whole) - heads)
    return Account(factors, heads, whole - factors - heads)


def array_bytes(path: Path_, whole: int) -> int:
    """Bytes of the arrays in a local folder; `whole` for other stores, which do not compress them."""
    if not (remote.is_address(path) or buckets.is_bucket(path)) and Path(path).is_dir():
        # another process may remove a segment meanwhile
        with suppress(FileNotFoundError):
            named = folder.segment_folders(Path(path))
            return sum(folder.tree_bytes(y) for x in named for y in x.glob("*/data*"))
    return whole


def owner(segment: Segment, leaf: str) -> int:
    """The place of the only task that a leaf belongs to; -1 for several tasks."""
    kind, _, number = leaf.rpartition("_")
    if len(segment.tasks) == 1:
        return 0
    return int(number) if kind in ("task", "tensors") and number.isdecimal() else -1


def task_bytes(store: Store) -> dict[str, int]:
    """Task -> bytes of the leaves that only this task reads."""
    out = dict.fromkeys(store.tasks, 0)
    for x in store.segments:
        for name, leaf in x.leaves.items():
            place = owner(x, name)
            if place in x.live:
                out[x.tasks[place]] += size_of(leaf)
    return out


def shared_bytes(store: Store) -> int:
    """Bytes of the leaves that several tasks read."""
    return sum(size_of(v) for x in store.segments for k, v in x.leaves.items() if owner(x, k) < 0)


def size_on_disk(path: Path_) -> int:
    """Bytes of a file, local or remote, of a store's manifest and segments, or of all files below a path.

    For a folder in a bucket: bytes of its manifest and uncompressed arrays.
    """
    if remote.is_address(path):
        return portable.remote_bytes(remote.find(str(path)))
    if buckets.is_bucket(path):
        return bucket.size_in_bucket(buckets.address(str(path)))
    at = Path(path)
    if at.is_file():
        return at.stat().st_size
    if (at / folder.MANIFEST).is_file():
        return folder.store_bytes(at)
    return folder.tree_bytes(at) if at.is_dir() else 0


def measure_size(store: Store, path: Path_ | None = None) -> int:
    """Bytes of the store as a folder with uncompressed plain factors, computed without writing or reading.

    Args:
      store: in memory.
      path: of the folder, on which a few bytes depend; None for a path of typical length.
    """
    home = "" if path is None else str(folder.absolute(path))
    entries = []
    for n, x in enumerate(store.segments):
        entry = segment_data.likely_entry(x, n)
        # a name may be longer than the start of a checksum
        entries.append(entry._replace(id=segment_data.name_there(x, home) or entry.id))
    written = [
        {
            **x._asdict(),
            "arrays": [["state/data", n] for n, _ in folder.division(x.bytes)],
            # as long as a checksum, and as hard to compress
            "files": hashlib.sha256(x.sha256.encode()).hexdigest()[:16],
        }
        for x in entries
    ]
    said = manifest.as_json(store, written)
    name = len(str(Path(home) / folder.SEGMENTS / ("0" * 16))) if home else None
    sizes = (
        folder.segment_size(x.bytes, folder.PATH_BYTES if name is None else name + max(len(x.id) - 16, 0))
        for x in entries
    )
    return len(manifest.gzipped(manifest.to_text(said))) + sum(sizes)
