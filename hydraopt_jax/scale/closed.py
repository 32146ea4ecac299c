"""HydraOpt's form with a head a task, in two passes over the tasks: sums first, heads second.

With `G = sum_t w_t delta_t delta_t.T` the shared factor is G's S leading eigenvectors and the heads are the
projections (`forms.hydra`). Here no pass holds more than a few tasks on the device: G is added up over chunks
of tasks, so T is unbounded; where T R < I, G is never formed: with `G = W.T W` and fewer rows in W than
columns, the eigenvectors come from `W W.T`. Both
sides look alike in the layout `a: [T, R, I]`, `b: [T, R, O]` of `delta = a.T @ b`, so that one side's
code is the other's. On a mesh modules and tasks are sharded; the sums over tasks are then a `psum`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from hydraopt_jax import algebra
from hydraopt_jax.algebra import matmul
from hydraopt_jax.scale.mesh import MODULES, TASKS

# up to this size an eigenproblem is solved outright
DIRECT = 256
# change of the captured share of the energy at which iterating stops, and the most rounds
TOLERANCE = 1e-5
ROUNDS = 60

BOTH = P(MODULES, TASKS)
LOCAL = P(MODULES)


class Basis(NamedTuple):
    """Leading directions of G.

    Attributes:
      vectors: `[M, n, S]`, orthonormal columns.
      values: `[M, S]` eigenvalues, descending.
    """

    vectors: Array
    values: Array


def load(a: Array, b: Array, scale: Array) -> tuple[Array, Array]:
    """Factors as their files have them, `[..., R, I]` and `[..., O, R]`; `a` and scaled `b.T` in float32."""
    return a.astype(jnp.float32), b.astype(jnp.float32).mT * scale[..., None, None]


def energies(a: Array, b: Array) -> Array:
    """Squared norms of `a.T @ b`, `[...]`."""
    return jnp.sum(matmul(a, a.mT) * matmul(b, b.mT), (-2, -1))


def flat(x: Array) -> Array:
    """Tasks and ranks as one axis: `[M, T, R, n] -> [M, T R, n]`."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def weighted(a: Array, b: Array) -> tuple[Array, Array]:
    """`w_t b_t b_t.T a_t`, whose product with `a.T` is G, and the energies."""
    outer = matmul(b, b.mT)
    energy = jnp.sum(matmul(a, a.mT) * outer, (-2, -1))
    return matmul(outer * algebra.task_weights(energy)[..., None, None], a), energy


@functools.partial(jax.jit, static_argnames=("mesh", "sides"), donate_argnums=0)
def accumulate(
    sums: tuple[Array, ...], a: Array, b: Array, scale: Array, *, mesh: Mesh, sides: tuple[str, ...]
) -> tuple[tuple[Array, ...], Array]:
    """Add a chunk of tasks to the sums.

    Args:
      sums: one a side, `[M, D, n, n]` with D the devices on the task axis, each adding up its own tasks.
      a, b, scale: a chunk as the files have it, `[M, T, R, I]`, `[M, T, O, R]`, `[M, T]`.
      mesh: where they lie.
      sides: "in", "out" or both.

    Returns:
      The sums, and energies `[M, T]`.
    """

    def local(sums: tuple[Array, ...], a: Array, b: Array, scale: Array) -> tuple[tuple[Array, ...], Array]:
        a, b = load(a, b, scale)
        out = []
        energy = jnp.zeros(a.shape[:2])
        for side, total in zip(sides, sums, strict=True):
            x, y = (a, b) if side == "in" else (b, a)
            heavy, energy = weighted(x, y)
            out.append(total + matmul(flat(x).mT, flat(heavy))[:, None])
        return tuple(out), energy

    specs = tuple(BOTH for _ in sides)
    run = jax.shard_map(local, mesh=mesh, in_specs=(specs, BOTH, BOTH, BOTH), out_specs=(specs, BOTH))
    return run(sums, a, b, scale)


def leading(apply: Callable[[Array], Array], size: int, columns: int, rank: int, trace: Array) -> Basis:
    """Leading eigenpairs of a positive semi-definite `[size, size]` matrix given by its products.

    Block subspace iteration with Rayleigh-Ritz values (Halko, Martinsson and Tropp, arXiv 0909.4061), two
    products a round, until the share of the trace that is captured rests. Exact in one round where the block
    is as wide as the matrix's range.

    Args:
      apply: `[size, P] -> [size, P]`.
      size: n.
      columns: width of the factor that the matrix is made of: no rank is higher.
      rank: S.
      trace: of the matrix.
    """
    reach = min(size, columns)
    width = reach if reach <= DIRECT else min(reach, rank + max(rank, 8))
    start = algebra.orthonormal(jax.random.normal(jax.random.key(0), (size, width)))

    def ritz(q: Array) -> tuple[Array, Array, Array]:
        product = apply(q)
        vectors, values = algebra.top_eigenvectors(matmul(q.mT, product), min(rank, width))
        return product, vectors, values[: min(rank, width)]

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        q, _, now, k = state
        product, _, values = ritz(q)
        return algebra.orthonormal(apply(product)), now, values.sum(), k + 1

    def open_(state: tuple[Array, Array, Array, Array]) -> Array:
        _, before, now, k = state
        return (k < 2) | ((k < ROUNDS) & (now - before > TOLERANCE * trace))

    # one product finds the range of a matrix no wider than the block; the loop is for the others
    q = algebra.orthonormal(apply(start))
    if width < reach:
        zero = jnp.zeros_like(trace)
        q, *_ = jax.lax.while_loop(open_, step, (q, zero - 1, zero, jnp.zeros((), jnp.int32)))
    _, vectors, values = ritz(q)
    return Basis(matmul(q, vectors), values)


@functools.partial(jax.jit, static_argnames=("mesh", "rank", "columns"))
def of_sum(total: Array, trace: Array, *, mesh: Mesh, rank: int, columns: int) -> Basis:
    """Leading directions of an accumulated sum `[M, D, n, n]`."""

    def local(total: Array, trace: Array) -> Basis:
        whole = jax.lax.psum(total[:, 0], TASKS)
        solve = lambda g, t: leading(lambda q: matmul(g, q), g.shape[0], columns, rank, t)  # noqa: E731
        return jax.vmap(solve)(whole, trace)

    return jax.shard_map(local, mesh=mesh, in_specs=(BOTH, LOCAL), out_specs=LOCAL, check_vma=False)(
        total, trace
    )


@functools.partial(jax.jit, static_argnames=("mesh", "rank", "side"))
def of_factors(a: Array, b: Array, scale: Array, *, mesh: Mesh, rank: int, side: str) -> tuple[Basis, Array]:
    """Leading directions of the sum, by the Gram matrix of all tasks' factors; and the energies."""

    def local(a: Array, b: Array, scale: Array) -> tuple[Basis, Array]:
        a, b, scale = (jax.lax.all_gather(x, TASKS, axis=1, tiled=True) for x in (a, b, scale))
        a, b = load(a, b, scale)
        x, y = (a, b) if side == "in" else (b, a)
        outer = matmul(y, y.mT)
        energy = jnp.sum(matmul(x, x.mT) * outer, (-2, -1))
        outer = outer * algebra.task_weights(energy)[..., None, None]

        values, vectors = algebra.eigh(outer)
        root = jnp.sqrt(jnp.maximum(values, 0.0))[..., None] * vectors.mT

        def one(rows: Array, energy: Array) -> Basis:
            gram = matmul(rows, rows.T)
            trace = jnp.sum(energy > 0).astype(jnp.float32)
            found = leading(lambda q: matmul(gram, q), len(rows), len(rows), rank, trace)
            lengths = jnp.sqrt(jnp.maximum(found.values, 1e-20))
            return Basis(algebra.orthonormal(matmul(rows.T, found.vectors) / lengths), found.values)

        return jax.vmap(one)(flat(matmul(root, x)), energy), energy

    return jax.shard_map(
        local, mesh=mesh, in_specs=(BOTH, BOTH, BOTH), out_specs=(LOCAL, LOCAL), check_vma=False
    )(a, b, scale)


class Heads(NamedTuple):
    """A chunk of stored heads.

    Attributes:
      values: `[M, T, S, O]`, or `[M, T, I, S]` with the output side shared, in the stored dtype.
      error: `[M, T]` squared errors of what is stored.
      energy: `[M, T]`.
    """

    values: Array
    error: Array
    energy: Array


@functools.partial(jax.jit, static_argnames=("mesh", "side", "dtype"))
def project(
    basis: Array,
    stored: Array,
    gain: Array,
    a: Array,
    b: Array,
    scale: Array,
    *,
    mesh: Mesh,
    side: str,
    dtype: str,
) -> Heads:
    """Heads of a chunk of tasks, rounded, and the errors of what is stored.

    The error is the norm of three small matrices, `delta - u u.T delta`, the heads' rounding and the shared
    factor's, so that nothing large is subtracted from anything large.

    Args:
      basis: `[M, n, S]` orthonormal u.
      stored: `[M, n, S]` the shared factor as it will be read, float32: about `u * gain`.
      gain: `[M, S]`.
      a, b, scale: a chunk as the files have it.
      side: the shared one.
      dtype: of the stored heads.
    """

    def local(u: Array, stored: Array, gain: Array, a: Array, b: Array, scale: Array) -> Heads:
        a, b = load(a, b, scale)
        x, y = (a, b) if side == "in" else (b, a)
        inner = matmul(flat(x), u).reshape(*x.shape[:3], u.shape[-1])
        heads = matmul(inner.mT, y)
        kept = (heads / gain[:, None, :, None]).astype(dtype)
        read = kept.astype(jnp.float32) * gain[:, None, :, None]
        off = stored / gain[:, None, :] - u
        rest = x - matmul(inner, u.mT[:, None])
        lost = heads - read
        outer = matmul(y, y.mT)
        energy = jnp.sum(matmul(x, x.mT) * outer, (-2, -1))
        error = jnp.sum(matmul(rest, rest.mT) * outer, (-2, -1)) + jnp.sum(lost**2, (-2, -1))
        cross = matmul(flat(rest), off).reshape(inner.shape)
        error += jnp.sum(matmul(off.mT, off)[:, None] * matmul(read, read.mT), (-2, -1))
        error -= 2 * jnp.sum(cross * matmul(y, read.mT), (-2, -1))
        error -= 2 * jnp.sum(matmul(u.mT, off)[:, None] * matmul(lost, read.mT), (-2, -1))
        return Heads(kept if side == "in" else kept.mT, jnp.maximum(error, 0.0), energy)

    return jax.shard_map(local, mesh=mesh, in_specs=(LOCAL, LOCAL, LOCAL, BOTH, BOTH, BOTH), out_specs=BOTH)(
        basis, stored, gain, a, b, scale
    )


def gains(values: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """What balances the shared factor's columns against the heads' rows, `[M, S]`.

    A head's row s has a mean square of about `values[s]` times the mean energy over the tasks (weights are
    inverse energies); the factor has unit columns. The root of the ratio's root goes to either side.
    """
    present = np.maximum((energy > 0).sum(-1), 1)
    squares = np.maximum(values, 0) / present[:, None] * (energy.sum(-1) / present)[:, None]
    return np.where(squares > 0, np.maximum(squares, 1e-30) ** 0.25, 1.0).astype(np.float32)
