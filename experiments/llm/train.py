"""Trains LoRA adapters of a language model, one per task, into PEFT folders with a log each.

    python -m experiments.llm.train --data DATA --regime shared

Rank 8, alpha 16, all seven projections of the upper 8 layers; Adam, 10 steps of warm-up, then linearly to
0; batches of one length, loss on the answers alone; the step with the lowest dev loss is kept. Regime
`shared` starts all tasks from one initialization, `independent` each from its own, `rank-16` is another
shared one (its rank and layers are arguments, see README.md). A finished task is left alone, a broken-off one
goes on from its last saved step: run the same command again. See README.md for what it took.
"""

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.llm import adapters, model
from experiments.llm.activations import Batch, Lower, gather, hidden_of, in_order, place, shuffled
from experiments.llm.base import DEFAULT, cache_folder, load_base
from experiments.llm.tasks import COUNTS, TASKS, Sequence, load_sequences

HERE = Path(__file__).parent
ROWS = 16  # of a batch
STEPS = 600
RATE, PLUS = 1.6e-3, 16.0
EVERY = 40


def loss_of(
    lora: Any, lower: dict[str, Any], batch: Batch, *, config: model.Config, scale: float
) -> jax.Array:
    """Mean negative log-likelihood of the answers' tokens; `lower` holds the head and the upper layers."""
    hidden, _ = model.run_layers(
        lower["upper"], jnp.asarray(batch.hidden), config=config, lora=lora, scale=scale
    )
    logits = model.logits(lower["outer"], hidden.reshape(-1, config.width)[batch.at], config=config)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return (losses * batch.weights).sum() / batch.weights.sum()


def optimizer(rate: float, plus: float, steps: int) -> optax.GradientTransformation:
    """Adam with 10 steps of warm-up and a linear decay to 0, gradients clipped to norm 1.

    `rate` is that of `b`; `a` has `rate / plus` (LoRA+, Hayou et al., arXiv 2402.12354).
    """
    warm = min(10, max(1, steps // 10))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm, steps, exponent=1.0)
    slower = optax.masked(
        optax.scale(1 / plus), lambda lora: {name: {"a": True, "b": False} for name in lora}
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule), slower)


@partial(jax.jit, static_argnames=("config", "scale", "rate", "plus", "steps"), donate_argnums=(0, 1))
def update(lora, state, weights, batch, *, config, scale, rate, plus, steps):
    """Adapter and optimizer state after one step on `batch`, and the loss before it."""
    value, grads = jax.value_and_grad(loss_of)(lora, weights, batch, config=config, scale=scale)
    changes, state = optimizer(rate, plus, steps).update(grads, state)
    return optax.apply_updates(lora, changes), state, value


evaluate = jax.jit(loss_of, static_argnames=("config", "scale"))


def mean_loss(
    lora: Any, weights: dict[str, Any], batches: list[Batch], *, config: model.Config, scale: float
) -> float:
    """Mean loss per answer token over `batches`."""
    counts = [float(batch.weights.sum()) for batch in batches]
    losses = [float(evaluate(lora, weights, batch, config=config, scale=scale)) for batch in batches]
    return float(np.average(losses, weights=counts))


def train(
    lower: Lower,
    start: Any,
    splits: dict[str, list[Sequence]],
    *,
    rate: float,
    plus: float,
    steps: int,
    rows: int,
    scale: float,
    seed: int,
    saved: Path,
) -> tuple[Any, dict[str, Any]]:
    """The adapter with the lowest dev loss, and its log. Progress lies in `saved`, whence it goes on."""
    config, weights = lower.base.config, {"outer": lower.outer, "upper": lower.upper}
    hidden = {split: hidden_of(lower, splits[split]) for split in ("train", "dev")}
    dev = [
        gather(splits["dev"], hidden["dev"], chosen, rows) for chosen in in_order(splits["dev"][:64], rows)
    ]
    lora, state = jax.tree.map(jnp.array, start), optimizer(rate, plus, steps).init(start)
    best: Any = start
    given = {"rate": rate, "plus": plus, "steps": steps}
    log: dict[str, Any] = {"train_loss": [], "dev_loss": [], "best_step": 0, "seconds": 0.0}
    leaves, tree = jax.tree.flatten((lora, state, best))
    if saved.exists():
        with np.load(saved) as file:
            lora, state, best = jax.tree.unflatten(
                tree, [jnp.asarray(file[f"{i}"]) for i in range(len(leaves))]
            )
            log = json.loads(str(file["log"]))
    done = len(log["train_loss"])
    order = shuffled(splits["train"], rows, np.random.default_rng(seed))
    for _ in range(done):
        next(order)
    measure = partial(mean_loss, weights=weights, batches=dev, config=config, scale=scale)
    if not log["dev_loss"]:
        log["dev_loss"].append([0, measure(lora)])
    clock = time.perf_counter()
    for step in range(done + 1, steps + 1):
        batch = gather(splits["train"], hidden["train"], next(order), rows)
        lora, state, loss = update(lora, state, weights, batch, config=config, scale=scale, **given)
        log["train_loss"].append(round(float(loss), 4))
        if step % EVERY == 0 or step == steps:
            log["dev_loss"].append([step, round(measure(lora), 4)])
            if log["dev_loss"][-1][1] == min(value for _, value in log["dev_loss"]):
                best, log["best_step"] = jax.tree.map(jnp.array, lora), step
            log["seconds"] += time.perf_counter() - clock
            clock = time.perf_counter()
            leaves = jax.tree.leaves((lora, state, best))
            arrays: dict[str, Any] = {f"{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
            part = saved.with_suffix(f".{os.getpid()}.npz")
            np.savez(part, log=json.dumps(log), **arrays)
            part.rename(saved)
    log["seconds"] = round(log["seconds"], 1)
    return best, log


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' files (see sources)")
    parser.add_argument("--base", default=DEFAULT, help="hub id or folder of a Llama-architecture model")
    parser.add_argument("--regime", choices=adapters.REGIMES, required=True)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument(
        "--out", type=Path, default=HERE / "adapters", help="folder of the adapters, one per regime and task"
    )
    parser.add_argument("--layers", type=int, default=8, help="upper layers that are adapted")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--rate", type=float, default=RATE, help="of `b`")
    parser.add_argument("--plus", type=float, default=PLUS, help="rate of `b` over that of `a`")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=int, default=ROWS, help="sequences of a batch")
    parser.add_argument("--items", type=int, default=COUNTS["train"], help="training items per task, at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    base = load_base(given.base)
    lower = place(base, given.layers)
    for name in given.tasks:
        folder = given.out / given.regime / name
        settings = {name: getattr(given, name) for name in ("rate", "plus", "steps", "rows", "seed")}
        if (folder / "log.json").exists():
            adapters.check_made(folder / "log.json", "--out", base=base.name, **settings)
            if (folder / adapters.CONFIG).exists():
                adapters.check_made(
                    folder / adapters.CONFIG,
                    "--out",
                    r=given.rank,
                    lora_alpha=given.alpha,
                    layers_to_transform=list(range(lower.depth, base.config.layers)),
                )
            print(f"{given.regime} {name}: is in {folder}", flush=True)
            continue
        splits = load_sequences(TASKS[name], given.data, base.tokenizer, base.stop)
        splits["train"] = splits["train"][: given.items]
        start = adapters.initialize(adapters.key_of(given.regime, name, given.seed), lower.upper, given.rank)
        parts = (given.out.resolve().name, base.name, given.regime, name, given.layers)
        shape = (given.rank, given.alpha, given.items)
        label = "-".join(map(str, (*parts, *shape, *settings.values())))
        saved = cache_folder() / f"training-{label.replace('/', '_')}.npz"
        lora, log = train(lower, start, splits, scale=given.alpha / given.rank, saved=saved, **settings)
        adapters.save_adapter(folder, lora, base=base.name, first_layer=lower.depth, alpha=given.alpha)
        facts = {
            "base": base.name,
            "task": name,
            "regime": given.regime,
            "items": {split: len(found) for split, found in splits.items()},
            "cosine_of_a_to_start": round(
                adapters.cosine(adapters.side(lora, "a"), adapters.side(start, "a")), 4
            ),
        }
        (folder / "log.json").write_text(json.dumps(facts | settings | log) + "\n")
        curve = " ".join(f"{value:.3f}" for _, value in log["dev_loss"])
        print(f"{given.regime} {name}: dev loss {curve}; {log['seconds']:.0f} s", flush=True)
        saved.unlink()


if __name__ == "__main__":
    main()
