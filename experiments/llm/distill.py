"""Refinement of stores by distillation: the stored adapters' answers are moved towards the own adapters'.

What `hydraopt_jax.refinement` needs of a model: a forward function of one task, and batches of unlabeled
inputs. Those are training sequences of all tasks, which no dev or test item of the same task shares.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.llm import model
from experiments.llm.activations import Batch, Lower, gather, hidden_of
from experiments.llm.tasks import TASKS, load_sequences

# of one shape, for one compilation: sequences per task, tokens, predicted tokens
ROWS = 2
LENGTH = 56
PREDICTED = 64


class Teaching(NamedTuple):
    """Arguments of `refine`: `forward(lora, batch)` gives logits `[A, V]`, `mask` which of them count.

    Each of `batches` holds ROWS sequences per task, all leaves with a leading task axis.
    """

    forward: Any
    batches: list[Batch]
    mask: Any


def stack_layers(lora: dict[str, tuple[jax.Array, jax.Array]], first: int, count: int) -> model.Tree:
    """Factors by name as `run_layers` takes them: `[L, in, S]` and `[L, S, out]`, padded to the widest S."""
    out = {}
    for module, group in model.GROUPS.items():
        pairs = [lora[f"model.layers.{first + i}.{group}.{module}"] for i in range(count)]
        width = max(a.shape[1] for a, _ in pairs)
        left = [jnp.pad(a, [(0, 0), (0, width - a.shape[1])]) for a, _ in pairs]
        right = [jnp.pad(b, [(0, width - b.shape[0]), (0, 0)]) for _, b in pairs]
        out[module] = {"a": jnp.stack(left), "b": jnp.stack(right)}
    return out


def forward(
    weights: tuple[model.Tree, model.Tree],
    lora: dict[str, tuple[jax.Array, jax.Array]],
    batch: Batch,
    *,
    config: model.Config,
    depth: int,
) -> jax.Array:
    """Logits `[A, V]` of one task's batch with the adapter `lora`, module name -> `([in, S], [S, out])`.

    `weights` are those of the layers from `depth` on and of what is around the layers.
    """
    upper, outer = weights
    layers = stack_layers(lora, depth, config.layers - depth)
    x, _ = model.run_layers(upper, jnp.asarray(batch.hidden), config=config, lora=layers)
    return model.logits(outer, x.reshape(-1, config.width)[batch.at], config=config)


def bind(lower: Lower) -> jax.tree_util.Partial:
    """`forward(lora, batch)` with its weights, which what is compiled takes as arguments."""
    run = partial(forward, config=lower.base.config, depth=lower.depth)
    return jax.tree_util.Partial(run, (lower.upper, lower.outer))


def teach(lower: Lower, tasks: list[str], data: Path, count: int) -> Teaching:
    """`count` batches of training sequences that fit, the same number of every task."""
    rows = []
    for name in tasks:
        whole = load_sequences(TASKS[name], data, lower.base.tokenizer, lower.base.stop)["train"]
        fitting = [s for s in whole if len(s.tokens) - 1 <= LENGTH and len(s.answer) <= PREDICTED // ROWS]
        fitting = fitting[: count * ROWS]
        hidden = hidden_of(lower, fitting)
        # tasks with few fitting sequences go through them again
        chosen = np.resize(range(len(fitting)), (count, ROWS)).tolist()
        rows.append([gather(fitting, hidden, x, ROWS, length=LENGTH, size=PREDICTED) for x in chosen])
    batches = [
        Batch(*(np.stack(leaf) for leaf in zip(*parts, strict=True))) for parts in zip(*rows, strict=True)
    ]
    return Teaching(bind(lower), batches, lambda batch: batch.weights > 0)
