"""Trains the 40 LoRA adapters together: one compiled step, vmapped over tasks.

    python -m experiments.morphology.adapters --data DIR --out DIR --regime shared
    python -m experiments.morphology.adapters --data DIR --out DIR --regime independent

`--out` is the folder in which pretrain.py left `base.safetensors`. In the shared regime all tasks start from
one random `a`; in the independent one each has its own. `b` starts at zero in both.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.morphology.assets import (
    load_adapters,
    revision_of,
    save_adapters,
    save_sample,
    stack_adapters,
)
from experiments.morphology.config import Adapting, Data
from experiments.morphology.dataset import Rows, load_items, training_rows
from experiments.morphology.training import draw, loss, run, schedule
from hydraopt_jax.demo.assets import load_base, load_vocabulary
from hydraopt_jax.demo.evaluate import evaluate
from hydraopt_jax.demo.model import Base, Config, Lora, modules
from hydraopt_jax.demo.vocabulary import encode_items

REGIMES = ("shared", "independent")


def init_adapters(config: Config, tasks: int, rank: int, key: Array, *, shared: bool) -> Lora:
    """Fresh factors `a` uniform in +-1/sqrt(I), as PEFT draws them, and `b` zero.

    Args:
        shared: one `a` for all tasks, or one for each.

    Returns:
        module -> `(a [T, I, R], b [T, R, O])`.

    >>> lora = init_adapters(Config(9, layers=1, width=8, hidden=16), 3, 2, jax.random.key(0), shared=True)
    >>> a, b = lora["layers.0.up_proj"]
    >>> a.shape, b.shape, bool((a[0] == a[2]).all())
    ((3, 8, 2), (3, 2, 16), True)
    """
    out = {}
    for i, (name, (n_in, n_out)) in enumerate(modules(config).items()):
        shape = (1 if shared else tasks, n_in, rank)
        a = jax.random.uniform(jax.random.fold_in(key, i), shape, minval=-1.0, maxval=1.0) / n_in**0.5
        out[name] = (jnp.broadcast_to(a, (tasks, n_in, rank)), jnp.zeros((tasks, rank, n_out)))
    return out


def scaled(lora: Lora, scale: float) -> Lora:
    """The same adapters with alpha / rank folded into `b`."""
    return {name: (a, scale * b) for name, (a, b) in lora.items()}


def train_adapters(
    base: Base, rows: Rows, settings: Adapting, folder: Path, *, shared: bool, stop: int | None = None
) -> tuple[Lora, list[float]]:
    """All adapters, `b` without the scale, and the mean loss of each chunk of steps."""
    tokens, lengths, starts, sizes = (jnp.asarray(x) for x in rows)
    tasks, scale = len(rows.sizes), settings.alpha / settings.rank
    decay = settings.steps - settings.warmup
    # Adam acts on each number alone, so one optimizer for the whole stack is one for each task.
    tx = optax.adam(schedule(settings.peak, settings.warmup, settings.steps, decay))

    def task_loss(lora: Lora, key: Array, start: Array, size: Array) -> Array:
        pick = draw(key, start, size, settings.batch)
        return loss(base, scaled(lora, scale), tokens[pick].astype(jnp.int32), lengths[pick])

    def step(state: tuple[Lora, Any], key: Array) -> tuple[Any, Array]:
        lora, memory = state
        keys = jax.random.split(key, tasks)
        values, grads = jax.vmap(jax.value_and_grad(task_loss))(lora, keys, starts, sizes)
        updates, memory = tx.update(grads, memory)
        return (optax.apply_updates(lora, updates), memory), values

    key = jax.random.key(settings.seed)
    # Real copies: the compiled loop takes over the state's buffers, and broadcast ones may be shared.
    fresh = jax.tree.map(jnp.array, init_adapters(base.config, tasks, settings.rank, key, shared=shared))
    (lora, _), trace = run(
        step,
        (fresh, tx.init(fresh)),
        seed=settings.seed,
        steps=settings.steps,
        chunk=settings.chunk,
        save=settings.save,
        folder=folder,
        title="adapters",
        stop=stop,
    )
    return lora, trace


def main(argv: list[str] | None = None) -> None:
    """Trains one regime, writes its adapters as PEFT folders in an archive, and its scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder download.py filled")
    parser.add_argument("--out", type=Path, required=True, help="the folder with base.safetensors")
    parser.add_argument("--regime", choices=REGIMES, default="shared")
    parser.add_argument("--steps", type=int, default=Adapting().steps)
    parser.add_argument("--peak", type=float, default=Adapting().peak, help="highest learning rate")
    parser.add_argument("--items", type=int, default=500, help="held-out items a task to score")
    args = parser.parse_args(argv)
    settings = Adapting(steps=args.steps, peak=args.peak)
    path = args.out / "base.safetensors"
    # The base as it ships, in fp16 precision: adapters must fit the weights they will be used with.
    base, vocabulary = load_base(path), load_vocabulary(path)
    items = load_items(args.data, Data())
    rows = training_rows(items, vocabulary, Data())
    begun = time.perf_counter()
    lora, trace = train_adapters(
        base, rows, settings, args.out / f"adapters-{args.regime}", shared=args.regime == "shared"
    )
    minutes = (time.perf_counter() - begun) / 60
    archive = args.out / f"adapters-{args.regime}.zip"
    separate = {t: {m: (a[i], b[i]) for m, (a, b) in lora.items()} for i, t in enumerate(items)}
    save_adapters(archive, separate, settings.alpha, revision_of(base))
    save_sample(args.out / "held-out.tsv.gz", {t: s["test"][: Data().sample] for t, s in items.items()})
    stored = stack_adapters(load_adapters(archive))
    report: dict[str, Any] = {
        "regime": args.regime,
        "settings": settings._asdict(),
        "items": args.items,
        "minutes": round(minutes, 2),
        "losses": [round(x, 4) for x in trace],
    }
    for split in ("dev", "test"):
        held = encode_items(vocabulary, {t: s[split] for t, s in items.items()}, limit=args.items)
        for label, factors in (("zero_shot", {}), ("adapter", stored)):
            scores = evaluate(base, factors, held)
            report[f"{split}_{label}"] = {
                t: {"exact": round(float(e), 4), "cer": round(float(c), 4)}
                for t, e, c in zip(items, scores.exact, scores.error, strict=True)
            }
            print(f"{split} {label}: mean exact match {scores.exact.mean():.4f}", flush=True)
    (args.out / f"adapters-{args.regime}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
