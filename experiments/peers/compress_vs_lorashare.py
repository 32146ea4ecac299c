"""`hydraopt compress` against `lorashare compress -k 64`, end to end, process start and files included.

    python experiments/peers/compress_vs_lorashare.py --json results.json

A seeded collection of 16 PEFT adapters (rank 16, 24 layers x q, k, v, o of width 896 with 128 key-value
outputs, bfloat16, 69.6 MB) is written once; the two commands then take turns, both with OMP_NUM_THREADS=1.
XLA keeps a thread pool of its own, so processor seconds are printed beside the wall clock. Errors are
measured from what each tool exports, by the float64 code of measure.py. About three minutes on two cores.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from measure import folder_bytes, relative_error
from rich.console import Console
from rich.table import Table

from hydraopt_jax import synthetic
from hydraopt_jax.formats import peft

LORASHARE = "lorashare==0.1.3"
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
# Runs a command and prints its children's peak memory: a fresh process each time, so that peaks do not mix.
WATCH = (
    "import json, resource, subprocess, sys, time; t = time.perf_counter(); "
    "done = subprocess.run(sys.argv[2:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True); "
    "out = dict(seconds=time.perf_counter() - t, returncode=done.returncode, tail=done.stdout[-2000:]); "
    "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
    "out |= dict(peak=1024 * used.ru_maxrss, cpu=used.ru_utime + used.ru_stime); "
    "open(sys.argv[1], 'w').write(json.dumps(out))"
)


def run(command: list[str], log: Path) -> dict[str, Any]:
    """Seconds and peak memory (bytes) of one command; exits with its output where it fails."""
    subprocess.run([sys.executable, "-c", WATCH, str(log), *command], env=os.environ | ONE_THREAD, check=True)
    out = json.loads(log.read_text())
    if out["returncode"]:
        raise SystemExit(f"{' '.join(command)}\nfailed with status {out['returncode']}:\n{out['tail']}")
    return out


def lorashare_python(given: str | None, work: Path) -> str:
    """The interpreter of lorashare's own virtual environment, made where none is given."""
    if given:
        return given
    folder = work / "venv-lorashare"
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", LORASHARE], check=True)
    return python


def measure(name: str, runs: list[dict[str, Any]], store: Path, exported: Path, folders: list[Path]) -> dict:
    """One tool's figures from its timed runs, its last store and what it exports."""
    errors = [relative_error(x, exported / x.name) for x in folders]
    return {
        "tool": name,
        "seconds": [round(x["seconds"], 3) for x in runs],
        "seconds_median": statistics.median(x["seconds"] for x in runs),
        "cpu_seconds_median": statistics.median(x["cpu"] for x in runs),
        "peak_memory_bytes": max(x["peak"] for x in runs),
        "bytes_on_disk": folder_bytes(store),
        "error_mean": statistics.mean(errors),
        "error_worst": max(errors),
    }


def table(results: list[dict]) -> Table:
    """The figures side by side."""
    out = Table("tool", *(["median s", "cpu s", "peak memory MB", "on disk MB", "mean error", "worst error"]))
    for x in results:
        out.add_row(
            x["tool"],
            f"{x['seconds_median']:.2f}",
            f"{x['cpu_seconds_median']:.2f}",
            f"{x['peak_memory_bytes'] / 1e6:.0f}",
            f"{x['bytes_on_disk'] / 1e6:.1f}",
            f"{x['error_mean']:.4f}",
            f"{x['error_worst']:.4f}",
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lorashare", metavar="PYTHON", help="an interpreter that has lorashare installed")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--likeness", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--components", type=int, default=64, help="lorashare's -k")
    parser.add_argument("--heads", default="16", help="hydraopt's --heads")
    parser.add_argument("--rank", default="24", help="hydraopt's --rank")
    parser.add_argument("--extra", default="", help="more options for hydraopt compress, in one string")
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        python = lorashare_python(arguments.lorashare, work)
        collection = synthetic.collection(
            arguments.seed,
            tasks=16,
            modules=synthetic.transformer_modules(24, 896, 128),
            rank=16,
            likeness=arguments.likeness,
        )
        folders = [work / "adapters" / x.task for x in collection]
        for folder, adapter in zip(folders, collection, strict=True):
            folder.parent.mkdir(exist_ok=True)
            peft.write_adapter(folder, adapter, dtype="bfloat16")
        names = [str(x) for x in folders]
        ours, theirs = work / "ours", work / "theirs"
        hydraopt, lorashare = (
            str(Path(sys.executable).parent / "hydraopt"),
            str(Path(python).parent / "lorashare"),
        )
        compress_ours = [hydraopt, "compress", *names, "--out", str(ours), "--json"]
        compress_ours += ["--heads", arguments.heads, "--rank", arguments.rank, *arguments.extra.split()]
        compress_theirs = [lorashare, "compress", *names, "--output", str(theirs), "--device", "cpu"]
        compress_theirs += ["--num-components", str(arguments.components)]
        timed: tuple[list, list] = ([], [])
        started = time.strftime("%Y-%m-%d")
        for _ in range(arguments.runs):
            for runs, command, store in (
                (timed[0], compress_ours, ours),
                (timed[1], compress_theirs, theirs),
            ):
                shutil.rmtree(store, ignore_errors=True)
                runs.append(run(command, work / "log.json"))
        run([hydraopt, "export", str(ours), "--all", "--out", str(work / "ours-peft")], work / "log.json")
        run(
            [lorashare, "reconstruct", str(theirs), "--all", "-o", str(work / "theirs-peft")],
            work / "log.json",
        )
        results = [
            measure("hydraopt", timed[0], ours, work / "ours-peft", folders),
            measure(f"lorashare -k {arguments.components}", timed[1], theirs, work / "theirs-peft", folders),
        ]
        out = {
            "date": started,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS=1",
            "options": vars(arguments) | {"lorashare": LORASHARE},
            "input_bytes": sum(folder_bytes(x) for x in folders),
            "speedup": results[1]["seconds_median"] / results[0]["seconds_median"],
            "bytes_ratio": results[0]["bytes_on_disk"] / results[1]["bytes_on_disk"],
            "error_ratio": results[0]["error_mean"] / results[1]["error_mean"],
            "memory_ratio": results[0]["peak_memory_bytes"] / results[1]["peak_memory_bytes"],
            "results": results,
        }
    text = json.dumps(out, indent=2)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")
    Console(stderr=True).print(table(results))


if __name__ == "__main__":
    main()
