"""One generated job in a process of its own: prints seconds, peak memory and the error as one JSON object.

python -m experiments.scale.job slice --tasks 1000 --budget 0.125
"""

import argparse
import functools
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np

from experiments.scale import generated
from hydraopt_jax import compression
from hydraopt_jax.collection import Collection
from hydraopt_jax.explicit import groups
from hydraopt_jax.forms import Hydra
from hydraopt_jax.jobs import estimate, job
from hydraopt_jax.rate_control import parts
from hydraopt_jax.rate_control.options import Options
from hydraopt_jax.rate_control.work import Job, Processes, Progress
from hydraopt_jax.store import sizes

FORM = Hydra(rank=16)


def peak() -> int:
    """Peak resident bytes of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def largest_group(found: Collection, budget: float | None) -> int:
    """Bytes of the factors that are solved, or coded, together, at most."""
    if budget is None:
        rows = groups.groups_of(found, FORM)
        return max(x.room * 2 * len(found.cards) * x.rank * sum(x.shape) for x in rows)
    return max(2 * parts.entries(found, x) for x in parts.parts_of(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=generated.MODELS)
    parser.add_argument("--tasks", type=int, required=True)
    parser.add_argument("--layers", type=int, help="only the first layers")
    parser.add_argument("--budget", type=float, help="of the bytes that come in, in place of rank 16")
    arguments = parser.parse_args()
    budget = arguments.budget
    jax.block_until_ready(jnp.ones(8) @ jnp.ones(8))
    base = peak()
    modules = generated.model(arguments.model, arguments.layers)
    found = generated.collection(arguments.tasks, modules)
    options = Options(budget=budget)
    planned = estimate.target_costs(found, options) if budget else estimate.form_costs(found, FORM)
    by_shape: dict[tuple[int, int], int] = {}
    for shape in modules.values():
        by_shape[shape] = by_shape.get(shape, 0) + 2 * arguments.tasks * 16 * sum(shape)
    seconds: list[float] = []
    read: list[int] = []
    asked = {"budget": budget} if budget else {"form": FORM}
    progress = Progress(step=lambda done: seconds.append(time.perf_counter()), read=read.append)
    # what comes after the last wait for work is done by the first process alone
    waits: dict[str, float] = {}

    def wait(name: str) -> None:
        waits[name] = time.process_time()

    processes = Processes(wait=wait)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "store"
        compress = functools.partial(compression.compress, **asked)
        start = time.perf_counter(), time.process_time()
        content = job.run_job(out, found, compress, asked, Job(progress=progress, processes=processes))
        total, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        alone = start[1] + cpu - waits["compressed" if budget else "worked"]
        highest, size = peak(), sizes.size_on_disk(out)
        assert content is not None
        errors = content.errors
    result = {
        "model": arguments.model,
        "tasks": arguments.tasks,
        "budget": budget,
        "modules": len(modules),
        "input_bytes": found.size,
        "largest_bucket_bytes": max(by_shape.values()),
        "largest_group_bytes": largest_group(found, budget),
        "baseline_bytes": base,
        "peak_beyond_baseline_bytes": highest - base,
        "planned_memory_bytes": planned.memory,
        "seconds": total,
        "cpu_seconds": cpu,
        "cpu_seconds_of_the_first_process_at_the_end": alone,
        "segments": len(content.segments),
        "seconds_after_first_group": seconds[-1] - seconds[0],
        "bytes_read": sum(read),
        "store_bytes": size,
        "planned_store_bytes": planned.store,
        "flops": planned.flops,
        "planned_seconds": planned.seconds,
        "error": float(np.nanmean(errors)),
        "bound": float(np.mean(list(content.report["bound"].values()))),
        "device": jax.devices()[0].device_kind,
    }
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
