"""What compressed stores score: exact match of every task against bytes, for one regime.

    python -m experiments.morphology.stores --data DATA --regime shared
    python -m experiments.morphology.stores --data DATA --regime independent \\
        --adapters OUT/adapters-independent.zip

Every row is a store written to disk, read back and scored by greedy decoding on the first items of every
task, in batches that mix the tasks (`serving`). Second moments and refinement see prompts of the train split
alone, answered by the adapters themselves.
Rows are kept in `results/stores-REGIME.json` as they are done; a second run goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.morphology.config import Data, Refining
from experiments.morphology.dataset import load_items
from hydraopt_jax import checkpoint, compression, formats, navigate, refinement, serving
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.morphology import outputs
from hydraopt_jax.morphology.assets import (
    ADAPTERS_FILE,
    load_base,
    load_vocabulary,
    unpack_adapters,
)
from hydraopt_jax.morphology.evaluate import evaluate
from hydraopt_jax.morphology.model import Base, forward
from hydraopt_jax.morphology.outputs import Sequences
from hydraopt_jax.morphology.vocabulary import encode_items
from hydraopt_jax.store import Store

BUDGETS = (0.5, 0.25, 0.125, 0.065, 0.03)
# budgets that are shown without second moments too, and refined
STUDIED = (0.065, 0.125)
HEADS = (1, 10, 40)
RESULTS = Path(__file__).parent / "results"


class Setting(NamedTuple):
    """What every row is made of."""

    base: Base
    collection: list[Adapter]
    lora: dict[str, Any]
    heard: Sequences


def round_trip(store: Store) -> tuple[Store, int]:
    """The store as it comes back from disk, and its bytes there."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "store", store)
        return checkpoint.restore(Path(folder) / "store"), checkpoint.size_on_disk(Path(folder) / "store")


def plan(setting: Setting, settings: Refining) -> dict[str, Callable[[], Store]]:
    """Name of each row -> what makes its store, most telling first."""
    collection = setting.collection
    made: dict[float, Store] = {}
    known: dict[str, Any] = {}

    def moments() -> dict[str, np.ndarray]:
        if "moments" not in known:
            sample = outputs.batch(setting.heard, 0, settings.moments)
            known["moments"] = outputs.moments(setting.base, setting.lora, sample, jax.random.key(0))
        return known["moments"]

    def navigated(budget: float, calibrated: bool) -> Store:
        options = navigate.Options(budget=budget, calibration=moments() if calibrated else None)
        key = f"problem {calibrated}"
        if key not in known:
            known[key] = navigate.setup(collection, options)
        found = navigate.compress(collection, options, problem=known[key])
        if calibrated:
            made[budget] = found
        return found

    def refined(budget: float, seed: int) -> Store:
        start = made.get(budget) or navigated(budget, True)
        train = settings.prompts - settings.batch * 4
        check = outputs.batch(setting.heard, train, settings.batch * 4)
        order = np.random.default_rng(seed).permutation(train)
        heard = Sequences(*(x[:, order] for x in setting.heard))
        return refinement.refine(
            start,
            collection,
            calibration=moments(),
            forward=lambda lora, x: forward(setting.base, lora, x.tokens),
            mask=lambda x: x.counts,
            batches=lambda i: outputs.batch(heard, i * settings.batch, settings.batch),
            check=check,
            steps=settings.steps,
            optimizer=refinement.default_optimizer(settings.steps, settings.rate),
        )[0]

    rows: dict[str, Callable[[], Store]] = {}
    for budget in STUDIED:
        rows[f"budget {budget:g}, output gradients"] = lambda b=budget: navigated(b, True)
        rows[f"budget {budget:g}, output gradients, refined"] = lambda b=budget: refined(b, 0)
    for budget in BUDGETS:
        rows[f"budget {budget:g}"] = lambda b=budget: navigated(b, False)
    for heads in HEADS:
        closed = compression.Options(heads=heads, dtype="float16")
        rows[f"HydraOpt K = {heads}, closed form"] = lambda o=closed: compression.compress(collection, o)
        adam = closed._replace(solver="optax", start="mean", side="in", steps=300)
        rows[f"HydraOpt K = {heads}, Adam from the mean"] = lambda o=adam: compression.compress(collection, o)
    for budget in STUDIED:
        for seed in settings.seeds[1:]:
            name = f"budget {budget:g}, output gradients, refined, seed {seed}"
            rows[name] = lambda b=budget, s=seed: refined(b, s)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder download.py filled")
    parser.add_argument("--regime", default="shared", help="names the results")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS_FILE, help="archive of PEFT folders")
    parser.add_argument("--items", type=int, default=500, help="items a task")
    parser.add_argument("--only", help="rows whose name contains this")
    options = parser.parse_args(argv)
    settings = Refining()
    base, vocabulary = load_base(), load_vocabulary()
    with tempfile.TemporaryDirectory() as folder:
        paths = unpack_adapters(options.adapters, Path(folder))
        collection = [formats.read_adapter(p) for p in paths]
    tasks = [x.task for x in collection]
    found = load_items(options.data, Data())
    prompts = encode_items(vocabulary, {t: found[t]["train"][: settings.prompts] for t in tasks}).prompts
    lora = refinement.originals(collection)
    setting = Setting(base, collection, lora, outputs.answered(base, lora, prompts))
    held = {
        split: encode_items(vocabulary, {t: found[t][split] for t in tasks}, limit=options.items)
        for split in ("test", "dev")
    }
    reference = 2 * sum(x.a[n].size + x.b[n].size for x in collection for n in x.a)
    path = RESULTS / f"stores-{options.regime}.json"
    result: dict[str, Any] = {
        "regime": options.regime,
        "items": options.items,
        "fp16_bytes": reference,
        "tasks": tasks,
        "rows": {},
    }
    if path.exists():
        result = json.loads(path.read_text())

    def keep(name: str, size: int, factors: dict[str, Any], more: dict[str, Any]) -> None:
        started = time.time()
        row: dict[str, Any] = {"bytes": size}
        # dev is for decisions: it is scored where there is one to take
        for split in ("test", "dev") if "gradients" in name or name == "own adapters" else ("test",):
            scores = evaluate(base, factors, held[split])
            row[split] = [round(float(x), 4) for x in scores.exact]
            row[f"{split}_cer"] = [round(float(x), 4) for x in scores.error]
        result["rows"][name] = row | more
        path.write_text(json.dumps(result) + "\n")
        mean = np.mean(row["test"])
        print(f"{name}: {size / reference:.4f} mean {mean:.4f} ({time.time() - started:.0f} s)", flush=True)

    if "zero-shot" not in result["rows"]:
        keep("zero-shot", 0, {}, {})
    if "own adapters" not in result["rows"]:
        keep("own adapters", reference, lora, {})
    for name, make in plan(setting, settings).items():
        if name in result["rows"] or (options.only and options.only not in name):
            continue
        started = time.time()
        store, size = round_trip(make())
        more = {
            "error": round(float(np.nanmean(store.errors)), 6),
            "forms": store.report.get("forms", {}),
            "refinement": store.report.get("refinement"),
            "seconds": round(time.time() - started, 1),
        }
        keep(name, size, serving.load(store), more)


if __name__ == "__main__":
    main()
