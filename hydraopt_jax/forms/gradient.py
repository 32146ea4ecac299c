"""The joint Optax loop: shared and task-specific factors together, any loss, any optimizer.

`minimize` is the loop; `hydra` is HydraOpt's form fitted by it, the same contract as `forms.hydra`. A run
from the mean of the adapters' factors stands for the published method; a run from the closed form can
only improve on it, because the best iterate is kept.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from hydraopt_jax import forms
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import losses
from hydraopt_jax.linalg import clustering, decompose
from hydraopt_jax.linalg.decompose import Svd, matmul

Params = Any


class State(NamedTuple):
    """What the loop carries: current and best parameters, the optimizer's state, and the stop rule's."""

    params: Params
    opt_state: optax.OptState
    best: Params
    best_loss: Array
    reference: Array
    stale: Array
    step: Array
    trace: Array


class Trace(NamedTuple):
    """Diagnostics of a run: `loss` of the returned parameters, `trace: [steps]` (NaN after the stop),
    `steps` taken, and whether it stopped because the loss no longer fell."""

    loss: Array
    trace: Array
    steps: Array
    converged: Array


def minimize(
    loss: Callable[[Params], Array],
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    tolerance: float = 1e-5,
    patience: int = 100,
) -> tuple[Params, Trace]:
    """Minimize `loss(params)` with Optax in one `while_loop`; return the best parameters met.

    It stops after `steps`, or when the best loss has fallen by less than `tolerance` of itself in
    `patience` steps. The first iterate counts: the result is never worse than `params`. Derivatives are those
    of the iterates, for the start and for what `loss` and `optimizer` close over; in reverse mode the states
    of all steps are kept.

    Args:
      loss: pytree -> scalar; traced once.
      params: pytree of arrays, the start.
      optimizer: any `optax.GradientTransformation`.
      steps: upper limit.
      tolerance: relative fall of the loss below which progress has ended.
      patience: steps between two looks at progress.

    Returns:
      `(params, trace)`.

    >>> import jax.numpy as jnp, optax
    >>> x, info = minimize(lambda x: (x - 3.0) ** 2, jnp.array(0.0), optax.sgd(0.4), steps=50)
    >>> print(f"{x:.3f}")
    3.000
    """

    def body(state: State) -> State:
        value, grads = jax.value_and_grad(loss)(state.params)
        better = value < state.best_loss
        best = jax.tree.map(lambda x, y: jnp.where(better, x, y), state.params, state.best)
        best_loss = jnp.where(better, value, state.best_loss)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        fresh = best_loss < state.reference * (1 - tolerance)
        return State(
            optax.apply_updates(state.params, updates),
            opt_state,
            best,
            best_loss,
            jnp.where(fresh, best_loss, state.reference),
            jnp.where(fresh, 0, state.stale + 1),
            state.step + 1,
            state.trace.at[state.step].set(value),
        )

    start = State(
        params,
        optimizer.init(params),
        params,
        jnp.array(jnp.inf),
        jnp.array(jnp.inf),
        jnp.array(0),
        jnp.array(0),
        jnp.full(steps, jnp.nan),
    )
    # what the loss closes over becomes an argument: custom derivatives see their arguments alone
    closed, shape = jax.make_jaxpr(body, return_shape=True)(start)
    end = _descend(
        partial(_evaluate, closed.jaxpr, jax.tree.structure(shape)), steps, patience, start, closed.consts
    )
    last = loss(end.params)
    better = last < end.best_loss
    best = jax.tree.map(lambda x, y: jnp.where(better, x, y), end.params, end.best)
    return best, Trace(jnp.minimum(last, end.best_loss), end.trace, end.step, end.stale >= patience)


def _evaluate(jaxpr: Jaxpr, structure: Any, state: State, *captured: Array) -> State:
    """The state after `jaxpr`, whose constants are `captured`."""
    leaves = jaxpr_as_fun(ClosedJaxpr(jaxpr, captured))(*jax.tree.leaves(state))
    return jax.tree.unflatten(structure, leaves)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _descend(
    body: Callable[..., State], steps: int, patience: int, start: State, captured: Sequence[Array]
) -> State:
    """`state = body(state, *captured)` until `steps` or `patience` run out."""
    return jax.lax.while_loop(lambda s: _running(s, steps, patience), lambda s: body(s, *captured), start)


@_descend.defjvp
def _descend_jvp(
    body: Callable[..., State], steps: int, patience: int, primals: Any, tangents: Any
) -> tuple[State, State]:
    """A while loop has no transpose: tangents come from a scan that stands still after the stop."""

    def scanned(start: State, captured: Sequence[Array]) -> State:
        def step(state: State, _: None) -> tuple[State, None]:
            go = _running(state, steps, patience)
            return jax.tree.map(lambda x, y: jnp.where(go, x, y), body(state, *captured), state), None

        return jax.lax.scan(step, start, length=steps)[0]

    return _descend(body, steps, patience, *primals), jax.jvp(scanned, primals, tangents)[1]


def _running(state: State, steps: int, patience: int) -> Array:
    return (state.step < steps) & (state.stale < patience)


def default_optimizer(steps: int, rate: float = 2e-2) -> optax.GradientTransformation:
    """Adam with a cosine decay to zero over `steps`; the rate suits deltas scaled to unit energy.

    `eps_root` keeps derivatives of the iterates finite where a gradient is exactly zero.
    """
    return optax.adam(optax.cosine_decay_schedule(rate, steps), eps_root=1e-16)


def mean_start(a: Array, b: Array, labels: Array, heads: int, rank: int) -> tuple[Array, Array]:
    """The published start: the mean of all input factors, and the mean output factor of each head.

    Args:
      a, b: `[T, I, R]`, `[T, R, O]` as the adapters hold them (the mean depends on their gauge).
      labels: `[T]` head of each task.
      heads: K.
      rank: S, at most R.

    Returns:
      `[I, S]` and `[K, S, O]`.
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
    start: str = "closed",
    optimizer: optax.GradientTransformation | None = None,
    loss: Callable[..., Array] = losses.weighted_error,
    steps: int = 1000,
    tolerance: float = 1e-5,
) -> tuple[forms.Factors, forms.Info]:
    """HydraOpt's form of one module by gradient descent, shared and task-specific factors jointly.

    It runs in the reduced coordinates of both sides, where errors are unchanged, on deltas scaled to unit
    mean energy, so that one learning rate serves all modules.

    Args:
      a, b: `[T, I, R]`, `[T, R, O]` the adapters' factors; used by the start from the mean.
      deltas: their decompositions.
      heads, rank, side, weights, cores: as in `forms.hydra`.
      start: "closed" (from `forms.hydra`; never worse than it) or "mean" (stands for the published method).
      optimizer: any `optax.GradientTransformation`; None for `default_optimizer(steps)`.
      loss: `(a, b, a_hat, b_hat, weights) -> scalar` over `[T, ...]` stacks.
      steps, tolerance: as in `minimize`.

    Returns:
      Factors and Info, as `forms.hydra` does.

    Raises:
      HydraOptError: unknown start, or a bad form (see `forms.hydra`).
    """
    if start not in ("closed", "mean"):
        raise HydraOptError(f"start = {start!r}: must be 'closed' or 'mean'")
    if side == "out":
        factors, info = hydra(
            b.mT,
            a.mT,
            deltas.mT,
            heads=heads,
            rank=rank,
            weights=weights,
            cores=cores,
            start=start,
            optimizer=optimizer,
            loss=loss,
            steps=steps,
            tolerance=tolerance,
        )
        return forms.transpose(factors), info
    closed, closed_info = forms.hydra(deltas, heads=heads, rank=rank, side=side, weights=weights, cores=cores)
    weights = closed_info.weights
    qa, ca = decompose.reduce(deltas.u * deltas.s[:, None, :])
    qb, cb = decompose.reduce(deltas.v.mT)
    scale = decompose.safe_sqrt(jnp.mean(deltas.energy)) + jnp.finfo(jnp.float32).tiny
    ca, cb = ca / scale, cb.mT
    labels = jnp.maximum(closed.b_of, 0)
    a_start, b_start, core = closed.a[0], closed.b, closed.core
    if start == "mean":
        width = closed.a.shape[2]
        a_start, b_start = mean_start(a, b, labels, heads, width)
        core = None if core is None else jnp.broadcast_to(jnp.eye(width), (a.shape[0], width, width))
    a_start, b_all = decompose.balance(a_start, jnp.moveaxis(b_start, 0, 1).reshape(a_start.shape[1], -1))
    b_start = jnp.moveaxis(b_all.reshape(b_all.shape[0], heads, -1), 0, 1) if core is None else b_start
    a_start = a_start if core is None else closed.a[0]
    params = (matmul(qa.T, a_start) / jnp.sqrt(scale), matmul(b_start, qb) / jnp.sqrt(scale), core)

    def stacked(params: Params) -> tuple[Array, Array]:
        shared, head, core = params
        out = head[labels] if core is None else matmul(core, head[labels])
        return jnp.broadcast_to(shared, (out.shape[0], *shared.shape)), out

    best, trace = minimize(
        lambda p: loss(ca, cb, *stacked(p), weights * scale**2),
        params,
        default_optimizer(steps) if optimizer is None else optimizer,
        steps=steps,
        tolerance=tolerance,
    )
    shared, head, core = best
    root = jnp.sqrt(scale)
    factors = closed._replace(a=matmul(qa, shared * root)[None], b=matmul(head * root, qb.T), core=core)
    error = forms.errors(deltas, factors)
    kept = (jnp.sum(weights * error) <= jnp.sum(weights * closed_info.error)) | (start == "mean")
    factors = jax.tree.map(lambda x, y: jnp.where(kept, x, y), factors, closed)
    error = jnp.where(kept, error, closed_info.error)
    return factors, closed_info._replace(error=error, trace=trace.trace, converged=trace.converged)
