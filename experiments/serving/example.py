"""From LoRA trees in Orbax to one jitted forward pass that mixes their tasks, without touching a file format.

    python -m experiments.serving.example

The trees are three of the trained adapters that ship with the package, saved as a Flax NNX training run does.
Half a minute on two cores; prints how alike the adapters are, the store's error, what its refinement gained,
and next tokens.
"""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import hydraopt_jax as hydra
from experiments.morphology.assets import load_adapters
from hydraopt_jax import formats, serving
from hydraopt_jax.demo import assets
from hydraopt_jax.demo.model import bind
from hydraopt_jax.demo.model import forward as predict
from hydraopt_jax.demo.tasks import Item, prompt
from hydraopt_jax.demo.vocabulary import token_ids

TASKS = ("lemmatise-en", "pronounce-es", "inflect-de")


def train(folder: Path) -> None:
    """What a training run leaves behind: one Orbax checkpoint of LoRA parameters a task."""
    for task, lora in load_adapters().items():
        if task in TASKS:
            a, b = ({name: np.asarray(pair[k]) for name, pair in lora.items()} for k in (0, 1))
            formats.write_checkpoint(folder / task, hydra.Adapter(task, a, b), "flax_nnx", scale=1.0)


def main(folder: Path, tokens: jax.Array) -> tuple[hydra.Store, jax.Array]:
    """Similarity, a store, its refinement, and logits `[N, L, V]` of tokens `[N, L]`, row n by task n."""
    adapters = [formats.read_checkpoint(folder / task, "flax_nnx", scale=1.0) for task in TASKS]
    print(hydra.similarity(adapters).mean.delta.round(3))

    store = hydra.compress(adapters, form=hydra.forms.Hydra(rank=16, side="in"))
    print("relative squared error", store.errors.mean(0).round(4))

    base = assets.load_base()
    forward = functools.partial(predict, base)
    inputs = [tokens[:, None]]
    adam = optax.adam(2e-3)
    store, gained = hydra.refine(store, adapters, forward=forward, batches=inputs, steps=20, optimizer=adam)
    print("divergence of the outputs", f"{gained.before:.2e} before, {gained.after:.2e} after refinement")

    model = bind(base)
    serving.wrap(model, serving.load(store, dtype=jnp.bfloat16), ["layers.*"])
    graph, state = nnx.split(model)

    @jax.jit
    def mixed(state: nnx.State, ids: jax.Array, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, state)
        serving.set_task_ids(model, ids[:, None])
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))[None]
        return model.readout(model(tokens, positions, mask, {})[0])

    return store, mixed(state, serving.task_ids(store, TASKS), tokens)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as path:
        train(Path(path))
        vocabulary = assets.load_vocabulary()
        words = [token_ids(vocabulary, prompt(task, Item(tuple("casa"), ()))) for task in TASKS]
        _, logits = main(Path(path), jnp.asarray(words))
        for task, token in zip(TASKS, logits[:, -1].argmax(-1).tolist(), strict=True):
            print(f"{task}: {vocabulary.tokens[token]}")
