"""The demonstration: bytes and scores of forty trained adapters, before and after, at three budgets.

The adapters do five word-level tasks in eight languages on a small character transformer. Model, adapters and
held-out items ship with the package (`demo/data`).
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hydraopt_jax import refinement, report, store
from hydraopt_jax.demo import assets
from hydraopt_jax.demo.evaluate import evaluate
from hydraopt_jax.demo.vocabulary import encode_items
from hydraopt_jax.errors import HydraOptError, system_error
from hydraopt_jax.formats import read_adapter, write_adapter
from hydraopt_jax.formats.memory_collection import in_memory
from hydraopt_jax.rate_control import distortion, engine
from hydraopt_jax.rate_control.options import Options
from hydraopt_jax.store.decoding import decode_all

BUDGETS = (0.25, 0.125, 0.0625)
PLOT = "tradeoff.png"
# scored words per task
ITEMS = 24


def stages(budgets: Sequence[float]) -> int:
    """The number of calls of `advance` by `run_demo`."""
    return len(budgets) + 3


def run_demo(
    out: Path,
    advance: Callable[[], None] = lambda: None,
    *,
    tasks: Sequence[str] | None = None,
    budgets: Sequence[float] = BUDGETS,
    items: int = ITEMS,
) -> dict[str, Any]:
    """Write the adapters as PEFT folders, compress them at each budget, score, export, verify, plot.

    Args:
      out: a new folder; it is written completely or not at all.
      advance: called after each of `stages(budgets)` stages.
      tasks: names of the adapters to use; None for all forty.
      budgets: fractions of the adapters' fp16 bytes.
      items: held-out words of each task to score, at most 48.

    Returns:
      JSON-able results, also written to `out/demo.json`. Per budget: bytes on disk, their fraction of the
      fp16 bytes, error, scores. Also the scores of the adapters themselves and of the model without adapters,
      and the path of the plot, None if matplotlib is not installed.

    Raises:
      HydraOptError: `out` exists or cannot be written.
    """
    if out.exists():
        raise HydraOptError(f"{out}: exists; choose another --out")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    except OSError as error:
        raise system_error(out, "written", error) from error
    try:
        new = work / "new"
        new.mkdir()  # mkdtemp's folder is its owner's only; this one has the usual permissions
        result = build_demo(new, advance, tasks, budgets, items)
        result["plot"] = str(out / PLOT) if (new / PLOT).exists() else None
        (new / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
        os.replace(new, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return result


def build_demo(
    work: Path,
    advance: Callable[[], None],
    chosen: Sequence[str] | None,
    budgets: Sequence[float],
    count: int,
) -> dict[str, Any]:
    """Write the demonstration's files to `work`; return the results of `run_demo`."""
    paths = assets.unpack_adapters(assets.ADAPTERS_FILE, work / "adapters")
    for path in paths:
        if chosen is not None and path.name not in chosen:
            shutil.rmtree(path)
    collection = [read_adapter(p) for p in paths if p.exists()]
    tasks = [x.task for x in collection]
    sample = assets.load_sample()
    items = encode_items(assets.load_vocabulary(), {t: sample[t] for t in tasks}, limit=count)
    base = assets.load_base()
    reference = 2 * sum(x.a[n].size + x.b[n].size for x in collection for n in x.a)

    def score(lora: dict[str, Any]) -> dict[str, float]:
        return dict(zip(tasks, np.round(evaluate(base, lora, items).exact, 4).tolist(), strict=True))

    none = score({})
    advance()
    before = score(refinement.originals(collection))
    advance()
    rows: list[dict[str, Any]] = []
    cache: dict[int, Any] = {}
    for budget in budgets:
        kept = engine.compress_to_target(in_memory(collection), Options(budget=budget), cache=cache)
        path = work / f"store-{budget:g}"
        store.save(path, kept)
        after = score(refinement.originals(list(decode_all(store.open(path)))))
        rows.append(
            {
                "budget": budget,
                "bytes": store.size_on_disk(path),
                "fraction": store.size_on_disk(path) / reference,
                "error": float(np.nanmean(kept.errors)),
                "score": float(np.mean(list(after.values()))),
                "scores": after,
            }
        )
        advance()
    content = store.open(path)
    write_adapter(work / "exported" / tasks[0], store.decode(content, tasks[0]))
    back = read_adapter(work / "exported" / tasks[0])
    measured = distortion.measure(content, collection)
    if report.can_plot():
        report.plot_tradeoff(
            work / PLOT,
            {
                "stores": [(x["fraction"], x["score"]) for x in rows],
                "own adapters, fp16": [(1.0, float(np.mean(list(before.values()))))],
            },
            bytes_label="bytes on disk / fp16 bytes of the adapters",
            error_label="exact match, mean over tasks",
            logarithmic=False,
        )
    advance()
    mean = lambda x: float(np.mean(list(x.values())))  # noqa: E731
    return {
        "tasks": tasks,
        "words": count,
        "bytes_fp16": reference,
        "without_adapters": {"score": mean(none), "scores": none},
        "own_adapters": {"score": mean(before), "scores": before},
        "stores": rows,
        "verified": measured,
        "exported": {"task": tasks[0], "modules": len(back.a)},
    }
