"""How alike the adapters of a collection are: factors, deltas and the subspaces they span."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hydraopt_jax.adapters import Adapter, Adapters, layer_kind, stack
from hydraopt_jax.linalg import decompose

# least jump of the mean similarity between groups of alike tasks
JUMP = 0.1


class Similarity(NamedTuple):
    """Task-by-task similarity of one module (`...` empty), or of many stacked ones.

    Attributes:
      input_factor: `[..., T, T]` cosine of the flattened `a`s, in [-1, 1]. Depends on the gauge.
      output_factor: `[..., T, T]` cosine of the flattened `b`s, in [-1, 1]. Depends on the gauge.
      delta: `[..., T, T]` cosine of the deltas, in [-1, 1].
      input_subspace: `[..., T, T]` mean squared cosine of the principal angles of the input sides, in [0, 1].
      output_subspace: `[..., T, T]` the same of the output sides.

    All are 0 where a task lacks the module or its delta is zero, on the diagonal too.
    """

    input_factor: Array
    output_factor: Array
    delta: Array
    input_subspace: Array
    output_subspace: Array


class Summary(NamedTuple):
    """Similarities of a collection.

    Attributes:
      tasks: the T task names.
      modules: module name -> Similarity of `[T, T]` arrays.
      kinds: layer kind -> Similarity averaged over its modules.
      mean: Similarity averaged over all modules.

    Averages leave out the modules that one task of the pair lacks.
    """

    tasks: tuple[str, ...]
    modules: Mapping[str, Similarity]
    kinds: Mapping[str, Similarity]
    mean: Similarity


def cosine(gram: Array) -> Array:
    """Cosines from inner products, `g[s, t] / sqrt(g[s, s] g[t, t])`; 0 where a norm is 0.

    Args:
      gram: `[..., T, T]`.

    Returns:
      `[..., T, T]` in [-1, 1].

    >>> print(cosine(jnp.array([[4.0, 1.0], [1.0, 1.0]])))
    [[1.  0.5]
     [0.5 1. ]]
    """
    inverse = decompose.safe_inverse(decompose.safe_sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1)))
    # One norm at a time: the product of two norms of tiny adapters would underflow.
    return jnp.clip(gram * inverse[..., :, None] * inverse[..., None, :], -1.0, 1.0)


def factor_cosine(x: Array) -> Array:
    """Cosine of flattened factors, `<x_s, x_t> / (||x_s|| ||x_t||)`: the paper's measure.

    It depends on the gauge: `(a @ g, inv(g) @ b)` is the same adapter as `(a, b)` with other cosines. It is
    meaningful for tasks trained from one initialization; `Similarity.delta` is meaningful for all.

    Args:
      x: `[T, ...]`, the `a`s or the `b`s of one module.

    Returns:
      `[T, T]` in [-1, 1].

    Reference: Ceritli et al., HydraOpt, EMNLP 2025, arXiv 2507.17706.

    >>> print(factor_cosine(jnp.array([[[1.0], [0.0]], [[-2.0], [0.0]]])))
    [[ 1. -1.]
     [-1.  1.]]
    """
    flat = _unit(x.astype(jnp.float32)).reshape(x.shape[0], -1)
    return cosine(decompose.matmul(flat, flat.T))


def delta_cosine(a: Array, b: Array) -> Array:
    """Cosine of deltas, `<delta_s, delta_t> / (||delta_s|| ||delta_t||)`, through `decompose.gram`.

    Args:
      a, b: `[T, I, R]`, `[T, R, O]`.

    Returns:
      `[T, T]` in [-1, 1]; gauge-invariant.

    >>> a, b = jnp.array([[[1.0], [0.0]], [[2.0], [0.0]]]), jnp.array([[[1.0, 0.0]], [[1.0, 1.0]]])
    >>> print(delta_cosine(a, b).round(3))
    [[1.    0.707]
     [0.707 1.   ]]
    """
    return cosine(decompose.gram(_unit(a.astype(jnp.float32)), _unit(b.astype(jnp.float32))))


def numerical_rank(s: Array) -> Array:
    """Count of singular values above float32 round-off of the largest.

    Args:
      s: `[..., R]`, descending.

    Returns:
      `[...]` int, 0 for a zero delta.

    >>> print(numerical_rank(jnp.array([[2.0, 1.0, 1e-9], [0.0, 0.0, 0.0]])))
    [2 0]
    """
    # With R columns and a few hundred rows, rounding errors reach some tens of units in the last place.
    return jnp.sum(s > 1e-5 * s[..., :1], -1)


def subspace_overlap(u: Array, rank: Array) -> Array:
    """Mean squared cosine of the principal angles of every two tasks' subspaces.

    `sum_j cos_j^2 / min(rank_s, rank_t)`, where the sum is `||u_s.T @ u_t||^2`; 0 where a rank is 0.

    Args:
      u: `[T, I, R]`, whose first `rank[t]` columns are an orthonormal basis of task t's subspace.
      rank: `[T]`.

    Returns:
      `[T, T]` in [0, 1]; 1 where the smaller subspace lies in the larger.

    References: Bjorck and Golub, Numerical methods for computing angles between linear subspaces, 1973;
    Hu et al., LoRA, ICLR 2022, section 7.2 (phi, with equal ranks).

    >>> plane, line = jnp.eye(4)[:, :2], jnp.array([[0.5, 0.0]] * 4)
    >>> print(subspace_overlap(jnp.stack([plane, line]), jnp.array([2, 1])))
    [[1.  0.5]
     [0.5 1. ]]
    """
    # A direction of numerically zero energy is arbitrary and does not belong to the subspace.
    kept = u * (jnp.arange(u.shape[-1]) < rank[:, None])[:, None, :].astype(u.dtype)
    smaller = jnp.minimum(rank[:, None], rank[None, :]).astype(u.dtype)
    return jnp.clip(decompose.gram(kept, kept.mT) / jnp.maximum(smaller, 1), 0.0, 1.0)


def _unit(x: Array) -> Array:
    """Each task's factor scaled to a largest entry of 1, so that no square overflows or underflows.

    Later results do not depend on the scale, so derivatives treat it as a constant.
    """
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), keepdims=True))
    return x / jnp.where(size > 0, size, 1.0)


def _measure(a: Array, b: Array, svd: decompose.Svd) -> Similarity:
    """Similarity of one module from factors and the decompositions of its T deltas."""
    rank = numerical_rank(svd.s)
    present = rank > 0
    pair = present[:, None] & present[None, :]
    return Similarity(
        jnp.where(pair, factor_cosine(a), 0.0),
        jnp.where(pair, factor_cosine(b), 0.0),
        jnp.where(pair, delta_cosine(a, b), 0.0),
        subspace_overlap(svd.u, rank),
        subspace_overlap(svd.v.mT, rank),
    )


_batched_measure = jax.jit(jax.vmap(_measure))


def _decompose(a: Array, b: Array) -> decompose.Svd:
    """Decompositions of rescaled deltas; ranks and directions do not depend on the scale."""
    scale = jax.vmap(jax.vmap(lambda x: _unit(x[None])[0]))
    return decompose.batched_svd(scale(jnp.asarray(a, jnp.float32)), scale(jnp.asarray(b, jnp.float32)))


def compare(a: Array, b: Array) -> Similarity:
    """All measures for modules of one shape.

    Args:
      a, b: `[M, T, I, R]`, `[M, T, R, O]`.

    Returns:
      Similarity of `[M, T, T]` arrays.

    >>> print(compare(jnp.ones((1, 2, 3, 1)), jnp.ones((1, 2, 1, 3))).delta.shape)
    (1, 2, 2)
    """
    return _batched_measure(jnp.asarray(a), jnp.asarray(b), _decompose(a, b))


def average(parts: list[Similarity]) -> Similarity:
    """Mean similarity over modules; for each pair of tasks over the modules that both adapt (0 if none).

    Args:
      parts: Similarities of `[T, T]` arrays.

    Returns:
      Similarity of `[T, T]` NumPy arrays.
    """
    stacked = [np.stack([np.asarray(getattr(x, field)) for x in parts]) for field in Similarity._fields]
    # The subspace cosine of a present task with itself is 1, so the diagonal says which tasks are present.
    present = np.diagonal(stacked[Similarity._fields.index("input_subspace")], axis1=1, axis2=2) > 0
    count = np.maximum((present[:, :, None] & present[:, None, :]).sum(0), 1)
    return Similarity(*(x.sum(0) / count for x in stacked))


def summarize(adapters: Adapters | Sequence[Adapter]) -> Summary:
    """Similarity of every module of a collection, of every layer kind and of the whole.

    Args:
      adapters: the collection, stacked or not.

    Returns:
      Summary of float32 NumPy arrays.

    Raises:
      HydraOptError: adapters that make no collection, see `adapters.stack`.

    >>> from hydraopt_jax import synthetic
    >>> found = summarize(synthetic.collection(tasks=2, likeness=1.0))
    >>> print(found.mean.delta.round(3), list(found.kinds))
    [[1. 1.]
     [1. 1.]] ['q_proj', 'k_proj', 'v_proj', 'o_proj']
    """
    modules: dict[str, Similarity] = {}
    stacked = adapters if isinstance(adapters, Adapters) else stack(adapters)
    for bucket in stacked.buckets:
        found = [np.asarray(x) for x in compare(jnp.asarray(bucket.a), jnp.asarray(bucket.b))]
        modules |= {name: Similarity(*(x[m] for x in found)) for m, name in enumerate(bucket.modules)}
    kinds: dict[str, list[Similarity]] = {}
    for name, value in modules.items():
        kinds.setdefault(layer_kind(name), []).append(value)
    return Summary(
        stacked.tasks, modules, {k: average(v) for k, v in kinds.items()}, average(list(modules.values()))
    )


def cluster_order(matrix: np.ndarray) -> list[int]:
    """An order of the T tasks of a similarity `[T, T]` in which similar tasks are neighbors.

    It is the optimal order of the leaves of the average-linkage tree over `1 - similarity`.

    Reference: Z. Bar-Joseph et al., Fast optimal leaf ordering for hierarchical clustering, 2001.

    >>> cluster_order(np.array([[1.0, 0.1, 0.9], [0.1, 1.0, 0.2], [0.9, 0.2, 1.0]]))
    [0, 2, 1]
    """
    from scipy.cluster.hierarchy import leaves_list

    tasks = len(matrix)
    if tasks < 3:
        return list(range(tasks))
    order = leaves_list(average_linkage(matrix)).tolist()
    # the order can be reversed: take the direction that begins with the earlier task
    return order if order[0] < order[-1] else order[::-1]


def average_linkage(matrix: np.ndarray) -> np.ndarray:
    """The average-linkage tree over `1 - similarity` of at least 2 tasks, as SciPy has it, `[T - 1, 4]`."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    far = np.maximum(1.0 - (matrix + matrix.T) / 2, 0.0).astype(np.float64)
    np.fill_diagonal(far, 0.0)
    return linkage(squareform(far, checks=False), "average", optimal_ordering=True)


def groups(matrix: np.ndarray) -> list[list[int]]:
    """Groups of alike tasks of a similarity `[T, T]`, the largest first; a task like no other is alone.

    The average-linkage tree is cut at the largest jump of the mean distance at which it joins two groups, the
    last one that to unrelated tasks (similarity 0). Without a jump of `JUMP` every task is alone.

    >>> groups(np.array([[1.0, 0.1, 0.9], [0.1, 1.0, 0.2], [0.9, 0.2, 1.0]]))
    [[0, 2], [1]]
    >>> groups(np.eye(2))
    [[0], [1]]
    """
    from scipy.cluster.hierarchy import fcluster

    tasks = len(matrix)
    labels = np.arange(tasks)
    if tasks > 1:
        tree = average_linkage(matrix)
        heights = np.append(tree[:, 2], max(1.0, tree[-1, 2]))
        jumps = np.diff(heights)
        if jumps.max() >= JUMP:
            labels = fcluster(tree, heights[np.argmax(jumps)], "distance")
    rows: dict[int, list[int]] = {}
    for t, label in enumerate(labels.tolist()):
        rows.setdefault(label, []).append(t)
    return sorted(rows.values(), key=lambda x: -len(x))


def nearest_pairs(matrix: np.ndarray, count: int) -> list[tuple[int, int, float]]:
    """The `count` most similar pairs of tasks of a similarity `[T, T]`: `(s, t, value)` with s < t.

    >>> nearest_pairs(np.array([[1.0, 0.1, 0.9], [0.1, 1.0, 0.2], [0.9, 0.2, 1.0]]), 2)
    [(0, 2, 0.9), (1, 2, 0.2)]
    """
    s, t = np.triu_indices(len(matrix), 1)
    values = np.asarray(matrix)[s, t]
    chosen = np.argsort(-values, kind="stable")[:count]
    return [(int(s[k]), int(t[k]), float(values[k])) for k in chosen]
