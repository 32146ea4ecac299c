"""Syntax: the bytes of a leaf. NumPy only.

A leaf holds the factors, here called pieces, that one set of tasks reads (`layout`), in canonical order:

    tables                     in the shared leaf only (`frequency_tables.pack_tables`)
    contexts                   of the vectors of each piece (`pack_contexts`)
    flags                      deflated: for each piece that may be predicted a bit for each vector, whether
                               it is; then for each piece of more than one block likewise whether its blocks
                               have contexts
    coefficients               of the predicted vectors (`prediction.pack_coefficients`), where there are any
    offsets                    of the contexts of such blocks, where there are any
    gains                      their bytes as a number, then `pack_gains`; in a task's own leaf only
    stream                     codes of all vectors of a context other than 0, vector after vector (`streams`)
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax.codec import prediction
from hydraopt_jax.codec.bitstream import (
    Damaged,
    Reader,
    deflate,
    inflate,
    number,
    pack_integers,
    unpack_integers,
    unzigzag,
    zigzag,
)
from hydraopt_jax.codec.contexts import BLOCK, FARTHEST, PER_OCTAVE, PER_SIDE, blocks, shifted
from hydraopt_jax.codec.layout import Piece, TermShape
from hydraopt_jax.codec.prediction import Prediction

SHARED = "shared"


def task_of(leaf: str) -> int | None:
    """The task whose own leaf it is."""
    return int(leaf[5:]) if leaf.startswith("task_") else None


def join(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    """Concatenation, also of nothing."""
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)


def code_contexts(
    rows: Sequence[Piece], contexts: Sequence[np.ndarray], offsets: Sequence[np.ndarray]
) -> np.ndarray:
    """The context of every code of a leaf, `[N]` uint8: `contexts` `[S]`, `offsets` `[S, blocks]`."""
    parts = []
    for row, context, offset in zip(rows, contexts, offsets, strict=True):
        live = context > 0
        if offset.any():
            each = shifted(context[live, None], offset[live]).astype(np.uint8)
            parts.append(np.repeat(each, BLOCK, 1)[:, : row.length].ravel())
        else:
            parts.append(np.repeat(context[live].astype(np.uint8), row.length))
    return join(parts, np.uint8)


def as_piece(codes: np.ndarray, piece: Piece, context: np.ndarray) -> np.ndarray:
    """A piece's codes `[length, S]` float32, zeros where uncoded, from `code_count` codes in a row."""
    coded = np.flatnonzero(context > 0)
    out = np.zeros((piece.length, piece.rank), np.float32)
    out[:, coded] = codes.reshape(len(coded), piece.length).T
    return out


def code_count(piece: Piece, context: np.ndarray) -> int:
    """Number of codes of a piece."""
    return piece.length * int(np.count_nonzero(context > 0))


def direction_contexts(
    shapes: Mapping[str, tuple[TermShape, ...]], contexts: Sequence[np.ndarray], task: int
) -> dict[tuple[str, int], np.ndarray]:
    """For each (module, term) of a task the sum of the contexts of each direction's two vectors, each counted
    from the first of its side; 0 for a direction without either, and so without a gain: `[S]`."""
    out = {}
    # of the term's first factor, in the order of `pieces`
    at = 0
    for name, terms in shapes.items():
        for k, term in enumerate(terms):
            first, at = at, at + term.factors(0)
            second, at = at, at + term.factors(1)
            if term.a_of[task] >= 0:
                a, b = contexts[first + term.a_of[task]], contexts[second + term.b_of[task]]
                out[name, k] = np.where((a > 0) & (b > 0), a % PER_SIDE + b % PER_SIDE, 0).astype(np.int64)
    return out


def gain_contexts(
    shapes: Mapping[str, tuple[TermShape, ...]], contexts: Sequence[np.ndarray], task: int
) -> list[np.ndarray]:
    """`direction_contexts` of the directions that a task has a gain for, term by term."""
    return [x[x > 0] for x in direction_contexts(shapes, contexts, task).values()]


def live_directions(
    shapes: Mapping[str, tuple[TermShape, ...]], contexts: Sequence[np.ndarray], task: int
) -> dict[tuple[str, int], np.ndarray]:
    """For each (module, term) the directions that a task has on both sides, and so a gain for: `[S]` bool."""
    return {k: x > 0 for k, x in direction_contexts(shapes, contexts, task).items()}


def round_gains(gains: Sequence[np.ndarray], bits: int) -> list[np.ndarray]:
    """The gains in float32 with so many bits behind the leading one.

    >>> print(round_gains([np.array([1.3, -200.0])], 2))
    [array([   1.25, -192.  ], dtype=float32)]
    """
    raw = join(gains, np.float32).view(np.int32).astype(np.int64)
    cut = 23 - bits
    rounded = (raw + (1 << cut >> 1)) >> cut << cut
    flat = rounded.astype(np.int32).view(np.float32)
    return np.split(flat, np.cumsum([len(x) for x in gains])[:-1]) if gains else []


def expected_difference(contexts: np.ndarray, bits: int) -> np.ndarray:
    """What a gain's number is expected to differ by from the one before it, `[n]`, the first from 0.

    Both vectors of a direction grow with its singular value and the gain falls with it, so that the
    logarithm of a gain is about minus the mean of those of the two vectors' rms, which their contexts say.
    """
    return np.diff(contexts, prepend=0) * -(1 << bits) // (2 * PER_OCTAVE)


def pack_gains(gains: np.ndarray, contexts: np.ndarray) -> bytes:
    """Gains of one task.

    A gain is a float32 whose sign, exponent and leading bits are a number, about linear in its logarithm.

    Args:
      gains: `[n]` float32; what is not zero in them decides how many bits are kept.
      contexts: `[n]` sum of the contexts of each gain's two vectors, each counted from the first of its side.
    """
    if not len(gains):
        return b""
    raw = np.asarray(gains, np.float32).view(np.int32).astype(np.int64)
    lowest = int(np.bitwise_or.reduce(raw)) & ((1 << 23) - 1) | 1 << 23
    bits = 23 - min((lowest & -lowest).bit_length() - 1, 23)
    rest = np.diff(raw >> (23 - bits), prepend=0) - expected_difference(contexts, bits)
    return bytes([bits]) + pack_integers(zigzag(rest))


def unpack_gains(data: bytes, contexts: np.ndarray) -> np.ndarray:
    """The inverse of `pack_gains`, float32.

    Raises:
      Damaged: bytes that `pack_gains` does not write.
    """
    reader = Reader(data)
    if not len(contexts):
        if data:
            raise Damaged("gains of a task without directions")
        return np.zeros(0, np.float32)
    (bits,) = reader.take(1)
    if bits > 23:
        raise Damaged(f"gains of {bits} bits")
    rest = unzigzag(unpack_integers(reader, len(contexts)))
    raw = np.cumsum(rest + expected_difference(contexts, bits)) << (23 - bits)
    out = raw.astype(np.int32).view(np.float32)
    if (raw != raw.astype(np.int32)).any() or not np.isfinite(out).all() or reader.rest():
        raise Damaged("gains that are not finite, or more than there are directions")
    return out


def pack_side(
    rows: Sequence[Piece],
    contexts: Sequence[np.ndarray],
    predictions: Sequence[Prediction | None],
    offsets: Sequence[np.ndarray],
    gains: bytes,
) -> bytes:
    """A leaf's bytes between its tables and its stream."""
    conditional = [(row, x) for row, x in zip(rows, predictions, strict=True) if row.base >= 0]
    flags = [np.packbits(np.zeros(row.rank, bool) if x is None else x.used) for row, x in conditional]
    moved = [(x, x.any(1)) for row, x in zip(rows, offsets, strict=True) if blocks(row.length)]
    body = join([*flags, *(np.packbits(mask) for _, mask in moved)], np.uint8).tobytes()
    shifts = join([x[mask].ravel() for x, mask in moved if mask.any()], np.int32)
    packed = deflate(body)
    coefficients = prediction.pack_coefficients([x for _, x in conditional])
    steps = pack_integers(zigzag(shifts)) if len(shifts) else b""
    first = pack_contexts(rows, contexts)
    return first + number(len(packed)) + packed + coefficients + steps + number(len(gains)) + gains


def pack_contexts(rows: Sequence[Piece], contexts: Sequence[np.ndarray]) -> bytes:
    """The contexts of a leaf's vectors: how many each piece has up to its last coded one, as differences from
    the piece before; then those contexts, counted from the first of their side, each as its
    difference from the vector before, the first of a piece from that of the last piece of its side."""
    sizes = np.array([len(x) for x in contexts], np.int64)
    flat = join(contexts, np.int64)
    piece = np.repeat(np.arange(len(rows)), sizes)
    place = np.arange(len(flat)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    ranks = np.zeros(len(rows), np.int64)
    np.maximum.at(ranks, piece, np.where(flat > 0, place + 1, 0))
    coded = flat[place < ranks[piece]] % PER_SIDE
    rests = np.diff(coded, prepend=0)
    # the first of a piece from that of the last piece of its side which has any
    side = np.array([x.side for x in rows], np.int64)[ranks > 0]
    at = (np.cumsum(ranks) - ranks)[ranks > 0]
    for k in (0, 1):
        first = at[side == k]
        rests[first] = np.diff(coded[first], prepend=0)
    return pack_integers(zigzag(np.diff(ranks, prepend=0))) + pack_integers(zigzag(rests))


def unpack_contexts(reader: Reader, rows: Sequence[Piece]) -> list[np.ndarray]:
    """The inverse of `pack_contexts`: `[S]` int64 of each piece.

    Raises:
      Damaged: more contexts than vectors, or an unknown one.
    """
    ranks = np.cumsum(unzigzag(unpack_integers(reader, len(rows))))
    if ((ranks < 0) | (ranks > [x.rank for x in rows])).any():
        raise Damaged("more contexts than vectors")
    flat = unzigzag(unpack_integers(reader, int(ranks.sum())))
    out, at, before = [], 0, [0, 0]
    for row, n in zip(rows, ranks.tolist(), strict=True):
        found: np.ndarray = np.zeros(row.rank, np.int64)
        found[:n] = before[row.side] + np.cumsum(flat[at : at + n])
        if found.min(initial=0) < 0 or found.max(initial=0) >= PER_SIDE:
            raise Damaged("an unknown context")
        before[row.side] = int(found[0]) if n else before[row.side]
        out.append(np.where(found > 0, found + row.side * PER_SIDE, 0))
        at += n
    return out


class Side(NamedTuple):
    """What a leaf says of its pieces before its stream.

    Attributes:
      contexts: of each piece `[S]` int64.
      used: of each piece that may be predicted the predicted vectors `[S]` bool; None for others.
      weights: of each such piece its coefficients `[D, vectors]`; None for others.
      offsets: of each piece those of its blocks' contexts, `[S, blocks]`.
      gains: bytes of its task's, see `unpack_gains`.
      stream: the bytes that follow.
    """

    contexts: list[np.ndarray]
    used: list[np.ndarray | None]
    weights: list[np.ndarray | None]
    offsets: list[np.ndarray]
    gains: bytes
    stream: bytes


def unpack_side(
    reader: Reader, rows: Sequence[Piece], known: Mapping[int, np.ndarray], places: Sequence[int]
) -> Side:
    """The inverse of `pack_side`.

    Args:
      reader: of the leaf, behind its tables.
      rows: the leaf's pieces.
      known: contexts of pieces of other leaves, by position; a base is in here or in this leaf.
      places: position of each of the leaf's pieces.

    Raises:
      Damaged: bytes that `pack_side` does not write.
    """
    flags = [-(-x.rank // 8) if x.base >= 0 else 0 for x in rows]
    marks = [-(-x.rank // 8) if blocks(x.length) else 0 for x in rows]
    contexts = unpack_contexts(reader, rows)
    body = Reader(inflate(reader.take(reader.number()), sum(flags) + sum(marks)))
    mine = dict(zip(places, contexts, strict=True))
    used = [
        np.unpackbits(body.array("u1", count))[: row.rank].astype(bool) if count else None
        for row, count in zip(rows, flags, strict=True)
    ]
    moved = [
        np.unpackbits(body.array("u1", count))[: row.rank].astype(bool)
        for row, count in zip(rows, marks, strict=True)
    ]
    sizes = []
    for row, mask in zip(rows, used, strict=True):
        base = mine.get(row.base, known.get(row.base)) if mask is not None else None
        if mask is not None and base is None:
            raise Damaged("a prediction from a factor that is not there")
        sizes.append((0, 0) if mask is None or base is None else (int((base > 0).sum()), int(mask.sum())))
    flat = prediction.unpack_coefficients(reader, sum(d * s for d, s in sizes))
    parts = np.split(flat, np.cumsum([d * s for d, s in sizes])[:-1]) if sizes else []
    weights = [
        None if mask is None else part.reshape(s, d).T
        for mask, part, (d, s) in zip(used, parts, sizes, strict=True)
    ]
    offsets = unpack_offsets(reader, rows, moved)
    gains = reader.take(reader.number())
    return Side(contexts, used, weights, offsets, gains, reader.rest())


def unpack_offsets(reader: Reader, rows: Sequence[Piece], moved: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Offsets `[S, blocks]` of the contexts of each piece's blocks; `moved` says which vectors have any.

    Raises:
      Damaged: an offset that is too large.
    """
    counts = [int(x.sum()) * blocks(row.length) for row, x in zip(rows, moved, strict=True)]
    flat = unzigzag(unpack_integers(reader, sum(counts))) if any(counts) else np.zeros(0, np.int64)
    if np.abs(flat).max(initial=0) > FARTHEST:
        raise Damaged("an offset of a context that is too large")
    out, at = [], 0
    for row, mask, count in zip(rows, moved, counts, strict=True):
        found = np.zeros((row.rank, blocks(row.length)), np.int64)
        if count:
            found[mask] = flat[at : at + count].reshape(-1, blocks(row.length))
        out.append(found)
        at += count
    return out
