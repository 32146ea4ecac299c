"""Block subspace iteration: leading directions of a matrix of which only products are at hand.

Reference: Halko, Martinsson and Tropp, Finding structure with randomness, 2011, arXiv 0909.4061.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from hydraopt_jax.linalg.decompose import matmul, orthonormal, top_eigenvectors

# largest eigenproblem that is solved directly
DIRECT = 256
# change of the captured fraction of the energy at which iteration stops; upper limit of rounds
TOLERANCE = 1e-5
ROUNDS = 60


def iterate(apply: Callable[[Array], Array], size: int, width: int, rounds: int) -> Array:
    """An orthonormal basis `[size, width]` near a matrix's leading directions, from a random start.

    Args:
      apply: product with the `[size, size]` matrix, `[size, width] -> [size, width]`.
      size: n.
      width: of the block; some more than the directions that are wanted.
      rounds: of `q = orthonormal(apply(q))`, each one product.

    >>> q = iterate(lambda x: jnp.diag(jnp.array([9.0, 0.1, 0.1])) @ x, 3, 1, 8)
    >>> print(abs(q[:, 0]).round(3))
    [1. 0. 0.]
    """
    q = jax.random.normal(jax.random.key(0), (size, width))
    for _ in range(rounds):
        q = orthonormal(apply(q))
    return q


def leading_eigenpairs(
    apply: Callable[[Array], Array], size: int, columns: int, rank: int, trace: Array
) -> tuple[Array, Array]:
    """Leading eigenvectors `[size, S]` and eigenvalues `[S]` of a positive semi-definite matrix.

    Iteration with Rayleigh-Ritz values, two products per round, until the captured fraction of the trace is
    stable. One round is exact if the block is as wide as the matrix's range.

    Args:
      apply: `[size, P] -> [size, P]`.
      size: n.
      columns: upper limit of the matrix's rank.
      rank: S.
      trace: trace of the matrix.
    """
    reach = min(size, columns)
    width = reach if reach <= DIRECT else min(reach, rank + max(rank, 8))

    def ritz(q: Array) -> tuple[Array, Array, Array]:
        product = apply(q)
        vectors, values = top_eigenvectors(matmul(q.mT, product), min(rank, width))
        return product, vectors, values[: min(rank, width)]

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        q, _, now, k = state
        product, _, values = ritz(q)
        return orthonormal(apply(product)), now, values.sum(), k + 1

    def open_(state: tuple[Array, Array, Array, Array]) -> Array:
        _, before, now, k = state
        return (k < 2) | ((k < ROUNDS) & (now - before > TOLERANCE * trace))

    # one product finds the range of a matrix no wider than the block; the loop is for the others
    q = iterate(apply, size, width, 1)
    if width < reach:
        zero = jnp.zeros_like(trace)
        q, *_ = jax.lax.while_loop(open_, step, (q, zero - 1, zero, jnp.zeros((), jnp.int32)))
    _, vectors, values = ritz(q)
    return matmul(q, vectors), values
