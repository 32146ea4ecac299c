"""Decode leaves to factors in steps and gains, with equal results on every machine. NumPy only."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hydraopt_jax.codec import frequency_tables, prediction, rans, streams, syntax
from hydraopt_jax.codec.bitstream import Damaged, Reader
from hydraopt_jax.codec.layout import Piece, TermShape, by_leaf, pieces
from hydraopt_jax.codec.syntax import SHARED, Side


class Decoded(NamedTuple):
    """Factors in quantizer steps.

    Attributes:
      pieces: every factor in canonical order.
      contexts: of each piece `[S]`; zeros where its leaf was not read.
      values: of each piece `[length, S]` float32 in steps; None where its leaf was not read.
      gains: task -> its gains, one array `[live directions]` per (module, term) that it has, in order.
    """

    pieces: list[Piece]
    contexts: list[np.ndarray]
    values: list[np.ndarray | None]
    gains: dict[int, list[np.ndarray]]


def decode_leaves(
    leaves: Mapping[str, bytes],
    shapes: Mapping[str, tuple[TermShape, ...]],
    tasks: Sequence[int],
    frequencies: np.ndarray | None = None,
    decode_lanes: rans.DecodeLanes = rans.decode,
) -> Decoded:
    """Factors and gains of some tasks.

    Args:
      leaves: name -> bytes, at least the shared leaf and those that the tasks read.
      shapes: module -> structure of its terms.
      tasks: positions of the tasks whose gains are needed.
      frequencies: tables, if the shared leaf has no tables.
      decode_lanes: see `streams.decode`.

    Raises:
      Damaged: leaves that no encoder writes.
    """
    rows, _ = pieces(shapes)
    missing = {SHARED, *(f"task_{t}" for t in tasks)} - set(leaves)
    if missing:
        raise Damaged(f"no leaf {min(missing)}")
    table, members, sides = read_sides(leaves, shapes, frequencies)
    order = tuple(members)
    contexts = {i: x for name in order for i, x in zip(members[name], sides[name].contexts, strict=True)}
    codes = streams.decode(
        [sides[n].stream for n in order],
        [
            syntax.code_contexts([rows[i] for i in members[n]], sides[n].contexts, sides[n].offsets)
            for n in order
        ],
        table,
        decode_lanes,
    )
    values: list[np.ndarray | None] = [None] * len(rows)
    bases: dict[int, prediction.Base] = {}
    for name in order:
        flat = codes.pop(0)
        for i, used, weights in zip(members[name], sides[name].used, sides[name].weights, strict=True):
            taken = flat.take(syntax.code_count(rows[i], contexts[i]))
            value = syntax.as_piece(taken, rows[i], contexts[i])
            if used is not None and weights is not None and used.any():
                at_base = rows[i].base
                if at_base not in bases:
                    bases[at_base] = prediction_base(values[at_base], contexts[at_base])
                units = prediction.units(contexts[i][used])
                value[:, used] += prediction.apply_weights(bases[at_base], weights, units)
                value[:, contexts[i] == 0] = 0
            values[i] = value
    every = [contexts.get(i, np.zeros(x.rank, np.int64)) for i, x in enumerate(rows)]
    gains = {t: split_gains(sides[f"task_{t}"].gains, shapes, every, t) for t in tasks}
    return Decoded(rows, every, values, gains)


class Sides(NamedTuple):
    """What leaves hold beside their streams.

    Attributes:
      table: `[COUNT, 2, SYMBOLS]` frequencies.
      members: leaf -> positions of its pieces, the shared leaf first.
      sides: leaf -> the rest.
    """

    table: np.ndarray
    members: dict[str, list[int]]
    sides: dict[str, Side]


def read_sides(
    leaves: Mapping[str, bytes],
    shapes: Mapping[str, tuple[TermShape, ...]],
    frequencies: np.ndarray | None = None,
) -> Sides:
    """The `Sides` of leaves; see `decode_leaves`."""
    rows, _ = pieces(shapes)
    order = (SHARED, *sorted(set(leaves) - {SHARED}))
    readers = {name: Reader(leaves[name]) for name in order}
    table = frequency_tables.unpack_tables(readers[SHARED]) if frequencies is None else frequencies
    members = by_leaf(rows, order)
    contexts: dict[int, np.ndarray] = {}
    sides: dict[str, Side] = {}
    for name in order:
        mine = [rows[i] for i in members[name]]
        sides[name] = syntax.unpack_side(readers[name], mine, contexts, members[name])
        contexts |= dict(zip(members[name], sides[name].contexts, strict=True))
    return Sides(table, members, sides)


def prediction_base(values: np.ndarray | None, context: np.ndarray) -> prediction.Base:
    """The `Base` of a decoded factor: its coded vectors."""
    if values is None:
        raise Damaged("a prediction from a factor that comes later")
    return prediction.scaled(values[:, context > 0])


def split_gains(
    data: bytes,
    shapes: Mapping[str, tuple[TermShape, ...]],
    contexts: Sequence[np.ndarray],
    task: int,
) -> list[np.ndarray]:
    """A task's gains, term by term.

    Raises:
      Damaged: bytes that no encoder writes.
    """
    sums = syntax.gain_contexts(shapes, contexts, task)
    found = syntax.unpack_gains(data, syntax.join(sums, np.int64))
    return np.split(found, np.cumsum([len(x) for x in sums])[:-1]) if sums else []
