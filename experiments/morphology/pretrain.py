"""Pre-trains the base on the mixture of all 40 tasks.

python -m experiments.morphology.pretrain --data DIR --out DIR
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from experiments.morphology.assets import save_base
from experiments.morphology.config import Data, Pretraining
from experiments.morphology.dataset import Rows, Splits, load_items, training_rows
from experiments.morphology.training import draw, loss, run, schedule
from hydraopt_jax.demo.model import Base, CharTransformer, Config, name_of
from hydraopt_jax.demo.tasks import LANGUAGES, TASKS, Item
from hydraopt_jax.demo.vocabulary import SPECIAL, Vocabulary, from_tokens


def init_base(config: Config, key: Array) -> Base:
    """A base with random parameters."""
    _, state = nnx.split(CharTransformer(config, rngs=nnx.Rngs(params=key)), nnx.Param)
    return Base({name_of(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}, config)


def build_vocabulary(items: Iterable[Item], minimum: int) -> Vocabulary:
    """A vocabulary: special, task and language tokens, then tokens seen at least `minimum` times, sorted."""
    counts: Counter[str] = Counter()
    for item in items:
        counts.update(item.input)
        counts.update(item.output)
    fixed = (*SPECIAL, *(f"task:{task}" for task in TASKS), *(f"language:{code}" for code in LANGUAGES))
    return from_tokens((*fixed, *sorted(token for token, n in counts.items() if n >= minimum)))


def optimizer(settings: Pretraining) -> optax.GradientTransformation:
    """AdamW with a clipped gradient; vectors (norm scales) are not decayed."""
    rate = schedule(settings.peak, settings.warmup, settings.steps, settings.decay)
    decayed = functools.partial(jax.tree.map, lambda x: x.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(rate, b2=0.98, weight_decay=settings.weight_decay, mask=decayed),
    )


def pretrain(
    rows: Rows, config: Config, settings: Pretraining, folder: Path, *, stop: int | None = None
) -> tuple[Base, list[float]]:
    """Trains on batches in which every row's task is drawn in proportion to the task's size to the power
    `settings.balance` (Conneau and Lample, Cross-lingual language model pretraining, arXiv 1901.07291).

    Returns the base and the mean loss of each chunk of steps.
    """
    tokens, lengths, starts, sizes = (jnp.asarray(x) for x in rows)
    shares = settings.balance * jnp.log(sizes)
    tx = optimizer(settings)

    def step(state: tuple[dict[str, Array], Any], key: Array) -> tuple[Any, Array]:
        params, memory = state
        which, where = jax.random.split(key)
        task = jax.random.categorical(which, shares, shape=(settings.batch,))
        pick = draw(where, starts[task], sizes[task], settings.batch)
        batch = tokens[pick].astype(jnp.int32)
        value, grads = jax.value_and_grad(lambda p: loss(Base(p, config), {}, batch, lengths[pick]))(params)
        updates, memory = tx.update(grads, memory, params)
        return (optax.apply_updates(params, updates), memory), value

    params = init_base(config, jax.random.key(settings.seed)).params
    (params, _), trace = run(
        step,
        (params, tx.init(params)),
        seed=settings.seed,
        steps=settings.steps,
        chunk=settings.chunk,
        save=settings.save,
        folder=folder,
        title="pre-training",
        stop=stop,
    )
    return Base(params, config), trace


def vocabulary_of(items: dict[str, Splits], config: Data) -> Vocabulary:
    """Tokens of the training items."""
    return build_vocabulary((i for splits in items.values() for i in splits["train"]), config.minimum)


def main(argv: list[str] | None = None) -> None:
    """Reads the files, trains, writes `base.safetensors`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder download.py filled")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints and base.safetensors go here")
    parser.add_argument("--steps", type=int, default=Pretraining().steps)
    args = parser.parse_args(argv)
    items = load_items(args.data, Data())
    vocabulary = vocabulary_of(items, Data())
    rows = training_rows(items, vocabulary, Data())
    print(
        f"{len(vocabulary.tokens)} tokens, {len(rows.tokens)} training items, "
        f"{rows.sizes.min()} in the smallest task"
    )
    settings = Pretraining(steps=args.steps)
    base, _ = pretrain(rows, Config(len(vocabulary.tokens)), settings, args.out / "pretraining")
    save_base(args.out / "base.safetensors", base, vocabulary)
    print(f"{sum(x.size for x in base.params.values())} parameters in {args.out / 'base.safetensors'}")


if __name__ == "__main__":
    main()
