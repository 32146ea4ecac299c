"""What noise shaping saves of a calibrated store's bytes, and what it costs in time.

    python -m experiments.morphology.shaping --data DATA --json experiments/morphology/results/shaping.json

The forty adapters of the shared initialization at each budget, calibrated by second moments of inputs and of
output gradients, without noise shaping (moments then only weigh what is coded) and with it. For each: bytes,
error of outputs by the moments, divergence of the logits on prompts that the moments did not see, seconds of
`compress`. From the errors of outputs: the bytes that the store without would have at the error of the one
with, interpolated between budgets.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from experiments.morphology.study import arguments, prepare
from hydraopt_jax.formats.memory_collection import in_memory
from hydraopt_jax.rate_control import engine, metrics
from hydraopt_jax.rate_control.options import Options

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
    options = arguments(__doc__, argv)
    study = prepare(options.data)
    found, rows = in_memory(study.collection), list[dict[str, Any]]()
    for shaped in (False, True):
        for budget in TOLD if shaped else BUDGETS:
            started = time.time()
            asked = Options(budget=budget, calibration=study.moments)
            if shaped:
                store = engine.compress_to_target(found, asked)
            else:
                with plainly():
                    store = engine.compress_to_target(found, asked)
            taken = time.time() - started
            row = {"budget": budget, "shaped": shaped} | study.measure(store)
            row |= {
                "output_error": float(np.nanmean(np.asarray(store.output_errors))),
                "seconds": round(taken, 1),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    for row in rows:
        if row["shaped"]:
            row["bytes_without"] = round(bytes_without(rows, row["output_error"]))
    options.json.write_text(json.dumps({"adapters": len(study.collection), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
