"""The demonstration: a seeded collection, its trade-off over K, an export and a verification."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hydraopt_jax import checkpoint, compression, report, store, synthetic
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import read_adapter, write_adapter

TASKS = 6
STAGES = TASKS + 3


def run(out: Path, seed: int, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write the collection as PEFT folders, compress it at K = 1..T, export, verify, plot.

    Args:
      out: a new folder; it appears whole or not at all.
      seed: of the collection.
      advance: called after each of `STAGES` stages.

    Returns:
      JSON-able: for each K the bytes on disk, their ratio to the input, the mean and worst relative squared
      error and the bound; the path of the plot. Also written to `out/demo.json`.

    Raises:
      HydraOptError: `out` exists or cannot be written.
    """
    if out.exists():
        raise HydraOptError(f"{out}: exists; choose another --out")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    except OSError as error:
        raise HydraOptError(f"{out}: cannot be written: {error.strerror or error}") from error
    try:
        result = build(work, seed, advance)
        result["plot"] = str(out / "tradeoff.png")
        (work / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return result


def build(work: Path, seed: int, advance: Callable[[], None]) -> dict[str, Any]:
    """The demonstration's files inside `work`."""
    made = synthetic.collection(
        seed,
        tasks=TASKS,
        modules=synthetic.transformer_modules(4, 256, 64),
        rank=8,
        likeness=0.6,
        dtype="float16",
    )
    for adapter in made:
        write_adapter(work / "adapters" / adapter.task, adapter)
    collection = [read_adapter(work / "adapters" / x.task) for x in made]
    advance()
    before = checkpoint.size_on_disk(work / "adapters")
    curve = []
    for heads in range(1, TASKS + 1):
        kept = compression.compress(collection, compression.Options(heads=heads))
        path = work / f"store-k{heads}"
        checkpoint.save(path, kept)
        size = checkpoint.size_on_disk(path)
        curve.append(
            {
                "heads": heads,
                "bytes": size,
                "ratio": size / before,
                "mean": float(np.nanmean(kept.errors)),
                "worst": float(np.nanmean(kept.errors, 0).max()),
                "bound": float(np.mean(list(kept.report["bound"].values()))),
            }
        )
        advance()
    content = checkpoint.restore(work / f"store-k{TASKS}")
    for task in content.tasks:
        write_adapter(work / "exported" / task, store.adapter(content, task))
    back = [read_adapter(work / "exported" / t) for t in content.tasks]
    advance()
    measured = compression.measure(content, collection)
    exported = compression.measure(
        compression.compress(back, compression.Options(dtype="float32")), collection
    )
    report.plot_tradeoff(
        work / "tradeoff.png",
        {f"HydraOpt, K = 1..{TASKS}": [(x["ratio"], x["mean"]) for x in curve]},
        bytes_label="bytes on disk / bytes of the adapters",
    )
    advance()
    return {"seed": seed, "bytes_before": before, "curve": curve, "verified": measured, "exported": exported}
