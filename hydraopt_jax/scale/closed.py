"""HydraOpt's form with a head a task, in two passes over the tasks: sums first, heads second.

With `G = sum_t w_t delta_t delta_t.T` the shared factor is G's S leading eigenvectors and the heads are the
projections (`forms.hydra`). Here no pass holds more than a few tasks on the device: G is added up over chunks
of tasks, so T is unbounded; where T R < I, G is never formed: with `G = W.T W` and fewer rows in W than
columns, the eigenvectors come from `W W.T`. Both
sides look alike in the layout `a: [T, R, I]`, `b: [T, R, O]` of `delta = a.T @ b`, so that one side's
code is the other's. On a mesh modules and tasks are sharded; the sums over tasks are then a `psum`.
"""

import functools
import itertools
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
# about so many rows has a strip of a sum
STRIP = 1024
# change of the captured share of the energy at which iterating stops, and the most rounds
TOLERANCE = 1e-5
ROUNDS = 60

# share of the energy below which what a basis leaves of a factor is formed, not found by a difference: the
# difference is then right to about 1e-5
NEAR = 1e-2

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


def flat(x: Array) -> Array:
    """Tasks and ranks as one axis: `[M, T, R, n] -> [M, T R, n]`."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


class Grams(NamedTuple):
    """Gram matrices of a chunk's factors, which tell the energies and most of what errors need.

    Attributes:
      a: `[M, T, R, R]`, of the rows of `a`.
      b: `[M, T, R, R]`, of the rows of the scaled `b.T`.
    """

    a: Array
    b: Array

    @property
    def energy(self) -> Array:
        """Squared norms of the deltas, `[M, T]`."""
        return (self.a * self.b).sum((-2, -1))

    def of(self, side: str) -> tuple[Array, Array]:
        """Of the shared side's factor and of the other one."""
        return (self.a, self.b) if side == "in" else (self.b, self.a)


# the upper triangle of a symmetric sum in strips of rows, `[M, D, end - at, n - at]`, each from its diagonal
# block on; D devices share the tasks
Sum = tuple[Array, ...]


def rows_of_strips(size: int) -> list[tuple[int, int]]:
    """Where the strips of a sum begin and end: two or more, which save a fourth of the products or more.

    >>> rows_of_strips(896)
    [(0, 448), (448, 896)]
    """
    count = max(2, size // STRIP)
    return list(itertools.pairwise(size * k // count for k in range(count + 1)))


def join(strips: Sum) -> Array:
    """The whole matrix of strips `[..., h, n - at]`, `[..., n, n]`."""
    size = strips[0].shape[-1]
    whole = jnp.zeros((*strips[0].shape[:-2], size, size), strips[0].dtype)
    at = 0
    for strip in strips:
        end = at + strip.shape[-2]
        whole = whole.at[..., at:end, at:].set(strip)
        whole = whole.at[..., end:, at:end].set(strip[..., end - at :].mT)
        at = end
    return whole


@functools.partial(jax.jit, static_argnames=("mesh", "sides"), donate_argnums=0)
def accumulate(
    sums: tuple[Sum, ...], a: Array, b: Array, scale: Array, *, mesh: Mesh, sides: tuple[str, ...]
) -> tuple[tuple[Sum, ...], Grams]:
    """Add a chunk of tasks to the sums.

    Args:
      sums: one a side, each device adding up its own tasks.
      a, b, scale: a chunk as the files have it, `[M, T, R, I]`, `[M, T, O, R]`, `[M, T]`.
      mesh: where they lie.
      sides: "in", "out" or both.

    Returns:
      The sums, and the chunk's Gram matrices.
    """

    def local(sums: tuple[Sum, ...], a: Array, b: Array, scale: Array) -> tuple[tuple[Sum, ...], Grams]:
        a, b = load(a, b, scale)
        grams = Grams(matmul(a, a.mT), matmul(b, b.mT))
        weights = algebra.task_weights(grams.energy)[..., None, None]
        out = []
        for side, total in zip(sides, sums, strict=True):
            x = a if side == "in" else b
            heavy = flat(matmul(grams.of(side)[1] * weights, x))
            rows, spans = flat(x).mT, rows_of_strips(x.shape[-1])
            out.append(
                tuple(
                    strip + matmul(rows[:, at:end], heavy[:, :, at:])[:, None]
                    for strip, (at, end) in zip(total, spans, strict=True)
                )
            )
        return tuple(out), grams

    run = jax.shard_map(local, mesh=mesh, in_specs=(BOTH, BOTH, BOTH, BOTH), out_specs=(BOTH, BOTH))
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
def of_sum(total: Sum, trace: Array, *, mesh: Mesh, rank: int, columns: int) -> Basis:
    """Leading directions of an accumulated sum; `trace` is `[M]`."""

    def local(total: Sum, trace: Array) -> Basis:
        whole = join(tuple(jax.lax.psum(x[:, 0], TASKS) for x in total))
        solve = lambda g, t: leading(lambda q: matmul(g, q), g.shape[0], columns, rank, t)  # noqa: E731
        return jax.vmap(solve)(whole, trace)

    return jax.shard_map(local, mesh=mesh, in_specs=(BOTH, LOCAL), out_specs=LOCAL, check_vma=False)(
        total, trace
    )


@functools.partial(jax.jit, static_argnames=("mesh", "rank", "side"))
def of_factors(a: Array, b: Array, scale: Array, *, mesh: Mesh, rank: int, side: str) -> tuple[Basis, Grams]:
    """Leading directions of the sum, by the Gram matrix of all tasks' factors; and the tasks' own."""

    def local(a: Array, b: Array, scale: Array) -> tuple[Basis, Grams]:
        a, b, scale = (jax.lax.all_gather(x, TASKS, axis=1, tiled=True) for x in (a, b, scale))
        a, b = load(a, b, scale)
        x = a if side == "in" else b
        grams = Grams(matmul(a, a.mT), matmul(b, b.mT))
        energy = grams.energy

        values, vectors = algebra.eigh(grams.of(side)[1] * algebra.task_weights(energy)[..., None, None])
        root = jnp.sqrt(jnp.maximum(values, 0.0))[..., None] * vectors.mT

        def one(rows: Array, energy: Array) -> Basis:
            gram = matmul(rows, rows.T)
            trace = jnp.sum(energy > 0).astype(jnp.float32)
            found = leading(lambda q: matmul(gram, q), len(rows), len(rows), rank, trace)
            lengths = jnp.sqrt(jnp.maximum(found.values, 1e-20))
            return Basis(algebra.orthonormal(matmul(rows.T, found.vectors) / lengths), found.values)

        return jax.vmap(one)(flat(matmul(root, x)), energy), grams

    return jax.shard_map(
        local, mesh=mesh, in_specs=(BOTH, BOTH, BOTH), out_specs=(LOCAL, LOCAL), check_vma=False
    )(a, b, scale)


class Heads(NamedTuple):
    """A chunk of stored heads.

    Attributes:
      values: `[M, T, S, O]`, or `[M, T, I, S]` with the output side shared, in the stored dtype.
      error: `[M, T]` squared errors of what is stored.
    """

    values: Array
    error: Array


@functools.partial(jax.jit, static_argnames=("mesh", "side", "dtype"))
def project(
    basis: Array,
    stored: Array,
    gain: Array,
    a: Array,
    b: Array,
    scale: Array,
    grams: Grams,
    *,
    mesh: Mesh,
    side: str,
    dtype: str,
) -> Heads:
    """Heads of a chunk of tasks, rounded, and the errors of what is stored.

    With x the shared side's factor, y the other one, `h = x u / gain` and the stored factor `u gain + off`,
    the heads are `h.T y = kept + lost` and

        delta - (u gain + off) kept = rest.T y + (u gain) lost - off kept,    rest = x - x u u.T,

    whose norm needs of the large factors `x [u, off]`, the heads and `y lost.T` only; all else are sums over
    R x S and S x S matrices. `|rest.T y|^2` is the energy less what u captures where that is no small
    difference; else rest is formed, so that nothing large is subtracted from anything large. Products of
    different rows of `lost` with each other are left out: less than `2 |off / gain|` of the error, in the
    worst case 2^-7 of it with bfloat16 and 2^-10 with float16, and as they are rounding errors some 1e-5.

    Args:
      basis: `[M, n, S]` orthonormal u.
      stored: `[M, n, S]` the shared factor as it will be read, float32: about `u * gain`.
      gain: `[M, S]`.
      a, b, scale: a chunk as the files have it.
      grams: the chunk's, as `accumulate` gives them.
      side: the shared one.
      dtype: of the stored heads.
    """

    def local(u: Array, stored: Array, gain: Array, a: Array, b: Array, scale: Array, grams: Grams) -> Heads:
        files = a, b, scale
        low, high = load(*files)
        # of y both layouts: the product with `lost` takes what would else be the transpose of `lost`
        if side == "in":
            x, y, columns = low, high, b.astype(jnp.float32) * scale[..., None, None]
        else:
            x, y, columns = high, low, low.mT
        yy, energy = grams.of(side)[1], grams.energy
        width = u.shape[-1]
        tall = (*x.shape[:3], width)
        off = stored - u * gain[:, None, :]
        both = matmul(flat(x), jnp.concatenate([u, off], -1))
        inner, cross = both[..., :width], both[..., width:]
        level = inner / gain[:, None, :]

        heads = matmul(level.reshape(tall).mT, y)
        kept = heads.astype(dtype)
        lost = heads - kept.astype(jnp.float32)
        noise = jnp.sum(lost**2, -1)
        y_lost = matmul(lost, columns).mT
        y_inner = matmul(yy, inner.reshape(tall))
        y_heads = y_inner / gain[:, None, None, :]

        def total(*pair: Array) -> Array:
            return jnp.sum(pair[0].reshape(tall) * pair[1], (-2, -1))

        # u is orthonormal to rounding only: |x - x u u.T|^2 counts that in
        square = energy - total(matmul(inner, 2 * jnp.eye(width) - matmul(u.mT, u)), y_inner)

        def formed() -> Array:
            # from the files again: else x would be kept for it, whether it is asked for or not
            rest = load(*files)[side == "out"] - matmul(inner, u.mT).reshape(x.shape)
            return jnp.sum(matmul(rest, rest.mT) * yy, (-2, -1))

        near = jnp.any((energy > 0) & (square < NEAR * energy))
        error = jax.lax.cond(near, formed, lambda: square)
        tilt, outer = matmul(u.mT, off), matmul(off.mT, off)
        error += jnp.sum((gain**2 + jnp.diagonal(outer, 0, -2, -1))[:, None] * noise, -1)
        error += total(matmul(level, outer), y_heads - 2 * y_lost)
        error -= 2 * total(cross - matmul(inner, tilt), y_heads - y_lost)
        tilt = gain[:, :, None] * tilt
        error -= 2 * total(matmul(level, tilt.mT), y_lost)
        error += 2 * jnp.sum(jnp.diagonal(tilt, 0, -2, -1)[:, None] * noise, -1)
        return Heads(kept if side == "in" else kept.mT, jnp.maximum(error, 0.0))

    specs = (LOCAL, LOCAL, LOCAL, BOTH, BOTH, BOTH, BOTH)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=BOTH)(
        basis, stored, gain, a, b, scale, grams
    )


def gains(values: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """What balances the shared factor's columns against the heads' rows, `[M, S]`.

    A head's row s has a mean square of about `values[s]` times the mean energy over the tasks (weights are
    inverse energies); the factor has unit columns. The root of the ratio's root goes to either side.
    """
    present = np.maximum((energy > 0).sum(-1), 1)
    squares = np.maximum(values, 0) / present[:, None] * (energy.sum(-1) / present)[:, None]
    return np.where(squares > 0, np.maximum(squares, 1e-30) ** 0.25, 1.0).astype(np.float32)
