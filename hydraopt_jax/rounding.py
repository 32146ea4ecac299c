"""What a store of given factors would hold: the rounding that a refinement has in its loop.

A plain store rounds to its dtype; a coded one quantises on the trellis, and what comes back depends on all
factors at once (tables, predictions). Both are functions from factors to factors, with no gradient of their own.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.coding import classes, codec
from hydraopt_jax.coding.codec import Coded
from hydraopt_jax.coding.trial import Metrics, unweigh
from hydraopt_jax.forms import Factors
from hydraopt_jax.layout import TermShape
from hydraopt_jax.store import Store

Modules = Mapping[str, tuple[Factors, ...]]

# rounds in which tables and the decisions that they charge for agree
TABLE_ROUNDS = 3
# how far, in steps, an unrounded entry may lie from what it was rounded to
CELL = 0.5


class Tables(NamedTuple):
    """What the quantiser is charged.

    Attributes:
      frequencies: `[COUNT, 2, HIGH]`.
      multiplier: squared steps a bit; a larger one spends fewer bytes.
    """

    frequencies: np.ndarray
    multiplier: float


def targets(modules: Modules, shapes: Mapping[str, tuple[TermShape, ...]]) -> dict[str, list[codec.Target]]:
    """Factors in steps as the codec takes them."""
    return {
        n: [
            codec.Target(
                shape,
                np.asarray(x.a, np.float32),
                np.ascontiguousarray(np.asarray(x.b, np.float32).swapaxes(1, 2)),
            )
            for shape, x in zip(shapes[n], terms, strict=True)
        ]
        for n, terms in modules.items()
    }


def encode(modules: Modules, shapes: Mapping[str, tuple[TermShape, ...]], tables: Tables) -> Coded:
    """Quantise factors in steps."""
    return codec.quantise(targets(modules, shapes), tables.frequencies, tables.multiplier)


def decoded(coded: Coded, modules: Modules) -> dict[str, tuple[Factors, ...]]:
    """What the quantised factors come back as, with the cores of `modules`."""
    return {
        n: tuple(x._replace(core=like.core) for x, like in zip(terms, modules[n], strict=True))
        for n, terms in codec.factors(coded).items()
    }


def start_tables(modules: Modules, shapes: Mapping[str, tuple[TermShape, ...]]) -> Tables:
    """Tables of factors in steps: quantisation and counting alternate."""
    prior = classes.gaussian()
    tables = Tables(prior / prior.sum(-1, keepdims=True), codec.MULTIPLIER)
    for _ in range(TABLE_ROUNDS):
        tables = recount(encode(modules, shapes, tables), tables.multiplier)
    return tables


def recount(coded: Coded, multiplier: float) -> Tables:
    """Tables of what was just quantised."""
    prior = classes.gaussian()
    return Tables(coded.counts + 8 * prior / prior.sum(-1, keepdims=True), multiplier)


def gains_of(coded: Coded, modules: Modules, tasks: int) -> dict[int, list[np.ndarray]]:
    """The cores of `modules` in the codec's order, as they will be read."""
    gains = {}
    for t in range(tasks):
        live = codec.live_directions(coded.shapes, coded.pieces, coded.classes, t)
        gains[t] = codec.round_gains([np.asarray(modules[n][k].core)[t][x] for (n, k), x in live.items()])
    return gains


def unrounded(
    store: Store, collection: Sequence[Adapter], metrics: Mapping[str, Metrics]
) -> dict[str, tuple[Factors, ...]]:
    """Factors before their rounding: on each side the ones of least squared error for what the other decodes to.

    With `p_t = core_t @ b_t`, the best inputs of the tasks t that share one factor solve
    `a @ sum_t w_t p_t p_t.T = sum_t w_t delta_t p_t.T`, `w_t = 1 / ||delta_t||^2`, and alike for the other side.
    Vectors that a store leaves out (zeros) stay so. All this is in the metrics' coordinates where there are any.

    Args:
      store: coded, with diagonal cores.
      collection: the adapters it was made of, in the order of its tasks.
      metrics: module -> metrics of its inputs and outputs, none where left out.
    """
    out: dict[str, tuple[Factors, ...]] = {}
    for name, terms in store.modules.items():
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
            core = np.asarray(term.core, np.float64)
            new_a = unweigh(sides[0], solve_side(rest, term.a_of, len(a), seen_b.swapaxes(1, 2), term.b_of, core))
            new_b = unweigh(sides[1], solve_side(flipped, term.b_of, len(b), seen_a.swapaxes(1, 2), term.a_of, core))
            new = [
                np.where(np.abs(x).max(1, keepdims=True) > 0, x + np.clip(y - x, -CELL, CELL), 0.0)
                for x, y in ((a, new_a), (b, new_b))
            ]
            rebuilt.append(term._replace(a=new[0].astype(np.float32), b=new[1].swapaxes(1, 2).astype(np.float32)))
        out[name] = tuple(rebuilt)
    return out


def residual(
    adapter: Adapter, name: str, terms: Sequence[Factors], *, skip: int, task: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """A task's delta less all terms but one, as factors `[I, r]`, `[r, O]` in float64; None where it has none."""
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
    """The `count` input factors `[A, I, S]` of least squared error for given output factors `other: [B, S, O]`."""
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
