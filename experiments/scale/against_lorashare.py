"""`hydraopt compress` against `lorashare compress`, end to end: process start and files included.

    python experiments/scale/against_lorashare.py --lorashare PYTHON --json experiments/scale/lorashare.json

Adapters shaped as those of experiments/peers/compress_vs_lorashare.py, more of them and unrelated. PYTHON is
an interpreter that has lorashare. Peak memory is the whole process's, Python and JAX (or torch) included.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))

from compress_vs_lorashare import run
from measure import folder_bytes

from hydraopt_jax import synthetic
from hydraopt_jax.formats import peft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lorashare", metavar="PYTHON", required=True)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    modules = synthetic.transformer_modules(24, 896, 128)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folders = []
        for n in range(arguments.tasks):
            (adapter,) = synthetic.collection(n, tasks=1, modules=modules, rank=16)
            folders.append(work / "in" / f"task-{n:03d}")
            peft.write_adapter(folders[-1], adapter, dtype="bfloat16")
        names = [str(x) for x in folders]
        ours, theirs = work / "ours", work / "theirs"
        commands = {
            "hydraopt": [
                *(sys.executable, "-m", "hydraopt_jax.cli", "compress", *names, "--out", str(ours)),
                *("--rank", "16", "--side", "in", "--json"),
            ],
            "lorashare": [
                *(str(Path(arguments.lorashare).parent / "lorashare"), "compress", *names),
                *("--output", str(theirs), "--device", "cpu", "--num-components", "64"),
            ],
        }
        load = os.getloadavg()[0]
        seen = {name: run(command, work / "log.json") for name, command in commands.items()}
        rows = {}
        for name, store in (("hydraopt", ours), ("lorashare", theirs)):
            rows[name] = {
                "seconds": round(seen[name]["seconds"], 2),
                "cpu_seconds": round(seen[name]["cpu"], 2),
                "peak_memory_bytes": seen[name]["peak"],
                "bytes_on_disk": folder_bytes(store),
            }
        size = sum(folder_bytes(x) for x in folders)
    ratio = {
        k: round(rows["lorashare"][k] / rows["hydraopt"][k], 2)
        for k in ("seconds", "cpu_seconds", "peak_memory_bytes")
    }
    out = {
        "tasks": arguments.tasks,
        "input_bytes": size,
        "load": load,
        "results": rows,
        "lorashare_over_hydraopt": ratio,
    }
    print(json.dumps(out, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
