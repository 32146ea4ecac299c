"""Objectives of a refinement: losses of stored factors against the original ones.

Both are functions `(stored, original, batch) -> scalar` over all tasks: the relative squared error of deltas,
with metrics in their coordinates, and the divergence of the model's outputs.

Reference: Hinton et al., Distilling the knowledge in a neural network, arXiv 1503.02531.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hydraopt_jax import adapters, forms
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.forms import losses
from hydraopt_jax.linalg import decompose
from hydraopt_jax.rate_control.metrics import Metrics
from hydraopt_jax.refinement.rounding import Modules

Lora = dict[str, tuple[Array, Array]]
Forward = Callable[[Lora, Any], Array]


def stacked(modules: Modules) -> Lora:
    """Factors of all tasks, module -> `(a: [T, I, S], b: [T, S, O])`, terms concatenated, cores folded in."""
    out = {}
    for name, terms in modules.items():
        pairs = [forms.pair(x) for x in terms]
        out[name] = jnp.concatenate([a for a, _ in pairs], -1), jnp.concatenate([b for _, b in pairs], -2)
    return out


def originals(collection: Sequence[Adapter]) -> Lora:
    """The adapters, padded to one rank per bucket: module -> `(a: [T, I, R], b: [T, R, O])`."""
    out = {}
    for bucket in adapters.stack(collection).buckets:
        for m, name in enumerate(bucket.modules):
            out[name] = jnp.asarray(bucket.a[m]), jnp.asarray(bucket.b[m])
    return out


def quadratic(metrics: Mapping[str, Metrics] | None = None) -> Callable[[Lora, Lora, Any], Array]:
    """The loss `mean_{m, t} ||D||^2 / ||delta||^2`, `D = delta - fit`, in the coordinates of given metrics.

    With metrics of both sides, `tr(C D G D.T)` is in units of the model's outputs. Then the loss is the sum
    of these over the sum of `tr(C delta G delta.T)`, so that modules are weighted by their effect on the
    outputs.
    """
    metrics = metrics or {}
    roots = {
        n: tuple(None if y is None else jnp.asarray(y.root, jnp.float32) for y in x)
        for n, x in metrics.items()
    }
    scales = {n: jnp.float32(x[0].scale * x[1].scale) for n, x in metrics.items() if x[0] and x[1]}
    # a pytree with the same function in every call, so that a new loss compiles nothing
    return jax.tree_util.Partial(_quadratic, roots, scales)


def _quadratic(
    roots: Mapping[str, tuple[Array | None, Array | None]],
    scales: Mapping[str, Array],
    stored: Lora,
    original: Lora,
    batch: Any = None,
) -> Array:
    def weigh(name: str, a: Array, b: Array) -> tuple[Array, Array]:
        left, right = roots.get(name, (None, None))
        a = a if left is None else decompose.matmul(left, a)
        return a, b if right is None else decompose.matmul(b, right)

    lost, whole = [], []
    for name, pair in original.items():
        a, b = weigh(name, *pair)
        energy = jnp.maximum(decompose.inner(a, b, a, b), 0.0)
        error = losses.squared_errors(a, b, *weigh(name, *stored[name]))
        unit = scales[name] if scales else decompose.task_weights(energy)
        lost.append(error * unit)
        whole.append(energy * unit)
    return jnp.sum(jnp.stack(lost)) / jnp.sum(jnp.stack(whole))


def divergence(
    forward: Forward, mask: Callable[[Any], Array] | None = None, *, at_once: int | None = None
) -> Callable[[Lora, Lora, Any], Array]:
    """The loss `mean KL(p_adapter || p_store)` of the next-token distributions.

    Args:
      forward: `(lora, batch) -> logits [..., V]` of one task, `lora` module -> `(a: [I, S], b: [S, O])`.
      mask: `batch -> [...]` bool, the predictions that count; None for all.
      at_once: number of tasks computed in parallel; None for all.

    Returns:
      `(stored, original, batch) -> scalar`, all three with a leading task axis.
    """

    def one(job: tuple[Lora, Lora, Any]) -> Array:
        stored, original, batch = job
        wanted = jax.nn.log_softmax(forward(original, batch).astype(jnp.float32))
        found = jax.nn.log_softmax(forward(stored, batch).astype(jnp.float32))
        each = jnp.sum(jnp.exp(wanted) * (wanted - found), -1)
        counted = jnp.ones_like(each) if mask is None else mask(batch).astype(each.dtype)
        return jnp.sum(each * counted) / jnp.maximum(jnp.sum(counted), 1.0)

    def loss(stored: Lora, original: Lora, batch: Any) -> Array:
        job = stored, jax.lax.stop_gradient(original), batch
        return jnp.mean(jax.vmap(one)(job) if at_once is None else jax.lax.map(one, job, batch_size=at_once))

    return loss
