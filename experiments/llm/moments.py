"""Second moments for calibrated stores: what the adapted modules see, and what their outputs are worth.

Of every task the first training sequences are run through its own adapter: the inputs of each module, and the
gradients at its outputs of the log-likelihood of labels drawn from the model itself (Martens and Grosse,
arXiv 1503.05671). They are pooled over tasks and kept in the cache folder.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.llm import adapters, model, stores
from experiments.llm.activations import Batch, Lower, fit, gather, hidden_of
from experiments.llm.base import cache_folder
from experiments.llm.score import with_deltas
from experiments.llm.tasks import TASKS, load_sequences
from hydraopt_jax import calibration

SEQUENCES = 16
# few shapes, few compilations: tokens of a sequence, tokens of all answers
LENGTHS = (64, 88)
PREDICTED = (64, 512, 1024)


@jax.custom_vjp
def tap(x: jax.Array, mask: jax.Array, inputs: jax.Array, outputs: jax.Array) -> jax.Array:
    """Zeros to add to a module's output; their gradient to `inputs` and `outputs` is its second moments.

    With `x` `[N, P, I]` and the gradient g `[N, P, O]` at the output, both summed over `mask` `[N, P]`:
    `x.T @ x` to `inputs` `[I, I]` and `g.T @ g` to `outputs` `[O, O]`.
    """
    return jnp.zeros((*x.shape[:-1], len(outputs)), x.dtype)


def _tap_forward(x: jax.Array, mask: jax.Array, inputs: jax.Array, outputs: jax.Array) -> Any:
    return tap(x, mask, inputs, outputs), (x, mask)


def _tap_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, ...]:
    x, mask = kept
    seen, felt = (jnp.einsum("np,npi,npj->ij", mask, y, y) for y in (x, gradient))
    return jnp.zeros_like(x), jnp.zeros_like(mask), seen, felt


tap.defvjp(_tap_forward, _tap_backward)


def drawn_loss(
    outer: model.Tree,
    upper: model.Tree,
    batch: Batch,
    key: jax.Array,
    change: model.Change,
    config: model.Config,
) -> jax.Array:
    """Summed negative log-likelihood of labels drawn from the model where answers are predicted."""
    x, _ = model.run_layers(upper, jnp.asarray(batch.hidden), config=config, change=change)
    scores = model.logits(outer, x.reshape(-1, config.width)[batch.at], config=config)
    drawn = jax.random.categorical(key, jax.lax.stop_gradient(scores))
    found = jnp.take_along_axis(jax.nn.log_softmax(scores), drawn[:, None], 1)[:, 0]
    return -(found * batch.weights).sum()


@partial(jax.jit, static_argnames="config")
def moments_of_batch(
    outer: model.Tree,
    upper: model.Tree,
    batch: Batch,
    mask: jax.Array,
    key: jax.Array,
    *,
    config: model.Config,
) -> model.Tree:
    """Per module `(inputs: [L, I, I], outputs: [L, O, O])`, summed over the positions in `mask` `[N, P]`."""

    def change(name: str, x: jax.Array, layer: model.Tree) -> jax.Array:
        return tap(x, mask, *layer[f"{name}.moments"])

    def loss(taps: model.Tree) -> jax.Array:
        layers = upper | {f"{name}.moments": value for name, value in taps.items()}
        return drawn_loss(outer, layers, batch, key, change, config)

    taps = {}
    for name in model.MODULES:
        count, width, to = upper[name].shape
        taps[name] = jnp.zeros((count, width, width)), jnp.zeros((count, to, to))
    return jax.grad(loss)(taps)


def moments(lower: Lower, folder: Path, tasks: list[str], data: Path) -> dict[str, np.ndarray]:
    """Mean second moments of a collection's modules, as a calibration of hydraopt_jax names them."""
    path = cache_folder() / f"moments-{stores.digest(stores.read_collection(folder, tasks))}.safetensors"
    if path.exists():
        return calibration.read_moments(path)
    total: Any = None
    count = 0.0
    for n, name in enumerate(tasks):
        sequences = load_sequences(TASKS[name], data, lower.base.tokenizer, lower.base.stop)["train"][
            :SEQUENCES
        ]
        length = fit(max(len(s.tokens) for s in sequences), LENGTHS)
        size = fit(sum(len(s.answer) for s in sequences), PREDICTED)
        hidden = hidden_of(lower, sequences)
        batch = gather(
            sequences, hidden, list(range(len(sequences))), len(sequences), length=length, size=size
        )
        lengths = np.array([len(s.tokens) - 1 for s in sequences])
        mask = (np.arange(length) < lengths[:, None]).astype(np.float32)
        upper = with_deltas(lower.upper, adapters.load_deltas(folder / name))
        found = moments_of_batch(
            lower.outer, upper, batch, jnp.asarray(mask), jax.random.key(n), config=lower.base.config
        )
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        count += float(mask.sum())
    out = {}
    for module, sides in total.items():
        for suffix, stacked in zip(("", calibration.OUTPUT), sides, strict=True):
            for i, moment in enumerate(np.asarray(stacked)):
                name = f"model.layers.{lower.depth + i}.{model.GROUPS[module]}.{module}{suffix}"
                out[name] = moment / count
    calibration.write_moments(path, out)
    return out
