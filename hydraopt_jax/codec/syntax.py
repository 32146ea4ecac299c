"""Syntax: the bytes of a leaf. NumPy only.

A leaf holds the factors, here called pieces, that one set of tasks reads (`layout`), in canonical order:

    tables                     in the shared leaf only (`tables.pack`)
    side information           deflated: the context of each vector of each piece, a byte each; then for each
                               piece that may be predicted a bit for each vector, whether it is
    coefficients               of the predicted vectors (`prediction.pack`), where there are any
    gains                      their bytes as a number, then `pack_gains`; in a task's own leaf only
    stream                     codes of all vectors of a context other than 0, vector after vector (`streams`)
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax.codec import prediction
from hydraopt_jax.codec.bitstream import Damaged, Reader, deflate, inflate, number
from hydraopt_jax.codec.contexts import COUNT
from hydraopt_jax.codec.layout import Piece, TermShape
from hydraopt_jax.codec.prediction import Prediction

SHARED = "shared"


def task_of(leaf: str) -> int | None:
    """The task whose own leaf it is."""
    return int(leaf[5:]) if leaf.startswith("task_") else None


def join(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    """Concatenation, also of nothing."""
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)


def code_contexts(rows: Sequence[Piece], contexts: Sequence[np.ndarray]) -> np.ndarray:
    """The context of every code of a leaf, `[N]` uint8."""
    return join([np.repeat(x[x > 0], row.length) for row, x in zip(rows, contexts, strict=True)], np.uint8)


def take_codes(codes: np.ndarray, at: int, piece: Piece, context: np.ndarray) -> tuple[np.ndarray, int]:
    """A piece's codes `[length, S]` float32, zeros where uncoded, and where the next piece's begin."""
    coded = np.flatnonzero(context > 0)
    out = np.zeros((piece.length, piece.rank), np.float32)
    end = at + piece.length * len(coded)
    out[:, coded] = codes[at:end].reshape(len(coded), piece.length).T
    return out, end


def live_directions(
    shapes: Mapping[str, tuple[TermShape, ...]],
    rows: Sequence[Piece],
    contexts: Sequence[np.ndarray],
    task: int,
) -> dict[tuple[str, int], np.ndarray]:
    """For each (module, term) the directions that a task has on both sides, and so a gain for: `[S]` bool."""
    of = {(x.module, x.term, x.side, x.factor): i for i, x in enumerate(rows)}
    out = {}
    for name, terms in shapes.items():
        for k, term in enumerate(terms):
            if term.a_of[task] >= 0:
                a, b = contexts[of[name, k, 0, term.a_of[task]]], contexts[of[name, k, 1, term.b_of[task]]]
                out[name, k] = (a > 0) & (b > 0)
    return out


def pack_gains(gains: Sequence[np.ndarray]) -> bytes:
    """Gains of one task in half precision times one unit: the largest gain over 2^14."""
    flat = join(gains, np.float64)
    unit = np.float32(max(np.abs(flat).max(initial=0.0), 1e-30) / 2**14)
    return unit.tobytes() + (flat / unit).astype("<f2").tobytes()


def round_gains(gains: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The gains as they will be read."""
    flat = unpack_gains(pack_gains(gains))
    return np.split(flat, np.cumsum([len(x) for x in gains])[:-1]) if gains else []


def unpack_gains(data: bytes) -> np.ndarray:
    """The inverse of `pack_gains`, float32.

    Raises:
      Damaged: gains that are not finite, or half a gain.
    """
    reader = Reader(data)
    unit = reader.array("<f4", 1)
    if len(data) % 2:
        raise Damaged("half a gain")
    with np.errstate(over="ignore", invalid="ignore"):
        out = reader.array("<f2", (len(data) - 4) // 2).astype(np.float32) * unit
    if not np.isfinite(out).all():
        raise Damaged("gains that are not finite")
    return out


def pack_side(
    rows: Sequence[Piece],
    contexts: Sequence[np.ndarray],
    predictions: Sequence[Prediction | None],
    gains: bytes,
) -> bytes:
    """A leaf's bytes between its tables and its stream."""
    body = b"".join(x.astype(np.uint8).tobytes() for x in contexts)
    conditional = [(row, x) for row, x in zip(rows, predictions, strict=True) if row.base >= 0]
    for row, x in conditional:
        body += np.packbits(np.zeros(row.rank, bool) if x is None else x.used).tobytes()
    packed = deflate(body)
    coefficients = prediction.pack([x for _, x in conditional])
    return number(len(packed)) + packed + coefficients + number(len(gains)) + gains


class Side(NamedTuple):
    """What a leaf says of its pieces before its stream.

    Attributes:
      contexts: of each piece `[S]` int64.
      used: of each piece that may be predicted the predicted vectors `[S]` bool; None for others.
      weights: of each such piece its coefficients `[D, vectors]`; None for others.
      gains: of its task, or None.
      stream: the bytes that follow.
    """

    contexts: list[np.ndarray]
    used: list[np.ndarray | None]
    weights: list[np.ndarray | None]
    gains: np.ndarray | None
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
    size = sum(x.rank for x in rows) + sum(flags)
    body = Reader(inflate(reader.take(reader.number()), size))
    contexts = [body.array("u1", x.rank).astype(np.int64) for x in rows]
    if any(x.max(initial=0) >= COUNT for x in contexts):
        raise Damaged("a context that there is not")
    mine = dict(zip(places, contexts, strict=True))
    used = [
        np.unpackbits(body.array("u1", count))[: row.rank].astype(bool) if count else None
        for row, count in zip(rows, flags, strict=True)
    ]
    sizes = []
    for row, mask in zip(rows, used, strict=True):
        base = mine.get(row.base, known.get(row.base)) if mask is not None else None
        if mask is not None and base is None:
            raise Damaged("a prediction from a factor that is not there")
        sizes.append((0, 0) if mask is None or base is None else (int((base > 0).sum()), int(mask.sum())))
    flat = prediction.unpack(reader, sum(d * s for d, s in sizes))
    parts = np.split(flat, np.cumsum([d * s for d, s in sizes])[:-1]) if sizes else []
    weights = [
        None if mask is None else part.reshape(s, d).T
        for mask, part, (d, s) in zip(used, parts, sizes, strict=True)
    ]
    length = reader.number()
    gains = unpack_gains(reader.take(length)) if length else None
    return Side(contexts, used, weights, gains, reader.rest())
