"""Peak memory of writing and reading a container larger than an array.

    python experiments/scale/writer.py [MIB...]

Writes random bytes as leaves of 1 MiB, then reads one of them and then all; prints what `ru_maxrss` grew by,
in MB, and seconds, and writes writer.json beside this file. A process for each size, with zstd and without.
"""

import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

OUT = Path(__file__).with_suffix(".json")
LEAF = 1 << 20


def measured(work):
    """What a call returns, MB by which it raised the peak, and seconds."""
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = work()
    took = time.perf_counter() - begun
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return found, {"peak_MB": round(more / 1e6), "seconds": round(took, 2)}


def one(count, zstd):
    """A container of so many leaves: written, one leaf read, all read."""
    from hydraopt_jax.store import container, container_writer

    block = np.random.default_rng(0).integers(0, 256, LEAF, np.uint8)
    leaf = lambda k: block + np.uint8(k % 256)  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        # what Orbax takes for anything is in the baseline
        container_writer.write(Path(folder) / "first", {"leaves": {"0": 1}}, [b"x"], zstd)
        path = Path(folder) / "store"
        index = {"leaves": {str(k): LEAF for k in range(count)}}
        _, wrote = measured(lambda: container_writer.write(path, index, map(leaf, range(count)), zstd))
        meta, item = container.read_description(path)
        opened = container.open_container(path, meta, item)
        start = meta["index"][0] + (count // 2) * LEAF
        span, single = measured(lambda: container.read_span(opened, start, start + LEAF, {}))
        np.testing.assert_array_equal(span, leaf(count // 2))
        _, whole = measured(lambda: container.read_span(opened, 0, opened.total, {}))
    return {
        "MiB": count,
        "zstd": zstd,
        "arrays": len(opened.arrays),
        "write": wrote,
        "one leaf": single,
        "all": whole,
    }


def main(sizes):
    rows = []
    for size, zstd in itertools.product(sizes or ["512", "2048"], ["zstd", "plain"]):
        command = [sys.executable, __file__, "--one", size, zstd]
        rows.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout))
        print(json.dumps(rows[-1]), flush=True)
    OUT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(int(sys.argv[2]), sys.argv[3] == "zstd")))
    else:
        main(sys.argv[1:])
