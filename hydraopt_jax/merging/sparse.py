"""Elementwise methods: drop entries of each delta, elect signs, add the rest.

These methods need single entries, so deltas must be formed. `combine` forms one at a time and holds a few
matrices `[I, O]` for any T. The result is cut to rank S by `truncation.truncate_dense`. PEFT's `..._svd`
methods do the same with all deltas in memory.

Trimming is per module as in PEFT; the original TIES code trims over all modules together.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.linalg.decompose import matmul
from hydraopt_jax.merging.truncation import truncate_dense

# (dense delta, number of the task) -> sparse delta
Sparsifier = Callable[[Array, Array], Array]


def combine(
    parts: Any,
    weights: Array,
    dense: Callable[[Any], Array],
    sparsify: Sparsifier,
    elect: str | None = None,
) -> Array:
    """`sum_t w_t s_t`, or TIES's elected and disjoint mean, of `s_t = sparsify(dense(part_t), t)`.

    With `elect`, entry by entry: the sign `g` is that of `sum_t s_t` ("total") or of `sum_t sign(s_t)`
    ("frequency"), plus where it is 0; the result is the mean of `w_t s_t` over the tasks with
    `sign(s_t) = g`.

    Args:
      parts: arrays with leading axis T, from which `dense` makes task t's matrix.
      weights: `[T]`.
      dense: parts of one task -> `[I, O]`.
      sparsify: drops entries.
      elect: None, "total" or "frequency".

    Returns:
      `[I, O]`.

    Raises:
      HydraOptError: an unknown election.

    >>> deltas = jnp.array([[[2.0, -1.0]], [[-1.0, -3.0]]])
    >>> print(combine(deltas, jnp.ones(2), lambda x: x, lambda x, t: x, "total"))
    [[ 2. -2.]]
    """
    if elect not in (None, "total", "frequency"):
        raise HydraOptError(f"elect = {elect!r}: must be total or frequency")
    count = weights.shape[0]
    one = jax.tree.map(lambda x: x[0], parts)
    zero = jnp.zeros(jax.eval_shape(dense, one).shape, jnp.float32)
    tasks = jnp.arange(count)

    def sparse(part: Any, t: Array) -> Array:
        return sparsify(dense(part), t)

    def add(total: Array, x: Any) -> tuple[Array, None]:
        part, t, w = x
        return total + w * sparse(part, t), None

    if elect is None:
        return jax.lax.scan(add, zero, (parts, tasks, weights))[0]

    # sums and counts per sign, so that one pass over the tasks suffices
    def ballot(state: tuple[Array, ...], x: Any) -> tuple[tuple[Array, ...], None]:
        vote, above, below, voters_above, voters_below = state
        part, t, w = x
        s = sparse(part, t)
        vote = vote + (s if elect == "total" else jnp.sign(s))
        above, below = above + jnp.where(s > 0, w * s, 0.0), below + jnp.where(s < 0, w * s, 0.0)
        more, less = voters_above + (s > 0).astype(s.dtype), voters_below + (s < 0).astype(s.dtype)
        return (vote, above, below, more, less), None

    start: tuple[Array, ...] = (zero,) * 5
    found, _ = jax.lax.scan(ballot, start, (parts, tasks, weights))
    vote, above, below, voters_above, voters_below = found
    plus = vote >= 0
    return jnp.where(plus, above, below) / jnp.maximum(jnp.where(plus, voters_above, voters_below), 1.0)


def nth_largest(x: Array, n: Array | int) -> Array:
    """The n-th largest magnitude in `x`, found bit by bit: 31 counts instead of a sort.

    Magnitudes of floats are ordered like their bit patterns. Derivatives treat the result as a constant.

    >>> print(nth_largest(jnp.array([0.5, -3.0, 2.0]), 2))
    2.0
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)

    def step(i: Array, found: Array) -> Array:
        more = found | jnp.left_shift(jnp.int32(1), 30 - i)
        return jnp.where(jnp.sum(bits >= more) >= n, more, found)

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, step, jnp.int32(0)), jnp.float32)


def trim(x: Array, density: float, size: Array | int | None = None) -> Array:
    """`x` with only its `floor(density * size)` largest magnitudes, at least one, and ties of the last.

    Args:
      x: any shape.
      density: fraction kept, in (0, 1].
      size: number of entries that `density` refers to; None for the size of `x`.
    """
    if size is None:
        kept: Any = max(int(density * x.size), 1)
    else:
        kept = jnp.maximum(jnp.floor(density * jnp.asarray(size)).astype(jnp.int32), 1)
    return jnp.where(jnp.abs(x) >= nth_largest(x, kept), x, 0.0)


def column_ranks(x: Array) -> Array:
    """Rank of each magnitude in its column, from 0; equal ones share the lowest. `[I, O]` int.

    It sorts bit patterns, which is several times faster on a CPU than sorting floats with their positions.

    >>> print(column_ranks(jnp.array([[0.5, 2.0], [-3.0, 1.0]])))
    [[0 1]
     [1 0]]
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x).T, jnp.int32)
    ordered = jax.lax.sort(bits, dimension=-1, is_stable=False)
    return jax.vmap(lambda o, b: jnp.searchsorted(o, b, method="scan"))(ordered, bits).T


def drop_at_random(key: Array, density: float) -> Sparsifier:
    """DARE's random mask: keep each entry with probability `density` and divide by it; one draw per task."""

    def sparsify(x: Array, t: Array) -> Array:
        kept = jax.random.bernoulli(jax.random.fold_in(key, t), density, x.shape)
        return jnp.where(kept, x / density, 0.0)

    return sparsify


def _merge(
    a: Array, b: Array, weights: Array, rank: int, sparsify: Sparsifier, elect: str | None = None
) -> tuple[Array, Array]:
    return truncate_dense(combine((a, b), weights, lambda pair: matmul(*pair), sparsify, elect), rank)


def magnitude(a: Array, b: Array, weights: Array, *, rank: int, density: float = 0.2) -> tuple[Array, Array]:
    """`sum_t w_t trim(delta_t)`: each delta's largest entries (PEFT's "magnitude_prune_svd").

    Args:
      a, b, weights, rank: see `sums`.
      density: fraction of entries kept, in (0, 1].
    """
    return _merge(a, b, weights, rank, lambda x, t: trim(x, density))


def ties(
    a: Array, b: Array, weights: Array, *, rank: int, density: float = 0.2, elect: str = "total"
) -> tuple[Array, Array]:
    """TIES: trim each delta, elect a sign per entry, average the values that agree with it; see `combine`.

    Args:
      a, b, rank: see `sums`.
      weights: `[T]`; 1 each gives the paper's disjoint mean.
      density: fraction of entries kept, in (0, 1].
      elect: signs by summed values ("total", the paper's) or by count ("frequency").

    Reference: Yadav et al., TIES-Merging: Resolving Interference When Merging Models, 2023, arXiv 2306.01708.
    """
    return _merge(a, b, weights, rank, lambda x, t: trim(x, density), elect)


def dare(
    a: Array, b: Array, weights: Array, *, rank: int, key: Array, density: float = 0.5
) -> tuple[Array, Array]:
    """DARE: `sum_t w_t mask_t * delta_t / density`, the mask's entries kept with probability `density`.

    Args:
      a, b, weights, rank: see `sums`.
      key: of the masks.
      density: in (0, 1].

    Reference: Yu et al., Language Models are Super Mario, 2023, arXiv 2311.03099.
    """
    return _merge(a, b, weights, rank, drop_at_random(key, density))


def dare_ties(
    a: Array,
    b: Array,
    weights: Array,
    *,
    rank: int,
    key: Array,
    density: float = 0.5,
    elect: str = "total",
) -> tuple[Array, Array]:
    """DARE's masks, then TIES's election and disjoint mean; see `dare` and `ties` for the arguments."""
    return _merge(a, b, weights, rank, drop_at_random(key, density), elect)


def della(
    a: Array,
    b: Array,
    weights: Array,
    *,
    rank: int,
    key: Array,
    density: float = 0.5,
    epsilon: float = 0.2,
    elect: str = "total",
) -> tuple[Array, Array]:
    """DELLA: DARE with keep probabilities that rise with the magnitude, then TIES's election and mean.

    Among the I entries of one output, the one of magnitude rank r = 0 .. I - 1 is kept with probability
    `p = density - epsilon / 2 + epsilon * r / (I - 1)` and divided by p.

    Args:
      a, b, weights, rank: see `sums`.
      key: of the masks.
      density: mean probability of keeping an entry.
      epsilon: width of the range of probabilities, which must lie in (0, 1].
      elect: see `ties`.

    Raises:
      HydraOptError: probabilities outside (0, 1].

    Reference: Deep et al., DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based
    Sampling, 2024, arXiv 2406.11617.
    """
    low, high = density - epsilon / 2, density + epsilon / 2
    if not (epsilon >= 0 and low > 0 and high <= 1 + 1e-9):
        raise HydraOptError(
            f"epsilon = {epsilon:g} with density = {density:g}: probabilities from {low:g} to {high:g} leave "
            "(0, 1]: lower epsilon"
        )

    def sparsify(x: Array, t: Array) -> Array:
        probability = low + epsilon * column_ranks(x).astype(x.dtype) / max(x.shape[0] - 1, 1)
        kept = jax.random.uniform(jax.random.fold_in(key, t), x.shape) < probability
        return jnp.where(kept, x / probability, 0.0)

    return _merge(a, b, weights, rank, sparsify, elect)


def breadcrumbs(
    a: Array, b: Array, weights: Array, *, rank: int, density: float = 0.15, outliers: float = 0.01
) -> tuple[Array, Array]:
    """Model Breadcrumbs: drop the largest and the smallest entries of each delta, add the others.

    `sum_t w_t m_t * delta_t`, where the mask m_t leaves out the fraction `outliers` of largest magnitude and
    keeps the next fraction `density`.

    Args:
      a, b, weights, rank: see `sums`.
      density: fraction kept, in (0, 1 - outliers].
      outliers: fraction of largest entries dropped, in [0, 1).

    Raises:
      HydraOptError: fractions that sum to more than 1.

    Reference: Davari and Belilovsky, Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks,
    2023, arXiv 2312.06795.
    """
    if not (0 <= outliers < 1 and density + outliers <= 1 + 1e-9):
        raise HydraOptError(
            f"outliers = {outliers:g} with density = {density:g}: must not be negative nor sum to more than 1"
        )

    def sparsify(x: Array, t: Array) -> Array:
        large, kept = int(outliers * x.size), max(int(density * x.size), 1)
        size = jnp.abs(x)
        below = size < nth_largest(x, large) if large else True
        return jnp.where(below & (size >= nth_largest(x, large + kept)), x, 0.0)

    return _merge(a, b, weights, rank, sparsify)
