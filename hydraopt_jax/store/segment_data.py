"""A segment as one run of bytes, and its inverse: `docs/format.md`, section "Segments".

    header      deflated JSON: schema, tables of full tensors, names and sizes of the leaves
    leaves      one after another
    digests     the first 16 bytes of each leaf's SHA-256

The manifest has the sizes of the header, and the SHA-256 of header and digests together. So one leaf can be
read and checked without the others.
"""

import functools
import hashlib
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax import strict_json
from hydraopt_jax.deferred import Deferred, size_of, span_of
from hydraopt_jax.errors import damaged
from hydraopt_jax.store import checks, schema
from hydraopt_jax.store.store import Reference, Segment
from hydraopt_jax.store.tensors import DEFLATE, inflate_at_most

DIGEST = 16
# number of leaves in the cache of read leaves, and bytes that a writer hashes at once
CACHED = 4
PIECE = 1 << 24


class SegmentEntry(NamedTuple):
    """The entry of a segment in a manifest.

    Attributes:
      id: name of the segment.
      bytes: of the run.
      header: bytes of the header, deflated and inflated.
      sha256: of header and digests.
    """

    id: str
    bytes: int
    header: tuple[int, int]
    sha256: str


def deflated_header(segment: Segment) -> tuple[bytes, int]:
    """The deflated header, and its size when inflated."""
    said = {
        **schema.as_json(segment.modules),
        "places": len(segment.tasks),
        "tensors": {str(k): row for k, row in enumerate(segment.tensors) if row},
        "leaves": [[k, size_of(v)] for k, v in segment.leaves.items()],
    }
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    return zlib.compress(text, 9), len(text)


def run_size(segment: Segment) -> int:
    """Bytes of the run."""
    return likely_entry(segment, 0).bytes


def run_pieces(segment: Segment, done: Callable[[SegmentEntry], None]) -> Iterator[Any]:
    """The run of a segment in pieces; deferred leaves are read one by one.

    `done` receives the entry at the end. The id in the entry is the first 16 digits of the checksum.
    """
    packed, raw = deflated_header(segment)
    yield packed
    digests = b""
    for leaf in segment.leaves.values():
        known, own = known_digest(leaf), hashlib.sha256()
        for part in pieces_of(leaf):
            if not known:
                own.update(part)
            yield part
        digests += known or own.digest()[:DIGEST]
    yield digests
    done(sealed(segment, packed, raw, digests))


def pieces_of(leaf: Any) -> Iterator[Any]:
    """The bytes of a leaf in pieces."""
    for start in range(0, size_of(leaf), PIECE):
        yield span_of(leaf, start, min(start + PIECE, size_of(leaf)))


def known_digest(leaf: Any) -> bytes:
    """The digest of a leaf that is in a store already and is checked when read; b"" for other leaves."""
    return leaf.digest if isinstance(leaf, Deferred) else b""


def leaf_digest(leaf: Any) -> bytes:
    """The digest of a leaf."""
    if known := known_digest(leaf):
        return known
    own = hashlib.sha256()
    for part in pieces_of(leaf):
        own.update(part)
    return own.digest()[:DIGEST]


def sealed(segment: Segment, packed: bytes, raw: int, digests: bytes) -> SegmentEntry:
    """The entry of a segment, from its deflated header, the inflated size of the header, and the digests."""
    sha = hashlib.sha256(packed + digests).hexdigest()
    total = len(packed) + sum(map(size_of, segment.leaves.values())) + len(digests)
    return SegmentEntry(sha[:16], total, (len(packed), raw), sha)


def entry_of(segment: Segment) -> SegmentEntry:
    """The entry of a segment; leaves with known digests are not read."""
    return sealed(segment, *deflated_header(segment), b"".join(map(leaf_digest, segment.leaves.values())))


def name_there(segment: Segment, home: str) -> str:
    """The name of a segment that was read from the folder; "" for another one."""
    origins = {x.origin if isinstance(x, Deferred) else None for x in segment.leaves.values()}
    origin = origins.pop() if len(origins) == 1 else None
    there = origin is not None and origin[0] == home and origin[2] == len(segment.leaves)
    return origin[1] if there and origin is not None else ""


def free_id(wanted: str, taken: Collection[str]) -> str:
    """An id that is not taken: equal segments have equal checksums, but not one name.

    >>> free_id("a", {"b"}), free_id("a", {"a", "ax"})
    ('a', 'axx')
    """
    while wanted in taken:
        wanted += "x"
    return wanted


def likely_entry(segment: Segment, n: int) -> SegmentEntry:
    """An entry of the same length as that of the segment, for counting bytes without reading leaves."""
    digest = hashlib.sha256(n.to_bytes(4, "little")).digest()[:DIGEST]
    return sealed(segment, *deflated_header(segment), digest * len(segment.leaves))


def open_segment(
    path: Any,
    entry: SegmentEntry,
    read: Callable[[int, int], np.ndarray],
    tasks: tuple[str, ...],
    removed: frozenset[int],
    references: tuple[Reference, ...] = (),
    tables: int = -1,
) -> Segment:
    """A segment whose leaves are read and compared with their checksums on demand.

    Args:
      path: of the store, for messages.
      entry: of the manifest.
      read: `(start, stop)` -> bytes of the run.
      tasks, removed, references, tables: see `Segment`.

    Raises:
      HydraOptError: the run is not that of the manifest.
    """
    (packed, raw), name = entry.header, f"segment {entry.id}"
    if packed > entry.bytes or raw > DEFLATE * packed:
        raise damaged(path, f"{name} has no header of its size")
    head = bytes(read(0, packed))
    text = inflate_at_most(head, raw + 1)
    try:
        said = strict_json.loads(text)
        leaves = [(str(k), int(n)) for k, n in said["leaves"]]
        end = entry.bytes - DIGEST * len(leaves)
        if len(text) != raw or packed + sum(n for _, n in leaves) != end or min(n for _, n in leaves) < 1:
            raise ValueError("sizes")
    except (ValueError, KeyError, TypeError):
        raise damaged(path, f"{name} has an invalid header") from None
    tail = bytes(read(end, entry.bytes)) if leaves else b""
    if hashlib.sha256(head + tail).hexdigest() != entry.sha256:
        raise damaged(path, f"{name} does not match its checksum")
    with checks.believing(path, f"the header of {name}"):
        checks.check_segment(said, leaves, len(tasks), references)
        modules = schema.from_json(said)
        tensors = tuple(
            tuple((n, d, tuple(s), b) for n, d, s, b in said["tensors"].get(str(k), ()))
            for k in range(len(tasks))
        )
    starts, at = {}, packed
    for k, (leaf, count) in enumerate(leaves):
        starts[leaf] = (at, count, tail[DIGEST * k : DIGEST * (k + 1)])
        at += count

    @functools.lru_cache(CACHED)
    def whole(leaf: str) -> np.ndarray:
        start, count, digest = starts[leaf]
        data = read(start, start + count)
        if hashlib.sha256(data.data).digest()[:DIGEST] != digest:
            raise damaged(path, f"{leaf} of {name} does not match its checksum")
        return data

    def part(leaf: str, start: int, stop: int) -> np.ndarray:
        return whole(leaf)[start:stop]

    origin = (str(path), entry.id, len(leaves))
    lazy: Mapping[str, Any] = {
        leaf: Deferred((count,), np.uint8, functools.partial(part, leaf), origin, starts[leaf][2])
        for leaf, count in leaves
    }
    return Segment(lazy, tasks, removed, modules, tensors, references, tables)
