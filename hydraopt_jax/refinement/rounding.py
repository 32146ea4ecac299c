"""What a store of given factors would hold: the rounding that a refinement has in its loop.

A plain store rounds to its dtype; a coded one quantizes on the trellis, and what comes back depends on all
factors at once (tables, predictions). Both map factors to factors and have no gradient of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.codec import contexts, encode, syntax
from hydraopt_jax.codec.decode import decode_leaves
from hydraopt_jax.codec.encode import Coded
from hydraopt_jax.codec.layout import TermShape
from hydraopt_jax.factors import Factors
from hydraopt_jax.rate_control.metrics import Metrics, unweigh
from hydraopt_jax.store.decoding import all_terms, terms_of
from hydraopt_jax.store.store import Segment

Modules = Mapping[str, tuple[Factors, ...]]

# rounds in which tables and the decisions that they charge for agree
TABLE_ROUNDS = 3
# bytes kept free for the account of a refinement in the index
SPARE = 96
# bits of a gain behind the leading one
GAIN_BITS = 10
# share of the bytes kept free while factors move: the estimate of a size is good to less
MARGIN = 0.002
# least and largest price of a bit while factors move, of the usual one
PRICES = (0.5, 2.0)
# tries to meet the bytes in the end
ROUNDS = 12
# entries in steps, of a module that a bad optimizer has thrown off
LARGEST = 2.0**28
# how far, in steps, an unrounded entry may lie from what it was rounded to
CELL = 0.5


class Tables(NamedTuple):
    """What the quantizer is charged.

    Attributes:
      frequencies: `[COUNT, 2, HIGH]`.
      multiplier: `[1]` squared steps a bit; a larger one spends fewer bytes.
    """

    frequencies: np.ndarray
    multiplier: np.ndarray


def targets(modules: Modules, shapes: Mapping[str, tuple[TermShape, ...]]) -> dict[str, list[encode.Target]]:
    """Factors in steps as the codec takes them; entries that have run away are cut to what a code holds."""

    def held(x: Any) -> np.ndarray:
        return np.nan_to_num(np.asarray(x, np.float32)).clip(-LARGEST, LARGEST)

    return {
        n: [
            encode.Target(shape, held(x.a), np.ascontiguousarray(held(x.b).swapaxes(1, 2)))
            for shape, x in zip(shapes[n], terms, strict=True)
        ]
        for n, terms in modules.items()
    }


def quantized(modules: Modules, shapes: Mapping[str, tuple[TermShape, ...]], tables: Tables) -> Coded:
    """Quantize factors in steps."""
    return encode.quantize(targets(modules, shapes), tables.frequencies, float(tables.multiplier[0]))


def decoded(coded: Coded, modules: Modules) -> dict[str, tuple[Factors, ...]]:
    """What the quantized factors come back as, with the cores of `modules`."""
    return {
        n: tuple(x._replace(core=like.core) for x, like in zip(terms, modules[n], strict=True))
        for n, terms in all_terms(coded.shapes, coded.pieces, coded.values).items()
    }


def recount(coded: Coded, multiplier: float | np.ndarray) -> Tables:
    """Tables of what was just quantized."""
    prior = contexts.gaussian()
    return Tables(coded.counts + 8 * prior / prior.sum(-1, keepdims=True), np.reshape(multiplier, 1))


def start_tables(modules: Modules, shapes: Mapping[str, tuple[TermShape, ...]]) -> Tables:
    """Tables of factors in steps: quantization and counting alternate."""
    prior = contexts.gaussian()
    tables = Tables(prior / prior.sum(-1, keepdims=True), np.array([encode.MULTIPLIER]))
    for _ in range(TABLE_ROUNDS):
        tables = recount(quantized(modules, shapes, tables), tables.multiplier)
    return tables


def gains_of(coded: Coded, modules: Modules, tasks: int) -> dict[int, list[np.ndarray]]:
    """The cores of `modules` in the codec's order, as they will be read."""
    gains = {}
    for t in range(tasks):
        live = syntax.live_directions(coded.shapes, coded.pieces, coded.contexts, t)
        own = [np.asarray(modules[n][k].core)[t][x] for (n, k), x in live.items()]
        gains[t] = syntax.round_gains(own, GAIN_BITS)
    return gains


def arrays(modules: Modules) -> Any:
    """What moves: module -> terms' `(a, b, core)` as arrays; an empty core where there is none."""
    return {n: tuple((x.a, x.b, () if x.core is None else x.core) for x in t) for n, t in modules.items()}


def with_arrays(modules: Modules, moved: Any) -> dict[str, tuple[Factors, ...]]:
    """The inverse of `arrays`."""
    return {
        n: tuple(
            x._replace(a=a, b=b, core=None if x.core is None else core)
            for x, (a, b, core) in zip(terms, moved[n], strict=True)
        )
        for n, terms in modules.items()
    }


class Rounding(NamedTuple):
    """How a store rounds.

    Attributes:
      tables: what the first rounding is charged.
      round: `(factors, tables, settled) -> (factors as they would be read, next tables)`; where settled,
        tables that fit stay, so that decisions stay what the factors have grown used to.
      finish: `(factors, tables) -> (factors as they are read, their leaves or None)`; no factors where they
        did not fit.
    """

    tables: Any
    round: Callable[[Modules, Any, bool], tuple[Modules, Any]]
    finish: Callable[[Modules, Any], tuple[Modules, dict[str, bytes] | None]]


def casting(kept: Modules) -> Rounding:
    """The rounding of a plain segment: each factor to the dtype it is stored in."""
    dtypes = jax.tree.map(lambda x: np.asarray(x).dtype, arrays(kept))

    def cast(modules: Modules, tables: Any, settled: bool = False) -> tuple[Modules, Any]:
        moved = jax.tree.map(lambda x, dtype: np.asarray(x).astype(dtype), arrays(modules), dtypes)
        return with_arrays(modules, moved), tables

    return Rounding(np.zeros(1), cast, lambda modules, tables: (cast(modules, tables)[0], None))


def coding(segment: Segment, kept: Modules) -> Rounding:
    """The rounding of a coded segment; the price of a bit follows the bytes, which may not grow."""
    shapes, tasks = segment.modules, len(segment.tasks)
    factors = (np.size(v) for k, v in segment.leaves.items() if k.startswith(("shared", "task_", "head_")))
    limit = max(sum(factors) - SPARE, SPARE)
    tables = start_tables(kept, shapes)

    def estimate(coded: Coded, modules: Modules) -> float:
        return encode.sizes(coded, gains_of(coded, modules, tasks))

    def serialize(coded: Coded, modules: Modules) -> tuple[dict[str, bytes], int]:
        leaves = encode.serialize(coded, gains_of(coded, modules, tasks))
        return leaves, sum(map(len, leaves.values()))

    # the estimate of a size is off by more than a little where there is little
    first = quantized(kept, shapes, tables)
    bias = serialize(first, kept)[1] / estimate(first, kept)

    def round_all(modules: Modules, tables: Any, settled: bool) -> tuple[Modules, Any]:
        coded = quantized(modules, shapes, tables)
        over = bias * estimate(coded, modules) / (limit - MARGIN * limit)
        if settled and over <= 1:
            return decoded(coded, modules), tables
        # bytes follow the price slowly
        price = tables.multiplier * np.clip(over**4, 0.95, 1.05) / encode.MULTIPLIER
        return decoded(coded, modules), recount(coded, encode.MULTIPLIER * np.clip(price, *PRICES))

    def finish(modules: Modules, tables: Any) -> tuple[Modules, dict[str, bytes] | None]:
        for _ in range(ROUNDS):
            coded = quantized(modules, shapes, tables)
            leaves, size = serialize(coded, modules)
            if size <= limit:
                found = decode_leaves(leaves, shapes, range(tasks))
                return terms_of(found, shapes, range(tasks)), leaves
            tables = recount(coded, tables.multiplier * (1.003 * size / limit) ** 4)
        return {}, None

    return Rounding(tables, round_all, finish)


def unrounded(
    kept: Modules, collection: Sequence[Adapter], metrics: Mapping[str, Metrics]
) -> dict[str, tuple[Factors, ...]]:
    """Factors before their rounding: on each side those of least squared error for what the other decodes to.

    With `p_t = core_t @ b_t`, the best inputs of the tasks t that share one factor solve
    `a @ sum_t w_t p_t p_t.T = sum_t w_t delta_t p_t.T`, `w_t = 1 / ||delta_t||^2`, and alike for the other
    side; they are kept within a cell of the stored ones. Vectors that a store leaves out (zeros) stay so. All
    this is in the metrics' coordinates where there are any.

    Args:
      kept: coded terms, with diagonal cores.
      collection: the adapters it was made of, in the order of its tasks.
      metrics: module -> metrics of its inputs and outputs, none where left out.
    """
    out: dict[str, tuple[Factors, ...]] = {}
    for name, terms in kept.items():
        sides = metrics.get(name, (None, None))
        inputs, outputs = (1.0 if x is None else x.root for x in sides)
        rebuilt = []
        for k, term in enumerate(terms):
            rest = [
                residual(adapter, name, terms, skip=k, task=t) if term.a_of[t] >= 0 else None
                for t, adapter in enumerate(collection)
            ]
            rest = [None if x is None else (np.dot(inputs, x[0]), np.dot(x[1], outputs)) for x in rest]
            flipped = [None if x is None else (x[1].T, x[0].T) for x in rest]
            a, b = np.asarray(term.a, np.float64), np.asarray(term.b, np.float64).swapaxes(1, 2)
            seen_a = a if sides[0] is None else inputs @ a
            seen_b = b if sides[1] is None else outputs @ b
            core, a_of, b_of = np.asarray(term.core, np.float64), np.asarray(term.a_of), np.asarray(term.b_of)
            new_a = solve_side(rest, a_of, len(a), seen_b.swapaxes(1, 2), b_of, core)
            new_b = solve_side(flipped, b_of, len(b), seen_a.swapaxes(1, 2), a_of, core)
            # a basis that others are predicted from is read by no task: it stays as it is
            read_a, read_b = (
                np.isin(np.arange(len(x)), of)[:, None, None] for x, of in ((a, a_of), (b, b_of))
            )
            a = np.where(read_a, within_cell(a, unweigh(sides[0], new_a)), a)
            b = np.where(read_b, within_cell(b, unweigh(sides[1], new_b)), b).swapaxes(1, 2)
            rebuilt.append(term._replace(a=a, b=b))
        out[name] = tuple(rebuilt)
    return out


def within_cell(stored: np.ndarray, best: np.ndarray) -> np.ndarray:
    """The best vectors `[A, n, S]`, each entry at most a cell from the stored one; zero vectors stay zero."""
    live = np.abs(stored).max(1, keepdims=True) > 0
    return np.where(live, stored + np.clip(best - stored, -CELL, CELL), 0.0).astype(np.float32)


def residual(
    adapter: Adapter, name: str, terms: Sequence[Factors], *, skip: int, task: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """A task's delta less all terms but one, factors `[I, r]`, `[r, O]` in float64; None if it has none."""
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
