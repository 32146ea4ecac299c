"""Whether a mixture of both metrics does better than either: errors of weights, and of outputs by moments.

    python -m experiments.morphology.mixture --data DATA --json experiments/morphology/results/mixture.json

The forty adapters of the shared initialization, calibrated by `share * M + (1 - share) * mean eigenvalue * I`
for each second moment M of inputs and output gradients (`moments.DAMPING` is 1 - share): share 0 is that of
errors of weights, but for what modules matter; of share 1 a ten-thousandth is the identity. For each share
and budget: mean error of the weights, and divergence of the logits on prompts that the moments did not see.
Rows are kept as they are done.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.morphology.study import arguments, prepare
from hydraopt_jax.calibration import moments
from hydraopt_jax.formats.memory_collection import in_memory
from hydraopt_jax.rate_control import engine
from hydraopt_jax.rate_control.options import Options

BUDGETS = (0.125, 0.03)
SHARES = (1.0, 0.97, 0.9, 0.7, 0.0)
# what moments need of the identity to have an inverse
LEAST = 1e-4


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    options = arguments(__doc__, argv)
    study = prepare(options.data)
    found = in_memory(study.collection)
    kept = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    rows: list[dict[str, Any]] = kept
    for budget, share in itertools.product(BUDGETS, SHARES):
        if any((x["budget"], x["share_of_moments"]) == (budget, share) for x in rows):
            continue
        moments.DAMPING = max(1 - share, LEAST)
        store = engine.compress_to_target(found, Options(budget=budget, calibration=study.moments))
        row = {"budget": budget, "share_of_moments": share} | study.measure(store)
        row["error"] = float(np.nanmean(np.asarray(store.errors)))
        rows.append(row)
        print(json.dumps(row), flush=True)
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
