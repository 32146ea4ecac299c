"""One generated job in a process of its own: prints seconds, peak memory and the error as one JSON object."""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import generated
import jax
import jax.numpy as jnp
import numpy as np
from hydraopt_jax.jobs.reading import Collection

from hydraopt_jax import compression
from hydraopt_jax.jobs import coded, estimate, groups, job, segments
from hydraopt_jax.rate_control import navigate
from hydraopt_jax.store import checkpoint


def peak() -> int:
    """Peak resident bytes of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def largest_group(found: Collection, options: compression.Options | navigate.Options) -> int:
    """Bytes of the factors that are solved, or coded, together, at most."""
    if isinstance(options, compression.Options):
        rows = groups.groups_of(found, options)
        return max(x.room * 2 * len(found.cards) * x.rank * sum(x.shape) for x in rows)
    size = lambda p: 2 * sum(found.rank(m, t) * sum(found.shapes[m]) for m in p.modules for t in p.tasks)  # noqa: E731
    return max(map(size, segments.parts_of(found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=generated.MODELS)
    parser.add_argument("--tasks", type=int, required=True)
    parser.add_argument("--layers", type=int, help="only the first layers")
    parser.add_argument("--budget", type=float, help="of the bytes that come in, in place of rank 16")
    arguments = parser.parse_args()
    jax.block_until_ready(jnp.ones(8) @ jnp.ones(8))
    base = peak()
    modules = generated.model(arguments.model, arguments.layers)
    found = generated.collection(arguments.tasks, modules)
    options: compression.Options | navigate.Options = compression.Options(rank=16)
    if arguments.budget:
        options = navigate.Options(budget=arguments.budget)
    planned = estimate.form_costs(found, options)
    by_shape: dict[tuple[int, int], int] = {}
    for shape in modules.values():
        by_shape[shape] = by_shape.get(shape, 0) + 2 * arguments.tasks * 16 * sum(shape)
    seconds: list[float] = []
    read: list[int] = []

    def step(_: int) -> None:
        seconds.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "store"
        start = time.perf_counter()
        run: Any = coded.run if arguments.budget else job.run
        content = run(out, found, options, progress=job.Progress(step=step, read=read.append))
        total = time.perf_counter() - start
        size = checkpoint.size_on_disk(out)
    assert content is not None
    result = {
        "model": arguments.model,
        "tasks": arguments.tasks,
        "budget": arguments.budget,
        "modules": len(modules),
        "input_bytes": found.size,
        "largest_bucket_bytes": max(by_shape.values()),
        "largest_group_bytes": largest_group(found, options),
        "baseline_bytes": base,
        "peak_beyond_baseline_bytes": peak() - base,
        "planned_memory_bytes": planned.memory,
        "seconds": total,
        "seconds_after_first_group": seconds[-1] - seconds[0],
        "bytes_read": sum(read),
        "store_bytes": size,
        "planned_store_bytes": planned.store,
        "flops": planned.flops,
        "planned_seconds": planned.seconds,
        "error": float(np.nanmean(content.errors)),
        "bound": float(np.mean(list(content.report["bound"].values()))),
        "device": jax.devices()[0].device_kind,
    }
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
