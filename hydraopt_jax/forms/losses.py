"""Losses of stored factors, differentiable and free of deltas.

The three levels of the product (weights, activations, outputs) share these forms: an activation loss is
the weight loss of adapters whose `a` was replaced by `L.T @ a`, `C = E[x x.T] = L @ L.T`; an output loss is
any function of factors the caller gives to `descent.minimize`.
"""

import jax.numpy as jnp
from jax import Array

from hydraopt_jax.linalg.decompose import inner


def squared_errors(a: Array, b: Array, a_hat: Array, b_hat: Array) -> Array:
    """`||a_t b_t - a_hat_t b_hat_t||^2` by expansion: `|x|^2 - 2 <x, y> + |y|^2`, each an R x R product.

    Cheap and smooth, for optimization; its round-off is about 1e-6 of the energy. To report errors use
    `decompose.residual_energy`.

    Args:
      a, b: `[T, I, R]`, `[T, R, O]`.
      a_hat, b_hat: `[T, I, S]`, `[T, S, O]`.

    Returns:
      `[T]`.
    """
    cross = inner(a, b, a_hat, b_hat)
    return inner(a, b, a, b) - 2 * cross + inner(a_hat, b_hat, a_hat, b_hat)


def weighted_error(a: Array, b: Array, a_hat: Array, b_hat: Array, weights: Array) -> Array:
    """`sum_t w_t ||a_t b_t - a_hat_t b_hat_t||^2`; relative errors where `w_t = 1 / ||delta_t||^2`."""
    return jnp.sum(weights * squared_errors(a, b, a_hat, b_hat))
