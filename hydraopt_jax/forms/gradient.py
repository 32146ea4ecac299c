"""HydraOpt's form by gradient descent on all factors jointly, with any loss and any Optax optimizer.

`hydra` has the contract of `forms.hydra`. A run from the mean of the adapters' factors stands in for the
published method. A run from the closed form is never worse than the closed form: the best iterate is kept.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from hydraopt_jax import forms
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import losses
from hydraopt_jax.forms.descent import minimize
from hydraopt_jax.forms.hyperparameters import STARTS, Gradient
from hydraopt_jax.linalg import clustering, decompose
from hydraopt_jax.linalg.decompose import Svd, matmul

Params = Any
CLOSED_START = Gradient()


def default_optimizer(steps: int, rate: float = 2e-2) -> optax.GradientTransformation:
    """Adam with cosine decay to zero over `steps`; the default rate suits deltas of unit energy.

    `eps_root` keeps derivatives of the iterates finite if a gradient is exactly zero.
    """
    return optax.adam(optax.cosine_decay_schedule(rate, steps), eps_root=1e-16)


def mean_start(a: Array, b: Array, labels: Array, heads: int, rank: int) -> tuple[Array, Array]:
    """The initialization from the mean: mean of all input factors, and mean output factor per head.

    Args:
      a, b: `[T, I, R]`, `[T, R, O]` factors of the adapters; the mean depends on their gauge.
      labels: `[T]` head index of each task.
      heads: K.
      rank: S, at most R.

    Returns:
      Shared factor `[I, S]` and heads `[K, S, O]`.
    """
    if rank > a.shape[2]:
        raise HydraOptError(
            f"rank = {rank}: a start from the mean needs a rank of at most the adapters' {a.shape[2]}; "
            "use the closed-form start"
        )
    average, _ = clustering.membership(labels, jnp.ones(a.shape[0]), heads)
    return a.mean(0)[:, :rank], jnp.einsum("kt,tro->kro", average, b)[:, :rank]


def hydra(
    a: Array,
    b: Array,
    deltas: Svd,
    *,
    heads: int,
    rank: int,
    side: str = "in",
    weights: Array | None = None,
    cores: bool = False,
    solver: Gradient = CLOSED_START,
    loss: Callable[..., Array] = losses.weighted_error,
    tolerance: float = 1e-5,
) -> tuple[forms.Factors, forms.Info]:
    """HydraOpt's form of one module by gradient descent on shared and task-specific factors jointly.

    It runs in reduced coordinates of both sides, which preserve errors, on deltas scaled to unit mean energy:
    one learning rate suits all modules.

    More than eight arguments: those of `forms.hydra`, whose place it takes, and the solver's.

    Args:
      a, b: `[T, I, R]`, `[T, R, O]` factors of the adapters, used by start "mean".
      deltas: decompositions of the deltas.
      heads, rank, side, weights, cores: as in `forms.hydra`.
      solver: start, optimizer and steps; from the closed form it is never worse than that.
      loss: `(a, b, a_hat, b_hat, weights) -> scalar` over `[T, ...]` stacks.
      tolerance: as in `minimize`.

    Returns:
      Factors and Info, as of `forms.hydra`.

    Raises:
      HydraOptError: unknown start, or a bad form (see `forms.hydra`).
    """
    if solver.start not in STARTS:
        raise HydraOptError(f"start = {solver.start!r}: must be 'closed' or 'mean'")
    form: dict[str, Any] = {"heads": heads, "rank": rank, "weights": weights, "cores": cores}
    if side == "out":
        flipped = b.mT, a.mT, deltas.mT
        factors, info = hydra(*flipped, **form, solver=solver, loss=loss, tolerance=tolerance)
        return forms.transpose(factors), info
    closed, closed_info = forms.hydra(deltas, side=side, **form)
    weights = closed_info.weights
    qa, ca = decompose.reduce(deltas.u * deltas.s[:, None, :])
    qb, cb = decompose.reduce(deltas.v.mT)
    scale = decompose.safe_sqrt(jnp.mean(deltas.energy)) + jnp.finfo(jnp.float32).tiny
    ca, cb = ca / scale, cb.mT
    labels = jnp.maximum(closed.b_of, 0)
    first, b_start, core = jnp.asarray(closed.a[0]), jnp.asarray(closed.b), closed.core
    a_start = first
    if solver.start == "mean":
        width = closed.a.shape[2]
        a_start, b_start = mean_start(a, b, labels, heads, width)
        if core is not None:
            core = jnp.broadcast_to(jnp.eye(width, dtype=a.dtype), (a.shape[0], width, width))
    unbalanced = a_start
    a_start, b_all = decompose.balance(a_start, jnp.moveaxis(b_start, 0, 1).reshape(a_start.shape[1], -1))
    b_start = jnp.moveaxis(b_all.reshape(b_all.shape[0], heads, -1), 0, 1) if core is None else b_start
    a_start = a_start if core is None else unbalanced
    params = (matmul(qa.T, a_start) / jnp.sqrt(scale), matmul(b_start, qb) / jnp.sqrt(scale), core)

    def stacked(params: Params) -> tuple[Array, Array]:
        shared, head, core = params
        out = head[labels] if core is None else matmul(core, head[labels])
        return jnp.broadcast_to(shared, (out.shape[0], *shared.shape)), out

    best, trace = minimize(
        lambda p: loss(ca, cb, *stacked(p), weights * scale**2),
        params,
        solver.optimizer or default_optimizer(solver.steps),
        steps=solver.steps,
        tolerance=tolerance,
    )
    shared, head, core = best
    root = jnp.sqrt(scale)
    factors = closed._replace(a=matmul(qa, shared * root)[None], b=matmul(head * root, qb.T), core=core)
    error = forms.squared_errors(deltas, factors)
    kept = (jnp.sum(weights * error) <= jnp.sum(weights * closed_info.error)) | (solver.start == "mean")
    factors = jax.tree.map(lambda x, y: jnp.where(kept, x, y), factors, closed)
    error = jnp.where(kept, error, closed_info.error)
    return factors, closed_info._replace(error=error, trace=trace.trace, converged=trace.converged)
