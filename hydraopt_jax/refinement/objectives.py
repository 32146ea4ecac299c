"""What a refinement makes small: the divergence of the model's outputs, over all tasks.

Reference: Hinton et al., Distilling the knowledge in a neural network, arXiv 1503.02531.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from hydraopt_jax import adapters, forms
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.refinement.rounding import Modules

Lora = dict[str, tuple[Array, Array]]
# as a `jax.tree_util.Partial` its arrays are arguments of what is compiled, not constants in it
Forward = Callable[[Lora, Any], Array]


def stacked(modules: Modules) -> Lora:
    """Factors of all tasks, module -> `(a: [T, I, S], b: [T, S, O])`, terms concatenated, cores folded in."""
    out = {}
    for name, terms in modules.items():
        # a module that is zero for all tasks has no terms
        if not terms:
            continue
        pairs = [forms.pair(x) for x in terms]
        out[name] = jnp.concatenate([a for a, _ in pairs], -1), jnp.concatenate([b for _, b in pairs], -2)
    return out


def all_tasks(parts: Sequence[Lora], places: Sequence[Array], tasks: int) -> Lora:
    """Factors of all tasks, from those of parts with some tasks and modules each; zeros for an absent task.

    Args:
      parts: module -> `(a: [t, I, S], b: [t, S, O])`; no task has a module in two of them.
      places: positions `[t]` of each part's tasks among all.
      tasks: T.

    >>> ones = {"q": (jnp.ones((1, 2, 1)), jnp.ones((1, 1, 2)))}
    >>> a, b = all_tasks([ones, ones], [jnp.array([2]), jnp.array([0])], 3)["q"]
    >>> print(a[:, 0, 0], b.shape)
    [1. 0. 1.] (3, 1, 2)
    """
    found: dict[str, list[tuple[Array, Array, Array]]] = {}
    for part, at in zip(parts, places, strict=True):
        for name, (a, b) in part.items():
            found.setdefault(name, []).append((at, a, b))
    out = {}
    for name, rows in found.items():
        _, first, last = rows[0]
        rank = max(a.shape[2] for _, a, _ in rows)
        left = jnp.zeros((tasks, first.shape[1], rank))
        right = jnp.zeros((tasks, rank, last.shape[2]))
        for at, a, b in rows:
            left, right = left.at[at, :, : a.shape[2]].set(a), right.at[at, : b.shape[1]].set(b)
        out[name] = left, right
    return out


def originals(collection: Sequence[Adapter]) -> Lora:
    """The adapters, padded to one rank per bucket: module -> `(a: [T, I, R], b: [T, R, O])`."""
    out = {}
    for bucket in adapters.stack(collection).buckets:
        for m, name in enumerate(bucket.modules):
            out[name] = jnp.asarray(bucket.a[m]), jnp.asarray(bucket.b[m])
    return out


def divergence(
    forward: Forward,
    mask: Callable[[Any], Array] | None = None,
    *,
    at_once: int | None = None,
    weights: Sequence[float] | None = None,
) -> Partial:
    """The loss `mean KL(p_adapter || p_store)` of the next-token distributions.

    Args:
      forward: `(lora, batch) -> logits [..., V]` of one task, `lora` module -> `(a: [I, S], b: [S, O])`. Bind
        a model's weights with `jax.tree_util.Partial(forward, weights)`: under `jit` they are then arguments;
        those of a closure become constants, which a large model compiles slowly with.
      mask: `batch -> [...]` bool, the predictions that count; None for all.
      at_once: number of tasks computed in parallel; None for all.
      weights: of the tasks in the mean; None for equal ones.

    Returns:
      `(stored, original, batch) -> scalar`, all three with a leading task axis; a pytree of what `forward`
      has bound.
    """
    bound = forward if isinstance(forward, Partial) else Partial(forward)

    def loss(forward: Forward, stored: Lora, original: Lora, batch: Any) -> Array:
        job = stored, jax.lax.stop_gradient(original), batch
        run = functools.partial(one, forward)
        each = jax.vmap(run)(job) if at_once is None else jax.lax.map(run, job, batch_size=at_once)
        return jnp.average(each, weights=None if weights is None else jnp.asarray(weights))

    def one(forward: Forward, job: tuple[Lora, Lora, Any]) -> Array:
        stored, original, batch = job
        wanted = jax.nn.log_softmax(forward(original, batch).astype(jnp.float32))
        found = jax.nn.log_softmax(forward(stored, batch).astype(jnp.float32))
        # tokens that a model masks have a logit of -inf
        open_ = jnp.isfinite(wanted)
        lost = jnp.where(open_, wanted, 0.0) - jnp.where(open_, found, 0.0)
        each = jnp.sum(jnp.exp(wanted) * lost, -1)
        counted = jnp.ones_like(each) if mask is None else mask(batch).astype(each.dtype)
        return jnp.sum(each * counted) / jnp.maximum(jnp.sum(counted), 1.0)

    return Partial(loss, bound)
