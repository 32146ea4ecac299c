"""Gradient descent with Optax: one step, and a loop of it in one compiled computation.

A loss takes the parameters and optionally, in this order, a batch, a PRNG key and auxiliary state. With
auxiliary state it returns the pair of its value and the new state. `minimize` loops on the device.
`refinement` uses the same `step` in a loop on the host, which rounds factors between steps.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

Params = Any


class DescentState(NamedTuple):
    """State of a descent: parameters, optimizer state, and the loss's auxiliary state or None."""

    params: Params
    opt_state: optax.OptState
    aux: Any = None


class Trace(NamedTuple):
    """Diagnostics of a run.

    Attributes:
      loss: of the returned parameters; of the last step if the loss takes batches or a key.
      trace: `[steps]` loss of every step, NaN after the stop.
      steps: steps taken.
      converged: whether it stopped because the loss no longer fell.
      aux: the loss's auxiliary state after the last step.
    """

    loss: Array
    trace: Array
    steps: Array
    converged: Array
    aux: Any = None


class Carry(NamedTuple):
    """Carry of the loop in `minimize`: the state, the best parameters, and the state of the stop rule."""

    state: DescentState
    best: Params
    best_loss: Array
    reference: Array
    stale: Array
    step: Array
    trace: Array


def step(
    loss: Callable[..., Any], optimizer: optax.GradientTransformation, state: DescentState, *given: Any
) -> tuple[DescentState, Array]:
    """The state after one step of the optimizer, and the loss before it.

    Args:
      loss: `(params, *given) -> scalar`; with auxiliary state `(params, *given, aux) -> (scalar, aux)`.
      optimizer: any `optax.GradientTransformation`.
      state: before.
      given: further arguments of the loss, such as a batch.
    """
    if state.aux is None:
        value, gradient = jax.value_and_grad(loss)(state.params, *given)
        aux = None
    else:
        found, gradient = jax.value_and_grad(loss, has_aux=True)(state.params, *given, state.aux)
        value, aux = found
    # Optax promotes its counts of steps
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return DescentState(optax.apply_updates(state.params, updates), opt_state, aux), value


def minimize(
    loss: Callable[..., Any],
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    batches: Any = None,
    key: Array | None = None,
    aux: Any = None,
    tolerance: float = 1e-5,
    patience: int = 100,
) -> tuple[Params, Trace]:
    """Parameters that minimize a loss, found with Optax in one `while_loop`; and a trace.

    Without batches and key the loss is a fixed function. The best parameters found are returned (the start is
    a candidate), and the loop stops when the best loss has fallen by less than `tolerance`, relative, in
    `patience` steps. With batches or a key the loss changes from step to step. Then all steps are taken, and
    the last parameters are returned.

    Derivatives are those of the iterates, with respect to the start and to values that `loss` and `optimizer`
    close over. Reverse mode keeps the states of all steps.

    More than eight arguments: the loss's own inputs (batches, key, state), and when to stop.

    Args:
      loss: `(params, [batch], [key], [aux]) -> scalar`, with those of the optional arguments that are given
        here; with `aux` it returns `(scalar, aux)`. Traced once.
      params: pytree of arrays, the start.
      optimizer: any `optax.GradientTransformation`.
      steps: upper limit.
      batches: pytree of arrays `[N, ...]`; step i takes batch i modulo N.
      key: step i takes `jax.random.fold_in(key, i)`.
      aux: pytree of arrays, the loss's own state, such as running means.
      tolerance: relative fall of the loss below which progress has ended.
      patience: number of steps after which progress is checked.

    >>> x, info = minimize(lambda x: (x - 3.0) ** 2, jnp.array(0.0), optax.sgd(0.4), steps=50)
    >>> print(f"{x:.3f}")
    3.000
    >>> loss = lambda x, y: (x - y) ** 2
    >>> x, info = minimize(loss, jnp.array(0.0), optax.sgd(0.01), steps=800, batches=jnp.array([2.0, 4.0]))
    >>> print(f"{x:.1f}")
    3.0
    """
    varies = batches is not None or key is not None

    def given(i: Array) -> list[Any]:
        out = []
        if batches is not None:
            count = len(jax.tree.leaves(batches)[0])
            out.append(jax.tree.map(lambda x: x[i % count], batches))
        return out if key is None else [*out, jax.random.fold_in(key, i)]

    def body(run: Carry) -> Carry:
        params = run.state.params
        state, value = step(loss, optimizer, run.state, *given(run.step))
        value = value.astype(run.best_loss.dtype)
        better = value < run.best_loss
        best_loss = jnp.where(better, value, run.best_loss)
        fresh = varies | (best_loss < run.reference * (1 - tolerance))
        return Carry(
            state,
            jax.tree.map(lambda x, y: jnp.where(better, x, y), params, run.best),
            best_loss,
            jnp.where(fresh, best_loss, run.reference),
            jnp.where(fresh, 0, run.stale + 1),
            run.step + 1,
            run.trace.at[run.step].set(value),
        )

    # of a dtype of its own, whatever the loss has
    worst = jnp.full((), jnp.inf, jnp.result_type(float))
    start = Carry(
        DescentState(params, optimizer.init(params), aux),
        params,
        worst,
        worst,
        jnp.array(0),
        jnp.array(0),
        jnp.full(steps, jnp.nan, worst.dtype),
    )
    # values that the loss closes over become arguments: custom derivatives only see arguments
    closed, shape = jax.make_jaxpr(body, return_shape=True)(start)
    end = _descend(
        partial(_evaluate, closed.jaxpr, jax.tree.structure(shape)), steps, patience, start, closed.consts
    )
    state, converged = end.state, end.stale >= patience
    if varies:
        return state.params, Trace(end.trace[end.step - 1], end.trace, end.step, converged, state.aux)
    last = loss(state.params) if aux is None else loss(state.params, state.aux)[0]
    better = last < end.best_loss
    best = jax.tree.map(lambda x, y: jnp.where(better, x, y), state.params, end.best)
    return best, Trace(jnp.minimum(last, end.best_loss), end.trace, end.step, converged, state.aux)


def _evaluate(jaxpr: Jaxpr, structure: Any, run: Carry, *captured: Array) -> Carry:
    """The run after `jaxpr`, whose constants are `captured`."""
    leaves = jaxpr_as_fun(ClosedJaxpr(jaxpr, captured))(*jax.tree.leaves(run))
    return jax.tree.unflatten(structure, leaves)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _descend(
    body: Callable[..., Carry], steps: int, patience: int, start: Carry, captured: Sequence[Array]
) -> Carry:
    """`run = body(run, *captured)` until `steps` or `patience` run out."""
    return jax.lax.while_loop(lambda x: _running(x, steps, patience), lambda x: body(x, *captured), start)


@_descend.defjvp
def _descend_jvp(
    body: Callable[..., Carry], steps: int, patience: int, primals: Any, tangents: Any
) -> tuple[Carry, Carry]:
    """Tangents from a scan that does nothing after the stop, because a while loop has no transpose."""

    def scanned(start: Carry, captured: Sequence[Array]) -> Carry:
        def move(run: Carry, _: None) -> tuple[Carry, None]:
            go = _running(run, steps, patience)
            return jax.tree.map(lambda x, y: jnp.where(go, x, y), body(run, *captured), run), None

        return jax.lax.scan(move, start, length=steps)[0]

    return _descend(body, steps, patience, *primals), jax.jvp(scanned, primals, tangents)[1]


def _running(run: Carry, steps: int, patience: int) -> Array:
    return (run.step < steps) & (run.stale < patience)
