"""`hydraopt compress` against `lorashare compress`, end to end: process start and files included.

    python -m experiments.scale.against_lorashare --lorashare PYTHON --model 8b --layers 1 --tasks 1000

PYTHON is an interpreter that has lorashare. Both may use all cores and as many threads as they like;
hydraopt finds no compiled code of an earlier run. Peak memory is the whole process's, Python and JAX (or
torch) included. Who is not done after `--limit` seconds is ended and has no row but that. Errors are measured
on some adapters from what each tool exports, by the float64 code of experiments/peers/measure.py.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.peers.measure import folder_bytes, relative_error, watched
from experiments.scale import generated


def error(tool: list[str], folders: list[Path], work: Path) -> float | None:
    """Mean relative squared error of some adapters as a tool exports them; None where it stored nothing."""
    errors = []
    for folder in folders:
        out = work / "exported"
        done = subprocess.run(
            [x.format(task=folder.name, out=out) for x in tool], capture_output=True, check=False
        )
        if done.returncode:
            return None
        errors.append(relative_error(folder, out))
        shutil.rmtree(out)
    return float(f"{np.mean(errors):.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lorashare", metavar="PYTHON", required=True)
    generated.options(parser, "0.5b", None, 64)
    parser.add_argument("--limit", type=float, default=600, help="seconds that each of the two has")
    parser.add_argument("--samples", type=int, default=3, help="adapters whose errors are measured")
    parser.add_argument("--only", choices=("hydraopt", "lorashare"), help="run one of the two")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folders = generated.on_disk(arguments, work / "in")
        names = [str(x) for x in folders]
        hydraopt = [sys.executable, "-m", "hydraopt_jax.cli"]
        lorashare = [str(Path(arguments.lorashare).parent / "lorashare")]
        stores = {x: str(work / x) for x in ("hydraopt", "lorashare")}
        commands = {
            "hydraopt": [
                *(*hydraopt, "compress", *names, "--out", stores["hydraopt"]),
                *("--form", "hydra", "--rank", "16", "--side", "in", "--json"),
            ],
            "lorashare": [
                *(*lorashare, "compress", *names, "--output", stores["lorashare"]),
                *("--device", "cpu", "--num-components", "64"),
            ],
        }
        exports = {
            "hydraopt": [*hydraopt, "export", stores["hydraopt"], "--task", "{task}", "--out", "{out}"],
            "lorashare": [
                *(*lorashare, "reconstruct", stores["lorashare"], "--adapter", "{task}", "--output", "{out}")
            ],
        }
        load = os.getloadavg()[0]
        rows: dict[str, dict[str, Any]] = {}
        for name in [arguments.only] if arguments.only else commands:
            own = {"XDG_CACHE_HOME": str(work), "JAX_COMPILATION_CACHE_DIR": str(work), "HF_HUB_OFFLINE": "1"}
            row = watched(commands[name], arguments.limit, own)
            rows[name] = {k: v for k, v in row.items() if row["failed"] or k not in ("failed", "tail")}
            if Path(stores[name]).exists() and not row["failed"]:
                rows[name]["bytes_on_disk"] = folder_bytes(Path(stores[name]))
                rows[name]["error"] = error(exports[name], folders[: arguments.samples], work)
            shutil.rmtree(stores[name], ignore_errors=True)
        size = sum(folder_bytes(x) for x in folders)
    out = {
        "model": arguments.model,
        "modules": len(generated.model(arguments.model, arguments.layers)),
        "tasks": arguments.tasks,
        "input_bytes": size,
        "load": load,
        "load_after": os.getloadavg()[0],
        "results": rows,
    }
    if len(rows) > 1:
        out["lorashare_over_hydraopt"] = {
            k: round(rows["lorashare"][k] / rows["hydraopt"][k], 2)
            for k in ("seconds", "cpu_seconds", "peak_memory_bytes")
        }
    print(json.dumps(out, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
