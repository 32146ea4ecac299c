"""The rounding in the loop of a refinement: from factors to the factors that a store would decode to.

A plain store rounds to its dtype. A coded store quantizes on the trellis, and the result depends on all
factors together (tables, predictions). Both map factors to factors and have no useful gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.codec import encode, syntax
from hydraopt_jax.codec.decode import decode_leaves
from hydraopt_jax.codec.encode import Coded
from hydraopt_jax.codec.layout import TermShape
from hydraopt_jax.factors import Array, Factors
from hydraopt_jax.rate_control.coding import fitted_tables, prior_tables
from hydraopt_jax.rate_control.metrics import Metrics
from hydraopt_jax.rate_control.unweighing import before_rounding, unweigh
from hydraopt_jax.refinement import rates
from hydraopt_jax.store.decoding import all_terms, decode_segment, terms_of
from hydraopt_jax.store.store import Segment

Modules = Mapping[str, tuple[Factors, ...]]
# module -> which factors each task of a term uses, `a_of` and `b_of`
Indices = Mapping[str, tuple[tuple[Array, Array], ...]]

# alternations between tables and the decisions that depend on them
TABLE_ROUNDS = 3
# bytes reserved for the refinement's entry in the report
SPARE = 96
# bits of a gain after the leading one
GAIN_BITS = 10
# share of the bytes kept free while factors move; the size estimate is more accurate than this
MARGIN = 0.002
# range of the price of a bit while factors move, relative to the usual price: a loss is that of a store that
# fits only as long as the price keeps up with factors that grow
PRICES = (0.5, 32.0)
# the least price, at which refinement begins, where noise shaping made the codes: at the usual one the
# trellis alone would round factors to codes of larger errors
LEAST_SHAPED = 1 / 16
# attempts to meet the byte limit at the end
ROUNDS = 12
# limit on entries in steps, for modules that diverged under a bad optimizer
LARGEST = 2.0**28
# largest distance, in steps, between an unrounded entry and its rounded value
CELL = 0.5


class Tables(NamedTuple):
    """The rate model of the quantizer.

    Attributes:
      frequencies: `[COUNT, 2, HIGH]`.
      multiplier: `[1]` squared steps per bit; a larger value spends fewer bytes.
    """

    frequencies: np.ndarray
    multiplier: np.ndarray


def terms_in_steps(
    modules: Modules, shapes: Mapping[str, tuple[TermShape, ...]]
) -> dict[str, list[encode.TermInSteps]]:
    """Factors in steps in the codec's layout; diverged entries are clipped to the range of a code."""

    def held(x: Any) -> np.ndarray:
        return np.nan_to_num(np.asarray(x, np.float32)).clip(-LARGEST, LARGEST)

    return {
        n: [
            encode.TermInSteps(shape, held(x.a), np.ascontiguousarray(held(x.b).swapaxes(1, 2)))
            for shape, x in zip(shapes[n], terms, strict=True)
        ]
        for n, terms in modules.items()
    }


def quantized(modules: Modules, shapes: Mapping[str, tuple[TermShape, ...]], tables: Tables) -> Coded:
    """The quantized values of factors in steps."""
    return encode.quantize(terms_in_steps(modules, shapes), tables.frequencies, float(tables.multiplier[0]))


def coded_terms(segment: Segment) -> dict[str, tuple[Factors, ...]]:
    """The terms of a coded segment, with the bases that no task reads for itself."""
    places = range(len(segment.tasks))
    found = decode_segment(segment, places)
    own = changed(terms_of(found, segment.modules, places))
    values = [x for x in found.values if x is not None]
    return {
        n: tuple(x._replace(core=y.core) for x, y in zip(terms, own[n], strict=True))
        for n, terms in all_terms(segment.modules, found.pieces, values).items()
        if n in own
    }


def changed(modules: Modules) -> dict[str, tuple[Factors, ...]]:
    """The modules that any task changes: the others have a term without factors."""
    return {n: tuple(terms) for n, terms in modules.items() if any(len(x.a) for x in terms)}


def decoded(coded: Coded, modules: Modules) -> dict[str, tuple[Factors, ...]]:
    """The decoded factors, with the cores of `modules`."""
    return {
        n: tuple(x._replace(core=like.core) for x, like in zip(terms, modules[n], strict=True))
        for n, terms in all_terms(coded.shapes, coded.pieces, coded.values).items()
    }


def recount(coded: Coded, multiplier: float | np.ndarray) -> Tables:
    """Tables counted from quantized values."""
    return Tables(fitted_tables(coded.counts), np.reshape(multiplier, 1))


def start_tables(modules: Modules, shapes: Mapping[str, tuple[TermShape, ...]], price: float = 1.0) -> Tables:
    """Tables for factors in steps, by alternating quantization at a price and counting."""
    tables = Tables(prior_tables(), np.array([price * encode.MULTIPLIER]))
    for _ in range(TABLE_ROUNDS):
        tables = recount(quantized(modules, shapes, tables), tables.multiplier)
    return tables


def gains_of(coded: Coded, modules: Modules, tasks: int) -> dict[int, list[np.ndarray]]:
    """The cores of `modules` in the codec's order, rounded as they will be decoded."""
    gains = {}
    for t in range(tasks):
        live = syntax.live_directions(coded.shapes, coded.contexts, t)
        own = [np.asarray(modules[n][k].core)[t][x] for (n, k), x in live.items()]
        gains[t] = syntax.round_gains(own, GAIN_BITS)
    return gains


def trainable_arrays(modules: Modules) -> Any:
    """The arrays that are optimized: module -> `(a, b, core)` per term, with an empty core for none."""
    return {n: tuple((x.a, x.b, () if x.core is None else x.core) for x in t) for n, t in modules.items()}


def indices_of(modules: Modules) -> Indices:
    """What `trainable_arrays` leaves out."""
    return {n: tuple((x.a_of, x.b_of) for x in t) for n, t in modules.items()}


def with_indices(indices: Indices, moved: Any) -> dict[str, tuple[Factors, ...]]:
    """The inverse of `trainable_arrays` and `indices_of`."""
    return {
        n: tuple(
            Factors(a, b, *of, None if isinstance(core, tuple) else core)
            for of, (a, b, core) in zip(rows, moved[n], strict=True)
        )
        for n, rows in indices.items()
    }


class Rounded(NamedTuple):
    """A rounding.

    Attributes:
      factors: decoded.
      tables: the rate model of the next rounding.
      slopes: derivative of the bits, at the quantizer's price, by the unrounded factors, in squared steps per
        step: like `trainable_arrays`, scalar zeros where there is none.
    """

    factors: Modules
    tables: Any
    slopes: Any


class Rounding(NamedTuple):
    """The rounding of a segment.

    Attributes:
      tables: the rate model of the first rounding.
      round: `(factors, tables, settled) -> Rounded`; if settled, tables that fit the byte limit stay, so that
        decisions change less.
      finish: `(factors, tables) -> (decoded factors, their leaves or None)`; no factors if they exceed the
        byte limit.
    """

    tables: Any
    round: Callable[[Modules, Any, bool], Rounded]
    finish: Callable[[Modules, Any], tuple[Modules, dict[str, bytes] | None]]


def cast_rounding(kept: Modules) -> Rounding:
    """The rounding of a plain segment: each factor to the dtype it is stored in."""
    dtypes = jax.tree.map(lambda x: np.asarray(x).dtype, trainable_arrays(kept))
    free = jax.tree.map(lambda x: np.zeros((), np.float32), dtypes)

    def cast(modules: Modules, tables: Any, settled: bool = False) -> Rounded:
        moved = jax.tree.map(lambda x, dtype: np.asarray(x).astype(dtype), trainable_arrays(modules), dtypes)
        return Rounded(with_indices(indices_of(modules), moved), tables, free)

    return Rounding(np.zeros(1), cast, lambda modules, tables: (cast(modules, tables).factors, None))


def coded_rounding(segment: Segment, kept: Modules, spare: int = SPARE, shaped: bool = False) -> Rounding:
    """The rounding of a coded segment; the price of a bit is adjusted so that bytes shrink by `spare`.

    `shaped`: noise shaping made its codes.
    """
    shapes, tasks = segment.modules, len(segment.tasks)
    factors = (np.size(v) for k, v in segment.leaves.items() if k.startswith(("shared", "task_", "head_")))
    limit = max(sum(factors) - spare, SPARE)
    least, begin = (LEAST_SHAPED, LEAST_SHAPED) if shaped else (PRICES[0], 1.0)
    tables = start_tables(kept, shapes, begin)

    def estimate(coded: Coded, modules: Modules) -> float:
        return encode.estimate_bytes(coded, encode.sides(coded, gains_of(coded, modules, tasks)))

    def serialize(coded: Coded, modules: Modules) -> tuple[dict[str, bytes], int]:
        leaves = encode.serialize(coded, gains_of(coded, modules, tasks))
        return leaves, sum(map(len, leaves.values()))

    # the estimate of a size is off by more than a little where there is little
    first = quantized(kept, shapes, tables)
    bias = serialize(first, kept)[1] / estimate(first, kept)

    def round_all(modules: Modules, tables: Any, settled: bool) -> Rounded:
        terms, price = terms_in_steps(modules, shapes), float(tables.multiplier[0])
        coded = encode.quantize(terms, tables.frequencies, price)
        bits, core = rates.rate_slopes(coded, terms), np.zeros((), np.float32)
        slopes = {n: tuple((price * a, price * b, core) for a, b in each) for n, each in bits.items()}
        over = bias * estimate(coded, modules) / (limit - MARGIN * limit)
        if settled and over <= 1:
            return Rounded(decoded(coded, modules), tables, slopes)
        # bytes react slowly to the price
        relative = tables.multiplier * np.clip(over**4, 0.95, 1.05) / encode.MULTIPLIER
        following = recount(coded, encode.MULTIPLIER * np.clip(relative, least, PRICES[1]))
        return Rounded(decoded(coded, modules), following, slopes)

    def finish(modules: Modules, tables: Any) -> tuple[Modules, dict[str, bytes] | None]:
        for _ in range(ROUNDS):
            coded = quantized(modules, shapes, tables)
            leaves, size = serialize(coded, modules)
            if size <= limit:
                found = decode_leaves(leaves, shapes, range(tasks))
                return changed(terms_of(found, shapes, range(tasks))), leaves
            tables = recount(coded, tables.multiplier * (1.003 * size / limit) ** 4)
        return {}, None

    return Rounding(tables, round_all, finish)


def unrounded(
    kept: Modules, collection: Sequence[Adapter], metrics: Mapping[str, Metrics], shaped: bool = False
) -> dict[str, tuple[Factors, ...]]:
    """Unrounded factors: per side those of least squared error, given the decoded factors of the other side.

    With `p_t = core_t @ b_t`, the best `a` of the tasks t that share one factor solves
    `a @ sum_t w_t p_t p_t.T = sum_t w_t delta_t p_t.T`, `w_t = 1 / ||delta_t||^2`; the other side is
    analogous. Entries are limited to one quantizer cell around the stored ones. Vectors that are zero in the
    store stay zero. With metrics all this is in their coordinates. Where noise shaping made the codes, the
    factors are what it rounded: others would be rounded to codes of larger errors.

    Args:
      kept: coded terms, with diagonal cores.
      collection: the original adapters, in the order of the tasks.
      metrics: module -> metrics of its inputs and outputs; modules may be missing.
      shaped: whether noise shaping made the codes.
    """
    out: dict[str, tuple[Factors, ...]] = {}
    for name, terms in kept.items():
        sides = metrics.get(name, (None, None))
        inputs, outputs = ((lambda x: x) if y is None else y.weigh for y in sides)
        rebuilt = []
        for k, term in enumerate(terms):
            rest = [
                remainder(adapter, name, terms, skip=k, task=t) if term.a_of[t] >= 0 else None
                for t, adapter in enumerate(collection)
            ]
            rest = [None if x is None else (inputs(x[0]), outputs(x[1].T).T) for x in rest]
            flipped = [None if x is None else (x[1].T, x[0].T) for x in rest]
            a, b = np.asarray(term.a, np.float64), np.asarray(term.b, np.float64).swapaxes(1, 2)
            seen_a, seen_b = inputs(a), outputs(b)
            core, a_of, b_of = np.asarray(term.core, np.float64), np.asarray(term.a_of), np.asarray(term.b_of)
            new_a = solve_side(rest, a_of, len(a), seen_b.swapaxes(1, 2), b_of, core)
            new_b = solve_side(flipped, b_of, len(b), seen_a.swapaxes(1, 2), a_of, core)
            # a basis that others are predicted from is read by no task: it stays as it is
            as_coded = before_rounding if shaped else lambda metric, _, x: unweigh(metric, x)
            read_a, read_b = (
                np.isin(np.arange(len(x)), of)[:, None, None] for x, of in ((a, a_of), (b, b_of))
            )
            a = np.where(read_a, within_cell(a, as_coded(sides[0], a, new_a)), a)
            b = np.where(read_b, within_cell(b, as_coded(sides[1], b, new_b)), b).swapaxes(1, 2)
            rebuilt.append(term._replace(a=a, b=b))
        out[name] = tuple(rebuilt)
    return out


def within_cell(stored: np.ndarray, best: np.ndarray) -> np.ndarray:
    """The best vectors `[A, n, S]`, each entry at most a cell from the stored one; zero vectors stay zero."""
    live = np.abs(stored).max(1, keepdims=True) > 0
    return np.where(live, stored + np.clip(best - stored, -CELL, CELL), 0.0).astype(np.float32)


def remainder(
    adapter: Adapter, name: str, terms: Sequence[Factors], *, skip: int, task: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """A task's delta minus all terms but one, as float64 factors `[I, r]`, `[r, O]`; None without a delta."""
    if name not in adapter.a:
        return None
    left = [np.asarray(adapter.a[name], np.float64)]
    right = [np.asarray(adapter.b[name], np.float64)]
    for k, x in enumerate(terms):
        if k != skip and x.a_of[task] >= 0:
            left.append(-np.asarray(x.a, np.float64)[x.a_of[task]])
            right.append(np.asarray(x.core)[task][:, None] * np.asarray(x.b, np.float64)[x.b_of[task]])
    return np.concatenate(left, 1), np.concatenate(right, 0)


def solve_side(
    deltas: Sequence[tuple[np.ndarray, np.ndarray] | None],
    of: np.ndarray,
    count: int,
    other: np.ndarray,
    other_of: np.ndarray,
    core: np.ndarray,
) -> np.ndarray:
    """The `count` input factors `[A, I, S]` of least squared error for given `other: [B, S, O]`."""
    rank = other.shape[1]
    size = next(x[0].shape[0] for x in deltas if x is not None)
    system, wanted = np.zeros((count, rank, rank)), np.zeros((count, size, rank))
    for t, delta in enumerate(deltas):
        if delta is None:
            continue
        left, right = delta
        p = core[t][:, None] * other[other_of[t]]
        energy = np.sum((left.T @ left) * (right @ right.T))
        weight = 1.0 / energy if energy > 0 else 0.0
        system[of[t]] += weight * (p @ p.T)
        wanted[of[t]] += weight * (left @ (right @ p.T))
    diagonal = np.einsum("ass->as", system)
    ridge = np.where(diagonal > 0, 1e-6 * diagonal, 1.0)
    return np.linalg.solve(system + ridge[:, :, None] * np.eye(rank), wanted.swapaxes(1, 2)).swapaxes(1, 2)
