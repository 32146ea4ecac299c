"""Partitions of tasks into groups that share a head: enumeration, Ward's hierarchy, reduced k-means.

All costs follow from Gram matrices of the reduced input-side coordinates `c: [T, N, R]` (scaled by the
singular values) and the output-side products `v v.T`; nothing of size I or O appears.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hydraopt_jax.linalg.decompose import eigen_tail, eigvalsh, matmul, top_eigenvectors


@lru_cache(maxsize=64)
def partitions(tasks: int, heads: int) -> np.ndarray:
    """All partitions of `tasks` items into exactly `heads` sets, as label rows `[P, tasks]`.

    P is the Stirling number of the second kind; rows are restricted growth strings.

    >>> partitions(3, 2).tolist()
    [[0, 0, 1], [0, 1, 0], [0, 1, 1]]
    """
    rows: list[tuple[int, ...]] = [(0,)]
    for t in range(1, tasks):
        rows = [(*r, k) for r in rows for k in range(min(max(r) + 2, heads))]
        rows = [r for r in rows if heads - 1 - max(r) <= tasks - 1 - t]
    return np.array(rows, np.int32)


def membership(labels: Array, weights: Array, heads: int) -> tuple[Array, Array]:
    """Averaging matrix `[K, T]` (row k takes the weighted mean of head k's tasks) and head masses `[K]`."""
    ones = (labels[None, :] == jnp.arange(heads)[:, None]).astype(weights.dtype) * weights
    mass = ones.sum(-1)
    return ones / jnp.where(mass > 0, mass, 1.0)[:, None], mass


def between(c: Array, v: Array, labels: Array, weights: Array, heads: int) -> Array:
    """Scatter of the head means in reduced coordinates, `sum_k n_k mean_k @ mean_k.T`: `[N, N]`.

    Args:
      c: `[T, N, R]` reduced input sides times singular values.
      v: `[T, R, O]` output sides.
      labels: `[T]` head of each task.
      weights: `[T]`.
      heads: K.
    """
    t, n, r = c.shape
    average, mass = membership(labels, weights, heads)
    pair = jnp.einsum("ks,k,kt->st", average, mass, average, precision="highest")
    flat = v.reshape(t * r, -1)
    products = matmul(flat, flat.T).reshape(t, r, t, r) * pair[:, None, :, None]
    side = jnp.moveaxis(c, 0, 1).reshape(n, t * r)
    return matmul(side, products.reshape(t * r, t * r), side.T)


def scatter(gram: Array, labels: Array, weights: Array, heads: int) -> Array:
    """Within-head scatter `sum_t w_t ||delta_t - mean||^2` from the Gram matrix of deltas `[T, T]`."""
    average, mass = membership(labels, weights, heads)
    means = jnp.einsum("ks,st,kt->k", average, gram, average, precision="highest")
    return jnp.maximum(jnp.sum(weights * jnp.diag(gram)) - jnp.sum(mass * means), 0.0)


def hierarchy(gram: Array, weights: Array) -> Array:
    """Ward's minimum-variance hierarchy, cut at every number of clusters.

    Merges, one pair at a time, the two clusters whose union raises the scatter least (Ward 1963), by the
    Lance-Williams recurrence. Cuts are nested.

    Args:
      gram: `[T, T]` Gram matrix of deltas.
      weights: `[T]`, 0 for a task without a delta.

    Returns:
      `[T, T]` labels; row K - 1 is the cut at K clusters, labeled 0 to K - 1 by first appearance.
    """
    t = gram.shape[0]
    mass = jnp.maximum(weights, 1e-30)
    norms = jnp.diag(gram)
    squared = jnp.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0.0)
    cost = squared * mass[:, None] * mass[None, :] / (mass[:, None] + mass[None, :])
    cost = jnp.where(jnp.eye(t, dtype=bool), jnp.inf, cost)

    def merge(state: tuple[Array, Array, Array], _: Any) -> tuple[tuple[Array, Array, Array], Array]:
        cost, mass, labels = state
        flat = jnp.argmin(cost)
        i, j = jnp.minimum(flat // t, flat % t), jnp.maximum(flat // t, flat % t)
        joint = (mass[i] + mass) * cost[i] + (mass[j] + mass) * cost[j] - mass * cost[i, j]
        joint = joint / (mass[i] + mass[j] + mass)
        joint = joint.at[i].set(jnp.inf)
        gone = jnp.isinf(cost[i]) | (jnp.arange(t) == j)
        joint = jnp.where(gone, jnp.inf, joint)
        cost = cost.at[i].set(joint).at[:, i].set(joint).at[j].set(jnp.inf).at[:, j].set(jnp.inf)
        labels = jnp.where(labels == j, i, labels)
        return (cost, mass.at[i].add(mass[j]), labels), labels

    own = jnp.arange(t)
    _, merged = jax.lax.scan(merge, (cost, mass, own), length=t - 1)
    cuts = jnp.concatenate([own[None], merged])[::-1]
    return jax.vmap(lambda labels: (jnp.cumsum(labels == own) - 1)[labels].astype(jnp.int32))(cuts)


def ward(gram: Array, weights: Array, heads: int) -> Array:
    """Labels `[T]` of Ward's hierarchy cut at `heads` clusters, see `hierarchy`."""
    return hierarchy(gram, weights)[heads - 1]


class Partition(NamedTuple):
    """A partition and how it was found.

    Attributes:
      labels: `[T]` head of each task.
      loss: weighted squared error `scatter + tau`.
      trace: `[steps]` loss after each alternation (of the exhaustive search: the best so far).
      certified: whether no partition into K heads can be better.
    """

    labels: Array
    loss: Array
    trace: Array
    certified: Array


def exhaustive(
    c: Array, v: Array, gram: Array, weights: Array, heads: int, rank: int | Array, limit: int
) -> Partition:
    """The best partition into K heads by search in order of the scatter, a lower bound of the loss.

    Only the `limit` partitions of least scatter are solved. The result is certified if the next scatter is
    not below the best loss found.
    """
    table = jnp.asarray(partitions(c.shape[0], heads))
    floor = jax.vmap(lambda x: scatter(gram, x, weights, heads))(table)
    order = jnp.argsort(floor)[: min(limit, table.shape[0])]

    def loss(row: Array) -> Array:
        values = eigvalsh(between(c, v, table[row], weights, heads))
        return floor[row] + eigen_tail(values, rank)

    losses = jax.lax.map(loss, order)
    best = jnp.argmin(losses)
    rest = jnp.sort(floor)[limit] if limit < table.shape[0] else jnp.inf
    trace = jax.lax.cummin(losses)
    return Partition(table[order[best]], losses[best], trace, losses[best] <= rest)


def reduced_kmeans(
    c: Array, v: Array, gram: Array, weights: Array, heads: int, rank: int, labels: Array, steps: int
) -> Partition:
    """Reduced k-means (De Soete and Carroll 1994): alternate the eigen-step and the assignment.

    The loss `scatter + tau(between, rank)` never rises. It is constant once no task changes its head.

    Args:
      c, v, gram, weights, heads: see `between` and `scatter`.
      rank: S, width of the shared factor.
      labels: `[T]` start.
      steps: alternations.
    """
    t, n, r = c.shape
    flat = v.reshape(t * r, -1)
    products = matmul(flat, flat.T)

    def losses(labels: Array) -> tuple[Array, Array]:
        basis, values = top_eigenvectors(between(c, v, labels, weights, heads), rank)
        return basis, scatter(gram, labels, weights, heads) + jnp.sum(values[rank:])

    def step(labels: Array, _: Any) -> tuple[Array, Array]:
        basis, loss = losses(labels)
        side = matmul(basis.T, jnp.moveaxis(c, 0, 1).reshape(n, t * r))
        inside = (matmul(side.T, side) * products).reshape(t, r, t, r).sum((1, 3))
        average, _ = membership(labels, weights, heads)
        cross = matmul(inside, average.T)
        own = jnp.einsum("ks,st,kt->k", average, inside, average, precision="highest")
        return fill_empty(own[None, :] - 2 * cross, weights), loss

    labels, trace = jax.lax.scan(step, labels, length=steps)
    _, loss = losses(labels)
    return Partition(labels, loss, jnp.append(trace, loss), jnp.array(False))


def fill_empty(distance: Array, weights: Array) -> Array:
    """Nearest head of each task, from distances `[T, K]`; an empty head takes the most distant task."""
    labels = jnp.argmin(distance, -1).astype(jnp.int32)
    tasks = jnp.arange(labels.shape[0])

    def fill(k: int, labels: Array) -> Array:
        count = (labels[:, None] == jnp.arange(distance.shape[1])[None, :]).sum(0)
        served = distance[tasks, labels] - distance.min()
        spare = jnp.where((count[labels] > 1) & (weights > 0), weights * (1.0 + served), -1.0)
        worst = jnp.argmax(spare)
        take = (count[k] == 0) & (spare[worst] > 0)
        return jnp.where(take, labels.at[worst].set(k), labels)

    return jax.lax.fori_loop(0, distance.shape[1], fill, labels)
