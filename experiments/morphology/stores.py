"""What compressed stores score: exact match of every task against bytes, for one regime.

    python -m experiments.morphology.stores --data DATA --out OUT --regime shared
    python -m experiments.morphology.stores --data DATA --out OUT --regime independent \\
        --adapters OUT/adapters-independent.zip --base OUT/base.safetensors

Every row is a store written to disk, read back and scored by greedy decoding on the held-out items of every
task, in batches that mix the tasks (`serving`). Second moments and refinement see prompts of the train split
alone, answered by the adapters themselves.
Scores are kept in `stores-REGIME.json` as they are done, stores and the steps of refinements below
OUT: a second run goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.morphology import outputs
from experiments.morphology.assets import check_base
from experiments.morphology.config import Data, Refining
from experiments.morphology.dataset import load_items
from experiments.morphology.rows import Maker, Setting, plan
from experiments.selection import add_only, selected
from hydraopt_jax import formats, refinement, report, serving
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.demo.assets import ADAPTERS_FILE, BASE_FILE, load_base, load_vocabulary, unpack_adapters
from hydraopt_jax.demo.evaluate import Adapted, evaluate
from hydraopt_jax.demo.model import Base
from hydraopt_jax.demo.tasks import Item
from hydraopt_jax.demo.vocabulary import Items, Vocabulary, encode_items
from hydraopt_jax.store import Store, save, size_on_disk
from hydraopt_jax.store import open as open_store

RESULTS = Path(__file__).parent / "results"
# dev items a task by which a merge's scale is chosen
CHOOSING = 100


def score(base: Base, factors: Adapted, held: Mapping[str, Items]) -> dict[str, list[float]]:
    """Exact match and character error rate of every task on each split."""
    row = {}
    for split, items in held.items():
        found = evaluate(base, factors, items)
        row[split] = [round(float(x), 4) for x in found.exact]
        row[f"{split}_cer"] = [round(float(x), 4) for x in found.error]
    return row


def on_disk(path: Path, make: Maker) -> tuple[Store, int, float | None]:
    """A row's store as it comes back from disk, its bytes there, and the seconds of making it, if it was."""
    seconds = None
    if not path.exists():
        started = time.time()
        made = make()
        seconds = round(time.time() - started, 1)
        save(path, made)
    return open_store(path), size_on_disk(path), seconds


def fill(
    result: dict[str, Any],
    path: Path,
    setting: Setting,
    rows: Mapping[str, Maker],
    held: Mapping[str, Items],
    out: Path,
) -> None:
    """Score what `result` lacks of the rows, and write it to `path` after each."""
    base, lora = setting.base, refinement.originals(setting.collection)

    def keep(name: str, size: int, factors: Adapted, **more: Any) -> None:
        # dev is for decisions: it is scored where there is one to take
        both = "gradients" in name or name == "own adapters"
        splits = {k: x for k, x in held.items() if both or k == "test"}
        row = {"bytes": size, **score(base, factors, splits), **more}
        result["rows"][name] = row
        path.write_text(json.dumps(result) + "\n")
        share, mean = size / result["fp16_bytes"], np.mean(row["test"])
        print(f"{time.strftime('%H:%M:%S')} {name}: {share:.4f} mean {mean:.4f}", flush=True)

    if "zero-shot" not in result["rows"]:
        keep("zero-shot", 0, {})
    if "own adapters" not in result["rows"]:
        keep("own adapters", result["fp16_bytes"], lora)
    todo = {k: x for k, x in rows.items() if k not in result["rows"]}
    with report.progress("rows", len(todo)) as advance:
        for name, make in todo.items():
            store, size, seconds = on_disk(out / re.sub(r"[^a-z0-9.]+", "-", name.lower()), make)
            keep(
                name,
                size,
                serving.load(store, dtype=jnp.float32),
                error=round(float(np.nanmean(store.errors)), 6),
                forms=store.report.get("forms", {}),
                refinement=store.report.get("refinement"),
                seconds=seconds,
            )
            advance()


def run(
    base: Base,
    vocabulary: Vocabulary,
    collection: Sequence[Adapter],
    items: Mapping[str, Mapping[str, Sequence[Item]]],
    settings: Refining,
    path: Path,
    out: Path,
    *,
    regime: str = "shared",
    count: int = 1000,
    only: Sequence[str] = ("*",),
) -> dict[str, Any]:
    """All rows that `only` names or has a pattern of, on up to `count` held-out items a task, into `path`."""
    tasks = [x.task for x in collection]
    result: dict[str, Any] = {
        "regime": regime,
        "items": count,
        "fp16_bytes": 2 * sum(x.a[n].size + x.b[n].size for x in collection for n in x.a),
        "tasks": tasks,
        "rows": {},
    }
    if path.exists():
        kept = json.loads(path.read_text())
        result = kept if kept["items"] == count and kept["tasks"] == tasks else result

    def encoded(split: str, limit: int) -> Items:
        return encode_items(vocabulary, {t: list(items[t][split]) for t in tasks}, limit=limit)

    @functools.cache
    def heard(count: int) -> outputs.Sequences:
        prompts = encoded("train", count).prompts
        return outputs.answered(base, refinement.originals(collection), prompts)

    few = encoded("dev", CHOOSING)
    setting = Setting(
        base,
        list(collection),
        heard,
        lambda store: float(evaluate(base, serving.load(store, dtype=jnp.float32), few).exact.mean()),
        out / "refining",
    )
    rows = selected(plan(setting, settings), only)
    fill(result, path, setting, rows, {s: encoded(s, count) for s in ("test", "dev")}, out)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder download.py filled")
    parser.add_argument("--out", type=Path, required=True, help="keeps stores and steps of refinements")
    parser.add_argument("--regime", default="shared", help="names the results")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS_FILE, help="archive of PEFT folders")
    parser.add_argument("--base", type=Path, default=BASE_FILE, help="the transformer that they adapt")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the scores")
    parser.add_argument("--items", type=int, default=1000, help="held-out items a task, at most")
    add_only(parser)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        paths = unpack_adapters(options.adapters, Path(folder))
        collection = [formats.read_adapter(p) for p in paths]
    base = load_base(options.base)
    check_base(collection, base)
    options.results.mkdir(parents=True, exist_ok=True)
    run(
        base,
        load_vocabulary(options.base),
        collection,
        load_items(options.data, Data()),
        Refining(),
        options.results / f"stores-{options.regime}.json",
        options.out / f"stores-{options.regime}",
        regime=options.regime,
        count=options.items,
        only=options.only,
    )


if __name__ == "__main__":
    main()
