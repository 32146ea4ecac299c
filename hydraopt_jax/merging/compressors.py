"""Baselines that keep factors of every task: slots, joint diagonalization, shared bases, own SVDs.

Contract: `(a: [T, I, R], b: [T, R, O], weights: [T], *, rank, ...)` of one module to `forms.Factors`. Weights
multiply the tasks' errors.
"""

import jax
import jax.numpy as jnp
from jax import Array

from hydraopt_jax import forms
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import Factors, diagonalization
from hydraopt_jax.linalg import clustering, decompose
from hydraopt_jax.linalg.decompose import matmul
from hydraopt_jax.merging.sums import side_by_side
from hydraopt_jax.merging.truncation import truncate


def separate(a: Array, b: Array, weights: Array, *, rank: int) -> Factors:
    """Each adapter's own truncated SVD, see `forms.separate`; weights have no effect."""
    return forms.separate(decompose.svd(a, b), rank=rank)[0]


def k_merge_slots(gram: Array, slots: int, threshold: float = 1.0) -> Array:
    """The slot of each adapter in K-Merge.

    Adapters arrive in order. If the cosine with every stored mean is below `threshold` and a slot is free,
    the adapter takes a new slot. Otherwise it is merged into the running mean of the nearest slot. Only inner
    products are needed.

    Args:
      gram: `[T, T]` inner products of whole adapters (summed over modules).
      slots: K.
      threshold: cosine from which an adapter is merged even if slots are free; 1 fills the slots first.

    Returns:
      `[T]` int, slot of each task.

    Raises:
      HydraOptError: fewer than one slot.

    >>> gram = jnp.array([[1.0, 0.0, 0.9], [0.0, 1.0, 0.1], [0.9, 0.1, 1.0]])
    >>> print(k_merge_slots(gram, 2))
    [0 1 0]
    """
    tasks = gram.shape[0]
    if slots < 1:
        raise HydraOptError(f"slots = {slots}: must be at least 1")
    slots = min(slots, tasks)
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 1e-30))

    def arrive(members: Array, t: Array) -> tuple[Array, Array]:
        count = members.sum(1)
        mean = members / jnp.maximum(count, 1.0)[:, None]
        own = jnp.einsum("ks,st,kt->k", mean, gram, mean, precision="highest")
        cosine = matmul(mean, gram[:, t]) / (norms[t] * jnp.sqrt(jnp.maximum(own, 1e-30)))
        cosine = jnp.where(count > 0, cosine, -jnp.inf)
        used = jnp.sum(count > 0)
        fresh = (used < slots) & (cosine.max() < threshold)
        slot = jnp.where(fresh, used, jnp.argmax(cosine)).astype(jnp.int32)
        return members.at[slot, t].set(1.0), slot

    return jax.lax.scan(arrive, jnp.zeros((slots, tasks)), jnp.arange(tasks))[1]


def k_merge(
    a: Array,
    b: Array,
    weights: Array,
    *,
    rank: int,
    slots: int = 2,
    threshold: float = 1.0,
    gram: Array | None = None,
) -> Factors:
    """K-Merge: K slots, each the mean delta of its adapters, cut to rank S, see `k_merge_slots`.

    The running mean `(n mean + delta) / (n + 1)` is the mean of the slot's members. It is cut to rank S once,
    at the end.

    Args:
      a, b: in the order of arrival.
      weights: `[T]`, of the tasks in the mean of their slot.
      rank: S.
      slots: K.
      threshold: see `k_merge_slots`.
      gram: `[T, T]` inner products of whole adapters; None for those of this module only.

    Returns:
      Factors with one `a` and one `b` per slot.

    Reference: Shenaj et al., K-Merge: Online Continual Merging of Adapters for On-device Large Language
    Models, 2025, arXiv 2510.13537.
    """
    labels = k_merge_slots(decompose.gram(a, b) if gram is None else gram, slots, threshold)
    # a task without this module has no part in its slot's mean
    here = jnp.any(b != 0, (1, 2)) & jnp.any(a != 0, (1, 2))
    average, _ = clustering.membership(labels, jnp.where(here, weights, 0.0), min(slots, a.shape[0]))
    left, right = jax.lax.map(lambda w: truncate(*side_by_side(a, b, w), rank), average)
    of = jnp.where(here, labels, -1)
    return Factors(left, right, of, of)


def joint_diagonalization(
    a: Array, b: Array, weights: Array, *, rank: int, clusters: int = 1, diagonal: bool = False
) -> Factors:
    """Joint diagonalization, `delta[t] ~= a[k] @ core[t] @ b[k]`, within each of `clusters` groups of tasks.

    Groups are those of `clustering.ward`. Each is fitted by `forms.diagonalization` with weight 0 for the
    other tasks.

    Args:
      a, b: `[T, I, R]`, `[T, R, O]`.
      weights: `[T]`, multiplied with `1 / ||delta_t||^2`.
      rank: S.
      clusters: 1 to T.
      diagonal: whether cores are diagonal (JD-Diag) or full (JD-Full).

    Returns:
      Factors with one `a` and `b` per cluster and a core per task.

    Raises:
      HydraOptError: clusters outside 1..T.

    Reference: Gabrielsson et al., Compress then Serve: Serving Thousands of LoRA Adapters with Little
    Overhead, 2024, arXiv 2407.00066.
    """
    tasks = a.shape[0]
    if not 1 <= clusters <= tasks:
        raise HydraOptError(f"clusters = {clusters}: must lie between 1 and the {tasks} tasks")
    deltas = decompose.svd(a, b)
    importance = weights * decompose.task_weights(deltas.energy)
    if clusters == 1:
        return diagonalization.joint_diagonal(deltas, rank=rank, diagonal=diagonal, weights=importance)[0]
    labels = clustering.ward(decompose.gram(a, b), importance, clusters)

    def one(k: Array) -> Factors:
        inside = jnp.where(labels == k, importance, 0.0)
        return diagonalization.joint_diagonal(deltas, rank=rank, diagonal=diagonal, weights=inside)[0]

    each = jax.lax.map(one, jnp.arange(clusters, dtype=labels.dtype))
    of = forms.present(deltas, labels)
    assert each.core is not None
    return Factors(each.a[:, 0], each.b[:, 0], of, of, each.core[labels, jnp.arange(tasks)])


def share(a: Array, b: Array, weights: Array, *, rank: int) -> Factors:
    """Share: one basis per side for all tasks, and a core per task.

    The bases are the S leading left singular vectors of the concatenated input-side factors, and of the
    concatenated output-side factors. A task stores `core[t] = basis_a.T delta_t basis_b`, or the coefficients
    `[S, R]`, `[R, S]` of its two factors if these are smaller. Each delta is split into factors evenly by its
    SVD, so the result depends only on the deltas. No mean is subtracted.

    Args:
      a, b: `[T, I, R]`, `[T, R, O]`.
      weights: `[T]`, of the tasks in the bases.
      rank: S; at most min(T * R, I) and min(T * R, O) are used.

    Returns:
      Factors with one `a`, one `b` and a full core per task.

    Reference: Kaushik et al., Shared LoRA Subspaces for almost Strict Continual Learning, 2026,
    arXiv 2602.06043.
    """
    deltas = decompose.svd(a, b)
    root = decompose.safe_sqrt(deltas.s * weights[:, None])
    left = decompose.wide(deltas.u * root[:, None, :])
    right = decompose.wide(deltas.v.mT * root[:, None, :])
    x, y = (decompose.leading(side, min(rank, *side.shape)) for side in (left, right))
    core = matmul(matmul(x.T, deltas.u * deltas.s[:, None, :]), matmul(deltas.v, y))
    of = forms.present(deltas, jnp.zeros(a.shape[0], jnp.int32))
    return Factors(x[None], y.T[None], of, of, core)


def entries(factors: Factors, rank: int) -> int:
    """Number of entries to store; a full core counts as its two sides `[S, R]`, `[R, S]` if that is less."""
    if factors.core is None or factors.core.ndim == 2:
        return forms.count(factors)
    tasks, rows, columns = factors.core.shape
    return int(factors.a.size + factors.b.size) + tasks * min(rows * columns, rank * (rows + columns))
