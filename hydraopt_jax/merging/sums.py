"""Sums of deltas, exact in the factors; and PEFT's sum of factors, which is not a sum of deltas.

All merging methods have one contract: from `(a: [T, I, R], b: [T, R, O], weights: [T], *, rank: S, ...)` of
one module, with the LoRA scale folded into `b`, to `(a: [I, S], b: [S, O])`. An absent task has zeros.
"""

import jax.numpy as jnp
from jax import Array

from hydraopt_jax.linalg import decompose
from hydraopt_jax.merging.truncation import truncate


def side_by_side(a: Array, b: Array, weights: Array) -> tuple[Array, Array]:
    """`[I, T * R]` and `[T * R, O]` whose product is `sum_t w_t delta_t`."""
    return decompose.wide(a), (b * weights[:, None, None]).reshape(-1, b.shape[-1])


def linear(a: Array, b: Array, weights: Array, *, rank: int) -> tuple[Array, Array]:
    """Best rank-S approximation of `sum_t w_t a[t] @ b[t]`: the mean delta where `w_t = 1 / T`.

    Task arithmetic (Ilharco et al., Editing models with task arithmetic, 2023, arXiv 2212.04089) is the same
    with `w_t` as the scale of each task. PEFT calls it "svd". It is exact for `rank >= T * R`.

    Args:
      a, b: `[T, I, R]`, `[T, R, O]`.
      weights: `[T]`.
      rank: S.

    Returns:
      `(a: [I, S], b: [S, O])`.

    >>> a, b = jnp.ones((2, 3, 1)), jnp.stack([jnp.ones((1, 2)), 3 * jnp.ones((1, 2))])
    >>> merged = linear(a, b, jnp.array([0.5, 0.5]), rank=1)
    >>> print((merged[0] @ merged[1]).round(4)[0])
    [2. 2.]
    """
    return truncate(*side_by_side(a, b, weights), rank)


def concatenation(a: Array, b: Array, weights: Array) -> tuple[Array, Array]:
    """`sum_t w_t a[t] @ b[t]` exactly, with all `T * R` directions (PEFT's "cat").

    Args:
      a, b: `[T, I, R]`, `[T, R, O]`.
      weights: `[T]`.

    Returns:
      `(a: [I, T * R], b: [T * R, O])`.
    """
    return decompose.balance(*side_by_side(a, b, weights))


def linear_factors(a: Array, b: Array, weights: Array) -> tuple[Array, Array]:
    """`(sum_t sign(w_t) sqrt|w_t| a[t]) @ (sum_t sqrt|w_t| b[t])`: PEFT's "linear", kept for comparison.

    WARNING: this is not a mean of deltas. It adds the cross terms `a[s] @ b[t]`, and it depends on how each
    delta is split into factors: rotating one adapter's factors does not change the adapter, but changes the
    result. Use `linear`. The result is PEFT's if all adapters have one scale (PEFT distributes the scale over
    both sides; here it is in `b`).

    Args:
      a: `[T, I, R]`; adapters of a lower rank are padded (PEFT refuses them).
      b: `[T, R, O]`.
      weights: `[T]`.

    Returns:
      `(a: [I, R], b: [R, O])`.
    """
    root = decompose.safe_sqrt(jnp.abs(weights))
    return jnp.einsum("t,tir->ir", root * jnp.sign(weights), a), jnp.einsum("t,tro->ro", root, b)
