"""Forms in closed form: approximations of the T deltas of one module, all with one contract.

Every form is `delta[t] ~= a[a_of[t]] @ core[t] @ b[b_of[t]]`. Forms differ in the number of factors per side
and in the core:

===================  =====  =====  =======================  ==========================================
form                 a      b      core                     what it is
===================  =====  =====  =======================  ==========================================
separate             T      T      none                     each adapter's truncated SVD
hydra, side "in"     1      K      none, or S x S per task  HydraOpt: one shared input factor, K heads
hydra, side "out"    K      1      none, or S x S per task  one shared output factor, K inputs
joint_diagonal       1      1      S x S, or a diagonal     two shared factors, a core per task
===================  =====  =====  =======================  ==========================================

A shared part plus a remainder per task is the sum of two of these. Functions take one module; vmap them over
modules of one shape.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.factors import Factors
from hydraopt_jax.forms import losses
from hydraopt_jax.linalg import clustering, decompose
from hydraopt_jax.linalg.decompose import Svd, matmul

# beyond this many tasks partitions are searched by reduced k-means instead of enumerated
EXHAUSTIVE_TASKS = 8
# maximum partitions solved exactly per module; the scatter excludes others where it suffices
EXHAUSTIVE_LIMIT = 512


class Info(NamedTuple):
    """Errors and bounds of a fit, as arrays, so that a jitted computation can return them.

    Attributes:
      error: `[T]` squared error `||delta_t - fit_t||^2`.
      energy: `[T]` squared norm of each delta.
      weights: `[T]` the task weights of the loss.
      bound: lower bound on `sum_t w_t error_t` of any factors of this form and rank, at any precision.
      trace: loss after each step.
      converged: whether the result is proven or the loss has stopped falling.
    """

    error: Array
    energy: Array
    weights: Array
    bound: Array
    trace: Array
    converged: Array


def pair(factors: Factors) -> tuple[Array, Array]:
    """The factors of every task, core folded in: `a: [T, I, S]`, `b: [T, S, O]`; zeros for an absent task."""
    a = jnp.asarray(factors.a)[jnp.maximum(factors.a_of, 0)]
    b = jnp.asarray(factors.b)[jnp.maximum(factors.b_of, 0)]
    if factors.core is not None:
        core = jnp.asarray(factors.core)
        b = core[..., None] * b if core.ndim == 2 else matmul(core, b)
    present = jnp.asarray((factors.a_of >= 0) & (factors.b_of >= 0))
    return a, jnp.where(present[:, None, None], b, 0.0)


def transpose(factors: Factors) -> Factors:
    """Factors of the transposed deltas."""
    core = factors.core
    if core is not None and core.ndim == 3:
        core = core.mT
    return Factors(factors.b.mT, factors.a.mT, factors.b_of, factors.a_of, core)


def squared_errors(deltas: Svd, factors: Factors) -> Array:
    """Squared errors `[T]` of the factors against the deltas, free of cancellation."""
    a, b = pair(factors)
    return decompose.residual_energy(deltas.u * deltas.s[..., None, :], deltas.v, a, b)


def present(deltas: Svd, index: Array) -> Array:
    """`index`, with -1 for tasks without a delta."""
    return jnp.where(deltas.energy > 0, index, -1).astype(jnp.int32)


def separate(deltas: Svd, *, rank: int) -> tuple[Factors, Info]:
    """Each adapter's own truncated SVD (Eckart and Young 1936): optimal when nothing is shared.

    Args:
      deltas: T decompositions, `u: [T, I, R]`.
      rank: S, singular directions kept.

    Returns:
      Factors with one `a` and one `b` per task, singular values split evenly; Info whose bound is the
      sum of the squared singular values left out.
    """
    s = min(rank, deltas.s.shape[-1])
    root = decompose.safe_sqrt(deltas.s[:, :s])
    tasks = present(deltas, jnp.arange(deltas.s.shape[0]))
    out = Factors(deltas.u[..., :s] * root[:, None, :], deltas.v[:, :s] * root[..., None], tasks, tasks)
    weights = decompose.task_weights(deltas.energy)
    tail = jnp.sum(deltas.s[:, s:] ** 2, -1)
    bound = jnp.sum(weights * tail)
    return out, Info(tail, deltas.energy, weights, bound, bound[None], jnp.array(True))


def hydra(
    deltas: Svd,
    *,
    heads: int,
    rank: int,
    side: str = "in",
    weights: Array | None = None,
    cores: bool = False,
    steps: int = 12,
    used: Array | None = None,
) -> tuple[Factors, Info]:
    """HydraOpt's form by closed form and alternation: one shared factor, K heads.

    With K = T the shared factor is the top-S eigenvectors of `G = sum_t w_t delta_t delta_t.T`, the heads
    are the projections, and the weighted error is exactly `tau(G, S)`: no optimizer does better. With K < T
    the partition is found by enumeration (T <= 8) or by reduced k-means from Ward's hierarchy, and the error
    is `scatter + tau`. With `cores`, task t uses `a @ core[t] @ b[b_of[t]]`, started from the hard form and
    alternated, so that its error is never above it.

    Args:
      deltas: T decompositions of one module.
      heads: K, 1 to T.
      rank: S, width of the shared factor, at most min(I, T * R) is used.
      side: "in" shares `a`, "out" shares `b`.
      weights: `[T]` task weights; None for `1 / ||delta_t||^2`.
      cores: whether each task has an S x S core.
      steps: alternations.
      used: columns of the shared factor that are not zero, at most S, as an array, so that ranks share a
        compilation; None for all. Not with `cores`, nor for more than `EXHAUSTIVE_TASKS` tasks.

    Returns:
      Factors (a: `[1, I, S]`, b: `[K, S, O]` for side "in") and Info with the bound `tau(G, S)`.

    Raises:
      HydraOptError: heads outside 1..T, rank below 1, or an unknown side.

    Reference: Ceritli et al., HydraOpt, arXiv 2507.17706; De Soete and Carroll, K-means clustering in a
    low-dimensional Euclidean space, 1994.
    """
    tasks = deltas.s.shape[0]
    if not 1 <= heads <= tasks:
        raise HydraOptError(f"heads = {heads}: must lie between 1 and the {tasks} tasks")
    if rank < 1:
        raise HydraOptError(f"rank = {rank}: must be at least 1")
    if side not in ("in", "out"):
        raise HydraOptError(f"side = {side!r}: must be 'in' or 'out'")
    if side == "out":
        factors, info = hydra(
            deltas.mT, heads=heads, rank=rank, weights=weights, cores=cores, steps=steps, used=used
        )
        return transpose(factors), info
    weights = decompose.task_weights(deltas.energy) if weights is None else weights
    weights = jnp.where(deltas.energy > 0, weights, 0.0)
    if tasks == 1:
        # a single task shares with no other: the same optimum with fewer roundings
        factors, info = separate(deltas, rank=rank)
        bound = jnp.sum(weights * info.error)
        return factors, info._replace(weights=weights, bound=bound, trace=bound[None])
    q, reduced = decompose.reduce(deltas.u * deltas.s[:, None, :])
    rank = min(rank, q.shape[1])
    trivial = heads in (1, tasks)
    labels = jnp.arange(tasks, dtype=jnp.int32) % heads
    trace, converged = jnp.zeros(0), jnp.array(True)
    if not trivial:
        part = partition(reduced, deltas, weights, heads, rank, steps, used)
        labels, trace, converged = part.labels, part.trace, part.certified
    between = clustering.between(reduced, deltas.v, labels, weights, heads)
    basis, values = decompose.top_eigenvectors(between, rank)
    if used is not None:
        basis = basis * (jnp.arange(rank) < used).astype(basis.dtype)
    projected = matmul(basis.T, reduced)
    average, _ = clustering.membership(labels, weights, heads)
    b = jnp.einsum("kt,tsr,tro->kso", average, projected, deltas.v, precision="highest")
    if heads < tasks:
        every = clustering.between(reduced, deltas.v, jnp.arange(tasks), weights, tasks)
        values = decompose.eigvalsh(every)
    bound = sure_tail(values, rank if used is None else used)
    factors = Factors(
        matmul(q, basis)[None],
        b,
        present(deltas, jnp.zeros(tasks, jnp.int32)),
        present(deltas, labels),
    )
    if cores and heads < tasks:
        factors, trace = add_cores(deltas, factors, weights, steps)
        converged = jnp.abs(trace[-2] - trace[-1]) <= 1e-4 * trace[-1]
    a_hat, b_hat = pair(factors)
    error = losses.squared_errors(deltas.u * deltas.s[:, None, :], deltas.v, a_hat, b_hat)
    error = jnp.maximum(error, 0.0)
    if trivial and not (cores and heads < tasks):
        trace = jnp.sum(weights * error)[None]
    return factors, Info(error, deltas.energy, weights, bound, trace, converged)


def sure_tail(eigenvalues: Array, rank: int | Array) -> Array:
    """`decompose.eigen_tail` minus the error of float32 eigenvalues, so that it stays a lower bound.

    If each of N eigenvalues has an error of at most eps times the largest one, their sum has at most N times
    that.

    >>> print(sure_tail(jnp.array([1.0, 1e-8, 0.0]), 1), sure_tail(jnp.array([1.0, 0.5, 0.0]), 1).round(5))
    0.0 0.5
    """
    noise = eigenvalues.shape[-1] * jnp.finfo(jnp.float32).eps * jnp.max(eigenvalues, -1, initial=0.0)
    return jnp.maximum(decompose.eigen_tail(eigenvalues, rank) - noise, 0.0)


def partition(
    reduced: Array,
    deltas: Svd,
    weights: Array,
    heads: int,
    rank: int,
    steps: int,
    used: Array | None = None,
) -> clustering.Partition:
    """The best partition of tasks into heads that the search finds."""
    gram = decompose.gram(deltas.u * deltas.s[:, None, :], deltas.v)
    if reduced.shape[0] <= EXHAUSTIVE_TASKS:
        kept = rank if used is None else used
        return clustering.exhaustive(reduced, deltas.v, gram, weights, heads, kept, EXHAUSTIVE_LIMIT)
    start = clustering.ward(gram, weights, heads)
    return clustering.reduced_kmeans(reduced, deltas.v, gram, weights, heads, rank, start, steps)


def add_cores(deltas: Svd, factors: Factors, weights: Array, steps: int) -> tuple[Factors, Array]:
    """Factors with a core per task: alternate the shared factor and the heads' row spaces, partition fixed.

    `core[t] = a.T delta_t b[k].T` with orthonormal `a`, `b[k]`; each half-step is an eigenproblem, so the
    loss never rises (higher-order orthogonal iteration, De Lathauwer et al. 2000). It runs in reduced
    coordinates of both sides, so that nothing of size O x O appears.
    """
    heads, rank = len(factors.b), factors.a.shape[-1]
    left = deltas.u * deltas.s[:, None, :]
    q, right = decompose.reduce(deltas.v.mT)
    right = right.mT
    width = min(rank, q.shape[1])
    member = (factors.b_of[None, :] == jnp.arange(heads)[:, None]).astype(weights.dtype) * weights
    of = jnp.maximum(factors.b_of, 0)
    total = jnp.sum(weights * deltas.energy)
    root = decompose.safe_sqrt(weights)[:, None, None]

    def rows_and_cores(a: Array) -> tuple[Array, Array]:
        outer = matmul(matmul(a.T, left), right)
        spread = jnp.einsum("kt,tsr,tsq->krq", member, outer, outer, precision="highest")
        rows = decompose.top_eigenvectors(spread, width)[0].mT
        return rows, matmul(outer, rows[of].mT)

    def step(state: tuple[Array, Array, Array], _: Any) -> tuple[tuple[Array, Array, Array], Array]:
        _, rows, _ = state
        side = decompose.wide(matmul(left, matmul(right, rows[of].mT)) * root)
        a = decompose.leading(side, rank)
        rows, core = rows_and_cores(a)
        return (a, rows, core), total - jnp.sum(weights * jnp.sum(core**2, (1, 2)))

    start = (factors.a[0], *rows_and_cores(factors.a[0]))
    (a, rows, core), trace = jax.lax.scan(step, start, length=steps)
    out = Factors(a[None], matmul(rows, q.T), factors.a_of, factors.b_of, core)
    return out, jnp.maximum(trace, 0.0)
