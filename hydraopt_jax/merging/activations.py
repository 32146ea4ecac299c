"""RegMean: the merged delta whose outputs are closest to each task's outputs on that task's inputs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.linalg import decompose
from hydraopt_jax.linalg.decompose import matmul
from hydraopt_jax.merging.truncation import truncate

# ridge relative to the mean eigenvalue, so that directions without inputs have a solution
RIDGE = 1e-6


def regmean(
    a: Array,
    b: Array,
    weights: Array,
    *,
    rank: int,
    moments: Sequence[Array],
    off_diagonal: float = 0.9,
) -> tuple[Array, Array]:
    """`(sum_t w_t C_t)^-1 sum_t w_t C_t delta_t`, which minimizes `sum_t w_t E_t ||x (delta - delta_t)||^2`.

    `C_t = E[x x.T]` is the second moment of the module's inputs on task t, with off-diagonal entries scaled
    down as in the paper. The base model's weights cancel. The right-hand side is kept as factors,
    `[C_1 a_1, ...] @ [b_1; ...]`, and moments are added one at a time.

    Args:
      a, b: `[T, I, R]`, `[T, R, O]`.
      weights: `[T]`.
      rank: S; `T * R` keeps all.
      moments: T of `[I, I]`, of `[I, 1 + K]` for one of low rank, or `[I]` where only the diagonal is known,
        see `calibration.matrix_of`.
      off_diagonal: factor of the off-diagonal entries, in [0, 1].

    Returns:
      `(a: [I, S], b: [S, O])`.

    Raises:
      HydraOptError: the number of moments is not T, or a moment has another size.

    Reference: Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, 2022,
    arXiv 2212.09849.
    """
    tasks, inputs, _ = a.shape
    if len(moments) != tasks:
        raise HydraOptError(f"regmean: {len(moments)} second moments for {tasks} tasks: give one each")
    for moment in moments:
        shape = jnp.shape(moment)
        if shape[:1] != (inputs,) or len(shape) > 2 or shape[-1] > inputs:
            raise HydraOptError(f"regmean: a second moment is {shape}, the module has {inputs} inputs")
    # a matrix is formed only where one is given: diagonals are for modules where it would be too large
    whole = any(jnp.ndim(x) == 2 for x in moments)

    def scaled(moment: Array) -> Array:
        moment = jnp.asarray(moment, jnp.float32)
        if moment.ndim == 1:
            return jnp.diag(moment) if whole else moment
        if moment.shape[1] < inputs:
            moment = jnp.diag(moment[:, 0]) + matmul(moment[:, 1:], moment[:, 1:].T)
        return off_diagonal * moment + (1 - off_diagonal) * jnp.diag(jnp.diagonal(moment))

    total, sides = jnp.zeros((inputs, inputs) if whole else inputs), []
    for t, moment in enumerate(map(scaled, moments)):
        total = total + weights[t] * moment
        sides.append(weights[t] * (matmul(moment, a[t]) if whole else moment[:, None] * a[t]))
    side = decompose.wide(jnp.stack(sides))
    ridge = RIDGE * (jnp.trace(total) if whole else total.sum()) / inputs + 1e-30
    if whole:
        left = jax.scipy.linalg.solve(total + ridge * jnp.eye(inputs), side, assume_a="sym")
    else:
        left = side / (total + ridge)[:, None]
    return truncate(left, b.reshape(-1, b.shape[-1]), rank)
