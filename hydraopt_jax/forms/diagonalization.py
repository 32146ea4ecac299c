"""Joint diagonalization: both sides shared, a core per task.

It has the contract of `forms`: decompositions of one module's T deltas in, factors and `Info` out.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hydraopt_jax import forms
from hydraopt_jax.forms import Factors, Info
from hydraopt_jax.linalg import decompose
from hydraopt_jax.linalg.decompose import Svd, matmul


def joint_diagonal(
    deltas: Svd,
    *,
    rank: int,
    diagonal: bool = False,
    weights: Array | None = None,
    steps: int = 20,
) -> tuple[Factors, Info]:
    """Both sides shared, a core per task: `delta[t] ~= a @ core[t] @ b`, the core full or diagonal.

    Full cores: higher-order orthogonal iteration (`forms.add_cores` with one head), the better of two starts.
    Diagonal ones: the canonical polyadic decomposition by alternating least squares. The loss never rises.

    Args:
      deltas: T decompositions of one module.
      rank: S.
      diagonal: whether cores are diagonal.
      weights: `[T]`; None for `1 / ||delta_t||^2`.
      steps: alternations.

    Returns:
      Factors with `core: [T, S, S]` or `[T, S]`, and Info with the two-sided bound `max(tau_in, tau_out)`,
      which holds for diagonal cores too: full ones contain them.

    Raises:
      HydraOptError: rank below 1.

    Reference: Gabrielsson et al., Compress then Serve, arXiv 2407.00066; Carroll and Chang, 1970.
    """
    tasks = deltas.s.shape[0]
    common, info = forms.hydra(deltas, heads=tasks, rank=rank, weights=weights)
    _, other = forms.hydra(deltas, heads=tasks, rank=rank, side="out", weights=weights)
    bound = jnp.maximum(info.bound, other.bound)
    if diagonal:
        factors, trace = polyadic(deltas, rank, info.weights, steps)
        error = forms.squared_errors(deltas, factors)
        settled = jnp.abs(trace[-2] - trace[-1]) <= 1e-4 * trace[-1]
        return factors, Info(error, info.energy, info.weights, bound, trace, settled)
    factors, found = full_cores(deltas, jnp.asarray(common.a), info.weights, steps)
    return factors, found._replace(bound=bound)


def full_cores(deltas: Svd, common: Array, weights: Array, steps: int) -> tuple[Factors, Info]:
    """One head with cores; a single task is its own truncated SVD.

    Two starts: the directions of the mean, and the leading directions of all tasks together (`common: [1, I,
    S]`, as in the higher-order SVD). The former is better for similar tasks, the latter for dissimilar ones.
    """
    rank = common.shape[-1]
    if deltas.s.shape[0] == 1:
        factors, info = forms.separate(deltas, rank=rank)
        width = factors.a.shape[-1]
        lost = jnp.sum(weights * info.error)
        info = info._replace(weights=weights, bound=lost, trace=jnp.broadcast_to(lost, info.trace.shape))
        return factors._replace(core=jnp.eye(width, dtype=factors.a.dtype)[None]), info
    mean, info = forms.hydra(deltas, heads=1, rank=rank, weights=weights, cores=True, steps=steps)
    other, trace = forms.add_cores(deltas, mean._replace(a=common), weights, steps)
    better = trace[-1] < info.trace[-1]
    factors, trace = jax.tree.map(lambda x, y: jnp.where(better, x, y), (other, trace), (mean, info.trace))
    settled = jnp.abs(trace[-2] - trace[-1]) <= 1e-4 * trace[-1]
    return factors, info._replace(error=forms.squared_errors(deltas, factors), trace=trace, converged=settled)


def polyadic(deltas: Svd, rank: int, weights: Array, steps: int) -> tuple[Factors, Array]:
    """Diagonal cores by alternating least squares from the leading directions of the weighted sum."""
    tasks = deltas.s.shape[0]
    left, right = deltas.u * deltas.s[:, None, :], deltas.v
    root = decompose.safe_sqrt(weights)[:, None, None]
    start = decompose.svd(decompose.wide(left * root), right.reshape(-1, right.shape[-1]))
    rank = min(rank, start.s.shape[-1])

    def solve(system: Array, target: Array) -> Array:
        ridge = 1e-7 * jnp.trace(system) + 1e-30
        return jnp.linalg.solve(system + ridge * jnp.eye(rank, dtype=system.dtype), target)

    def cores(a: Array, b: Array) -> Array:
        system = matmul(a.T, a) * matmul(b, b.T)
        cross = jnp.sum(matmul(a.T, left) * matmul(right, b.T).mT, -1)
        return solve(system, cross.T).T

    def step(state: tuple[Array, Array, Array], _: Any) -> tuple[tuple[Array, Array, Array], Array]:
        a, b, c = state
        weighted = jnp.einsum("t,ts,tr->sr", weights, c, c)
        toward = jnp.einsum("t,tir,trs,ts->is", weights, left, matmul(right, b.T), c)
        a = solve(weighted * matmul(b, b.T), toward.T).T
        a = a / jnp.maximum(decompose.safe_sqrt(jnp.sum(a**2, 0)), 1e-30)
        c = cores(a, b)
        weighted = jnp.einsum("t,ts,tr->sr", weights, c, c)
        toward = jnp.einsum("t,ts,tsr,tro->so", weights, c, matmul(a.T, left), right)
        b = solve(weighted * matmul(a.T, a), toward)
        b = b / jnp.maximum(decompose.safe_sqrt(jnp.sum(b**2, 1, keepdims=True)), 1e-30)
        c = cores(a, b)
        lost = decompose.residual_energy(
            left, right, jnp.broadcast_to(a, (tasks, *a.shape)), c[..., None] * b
        )
        return (a, b, c), jnp.sum(weights * lost)

    a, b = start.u[:, :rank], start.v[:rank]
    (a, b, c), trace = jax.lax.scan(step, (a, b, cores(a, b)), length=steps)
    index = forms.present(deltas, jnp.zeros(tasks, jnp.int32))
    return Factors(a[None], b[None], index, index, c), trace
