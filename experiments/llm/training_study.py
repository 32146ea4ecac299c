"""How training decides what a store can keep: the same tasks, trained in different ways, on dev items.

    python -m experiments.llm.train --data DATA --regime shared --rate 1e-3 --plus 1 --layers 15 --out FOLDER
    python -m experiments.llm.training_study --data DATA FOLDER/shared

For each folder of adapters: how far training went, and the share of the log-likelihood gain over the base
that stores of its tasks keep, on the first 64 dev items of each task. Adds an entry per folder to
results/training-study.json. `FOLDER:TASK,TASK` takes some of a folder's tasks.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.llm import adapters, stores
from experiments.llm.activations import hidden_of, place
from experiments.llm.base import DEFAULT, load_base
from experiments.llm.compare import gain_kept, reference_loss, slug_of
from experiments.llm.score import with_deltas
from experiments.llm.tasks import TASKS, load_sequences
from hydraopt_jax.adapters import Adapter, stack
from hydraopt_jax.linalg import decompose

HERE = Path(__file__).parent
ITEMS = 64
BUDGETS = (0.125, 0.03, 0.015)


def rows_of(tasks: int) -> list[str]:
    """The rows of `stores.plan` that are measured."""
    return [f"HydraOpt K = {tasks}, Adam from the mean", *(f"budget {x:g}" for x in BUDGETS)]


def facts_of(folder: Path, collection: list[Adapter]) -> dict[str, Any]:
    """What the logs say of a training, and how far it went: means over tasks and modules."""
    logs = [json.loads((folder / x.task / "log.json").read_text()) for x in collection]
    # logs from before `--plus` have one rate
    given = {"plus": 1.0} | {k: v for k, v in logs[0].items() if k in ("rate", "plus", "rows", "seed")}
    return given | {
        "layers": len(collection[0].config["layers_to_transform"]),
        "rank": collection[0].config["r"],
        "steps": [x["steps"] for x in logs],
        "items": [x["items"]["train"] for x in logs],
        "regime": logs[0]["regime"],
        "tasks": [x.task for x in collection],
        "cosine_of_a_to_start": round(float(np.mean([x["cosine_of_a_to_start"] for x in logs])), 4),
        "energy_of_two_directions": round(energy_of_first(collection, 2), 4),
    }


def energy_of_first(collection: list[Adapter], count: int) -> float:
    """Share of a delta's energy in its first `count` singular directions, the mean over modules and tasks."""
    shares = []
    for bucket in stack(collection).buckets:
        energy = np.asarray(decompose.batched_svd(*jax.device_put((bucket.a, bucket.b))).s) ** 2
        total = energy.sum(-1)
        shares.append(energy[..., :count].sum(-1)[total > 0] / total[total > 0])
    return float(np.mean(np.concatenate(shares)))


def measure(folder: Path, tasks: list[str], base: str, data: Path) -> dict[str, Any]:
    """Facts of a training, loss of each own adapter, and the gain that stored rows keep per task."""
    collection = stores.read_collection(folder, tasks)
    found = facts_of(folder, collection)
    lower = place(load_base(base), found["layers"])
    plan, rows = stores.plan(collection), {}
    with tempfile.TemporaryDirectory() as at:
        for name in rows_of(len(tasks)):
            rows[name] = plan[name](Path(at) / slug_of(name))
    found["loss"], found["base_loss"] = {}, {}
    found["rows"] = {name: {"bytes": x.bytes, "gain_kept": {}} for name, x in rows.items()}
    for task in tasks:
        dev = load_sequences(TASKS[task], data, lower.base.tokenizer, lower.base.stop)["dev"][:ITEMS]
        hidden = hidden_of(lower, dev)
        base_loss = reference_loss(lower, lower.upper, dev, hidden)
        own = reference_loss(
            lower, with_deltas(lower.upper, adapters.load_deltas(folder / task)), dev, hidden
        )
        found["loss"][task], found["base_loss"][task] = round(own, 4), round(base_loss, 4)
        for name, row in rows.items():
            upper = with_deltas(lower.upper, stores.deltas_of(row.tasks[task]))
            kept = gain_kept(base_loss, own, reference_loss(lower, upper, dev, hidden))
            found["rows"][name]["gain_kept"][task] = round(kept, 4)
    return found | {"adapters": stores.digest(collection), "fp16_bytes": stores.fp16_bytes(collection)}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", help="folders of adapters, FOLDER or FOLDER:TASK,TASK")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' files (see sources)")
    parser.add_argument("--base", default=DEFAULT, help="hub id or folder of a Llama-architecture model")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    given = parser.parse_args(argv)
    path = given.results / "training-study.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    for argument in given.folders:
        folder, _, chosen = argument.partition(":")
        tasks = (
            chosen.split(",") if chosen else [x for x in TASKS if (Path(folder) / x / "log.json").exists()]
        )
        found = measure(Path(folder), tasks, given.base, given.data)
        entries = [x for x in entries if x["adapters"] != found["adapters"]] + [found]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")
        means = {k: round(float(np.mean(list(x["gain_kept"].values()))), 4) for k, x in found["rows"].items()}
        print(f"{folder}: {len(tasks)} tasks, loss {np.mean(list(found['loss'].values())):.4f}, kept {means}")


if __name__ == "__main__":
    main()
