"""Peak memory of every merging method: 40 adapters of rank 16, one module of 2048 x 2048, float32.

    python -m experiments.peers.merge_memory --json experiments/peers/merge_memory.json

Each method has a process of its own. Beside the peak of the whole process (`ru_maxrss`) stands what it takes
beyond the baseline: Python, JAX and the inputs, 10 MB of factors, and for RegMean 671 MB of second moments.
One dense delta is 16.8 MB, all of them 671 MB. Also the seconds, compilation included, and the processor's.
About ten minutes on two cores.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TASKS, RANK, WIDTH = 40, 16, 2048


def worker(name: str) -> dict[str, float]:
    """Peaks and seconds of one method in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from hydraopt_jax import merging, synthetic
    from hydraopt_jax.merging import registry

    shapes = {"q": (WIDTH, WIDTH)}
    collection = synthetic.collection(0, tasks=TASKS, modules=shapes, rank=RANK, dtype="float32")
    options: dict[str, Any] = {}
    if "moments" in registry.method_of(name).options:
        rng = np.random.default_rng(0)
        x = (rng.standard_normal((WIDTH + 8, WIDTH), np.float32) for _ in range(TASKS))
        options["moments"] = [{"q": rows.T @ rows / len(rows)} for rows in x]
    jax.block_until_ready(jax.jit(jnp.dot)(jnp.ones((64, 64)), jnp.ones((64, 64))))
    # what is resident, not the peak of making the inputs: that one would hide the method's own
    before = resident()
    if (highest := peak()) > 1.2 * before + 100e6:
        raise SystemExit(f"making the inputs took {highest / 1e6:.0f} MB: the peak of {name} is not seen")
    start = time.perf_counter(), time.process_time()
    merging.merge_modules(collection, name, **options)
    return {
        "seconds": round(time.perf_counter() - start[0], 2),
        "cpu_seconds": round(time.process_time() - start[1], 2),
        "baseline_bytes": before,
        "peak_bytes": peak(),
        "beyond_baseline_bytes": max(peak() - before, 0),
    }


def peak() -> int:
    """Highest resident bytes of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident() -> int:
    """Resident bytes of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def table(methods: dict[str, dict[str, float]]) -> Table:
    """Methods by peak."""
    out = Table("method", "peak MB", "beyond the baseline MB", "s", "cpu s")
    for name, x in sorted(methods.items(), key=lambda row: -row[1]["peak_bytes"]):
        sizes = (f"{x[k] / 1e6:.0f}" for k in ("peak_bytes", "beyond_baseline_bytes"))
        out.add_row(name, *sizes, f"{x['seconds']:.1f}", f"{x['cpu_seconds']:.1f}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", help="all where none is named")
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(arguments.worker)))
        return
    from hydraopt_jax.merging import METHODS

    methods = {}
    for name in arguments.methods or METHODS:
        command = [sys.executable, "-m", "experiments.peers.merge_memory", "--worker", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        methods[name] = json.loads(done.stdout)
        print(name, methods[name], file=sys.stderr)
    highest = max(methods, key=lambda name: methods[name]["peak_bytes"])
    result = {
        "case": {"adapters": TASKS, "rank": RANK, "module": [WIDTH, WIDTH]},
        "highest": {"method": highest, "peak_bytes": methods[highest]["peak_bytes"]},
        "methods": methods,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")
    Console(stderr=True).print(table(methods))


if __name__ == "__main__":
    main()
