"""What noise shaping saves of a calibrated store's bytes, and what it costs in time.

    python -m experiments.morphology.shaping --data DATA --json experiments/morphology/results/shaping.json

The forty adapters of the shared initialization at each budget, calibrated by second moments of inputs and of
output gradients, without noise shaping (moments then only weigh what is coded) and with it. For each: bytes,
error of outputs by the moments, divergence of the logits on prompts that the moments did not see, seconds of
`compress`. From the errors of outputs: the bytes that the store without would have at the error of the one
with, interpolated between budgets.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.morphology import outputs
from experiments.morphology.config import Data, Refining
from experiments.morphology.dataset import load_items
from hydraopt_jax import formats, refinement
from hydraopt_jax.demo.assets import ADAPTERS_FILE, BASE_FILE, load_base, load_vocabulary, unpack_adapters
from hydraopt_jax.demo.model import forward
from hydraopt_jax.demo.tasks import Item
from hydraopt_jax.demo.vocabulary import encode_items
from hydraopt_jax.formats.memory_collection import in_memory
from hydraopt_jax.rate_control import engine, metrics
from hydraopt_jax.rate_control.options import Options
from hydraopt_jax.store import decode_terms
from hydraopt_jax.store.sizes import measure_size

# of the curve without noise shaping, wide enough for the errors of those with it
BUDGETS = (0.18, 0.125, 0.09, 0.0625, 0.045, 0.03, 0.02)
TOLD = (0.125, 0.0625, 0.03)


@contextmanager
def plainly() -> Iterator[None]:
    """Without noise shaping."""
    largest = metrics.SHAPED
    metrics.SHAPED = 0
    try:
        yield
    finally:
        metrics.SHAPED = largest


def bytes_without(rows: Sequence[dict[str, Any]], error: float) -> float:
    """Bytes of the stores without noise shaping at an error of outputs, log-linear between budgets."""
    known = sorted((np.log(x["output_error"]), np.log(x["bytes"])) for x in rows if not x["shaped"])
    at, size = zip(*known, strict=True)
    assert at[0] <= np.log(error) <= at[-1], f"no two budgets are around an error of {error:.3g}"
    return float(np.exp(np.interp(np.log(error), at, size)))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder download.py filled")
    parser.add_argument("--json", type=Path, required=True, help="results")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        paths = unpack_adapters(ADAPTERS_FILE, Path(folder))
        collection = [formats.read_adapter(p) for p in paths]
    base, vocabulary = load_base(BASE_FILE), load_vocabulary(BASE_FILE)
    items, given = load_items(options.data, Data()), Refining()
    lora = refinement.originals(collection)
    wanted: dict[str, Sequence[Item]] = {x.task: list(items[x.task]["train"]) for x in collection}
    prompts = encode_items(vocabulary, wanted, limit=given.moments + given.check).prompts
    heard = outputs.answered(base, lora, prompts)
    moments = outputs.moments(base, lora, outputs.batch(heard, 0, given.moments), jax.random.key(0))
    unseen = outputs.batch(heard, given.moments, given.check)
    loss = refinement.divergence(lambda own, x: forward(base, own, x.tokens), lambda x: x.counts)
    diverged = jax.jit(loss)
    found, rows = in_memory(collection), list[dict[str, Any]]()
    total = 2 * sum(x.a[n].size + x.b[n].size for x in collection for n in x.a)
    for shaped in (False, True):
        for budget in TOLD if shaped else BUDGETS:
            started = time.time()
            asked = Options(budget=budget, calibration=moments)
            if shaped:
                store = engine.compress_to_target(found, asked)
            else:
                with plainly():
                    store = engine.compress_to_target(found, asked)
            taken = time.time() - started
            stored = {n: (0 * a, 0 * b) for n, (a, b) in lora.items()}
            stored |= refinement.stacked(decode_terms(store))
            row = {
                "budget": budget,
                "shaped": shaped,
                "bytes": measure_size(store),
                "share": measure_size(store) / total,
                "output_error": float(np.nanmean(np.asarray(store.output_errors))),
                "divergence": float(diverged(stored, lora, unseen)),
                "seconds": round(taken, 1),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    for row in rows:
        if row["shaped"]:
            row["bytes_without"] = round(bytes_without(rows, row["output_error"]))
    options.json.write_text(json.dumps({"adapters": len(collection), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
