"""What compressed stores score: exact match of every task against bytes, for one regime.

    python -m experiments.morphology.stores --data DATA --regime shared
    python -m experiments.morphology.stores --data DATA --regime independent \\
        --adapters OUT/adapters-independent.zip

Every row is a store written to disk, read back and scored by greedy decoding on the first test items of
every task. Rows are kept in `results/stores-REGIME.json` as they are done; a second run goes on where the
first stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.morphology.config import Data
from experiments.morphology.dataset import load_items
from hydraopt_jax import checkpoint, compression, formats, navigate, report
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.demo import lora_of
from hydraopt_jax.morphology.assets import ADAPTERS_FILE, load_base, load_vocabulary, unpack_adapters
from hydraopt_jax.morphology.evaluate import evaluate
from hydraopt_jax.morphology.vocabulary import encode_items
from hydraopt_jax.store import Store

BUDGETS = (0.5, 0.25, 0.125, 0.0625, 0.03)
HEADS = (1, 5, 10, 20, 40)
ADAM_HEADS = (1, 10, 40)
RESULTS = Path(__file__).parent / "results"


def round_trip(store: Store) -> tuple[Store, int]:
    """The store as it comes back from disk, and its bytes there."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "store", store)
        return checkpoint.restore(Path(folder) / "store"), checkpoint.size_on_disk(Path(folder) / "store")


def plan(collection: Sequence[Adapter]) -> dict[str, Callable[[], Store]]:
    """Name of each row -> what makes its store."""
    rows: dict[str, Callable[[], Store]] = {}
    problems: dict[bool, Any] = {}

    def navigated(budget: float, share: bool) -> Store:
        options = navigate.Options(budget=budget, share=share)
        if share not in problems:
            problems[share] = navigate.setup(collection, options)
        return navigate.compress(collection, options, problem=problems[share])

    for share in (True, False):
        for budget in BUDGETS:
            name = f"budget {budget:g}" + ("" if share else ", nothing shared")
            rows[name] = lambda budget=budget, share=share: navigated(budget, share)
    for heads in HEADS:
        options = compression.Options(heads=heads, dtype="float16")
        rows[f"HydraOpt K = {heads}, closed form"] = lambda options=options: compression.compress(
            collection, options
        )
    for heads in ADAM_HEADS:
        adam = compression.Options(
            heads=heads, dtype="float16", solver="optax", start="mean", side="in", steps=300
        )
        rows[f"HydraOpt K = {heads}, Adam from the mean"] = lambda options=adam: compression.compress(
            collection, options
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder download.py filled")
    parser.add_argument("--regime", default="shared", help="names the results")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS_FILE, help="archive of PEFT folders")
    parser.add_argument("--items", type=int, default=250, help="test items a task")
    options = parser.parse_args(argv)
    base, vocabulary = load_base(), load_vocabulary()
    with tempfile.TemporaryDirectory() as folder:
        paths = unpack_adapters(options.adapters, Path(folder))
        collection = [formats.read_adapter(p) for p in paths]
    tasks = [x.task for x in collection]
    found = load_items(options.data, Data())
    items = encode_items(vocabulary, {t: found[t]["test"] for t in tasks}, limit=options.items)
    reference = 2 * sum(x.a[n].size + x.b[n].size for x in collection for n in x.a)
    path = RESULTS / f"stores-{options.regime}.json"
    result = (
        json.loads(path.read_text())
        if path.exists()
        else {
            "regime": options.regime,
            "items": options.items,
            "fp16_bytes": reference,
            "tasks": tasks,
            "rows": {},
        }
    )

    def keep(name: str, size: int, lora: dict[str, Any], more: dict[str, Any]) -> None:
        started = time.time()
        scores = evaluate(base, lora, items)
        exact = [round(float(x), 4) for x in scores.exact]
        cer = [round(float(x), 4) for x in scores.error]
        result["rows"][name] = {"bytes": size, "exact": exact, "cer": cer, **more}
        path.write_text(json.dumps(result) + "\n")
        print(
            f"{name}: {size / reference:.4f} mean {np.mean(exact):.4f} ({time.time() - started:.0f} s)",
            flush=True,
        )

    if "zero-shot" not in result["rows"]:
        keep("zero-shot", 0, {}, {})
    if "own adapters" not in result["rows"]:
        own = compression.compress(collection, compression.Options(dtype="float32"))
        keep("own adapters", reference, lora_of(own, tasks), {})
    for name, make in plan(collection).items():
        if name in result["rows"]:
            continue
        store, size = round_trip(make())
        lora = lora_of(store, tasks)
        error = round(float(np.nanmean(store.errors)), 6)
        keep(name, size, lora, {"error": error, "forms": store.report.get("forms", {})})
    summary = drops(result)
    for name, row in summary.items():
        shown = (row[k] for k in ("fraction", "score", "mean_drop", "worst_drop"))
        print(f"{name:45}", *(f"{x:+.4f}" for x in shown))
    curves = {
        label: [(r["fraction"], max(r["mean_drop"], 1e-4)) for n, r in summary.items() if match(n)]
        for label, match in {
            "hydraopt_jax": lambda n: n.startswith("budget") and "nothing" not in n,
            "hydraopt_jax, nothing shared": lambda n: "nothing" in n,
            "HydraOpt, closed form": lambda n: "closed" in n,
            "HydraOpt, Adam from the mean": lambda n: "Adam" in n,
        }.items()
    }
    label = "mean relative drop of exact match"
    report.plot_tradeoff(RESULTS / f"stores-{options.regime}.png", curves, error_label=label)


def drops(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Bytes as a share of the fp16 adapters, mean score, mean and worst-task relative drop of every row."""
    own = np.array(result["rows"]["own adapters"]["exact"])
    out = {}
    for name, row in result["rows"].items():
        ratio = np.array(row["exact"]) / own
        out[name] = {
            "fraction": row["bytes"] / result["fp16_bytes"],
            "score": float(np.mean(row["exact"])),
            "mean_drop": float(1 - ratio.mean()),
            "worst_drop": float(1 - ratio.min()),
        }
    return out


if __name__ == "__main__":
    main()
