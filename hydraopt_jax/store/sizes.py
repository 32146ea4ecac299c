"""Sizes: what a store takes on disk and what of it is whose; arithmetic, without writing anything."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from hydraopt_jax import buckets, remote
from hydraopt_jax.deferred import Deferred, size_of
from hydraopt_jax.store import bucket, folder, manifest, portable, segment_data
from hydraopt_jax.store.store import Segment, Store

Path_ = str | os.PathLike


class Account(NamedTuple):
    """What takes the bytes of a store on disk; the three add up to all of it.

    Attributes:
      factors: of the factors, after all compression.
      heads: of the full tensors beside them, which a fraction as a budget does not count.
      metadata: of all else: manifest, headers, errors, checksums, and what checkpoints take.
    """

    factors: int
    heads: int
    metadata: int


def account(path: Path_, store: Store) -> Account:
    """What takes the bytes of a store, which was opened from there."""
    whole = size_on_disk(path)
    heads = factors = 0
    for x in store.segments:
        for name, leaf in x.leaves.items():
            heads += size_of(leaf) if name.startswith("tensors_") else 0
            factors += size_of(leaf) if name.startswith(("shared", "task_", "head_", "prediction")) else 0
    # plain factors may have become smaller
    factors = min(factors, whole - heads)
    return Account(factors, heads, whole - factors - heads)


def owner(segment: Segment, leaf: str) -> int:
    """The place in a segment whose task alone a leaf is of; -1 for several tasks."""
    kind, _, number = leaf.rpartition("_")
    if len(segment.tasks) == 1:
        return 0
    return int(number) if kind in ("task", "tensors") and number.isdecimal() else -1


def task_bytes(store: Store) -> dict[str, int]:
    """Task -> bytes of the leaves that are of no other task."""
    out = dict.fromkeys(store.tasks, 0)
    for x in store.segments:
        for name, leaf in x.leaves.items():
            place = owner(x, name)
            if place in x.live:
                out[x.tasks[place]] += size_of(leaf)
    return out


def shared_bytes(store: Store) -> int:
    """Bytes of the leaves that are of several tasks."""
    return sum(size_of(v) for x in store.segments for k, v in x.leaves.items() if owner(x, k) < 0)


def size_on_disk(path: Path_) -> int:
    """Bytes of a file, here or elsewhere, or of all files below a path, as a user counts them.

    Of a folder in a bucket: of its manifest and, before compression, of its arrays.
    """
    if remote.is_address(path):
        return portable.size_of(remote.find(str(path)))
    if buckets.is_bucket(path):
        return bucket.size(buckets.address(str(path)))
    at = Path(path)
    if at.is_file():
        return at.stat().st_size
    return folder.tree_bytes(at) if at.is_dir() else 0


def name_there(segment: Segment, path: Path_ | None) -> str:
    """The name of a segment that lies in a folder, which may be longer than one that its bytes give."""
    for x in segment.leaves.values():
        if isinstance(x, Deferred) and x.origin is not None and path is not None:
            where, name, _ = x.origin
            return str(name) if where == str(Path(path).absolute()) else ""
    return ""


def measure_size(store: Store, path: Path_ | None = None) -> int:
    """Bytes that the store takes as a folder, plain factors uncompressed; nothing is written or read.

    Args:
      store: in memory.
      path: of the folder, which a few bytes depend on; None for one of a usual length.
    """
    entries = []
    for n, x in enumerate(store.segments):
        entry = segment_data.likely_entry(x, n)
        entries.append(entry._replace(id=name_there(x, path) or entry.id))
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
    name = None if path is None else len(str(Path(path).absolute() / folder.SEGMENTS / ("0" * 16)))
    sizes = (
        folder.segment_size(x.bytes, folder.PATH_BYTES if name is None else name + max(len(x.id) - 16, 0))
        for x in entries
    )
    return len(manifest.gzipped(manifest.to_text(said))) + sum(sizes)
