"""What is compared: name of every row -> how its store is made, when the row's turn comes.

Merging baselines are stores too: one adapter that all tasks read, or what a method keeps of every task.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.morphology import outputs
from experiments.morphology.config import Refining
from experiments.morphology.outputs import Sequences
from hydraopt_jax import merging, refinement, report
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.compression import compress
from hydraopt_jax.demo.model import Base, forward
from hydraopt_jax.explicit import fitting
from hydraopt_jax.formats.memory_collection import in_memory
from hydraopt_jax.forms import Factors, Gradient, Hydra
from hydraopt_jax.merging import whole_adapters
from hydraopt_jax.rate_control import engine
from hydraopt_jax.rate_control.distortion import error_table
from hydraopt_jax.rate_control.options import Options
from hydraopt_jax.rate_control.problem import Problem
from hydraopt_jax.static import Static
from hydraopt_jax.store import Store, plain, save
from hydraopt_jax.store import open as open_store
from hydraopt_jax.store.store import make_segment
from hydraopt_jax.store.tensors import encode_tensors

BUDGETS = (0.5, 0.25, 0.125, 0.0625, 0.03)
HEADS = (1, 10, 40)
# merging methods that make one adapter, each scaled to suit; and what keeps more than one
SINGLE = ("linear", "ties", "dare-ties", "knots", "tsv-m")
RANDOM = ("dare-ties",)
SLOTS = (8, 20)
SCALES = (1.0, 2.0, 4.0, 8.0)

Maker = Callable[[], Store]


class Setting(NamedTuple):
    """What every row is made of.

    Attributes:
      base: the trained transformer.
      collection: the T adapters.
      heard: makes so many prompts of the train split, with the adapters' own answers.
      score: mean exact match of a store on some dev items, to choose a merge's scale.
      folder: where refinements keep their steps, to go on after a stop; None for nowhere.
    """

    base: Base
    collection: list[Adapter]
    heard: Callable[[int], Sequences]
    score: Callable[[Store], float]
    folder: Path | None = None


def plan(setting: Setting, settings: Refining) -> dict[str, Maker]:
    """Name of each row -> its maker, most telling first."""
    moments = functools.cache(functools.partial(_moments, setting, settings))
    found = in_memory(setting.collection)
    # analyses, which all budgets have in common
    known: dict[bool, dict[int, Problem]] = {False: {}, True: {}}

    @functools.cache
    def budgeted(budget: float, calibrated: bool) -> Store:
        options = Options(budget=budget, calibration=moments() if calibrated else None)
        return engine.compress_to_target(found, options, cache=known[calibrated])

    def refined_to(budget: float, seed: int) -> Store:
        return refined(setting, settings, budgeted(budget, True), moments(), budget, seed)

    rows: dict[str, Maker] = {}
    for budget in settings.budgets:
        rows[f"budget {budget:g}, output gradients"] = functools.partial(budgeted, budget, True)
        rows[f"budget {budget:g}, output gradients, refined"] = functools.partial(refined_to, budget, 0)
    for budget in BUDGETS:
        rows[f"budget {budget:g}"] = functools.partial(budgeted, budget, False)
    for heads in HEADS:
        adam = Hydra(heads=heads, side="in", solver=Gradient(start="mean", steps=300))
        for label, form in (("closed form", Hydra(heads=heads)), ("Adam from the mean", adam)):
            rows[f"HydraOpt K = {heads}, {label}"] = functools.partial(
                compress, setting.collection, form=form, dtype="float16"
            )
    rows |= merged(setting, settings)
    for seed in settings.seeds[1:]:
        for budget in settings.budgets[:1]:
            name = f"budget {budget:g}, output gradients, refined, seed {seed}"
            rows[name] = functools.partial(refined_to, budget, seed)
    return rows


def _moments(setting: Setting, settings: Refining) -> dict[str, np.ndarray]:
    """Second moments of inputs and output gradients on a few prompts."""
    sample = setting.heard(settings.moments)
    lora = refinement.originals(setting.collection)
    return outputs.moments(setting.base, lora, sample, jax.random.key(0))


def refined(
    setting: Setting,
    settings: Refining,
    start: Store,
    moments: Mapping[str, np.ndarray],
    budget: float,
    seed: int,
) -> Store:
    """A store of one of the budgets refined on the divergence of the logits; the seed orders the prompts."""
    name, which = f"{budget:g}-seed-{seed}", settings.budgets.index(budget)
    steps, rate = settings.steps[which], settings.rates[which]
    train = settings.prompts[which] - settings.check
    heard = setting.heard(settings.prompts[which])
    check = outputs.batch(heard, train, settings.check)
    order = np.random.default_rng(seed).permutation(train)
    shuffled = Sequences(*(x[:, order] for x in heard))
    folder = None
    if setting.folder is not None:
        folder = setting.folder / name
        # steps are of one start: one made again from another temporary folder has other bytes
        first = setting.folder / f"{budget:g}-start"
        if not first.exists():
            save(first, start)
        start = open_store(first)
    with report.progress(f"refining {name}", steps) as advance:
        return refinement.refine(
            start,
            setting.collection,
            calibration=moments,
            forward=lambda lora, x: forward(setting.base, lora, x.tokens),
            mask=lambda x: x.counts,
            batches=lambda i: outputs.batch(shuffled, i * settings.batch, settings.batch),
            check=check,
            steps=steps,
            optimizer=refinement.default_optimizer(steps, rate),
            folder=folder,
            save=settings.save,
            progress=lambda loss: advance(),
        )[0]


def merged(setting: Setting, settings: Refining) -> dict[str, Maker]:
    """The merging baselines, in float16."""

    def kept(method: str, **options: Any) -> Store:
        return store_of(setting.collection, merging.merge_modules(setting.collection, method, **options))

    rows: dict[str, Maker] = {}
    for method in SINGLE:
        for seed in settings.seeds if method in RANDOM else (0,):
            name = f"merged, {method}" + (f", seed {seed}" if seed else "")
            rows[name] = functools.partial(scaled, setting, method, seed)
    for slots in SLOTS:
        rows[f"K-Merge, {slots} slots"] = functools.partial(kept, "k-merge", slots=slots)
    return rows


def scaled(setting: Setting, method: str, seed: int) -> Store:
    """One adapter for all tasks, at the best of a few scales on dev items.

    Scales are multiples of the one of least weight error, see `merging.whole_adapters.least_error_scale`.
    """
    found = merging.merge_modules(setting.collection, method, key=jax.random.key(seed))
    least, _ = whole_adapters.least_error_scale(setting.collection, found)
    everywhere = np.zeros(len(setting.collection), np.int32)
    tries = []
    for scale in SCALES:
        one = {
            n: Factors(a[None], np.float32(scale * least) * b[None], everywhere, everywhere)
            for n, (a, b) in found.items()
        }
        tries.append(store_of(setting.collection, one))
    return max(tries, key=setting.score)


def store_of(collection: Sequence[Adapter], modules: Mapping[str, Factors]) -> Store:
    """A float16 store of what a merging method kept."""
    cast = {n: (fitting.cast(fitting.scale(x), "float16", n),) for n, x in modules.items()}
    schema, leaves = plain.to_leaves(cast)
    tasks = tuple(x.task for x in collection)
    errors = error_table(cast, collection, list(schema))
    tensors = [encode_tensors(x.extras) for x in collection]
    segment = make_segment(tasks, schema, leaves, errors, tensors=tensors)
    found = in_memory(collection)
    report = Static({"form": "merged", "options": {}, "entries": found.entries(), "bound": {}})
    return Store((segment,), tasks, found.sources, report)
