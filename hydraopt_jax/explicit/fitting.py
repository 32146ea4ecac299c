"""Fit modules of one shape, round to the stored dtype, and measure errors; the mathematics is in `forms`."""

import functools
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

from hydraopt_jax import forms
from hydraopt_jax.adapters import Bucket
from hydraopt_jax.factors import to_dtype
from hydraopt_jax.forms import Factors, Gradient, Hydra, Info, closed_form, gradient, losses
from hydraopt_jax.linalg import decompose
from hydraopt_jax.linalg.decompose import Svd
from hydraopt_jax.rate_control.distortion import relative
from hydraopt_jax.store.store import select_term

# maximum modules solved in one call, to bound memory and to update the progress bar
CHUNK = 24
# relative error below which the expanded square, whose round-off is about 1e-6, is not exact enough
EXPANSION_FLOOR = 1e-3


@functools.partial(jax.jit, static_argnames=("heads", "rank", "cores"))
def fit_closed(
    deltas: Svd, *, heads: int, rank: int, cores: bool, used: jax.Array | None = None
) -> tuple[Factors, Info]:
    """`forms.hydra` with a shared `a` for modules of one shape, decompositions of `[M, T]` deltas."""
    solve = functools.partial(forms.hydra, heads=heads, rank=rank, cores=cores, used=used)
    return jax.vmap(solve)(deltas)


class Reduced(NamedTuple):
    """Deltas in coordinates of what the tasks of each module span, in which all errors are the same.

    Attributes:
      deltas: decompositions, `u: [M, T, N, R]`, `v: [M, T, R, P]`; N and P are T R unless I or O is smaller.
      inputs, outputs: orthonormal bases `[M, I, N]` and `[M, O, P]`; None for the standard basis.
    """

    deltas: Svd
    inputs: Any
    outputs: Any


@jax.jit
def reduced_columns(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`decompose.reduce` of modules' columns `[M, T, I, R]`."""
    return jax.vmap(decompose.reduce)(x)


@jax.jit
def reduced_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same for modules' rows `[M, T, R, O]`, which stay rows."""
    base, small = jax.vmap(decompose.reduce)(x.mT)
    return base, small.mT


def reduced(deltas: Svd) -> Reduced:
    """`Reduced` deltas, so that modules of all shapes, and both sides, share compilations."""
    tasks, rank = deltas.s.shape[1:]
    few = tasks * rank if tasks > 1 else np.inf
    inputs, u = reduced_columns(deltas.u) if few < deltas.u.shape[2] else (None, deltas.u)
    outputs, v = reduced_rows(deltas.v) if few < deltas.v.shape[3] else (None, deltas.v)
    return Reduced(Svd(u, deltas.s, v), inputs, outputs)


def restored(factors: Factors, inputs: np.ndarray | None, outputs: np.ndarray | None) -> Factors:
    """Factors of one module of `Reduced` deltas in its own coordinates; arrays of the host."""
    a = factors.a if inputs is None else inputs @ factors.a
    b = factors.b if outputs is None else factors.b @ outputs.T
    return factors._replace(a=a, b=b)


def fit_closed_at(deltas: Svd, most: int, *, heads: int, rank: int, cores: bool) -> tuple[Factors, Info]:
    """`fit_closed`, whose ranks up to `most` share a compilation; arrays of the host."""
    if cores or not 1 < deltas.s.shape[1] <= closed_form.EXHAUSTIVE_TASKS:
        return jax.device_get(fit_closed(deltas, heads=heads, rank=rank, cores=cores))
    used = jax.device_put(np.int32(rank))
    factors, info = jax.device_get(fit_closed(deltas, heads=heads, rank=most, cores=False, used=used))
    return factors._replace(a=factors.a[..., :rank], b=factors.b[..., :rank, :]), info


@functools.partial(jax.jit, static_argnames=("solver", "heads", "rank", "side", "cores"))
def fit_optax(
    a: jax.Array, b: jax.Array, deltas: Svd, *, solver: Gradient, **form: Any
) -> tuple[Factors, Info]:
    """`gradient.hydra` for modules of one shape, whose optimizer must be hashable, as those of Optax are."""
    return jax.vmap(lambda *x: gradient.hydra(*x, solver=solver, **form))(a, b, deltas)


def entries(heads: int, rank: int, shape: tuple[int, int], side: str) -> int:
    """Number of stored entries of one module: S (I + K O), or S (O + K I) with the output side shared."""
    inputs, outputs = shape if side == "in" else shape[::-1]
    return min(rank, inputs) * (inputs + heads * outputs)


def rank_at(cost: int, heads: int, shape: tuple[int, int], side: str) -> int:
    """The largest rank whose entries do not exceed `cost`, at least 1."""
    return max(cost // entries(heads, 1, shape, side), 1)


def fit(a: jax.Array, b: jax.Array, asked: Hydra, heads: int, rank: int) -> list[tuple[Factors, Info]]:
    """Factors of modules of one shape; with side "auto" each module gets the better side at equal entries."""
    shape = a.shape[2], b.shape[3]
    deltas = decompose.batched_svd(a, b)
    small = reduced(deltas) if asked.solver is None else Reduced(deltas, None, None)
    solutions = []
    costs = {side: entries(heads, rank, shape, side) for side in ("in", "out")}
    sides = ("in", "out") if asked.side == "auto" else (asked.side,)
    for side in sides:
        width = rank
        if asked.side == "auto":
            width = min(rank_at(min(costs.values()), heads, shape, side), rank)
        form: dict[str, Any] = {"heads": heads, "rank": width, "cores": asked.cores}
        if asked.solver is None:
            mine = small.deltas.mT if side == "out" else small.deltas
            found = fit_closed_at(mine, rank, **form)
        else:
            found = fit_optax(a, b, deltas, solver=asked.solver, side=side, **form)
        solutions.append(jax.device_get(found))
    losses = np.array([(info.weights * info.error).sum(-1) for _, info in solutions])
    bases = jax.device_get((small.inputs, small.outputs))
    out = []
    for m, best in enumerate(losses.argmin(0).tolist()):
        factors, info = jax.tree.map(lambda x, m=m: x[m], solutions[best])
        if asked.solver is None:
            factors = forms.transpose(factors) if sides[best] == "out" else factors
            factors = restored(factors, *(None if x is None else x[m] for x in bases))
        out.append((factors, info))
    return out


def scale(factors: Factors) -> Factors:
    """Factors with a balanced scale of shared factor and heads, so that neither loses in half precision."""
    a, b = factors.a, factors.b
    na = np.sqrt(np.mean(np.sum(a**2, 1), 0))
    nb = np.sqrt(np.mean(np.sum(b**2, 2), 0))
    root = np.sqrt(np.divide(nb, na, out=np.ones_like(na), where=(na > 0) & (nb > 0)))
    if factors.core is not None:
        return factors
    return factors._replace(a=a * root, b=b / root[:, None])


def cast(factors: Factors, dtype: str, module: str) -> Factors:
    """The factors in the stored dtype."""
    core = None if factors.core is None else to_dtype(module, factors.core, dtype)
    a, b = (to_dtype(module, x, dtype) for x in (factors.a, factors.b))
    return factors._replace(a=a, b=b, core=core)


expanded = jax.jit(jax.vmap(losses.squared_errors))
exact = jax.jit(decompose.residual_energy)


def squared_errors(
    a: jax.Array, b: jax.Array, a_hat: np.ndarray, b_hat: np.ndarray, energy: np.ndarray
) -> np.ndarray:
    """Squared errors `[M, T]` of stored factors: by expansion, or by QR where its round-off would show."""
    error = np.asarray(expanded(a, b, a_hat, b_hat))
    if (error >= EXPANSION_FLOOR * energy).all():
        return error
    return np.asarray(exact(a, b, a_hat, b_hat))


def stacked(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """`forms.pair` on the host: `[T, I, S]` and `[T, S, O]` in float32, core folded in."""
    a = np.asarray(factors.a, np.float32)[np.maximum(factors.a_of, 0)]
    b = np.asarray(factors.b, np.float32)[np.maximum(factors.b_of, 0)]
    if factors.core is not None:
        b = np.asarray(factors.core, np.float32) @ b
    return a, b * (np.asarray(factors.b_of) >= 0)[:, None, None]


def fit_modules(bucket: Bucket, asked: Hydra, dtype: str) -> dict[str, tuple[Factors, np.ndarray, float]]:
    """Fit, round and measure the modules of a bucket: module -> (factors, relative errors `[T]`, bound)."""
    a, b = jax.device_put((bucket.a, bucket.b))
    tasks = a.shape[1]
    heads, rank = asked.heads or tasks, asked.rank or a.shape[3]
    out = {}
    rows = []
    found = fit(a, b, asked, heads, rank)
    for name, present, (factors, info) in zip(bucket.modules, bucket.ranks > 0, found, strict=True):
        if (np.asarray(factors.a_of) < 0).all():
            # zero for all tasks: one pair of zeros, for the first one that has the module
            one = np.where(np.arange(tasks) == np.argmax(present), 0, -1).astype(np.int32)
            factors = factors._replace(a=0 * factors.a[:1], b=0 * factors.b[:1], a_of=one, b_of=one)
        # without factors that no task uses
        kept = cast(scale(select_term(factors, range(tasks))), dtype, name)
        rows.append((name, kept, info))
    widths = [x.a.shape[2] for _, x, _ in rows]
    left = np.zeros((*a.shape[:3], max(widths)), np.float32)
    right = np.zeros((*b.shape[:2], max(widths), b.shape[3]), np.float32)
    for m, (_, kept, _) in enumerate(rows):
        left[m, :, :, : widths[m]], right[m, :, : widths[m]] = stacked(kept)
    energy = np.stack([info.energy for _, _, info in rows])
    error = squared_errors(a, b, left, right, energy)
    for m, (name, kept, info) in enumerate(rows):
        absent = bucket.ranks[m] == 0
        errors = np.where(absent, np.nan, relative(error[m], np.asarray(info.energy)))
        present = max(int((info.energy > 0).sum()), 1)
        out[name] = kept, errors, float(info.bound) / present
    return out
