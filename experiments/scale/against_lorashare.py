"""`hydraopt compress` against `lorashare compress`, end to end: process start and files included.

    python experiments/scale/against_lorashare.py --lorashare PYTHON --tasks 1024 --json FILE

Adapters shaped as those of experiments/peers/compress_vs_others.py, more of them and unrelated. PYTHON is
an interpreter that has lorashare. Both may use all cores and as many threads as they like; hydraopt finds no
compiled code of an earlier run. Peak memory is the whole process's, Python and JAX (or torch)
included. Who is not done after `--limit` seconds is ended and has no row but that.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))

from measure import folder_bytes

from hydraopt_jax import synthetic
from hydraopt_jax.formats import peft


def run(command: list[str], environment: dict[str, str], limit: float) -> dict[str, Any]:
    """Seconds, processor seconds and peak bytes of a command; only what it did where it did not succeed."""
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
        signal.signal(signal.SIGALRM, lambda *_: process.kill())
        signal.alarm(int(limit))
        _, status, used = os.wait4(process.pid, 0)
        signal.alarm(0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        tail = log.read().decode(errors="replace")[-300:]
    row = {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "peak_memory_bytes": 1024 * used.ru_maxrss,
    }
    if process.returncode:
        row |= {"failed": "not done in time" if seconds >= limit else f"{process.returncode}: {tail}"}
    return row


def bytes_of(folder: Path) -> int:
    return folder_bytes(folder) if folder.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lorashare", metavar="PYTHON", required=True)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--limit", type=float, default=600, help="seconds that each of the two has")
    parser.add_argument(
        "--inputs", metavar="FOLDER", help="keep the adapters there, take those that are there"
    )
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    modules = synthetic.transformer_modules(24, 896, 128)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folders = []
        for n in range(arguments.tasks):
            folders.append(Path(arguments.inputs or work / "in") / f"task-{n:03d}")
            if not folders[-1].exists():
                (adapter,) = synthetic.collection(n, tasks=1, modules=modules, rank=16)
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
        rows = {}
        for name, store in (("hydraopt", ours), ("lorashare", theirs)):
            rows[name] = run(
                commands[name], {"XDG_CACHE_HOME": str(work), "HF_HUB_OFFLINE": "1"}, arguments.limit
            )
            rows[name]["bytes_on_disk"] = bytes_of(store)
            shutil.rmtree(store, ignore_errors=True)
        size = sum(folder_bytes(x) for x in folders)
    ratio = {
        k: round(rows["lorashare"][k] / rows["hydraopt"][k], 2)
        for k in ("seconds", "cpu_seconds", "peak_memory_bytes")
    }
    out = {
        "tasks": arguments.tasks,
        "input_bytes": size,
        "load": load,
        "load_after": os.getloadavg()[0],
        "results": rows,
        "lorashare_over_hydraopt": ratio,
    }
    print(json.dumps(out, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
