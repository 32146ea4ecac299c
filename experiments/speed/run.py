"""What a user waits for, in units of zlib level 6 compressing the same fp16 bytes on the same core.

    OPENBLAS_NUM_THREADS=1 python experiments/speed/run.py --json experiments/speed/results.json

Four adapters of the first four layers of an 8B-shaped model (rank 16, 42 MB in half precision, generated) are
compressed to an eighth by the command, whole process; one of them is decoded; `hydraopt --help` is measured
against `import numpy`. Times are processor seconds, the least of several runs, so that a busy machine counts
little. About five minutes.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "scale"))
import generated

from hydraopt_jax.codec import layout
from hydraopt_jax.codec.decode import decode
from hydraopt_jax.store import Store, checkpoint

RUNS = 3


def least(run: Callable[[], Any], runs: int = RUNS) -> float:
    """Processor seconds of the fastest of several runs in this process."""
    found = []
    for _ in range(runs):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def command(*arguments: str, runs: int = RUNS) -> float:
    """Processor seconds of the fastest of several runs of a command."""
    found = []
    for _ in range(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def fp16_bytes(folder: Path) -> bytes:
    """An adapter's factors in half precision."""
    found = load_file(folder / "adapter_model.safetensors")
    return b"".join(x.astype(np.float16).tobytes() for x in found.values())


def leaves_of_a_task(store: Store, task: int) -> tuple[dict[str, bytes], Any]:
    """The coded leaves that one task reads, and the structure of the terms."""
    assert store.payload is not None
    groups = layout.pieces(store.payload.shapes)[1]
    heads = {f"head_{k}" for k, users in enumerate(groups) if task in users}
    wanted = {"shared", f"task_{task}", *heads}
    return {k: v for k, v in store.payload.leaves.items() if k in wanted}, store.payload.shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    hydraopt = [sys.executable, "-m", "hydraopt_jax.cli"]
    with tempfile.TemporaryDirectory() as spare:
        made = generated.collection(options.tasks, generated.model("8b", options.layers))
        folders = [Path(spare) / x for x in made.tasks]
        for n, folder in enumerate(folders):
            generated.write(made, n, folder)
        data = [fp16_bytes(x) for x in folders]
        numbers = len(data[0]) // 2
        unit = least(lambda: zlib.compress(data[0], 6)) / numbers
        store = Path(spare) / "store"
        arguments = ["compress", *map(str, folders), "--budget", "0.125", "--overwrite", "--out", str(store)]
        # the first run compiles
        cold = command(*hydraopt, *arguments, runs=1)
        warm = command(*hydraopt, *arguments, runs=2)
        leaves, shapes = leaves_of_a_task(checkpoint.restore(store), 0)
        decoding = least(lambda: decode(leaves, shapes, [0]))
        again = least(lambda: zlib.compress(data[0], 6)) / numbers
    unit = min(unit, again)
    total = options.tasks * numbers
    rows = {
        "zlib level 6, ns per number": round(unit * 1e9, 1),
        "decode one task, NumPy": round(decoding / numbers / unit, 3),
        "compress --budget 0.125, cold": round(cold / total / unit, 2),
        "compress --budget 0.125, warm": round(warm / total / unit, 2),
        "hydraopt --help over import numpy": round(
            command(*hydraopt, "--help") / command(sys.executable, "-c", "import numpy"), 2
        ),
    }
    out = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "numbers per task": numbers,
        "ratios": rows,
    }
    print(json.dumps(out, indent=1))
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
