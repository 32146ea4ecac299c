"""Achieved FLOP/s of the Gram and projection steps over a large matmul's, interleaved in one process.

    python -m experiments.scale.roofline > experiments/scale/roofline.json

FLOPs are those of the products that are done, of a symmetric sum the strips that are; conversions, rounding
and everything else that is no product count as none.
"""

import json
import os
import statistics
import sys
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np

from hydraopt_jax import devices
from hydraopt_jax.explicit import groups, streaming, streaming_gram

SIZE, RANK, TASKS, WIDTH, ROUNDS = 2048, 16, 168, 16, 7


def main() -> None:
    rng = np.random.default_rng(0)
    grid = devices.make(1)
    bfloat16 = jnp.bfloat16.dtype
    a = rng.standard_normal((1, TASKS, RANK, SIZE), np.float32).astype(bfloat16)
    b = rng.standard_normal((1, TASKS, SIZE, RANK), np.float32).astype(bfloat16)
    block = groups.GroupFactors(a, b, np.ones((1, TASKS), np.float32), np.full((1, TASKS), RANK))
    both = streaming_gram.bits(block.a), streaming_gram.bits(block.b), block.scale
    pieces = {
        "gram": streaming.sum_tasks(RANK, (SIZE, SIZE), grid),
        "projection": streaming.head_tasks(RANK, (SIZE, SIZE), WIDTH, grid),
    }
    ((_, factors),) = streaming.chunks(both, TASKS, grid)
    # the first pass leaves the factors' own Gram matrices to the second one
    wide = [x.astype(np.float32) for x in (a, b.swapaxes(2, 3))]
    grams = [x @ x.swapaxes(2, 3) for x in wide]
    every = (block.a, block.b, block.scale, *grams)
    parts = [x for _, x in streaming.chunks(every, pieces["projection"], grid)]
    q = np.linalg.qr(rng.standard_normal((SIZE, WIDTH)))[0][None].astype(np.float32)
    shared = streaming_gram.Range(
        *(devices.put_on_mesh(grid, x, streaming_gram.LOCAL) for x in streaming_gram.range_of(q))
    )
    large = jnp.asarray(rng.standard_normal((4096, 4096), np.float32))
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))

    def matmul() -> None:
        product(large).block_until_ready()

    def gram() -> None:
        sums = streaming.blank((SIZE, SIZE), mesh=grid)
        sums, _ = streaming_gram.accumulate(
            sums, *factors, mesh=grid, sides=("in", "out"), dtype="bfloat16", size=pieces["gram"]
        )
        jax.block_until_ready(sums)

    def projection() -> None:
        for x in parts:
            grams = streaming_gram.Grams(*x[3:])
            out = streaming_gram.project(shared, *x[:3], grams, mesh=grid, side="in", dtype="bfloat16")
        jax.block_until_ready(out)

    rows = TASKS * RANK
    flops = {
        "matmul 4096": 2 * 4096**3,
        # two sums; Gram matrices of both factors; each factor times the other one's
        "gram": 2 * rows * (2 * streaming_gram.entries_of_strips(SIZE) + 4 * RANK * SIZE),
        # the factor times the basis, heads, and small ones
        "projection": 2 * rows * WIDTH * (2 * SIZE + RANK + WIDTH),
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
        "load": os.getloadavg()[0],
        "tasks in a piece": pieces,
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
