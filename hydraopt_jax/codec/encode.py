"""Encode factors in quantizer steps to codes, and codes to leaves of bytes.

The vectors of a factor are predicted from another factor if that saves bits, quantized on the trellis and
entropy-coded. The shared leaf is quantized first, because other leaves may be predicted from its decoded
vectors. The gains, a diagonal core per task, convert steps to values.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax.codec import frequency_tables, lanes, prediction, streams, syntax
from hydraopt_jax.codec.contexts import COUNT, RAW_BITS, WIDE
from hydraopt_jax.codec.decode import prediction_base, read_sides, split_gains
from hydraopt_jax.codec.layout import Piece, TermShape, by_leaf, pieces
from hydraopt_jax.codec.noise_shaping import Filter, Vector
from hydraopt_jax.codec.prediction import Prediction
from hydraopt_jax.codec.quantization import context_bits, quantize_streams
from hydraopt_jax.codec.remainders import remainders
from hydraopt_jax.codec.streams import Symbols
from hydraopt_jax.codec.syntax import SHARED, join

# squared steps per bit, and the squared error of a well-coded coefficient in squared steps
MULTIPLIER = 0.38
DISTORTION = 0.26


class Filters(NamedTuple):
    """Filters of a factor's errors.

    Attributes:
      each: different ones.
      of: `[A, S]` which of them each vector has, -1 for none.
    """

    each: tuple[Filter, ...]
    of: np.ndarray


class TermInSteps(NamedTuple):
    """A term to be coded.

    Attributes:
      shape: its structure.
      a: `[A, I, S]` input-side vectors in steps; a zero vector is not coded.
      b: `[B, O, S]` output-side vectors in steps, likewise.
      filters: of the errors of `a` and of `b`; None for errors that all count alike.
    """

    shape: TermShape
    a: np.ndarray
    b: np.ndarray
    filters: tuple[Filters | None, Filters | None] = (None, None)


class Coded(NamedTuple):
    """A quantized collection, not yet in bytes.

    Attributes:
      shapes: module name -> its terms' structure.
      pieces: every factor in canonical order.
      contexts: of each vector of each piece, `[S]`.
      predictions: of each piece, or None.
      offsets: of the contexts of each piece's blocks, `[S, blocks]`.
      values: what each piece decodes to, `[length, S]` float32 in steps.
      leaves: names of the leaves, the shared one first.
      symbols: codes of each leaf.
      counts: `[COUNT, 2, SYMBOLS]` histogram of all symbols.
    """

    shapes: Mapping[str, tuple[TermShape, ...]]
    pieces: list[Piece]
    contexts: list[np.ndarray]
    predictions: list[Prediction | None]
    offsets: list[np.ndarray]
    values: list[np.ndarray]
    leaves: tuple[str, ...]
    symbols: list[Symbols]
    counts: np.ndarray


def quantize(
    modules: Mapping[str, Sequence[TermInSteps]], frequencies: np.ndarray, multiplier: float = MULTIPLIER
) -> Coded:
    """The quantized factors of a collection.

    Args:
      modules: name -> terms.
      frequencies: `[COUNT, 2, SYMBOLS]`, the rate model of the quantizer.
      multiplier: squared steps per bit.

    Raises:
      HydraOptError: an entry of more steps than a code can hold.
    """
    shapes = {name: tuple(x.shape for x in terms) for name, terms in modules.items()}
    shaped = any(f for terms in modules.values() for x in terms for f in x.filters)
    rows, _ = pieces(shapes)
    leaves = (SHARED, *sorted({x.leaf for x in rows} - {SHARED}))
    context: list[Any] = [None] * len(rows)
    predictions: list[Prediction | None] = [None] * len(rows)
    offsets: list[Any] = [None] * len(rows)
    values: list[Any] = [None] * len(rows)
    symbols: list[Symbols] = []
    members = by_leaf(rows, leaves)
    for now in (leaves[:1], leaves[1:]):
        factors = {i: factor_of(rows[i], modules) for leaf in now for i in members[leaf]}
        bases = {rows[i].base for i in factors if rows[i].base >= 0}
        known = {i: prediction_base(values[i], context[i]) for i in bases}
        rests = remainders(factors, rows, known)
        for i, rest in rests.items():
            predictions[i], context[i], offsets[i] = rest.prediction, rest.context, rest.offsets
        found = quantize_streams(
            [join([rests[i].vectors[context[i] > 0].ravel() for i in members[x]], np.float32) for x in now],
            [
                syntax.code_contexts([rows[i] for i in m], [context[i] for i in m], [offsets[i] for i in m])
                for m in (members[leaf] for leaf in now)
            ],
            frequencies,
            multiplier,
            [[x for i in members[leaf] for x in vectors_of(rows[i], modules, context[i] > 0)] for leaf in now]
            if shaped
            else (),
        )
        symbols += found
        for leaf, stream in zip(now, found, strict=True):
            codes = codes_of(stream, [rows[i] for i in members[leaf]], [context[i] for i in members[leaf]])
            for i, code in zip(members[leaf], codes, strict=True):
                value = rests[i].guess
                value += code
                value[context[i] == 0] = 0
                values[i] = value.T
    counts = streams.histogram(symbols)
    return Coded(shapes, rows, context, predictions, offsets, values, leaves, symbols, counts)


def factor_of(row: Piece, modules: Mapping[str, Sequence[TermInSteps]]) -> np.ndarray:
    """The vectors `[S, n]` of a piece, in steps."""
    term = modules[row.module][row.term]
    return (term.b if row.side else term.a)[row.factor].T


def vectors_of(row: Piece, modules: Mapping[str, Sequence[TermInSteps]], coded: np.ndarray) -> list[Vector]:
    """The coded vectors of a piece."""
    found = modules[row.module][row.term].filters[row.side]
    of = np.full(row.rank, -1) if found is None else found.of[row.factor]
    return [Vector(row.length, found.each[k] if found and k >= 0 else None) for k in of[coded]]


def codes_of(stream: Symbols, rows: Sequence[Piece], contexts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """The codes `[S, n]` of each piece of a stream in steps, 0 where a vector is not coded."""
    flat, at = streams.values(stream), 0
    for row, context in zip(rows, contexts, strict=True):
        end, coded = at + syntax.code_count(row, context), context > 0
        codes, at = flat[at:end].reshape(-1, row.length), end
        if coded.all():
            yield codes
            continue
        found = np.zeros((row.rank, row.length), flat.dtype)
        found[coded] = codes
        yield found


def all_codes(coded: Coded) -> Iterator[tuple[int, np.ndarray]]:
    """The position of each piece and its codes `[S, n]` in steps."""
    members = by_leaf(coded.pieces, coded.leaves)
    for mine, stream in zip(members.values(), coded.symbols, strict=True):
        found = codes_of(stream, [coded.pieces[i] for i in mine], [coded.contexts[i] for i in mine])
        yield from zip(mine, found, strict=True)


def estimate_bytes(coded: Coded, side: Mapping[str, bytes]) -> float:
    """Estimate of the bytes of `serialize`, accurate to some tenths of a per cent, without coding; `side` is
    that of `sides`."""
    lanes = sum(x.lanes for x in coded.symbols)
    per_context = sum((streams.occurrences(x.context) for x in coded.symbols), np.zeros(COUNT, np.int64))
    zeros = (coded.counts[:, :, 0].sum(1) * ~WIDE).sum()
    raw = float(per_context @ RAW_BITS + per_context.sum() - zeros) / 8
    return (
        sum(map(len, side.values()))
        + raw
        + 5.2 * lanes
        + 8 * len(coded.leaves)
        + entropy_bytes(coded.counts)
        + len(frequency_tables.pack_tables(frequency_tables.from_counts(coded.counts)))
    )


def entropy_bytes(counts: np.ndarray) -> float:
    """Bytes of the symbols under the tables that are made of their counts."""
    frequency = frequency_tables.from_counts(counts)
    used = counts > 0
    bits = -counts[used] * np.log2(frequency[used] / frequency_tables.SLOTS)
    wide = np.broadcast_to(WIDE[:, None, None], counts.shape)[used]
    return float((bits * np.where(wide, 0.5, 1)).sum()) / 8


def module_bits(coded: Coded) -> np.ndarray:
    """Approximate bits of each module, `[M]`: mean bits of codes by context, plus coefficients."""
    each = context_bits(coded.counts)
    position = {n: m for m, n in enumerate(coded.shapes)}
    out = np.zeros(len(position))
    for row, context, offset, found in zip(
        coded.pieces, coded.contexts, coded.offsets, coded.predictions, strict=True
    ):
        out[position[row.module]] += each[syntax.code_contexts([row], [context], [offset])].sum()
        out[position[row.module]] += 4 * np.count_nonzero(context) + 2 * np.count_nonzero(offset)
        if found is not None:
            out[position[row.module]] += prediction.spent(found.coefficients[:, found.used]).sum()
    return out


def sides(coded: Coded, gains: Mapping[int, Sequence[np.ndarray]]) -> dict[str, bytes]:
    """The side information of each leaf."""
    out = {}
    leaves = (*coded.leaves, *(f"task_{t}" for t in gains if f"task_{t}" not in coded.leaves))
    for leaf, members in by_leaf(coded.pieces, leaves).items():
        task = syntax.task_of(leaf)
        out[leaf] = syntax.pack_side(
            [coded.pieces[i] for i in members],
            [coded.contexts[i] for i in members],
            [coded.predictions[i] for i in members],
            [coded.offsets[i] for i in members],
            b"" if task is None or task not in gains else packed_gains(coded, task, gains[task]),
        )
    return out


def packed_gains(coded: Coded, task: int, gains: Sequence[np.ndarray]) -> bytes:
    """The bytes of a task's gains."""
    sums = syntax.gain_contexts(coded.shapes, coded.contexts, task)
    return syntax.pack_gains(join(gains, np.float32), join(sums, np.int64))


def serialize(
    coded: Coded,
    gains: Mapping[int, Sequence[np.ndarray]],
    frequencies: np.ndarray | None = None,
    side: Mapping[str, bytes] | None = None,
) -> dict[str, bytes]:
    """Leaves of bytes, which decode to `coded.values` and the gains bit for bit.

    Args:
      coded: the quantized collection.
      gains: task -> its gains, one `[live directions]` array for each (module, term) it has, in order.
      frequencies: tables that the reader has already; None for new tables in the shared leaf.
      side: that of `sides`, where it is known.
    """
    table = frequency_tables.from_counts(coded.counts) if frequencies is None else frequencies
    bodies = dict(zip(coded.leaves, lanes.encode(coded.symbols, table), strict=True))
    known = sides(coded, gains) if side is None else side
    out = {leaf: x + bodies.get(leaf, b"\x00") for leaf, x in known.items()}
    if frequencies is None:
        out[SHARED] = frequency_tables.pack_tables(table) + out[SHARED]
    check_sides(out, coded, gains, table, frequencies)
    return out


def check_sides(
    leaves: Mapping[str, bytes],
    coded: Coded,
    gains: Mapping[int, Sequence[np.ndarray]],
    table: np.ndarray,
    given: np.ndarray | None,
) -> None:
    """Raise unless what is read beside the streams equals what was coded; `lanes.encode` sees to the streams.

    With it the decoded values equal `coded.values`, which were computed from it as a decoder does.

    Raises:
      RuntimeError: they differ, which is a fault of this package.
    """
    found = read_sides(leaves, coded.shapes, given)
    same = np.array_equal(found.table, table)
    for leaf, members in found.members.items():
        side = found.sides[leaf]
        for i, context, used, weights, offsets in zip(
            members, side.contexts, side.used, side.weights, side.offsets, strict=True
        ):
            same &= np.array_equal(context, coded.contexts[i]) and np.array_equal(offsets, coded.offsets[i])
            x = coded.predictions[i]
            if x is None or used is None or weights is None:
                same &= x is None and (used is None or not used.any())
                continue
            same &= np.array_equal(used, x.used) and np.array_equal(weights, x.coefficients[:, x.used])
            same &= np.array_equal(prediction.units(context[used]), x.units[used])
    for task, mine in gains.items():
        read = split_gains(found.sides[f"task_{task}"].gains, coded.shapes, coded.contexts, task)
        same &= np.array_equal(join(read, np.float32), join(mine, np.float32))
    if not same:
        raise RuntimeError(f"coded factors decode to others: {lanes.BUG}")
