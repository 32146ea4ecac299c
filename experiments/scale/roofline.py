"""Achieved FLOP/s of the Gram and projection steps over a large matmul's, interleaved in one process."""

import json
import os
import statistics
import sys
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np

from hydraopt_jax.scale import closed, groups, mesh, streaming

SIZE, RANK, TASKS, WIDTH, ROUNDS = 2048, 16, 168, 16, 7


def main() -> None:
    rng = np.random.default_rng(0)
    grid = mesh.make(1)
    bfloat16 = jnp.bfloat16.dtype
    a = rng.standard_normal((1, TASKS, RANK, SIZE), np.float32).astype(bfloat16)
    b = rng.standard_normal((1, TASKS, SIZE, RANK), np.float32).astype(bfloat16)
    block = groups.Block(a, b, np.ones((1, TASKS), np.float32), np.full((1, TASKS), RANK))
    each = 2 * RANK * SIZE
    lengths = {
        "gram": streaming.chunk_tasks(streaming.SUM_BYTES, TASKS, each, 1, grid),
        "projection": streaming.chunk_tasks(streaming.HEAD_BYTES, TASKS, each + WIDTH * SIZE, 1, grid),
    }
    parts = {k: [x for _, x in streaming.chunks(block, n, grid)] for k, n in lengths.items()}
    q = np.linalg.qr(rng.standard_normal((SIZE, WIDTH)))[0][None].astype(np.float32)
    shared = tuple(mesh.put(grid, x, closed.LOCAL) for x in (q, q, np.ones((1, WIDTH), np.float32)))
    large = jnp.asarray(rng.standard_normal((4096, 4096), np.float32))
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))

    def matmul() -> None:
        product(large).block_until_ready()

    def gram() -> None:
        sums = (jnp.zeros((1, 1, SIZE, SIZE)), jnp.zeros((1, 1, SIZE, SIZE)))
        for x in parts["gram"]:
            sums, _ = closed.accumulate(sums, *x, mesh=grid, sides=("in", "out"))
        jax.block_until_ready(sums)

    def projection() -> None:
        for x in parts["projection"]:
            out = closed.project(*shared, *x, mesh=grid, side="in", dtype="bfloat16")
        jax.block_until_ready(out)

    wide = TASKS * RANK
    flops = {
        "matmul 4096": 2 * 4096**3,
        # two sums; and what weighs a task: two R x R Grams and their product with the factor, a side
        "gram": 2 * (2 * wide * SIZE**2 + 3 * 2 * wide * RANK * SIZE),
        # inner products, heads, what is left of the factor, its Gram, the factor's rounding, heads against
        # heads twice, factor against heads, and two R x R Grams for the energy
        "projection": 2 * wide * SIZE * (4 * WIDTH + 2 * RANK + WIDTH + RANK) + 4 * TASKS * WIDTH**2 * SIZE,
    }
    steps = {"matmul 4096": matmul, "gram": gram, "projection": projection}
    seconds: dict[str, list[float]] = {k: [] for k in steps}
    for n in range(ROUNDS + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name] += [time.perf_counter() - start] * (n > 0)
    rates = {k: flops[k] / min(v) for k, v in seconds.items()}
    out = {
        "tasks in a chunk": lengths,
        "flops": flops,
        "seconds": {k: [round(x, 4) for x in v] for k, v in seconds.items()},
        "rate of the best": {k: float(f"{v:.4g}") for k, v in rates.items()},
        "share of matmul": {k: round(v / rates["matmul 4096"], 3) for k, v in rates.items()},
        "share of matmul, medians": {
            k: round(
                flops[k]
                / statistics.median(v)
                / flops["matmul 4096"]
                * statistics.median(seconds["matmul 4096"]),
                3,
            )
            for k, v in seconds.items()
        },
    }
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
