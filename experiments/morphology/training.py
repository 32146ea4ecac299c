"""What both trainings share: schedules, batches, checkpoints that a stopped run goes on from, progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from orbax.checkpoint import v1 as ocp
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hydraopt_jax.checkpoints import save_context
from hydraopt_jax.demo.model import Base, Branches, forward
from hydraopt_jax.demo.vocabulary import PAD_ID

Step = Callable[[Any, Array], tuple[Any, Array]]


def schedule(peak: float, warmup: int, steps: int, decay: int) -> optax.Schedule:
    """Linear rise over `warmup` steps, flat, linear fall to zero over the last `decay` steps.

    >>> float(schedule(1.0, 2, 10, 4)(8))
    0.5
    """
    flat = max(steps - warmup - decay, 0)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, decay),
        ],
        [warmup, warmup + flat],
    )


def draw(key: Array, start: Array, size: Array, batch: int) -> Array:
    """Row numbers of a batch of one task, drawn with replacement: [batch]."""
    return start + jax.random.randint(key, (batch,), 0, size)


def scan_steps(step: Step, state: Any, keys: Array) -> tuple[Any, Array]:
    """Several steps in one compiled call; the losses are stacked in front."""
    return jax.lax.scan(step, state, keys)


def latest(folder: Path) -> int | None:
    """Number of steps of the newest finished checkpoint, if there is one."""
    done = [int(p.name) for p in folder.glob("*") if p.name.isdigit()]
    return max(done, default=None)


def run(
    step: Step,
    state: Any,
    *,
    seed: int,
    steps: int,
    chunk: int,
    save: int,
    folder: Path,
    title: str,
    stop: int | None = None,
) -> tuple[Any, list[float]]:
    """Trains to `steps`, from the newest checkpoint in `folder` if there is one.

    Args:
        step: `(state, key) -> (state, loss)`; the loss may be an array, its mean is shown.
        state: the fresh state, also the shape of what is restored.
        seed: step i uses `fold_in(key(seed), i)`, so a resumed run draws what an unbroken one would.
        steps: where to stop; `chunk` of them are compiled together.
        save: a checkpoint every so many steps, and at the end.
        stop: leave after this many steps of this call (to test resuming).

    Returns:
        The last state and the mean loss of each chunk run here.
    """
    begun = latest(folder)
    if begun:
        state = ocp.load(folder / str(begun), jax.tree.map(jnp.asarray, state))
    key, done, trace = jax.random.key(seed), begun or 0, []
    end = steps if stop is None else min(steps, done + stop)
    compiled = jax.jit(lambda s, k: scan_steps(step, s, k), donate_argnums=0)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        shown = bar.add_task(title, total=steps, completed=done, loss=float("nan"))
        while done < end:
            count = min(chunk, end - done)
            clock = time.perf_counter()
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(done, done + count))
            state, losses = compiled(state, keys)
            trace.append(float(jnp.mean(losses)))
            done += count
            bar.update(shown, completed=done, loss=trace[-1])
            if not console.is_terminal:
                seconds = (time.perf_counter() - clock) / count
                left = (end - done) * seconds / 60
                text = f"{title} {done}/{steps} loss {trace[-1]:.4f} {seconds:.3f} s/step {left:.1f} min left"
                print(text, flush=True)
            if done == end or done // save > (done - count) // save:
                folder.mkdir(parents=True, exist_ok=True)
                with save_context():
                    ocp.save((folder / str(done)).resolve(), state, overwrite=True)
    return state, trace


def loss(base: Base, lora: Branches, tokens: Array, lengths: Array) -> Array:
    """Mean cross-entropy of the answers.

    Args:
        tokens: [N, L] prompt, answer, padding.
        lengths: [N] of the prompts, `<sep>` included: only what comes after is learnt.
    """
    logits = forward(base, lora, tokens[:, :-1])
    wanted = tokens[:, 1:]
    learnt = (jnp.arange(wanted.shape[1]) >= lengths[:, None] - 1) & (wanted != PAD_ID)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[..., None], -1)[..., 0]
    return -jnp.sum(picked * learnt) / jnp.maximum(jnp.sum(learnt), 1)
