"""A stream of adds against a fit of all at once and K-Merge, on adapters that ship with the package.

    python -m experiments.reliability.stream

The first FIRST adapters are compressed at a step, the others are added one by one, in three orders; the fit
of all at once gets the bytes that the stream's store takes. K-Merge, which merges each arriving adapter into
one of K, gets at least as many. Writes stream.json beside this file.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np

from hydraopt_jax import adapters, changes, formats
from hydraopt_jax.compression import compress
from hydraopt_jax.demo import assets
from hydraopt_jax.merging import curves
from hydraopt_jax.store import Store, sizes

TASKS, FIRST, ERROR = 12, 4, 0.01
ORDERS = 3
OUT = Path(__file__).parent / "stream.json"


def collection() -> list[adapters.Adapter]:
    """Every third of the shipped adapters, so that tasks and languages mix."""
    with tempfile.TemporaryDirectory() as folder:
        paths = assets.unpack_adapters(assets.ADAPTERS_FILE, Path(folder))
        chosen = sorted(paths)[:: max(len(paths) // TASKS, 1)][:TASKS]
        return [formats.read_adapter(x) for x in chosen]


def stream(many: list[adapters.Adapter]) -> tuple[Store, float]:
    """The store after a stream of adds, and its processor seconds per add."""
    content = compress(many[:FIRST], max_error=ERROR)
    start = time.process_time()
    for x in many[FIRST:]:
        content = changes.add(content, x)
    return content, (time.process_time() - start) / (len(many) - FIRST)


def main() -> None:
    many = collection()
    rows = []
    for seed in range(ORDERS):
        order = np.random.default_rng(seed).permutation(len(many))
        arrived = [many[k] for k in order]
        content, seconds = stream(arrived)
        size = sizes.measure_size(content)
        found = changes.estimate_refit(content, {x.task: x for x in many})
        whole = compress(arrived, budget=size)
        curve = curves.curves_of(arrived, ["k-merge"])[0]
        rival = next((p for p in curve.points if p.bytes >= size), curve.points[-1])
        rows.append(
            {
                "order": seed,
                "bytes": size,
                "fraction": round(size / (2 * content.report["entries"]), 4),
                "stream": float(np.nanmean(content.errors)),
                "at once": float(np.nanmean(whole.errors)),
                "estimate": found.mean,
                "due": found.due,
                "k-merge": {"setting": rival.setting, "bytes": int(rival.bytes), "error": float(rival.mean)},
                "processor seconds per add": round(seconds, 2),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    result = {"tasks": [x.task for x in many], "first": FIRST, "error": ERROR, "rows": rows}
    OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
