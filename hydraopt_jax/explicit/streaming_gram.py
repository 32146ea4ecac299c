"""HydraOpt's form with a head per task in two passes over the tasks: first sums, then heads.

With `G = sum_t w_t delta_t delta_t.T` the shared factor is the S leading eigenvectors of G, and the heads are
projections (`forms.hydra`). G is accumulated over chunks of tasks: a pass has few tasks on the device, and T
is unbounded. If T R < I, G is not formed: with `G = W.T W` the eigenvectors come from the smaller `W W.T`.
The layout `a: [T, R, I]`, `b: [T, R, O]` of `delta = a.T @ b` is symmetric, so that both sides share code.
A mesh shards modules and tasks; sums over tasks are then a `psum`.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from hydraopt_jax.devices import MODULES, TASKS, even
from hydraopt_jax.linalg import decompose
from hydraopt_jax.linalg.decompose import matmul
from hydraopt_jax.linalg.subspace import DIRECT, TOLERANCE, leading_eigenpairs

# approximate number of rows of a strip of a sum
STRIP = 1024

# fraction of the energy below which the residual of a basis is formed instead of computed as a difference;
# above it the difference is right to about 1e-5
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


def oriented(a: Array, b: Array, scale: Array) -> tuple[Array, Array]:
    """`a` and scaled `b.T` in float32, of factors in the layout of files, `[..., R, I]` and `[..., O, R]`."""
    return a.astype(jnp.float32), b.astype(jnp.float32).mT * scale[..., None, None]


def flat(x: Array) -> Array:
    """`[M, T R, n]` of `[M, T, R, n]`: tasks and ranks as one axis."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


class Grams(NamedTuple):
    """Gram matrices of a chunk's factors: energies follow from them, and errors mostly.

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
        """Gram matrices of the shared side's factor and of the other factor."""
        return (self.a, self.b) if side == "in" else (self.b, self.a)


# upper triangle of a symmetric sum as strips of rows, `[M, D, end - at, n - at]`; a strip begins at its
# diagonal block; D devices share the tasks
Strips = tuple[Array, ...]


def rows_of_strips(size: int) -> list[tuple[int, int]]:
    """Begin and end of every strip of a sum; two at least save a quarter of the products.

    >>> rows_of_strips(896), rows_of_strips(1)
    ([(0, 448), (448, 896)], [(0, 1)])
    """
    count = min(max(2, size // STRIP), size)
    return list(itertools.pairwise(size * k // count for k in range(count + 1)))


def entries_of_strips(size: int) -> int:
    """Count of the numbers in the strips of a sum.

    >>> entries_of_strips(896) / 896**2
    0.75
    """
    return sum((end - at) * (size - at) for at, end in rows_of_strips(size))


def multiply(strips: Strips, q: Array) -> Array:
    """Product `[n, P]` of a sum with `q: [n, P]`, from strips without leading axes; the sum is not formed."""
    spans = rows_of_strips(len(q))
    out = [matmul(strip, q[at:]) for strip, (at, _) in zip(strips, spans, strict=True)]
    # by symmetry the part below a diagonal block is the transpose of the part to its right
    right = jnp.zeros((q.shape[1], len(q)), jnp.float32)
    for strip, (at, end) in zip(strips[:-1], spans[:-1], strict=True):
        # product with the whole strip: slicing would copy it
        right = right.at[:, end:].add(matmul(q[at:end].T, strip)[:, end - at :])
    return jnp.concatenate(out) + right.T


def bits(factor: np.ndarray) -> np.ndarray:
    """A half-precision array as integers: XLA on a CPU converts a whole array to float32 before it slices."""
    return factor.view(np.uint16) if factor.dtype.itemsize == 2 else factor


@functools.partial(jax.jit, static_argnames=("mesh", "sides", "dtype", "size"), donate_argnums=0)
def accumulate(
    sums: tuple[Strips, ...],
    a: Array,
    b: Array,
    scale: Array,
    *,
    mesh: Mesh,
    sides: tuple[str, ...],
    dtype: str,
    size: int,
) -> tuple[tuple[Strips, ...], Grams]:
    """Sums with tasks added, and the tasks' Gram matrices; all pieces of tasks reuse one buffer.

    Args:
      sums: one per side; each device adds its own tasks.
      a, b, scale: `[M, T, R, I]`, `[M, T, O, R]`, `[M, T]` in the layout of files; `bits` of a and b.
      mesh: the devices.
      sides: "in", "out" or both.
      dtype: dtype of a and b.
      size: upper limit of tasks per piece and device.
    """

    def local(sums: tuple[Strips, ...], a: Array, b: Array, scale: Array) -> tuple[tuple[Strips, ...], Grams]:
        tasks, rank = a.shape[1:3]
        length = even(tasks, size)

        def step(k: Array, state: tuple[tuple[Strips, ...], Grams]) -> tuple[tuple[Strips, ...], Grams]:
            sums, grams = state
            # the last piece overlaps the one before: all have one length
            at = jnp.minimum(k * length, tasks - length)
            one, two, factor = (jax.lax.dynamic_slice_in_dim(x, at, length, 1) for x in (a, b, scale))
            one, two = (jax.lax.bitcast_convert_type(x, jnp.dtype(dtype)) for x in (one, two))
            low, high = oriented(one, two, factor)
            own = Grams(matmul(low, low.mT), matmul(high, high.mT))
            new = at + jnp.arange(length) >= k * length
            weights = jnp.where(new, decompose.task_weights(own.energy), 0)[..., None, None]
            out = []
            for side, total in zip(sides, sums, strict=True):
                x = low if side == "in" else high
                heavy = flat(matmul(own.of(side)[1] * weights, x))
                rows, strips = flat(x).mT, []
                # a zero that depends on the strip before: else the products of all strips are in memory at
                # once
                nothing = jnp.zeros((1, 1, 1))
                for strip, (begin, end) in zip(total, rows_of_strips(x.shape[-1]), strict=True):
                    product = matmul(rows[:, begin:end] + nothing, heavy[:, :, begin:])
                    strips.append(strip + product[:, None])
                    nothing = 0 * strips[-1][:, 0, :1, :1]
                out.append(tuple(strips))
            put = lambda every, x: jax.lax.dynamic_update_slice_in_dim(every, x, at, 1)  # noqa: E731
            return tuple(out), jax.tree.map(put, grams, own)

        blank = jnp.zeros((*scale.shape, rank, rank))
        return jax.lax.fori_loop(0, -(-tasks // length), step, (sums, Grams(blank, blank)))

    run = jax.shard_map(local, mesh=mesh, in_specs=(BOTH,) * 4, out_specs=(BOTH, BOTH), check_vma=False)
    return run(sums, a, b, scale)


def uncertainty(values: np.ndarray, reach: int, trace: np.ndarray) -> np.ndarray:
    """Uncertainty `[M]` of the sum of leading eigenvalues `[M, S]` of matrices of trace `[M]`.

    If a matrix is known to eps times its largest eigenvalue, the sum of its at most N = `reach` nonzero
    eigenvalues is known to N eps times that (`forms.sure_tail`). Iteration adds the tolerance of its last
    round.
    """
    noise = reach * np.finfo(np.float32).eps * values.max(-1, initial=0.0)
    return noise + (TOLERANCE * trace if reach > DIRECT else 0.0)


@functools.partial(jax.jit, static_argnames=("mesh", "rank", "columns"))
def of_sum(total: Strips, trace: Array, *, mesh: Mesh, rank: int, columns: int) -> Basis:
    """Leading directions of an accumulated sum of trace `[M]`."""

    def local(total: Strips, trace: Array) -> Basis:
        own = tuple(x[:, 0] for x in total)
        # psum copies even on one device
        whole = own if mesh.shape[TASKS] == 1 else jax.lax.psum(own, TASKS)
        size = whole[0].shape[-1]
        solve = lambda g, t: Basis(  # noqa: E731
            *leading_eigenpairs(lambda q: multiply(g, q), size, columns, rank, t)
        )
        return jax.vmap(solve)(whole, trace)

    return jax.shard_map(local, mesh=mesh, in_specs=(BOTH, LOCAL), out_specs=LOCAL, check_vma=False)(
        total, trace
    )


@functools.partial(jax.jit, static_argnames=("mesh", "rank", "side"))
def of_factors(a: Array, b: Array, scale: Array, *, mesh: Mesh, rank: int, side: str) -> tuple[Basis, Grams]:
    """Leading directions of the sum by the Gram matrix of all factors, and each task's Gram matrices."""

    def local(a: Array, b: Array, scale: Array) -> tuple[Basis, Grams]:
        a, b, scale = (jax.lax.all_gather(x, TASKS, axis=1, tiled=True) for x in (a, b, scale))
        a, b = oriented(a, b, scale)
        x = a if side == "in" else b
        grams = Grams(matmul(a, a.mT), matmul(b, b.mT))
        energy = grams.energy

        values, vectors = decompose.eigh(grams.of(side)[1] * decompose.task_weights(energy)[..., None, None])
        root = jnp.sqrt(jnp.maximum(values, 0.0))[..., None] * vectors.mT

        def one(rows: Array, energy: Array) -> Basis:
            gram = matmul(rows, rows.T)
            trace = jnp.sum(energy > 0).astype(jnp.float32)
            vectors, values = leading_eigenpairs(lambda q: matmul(gram, q), len(rows), len(rows), rank, trace)
            lengths = jnp.sqrt(jnp.maximum(values, 1e-20))
            return Basis(decompose.orthonormal(matmul(rows.T, vectors) / lengths), values)

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


class Range(NamedTuple):
    """Orthonormal basis q of the range of a stored shared factor `s = q r`.

    Attributes:
      q: `[M, n, S]`; columns of zeros if s has rank below S.
      inverse: `[M, S, S]`, inverse of `r.T`, pseudoinverse if columns are linearly dependent.
      squares: `[M, S]` squared norms of the columns of s.
    """

    q: Array
    inverse: Array
    squares: Array


def range_of(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`Range` of shared factors `[M, n, S]`, on the host.

    With unit columns w and `c = w.T w`, `q = w c^(-1/2)` is the orthonormal basis nearest to w.

    >>> q, inverse, _ = range_of(np.array([[[2.0, 0.0], [0.0, 0.0], [0.0, 4.0]]], np.float32))
    >>> q[0].tolist(), inverse[0].diagonal().tolist()
    ([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], [0.5, 0.25])
    """
    wide = stored.astype(np.float64)
    squares = (wide**2).sum(-2)
    # absent directions get zero: one over infinity
    scales = (np.where(squares > 0, squares, np.inf) ** -0.5)[..., None, :]
    unit = wide * scales
    values, vectors = np.linalg.eigh(unit.mT @ unit)
    roots = (np.where(values > 1e-6, values, np.inf) ** -0.5)[..., None, :]
    root = (vectors * roots) @ vectors.mT
    return (unit @ root).astype(np.float32), (root * scales).astype(np.float32), squares.astype(np.float32)


@functools.partial(jax.jit, static_argnames=("mesh", "side", "dtype"))
def project(
    shared: Range, a: Array, b: Array, scale: Array, grams: Grams, *, mesh: Mesh, side: str, dtype: str
) -> Heads:
    """Heads by least squares on the stored factor s, rounded, and the errors of what is stored.

    With x the shared side's factor, y the other one, `delta = x.T y`, and `s = q r` (`Range`) the heads are
    `s^+ delta = (x q r^-T).T y = kept + lost`, and as nothing that s spans is left of delta,

        |delta - s kept|^2 = |delta - q q.T delta|^2 + |s lost|^2.

    The first term is the energy minus the energy that q captures. If this difference is small, the residual
    of x is formed instead, which avoids cancellation. The second term leaves out products of different rows
    of `lost`. The columns of s are orthogonal to rounding, so that these products are at most 2^-7 of it in
    bfloat16 and 2^-10 in float16, and about 1e-5 for rounding errors.

    Args:
      shared: `Range` of the stored factors.
      a, b, scale: a chunk in the layout of files.
      grams: the chunk's Gram matrices, from `accumulate`.
      mesh: the devices.
      side: the shared side.
      dtype: dtype of the stored heads.
    """

    def local(shared: Range, a: Array, b: Array, scale: Array, grams: Grams) -> Heads:
        x, y = oriented(a, b, scale) if side == "in" else oriented(a, b, scale)[::-1]
        yy, energy = grams.of(side)[1], grams.energy
        q, inverse, squares = shared
        tall = (*x.shape[:3], q.shape[-1])
        inner = matmul(flat(x), q)
        heads = matmul(matmul(inner, inverse).reshape(tall).mT, y)
        kept = heads.astype(dtype)
        lost = heads - kept.astype(jnp.float32)
        captured = inner.reshape(tall) * matmul(yy, inner.reshape(tall))
        left = energy - jnp.sum(captured, (-2, -1))

        def formed() -> Array:
            # loaded again: else x would be kept in memory even if the residual is not needed
            rest = oriented(a, b, scale)[side == "out"] - matmul(inner, q.mT).reshape(x.shape)
            return jnp.sum(matmul(rest, rest.mT) * yy, (-2, -1))

        near = jnp.any((energy > 0) & (left < NEAR * energy))
        left = jax.lax.cond(near, formed, lambda: left)
        rounding = jnp.sum(jnp.sum(lost**2, -1) * squares[:, None], -1)
        return Heads(kept if side == "in" else kept.mT, jnp.maximum(left + rounding, 0.0))

    specs = (LOCAL, BOTH, BOTH, BOTH, BOTH)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=BOTH, check_vma=False)(
        shared, a, b, scale, grams
    )


def gains(values: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Factors `[M, S]` that balance the shared factor's columns and the heads' rows.

    Row s of a head has a mean square of about `values[s]` times the mean energy over the tasks (weights are
    inverse energies). The shared factor has unit columns. Each side gets the fourth root of the ratio.
    """
    present = np.maximum((energy > 0).sum(-1), 1)
    squares = np.maximum(values, 0) / present[:, None] * (energy.sum(-1) / present)[:, None]
    return np.where(squares > 0, np.maximum(squares, 1e-30) ** 0.25, 1.0).astype(np.float32)
