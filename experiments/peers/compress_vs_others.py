"""`hydraopt compress` against lorashare and vlora-dev, end to end, process start and files included.

    python -m experiments.peers.compress_vs_others --json experiments/peers/compress_vs_others.json

A seeded collection of 16 PEFT adapters (rank 16, 24 layers x q, k, v, o of width 896 with 128 key-value
outputs, bfloat16, 69.6 MB) is written once; the commands then take turns with OMP_NUM_THREADS=1. XLA keeps
a thread pool of its own, so processor seconds are printed beside the wall clock: those of the first run, in
which `hydraopt` compiles, and the median of the later ones. Errors are measured from what each tool exports,
by the float64 code of measure.py. About five minutes on two cores.
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
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from experiments.peers.measure import folder_bytes, relative_error, run
from hydraopt_jax import synthetic
from hydraopt_jax.formats import peft

PACKAGES = ("lorashare==0.1.3", "vlora-dev==1.0.0")
HYDRAOPT = (sys.executable, "-m", "hydraopt_jax.cli")
TIMES = ("seconds_first", "seconds_later", "cpu_seconds_first", "cpu_seconds_later")


class Tool(NamedTuple):
    """One contender: its commands, `{out}` where the store is to be written.

    Attributes:
      name: as shown.
      compress: adapters to store.
      export: store to PEFT folders below `{peft}`, a command or several.
    """

    name: str
    compress: list[str]
    export: list[list[str]]


def environment(given: str | None, work: Path) -> Path:
    """Folder of the commands of the others' own virtual environment, made where none is given."""
    if given:
        return Path(given).parent
    folder = work / "venv"
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return folder / "bin"


def float32(folder: Path) -> Path:
    """Where an adapter's float32 copy is."""
    return folder.parent.with_name("float32") / folder.name


def tools(arguments: argparse.Namespace, commands: Path, folders: list[Path]) -> list[Tool]:
    """The contenders."""
    names = [str(x) for x in folders]
    lorashare, vlora = str(commands / "lorashare"), str(commands / "vlora")
    alpha = json.loads((folders[0] / "adapter_config.json").read_text())["lora_alpha"]
    k, few = str(arguments.lorashare_components), str(arguments.vlora_components)
    shared = [
        "--form",
        "hydra",
        "--heads",
        arguments.heads,
        "--rank",
        arguments.rank,
        *arguments.extra.split(),
    ]

    def ours(options: list[str]) -> Tool:
        return Tool(
            "hydraopt " + " ".join(options),
            [*HYDRAOPT, "compress", *names, "--out", "{out}", "--json", *options],
            [[*HYDRAOPT, "export", "{out}", "--all", "--out", "{peft}"]],
        )

    return [
        ours(shared),
        ours(["--budget", arguments.budget]),
        Tool(
            f"lorashare -k {k}",
            [lorashare, "compress", *names, "--output", "{out}", "--device", "cpu", "--num-components", k],
            [[lorashare, "reconstruct", "{out}", "--all", "-o", "{peft}"]],
        ),
        # vlora fails on bfloat16 and forgets the LoRA scale: it gets float32 copies and is told the scale
        Tool(
            f"vlora -k {few}",
            [vlora, "compress", *(str(float32(x)) for x in folders), "-o", "{out}", "-k", few],
            [
                [vlora, "export", "{out}", x.name, "-o", f"{{peft}}/{x.name}", "--alpha", str(alpha)]
                for x in folders
            ],
        ),
    ]


def measure(tool: Tool, runs: list[dict[str, Any]], store: Path, exported: Path, folders: list[Path]) -> dict:
    """One tool's figures from its timed runs, its last store and what it exports.

    The first run of `hydraopt` compiles; the later ones find that in a cache, as a user's do.
    """
    later = runs[1:] or runs
    errors = [relative_error(x, exported / x.name) for x in folders]
    return {
        "tool": tool.name,
        "seconds": [round(x["seconds"], 3) for x in runs],
        "seconds_first": runs[0]["seconds"],
        "seconds_later": statistics.median(x["seconds"] for x in later),
        "cpu_seconds_first": runs[0]["cpu_seconds"],
        "cpu_seconds_later": statistics.median(x["cpu_seconds"] for x in later),
        "peak_memory_bytes": max(x["peak_memory_bytes"] for x in runs),
        "bytes_on_disk": folder_bytes(store),
        "error_mean": statistics.mean(errors),
        "error_worst": max(errors),
    }


def table(results: list[dict]) -> Table:
    """The figures side by side, and how many times the first tool's they are."""
    times = ("s, first", "s, later", "cpu s, first", "cpu s, later")
    out = Table("tool", *times, "peak memory MB", "on disk MB", "mean error", "worst error")
    for x in results:
        out.add_row(
            x["tool"],
            *(f"{x[key]:.2f}" for key in TIMES),
            f"{x['peak_memory_bytes'] / 1e6:.0f}",
            f"{x['bytes_on_disk'] / 1e6:.1f}",
            f"{x['error_mean']:.2g}",
            f"{x['error_worst']:.2g}",
        )
    return out


def ratios(x: dict, first: dict) -> dict[str, float]:
    """A tool's figures over the first tool's."""
    keys = (*TIMES, "peak_memory_bytes", "bytes_on_disk", "error_mean")
    return {key: float(f"{x[key] / first[key]:.3g}") for key in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--others", metavar="PYTHON", help="an interpreter that has lorashare and vlora-dev")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--likeness", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lorashare-components", type=int, default=64, help="lorashare's -k")
    parser.add_argument("--vlora-components", type=int, default=4, help="vlora's -k, at most the tasks")
    parser.add_argument("--heads", default="16", help="hydraopt's --heads")
    parser.add_argument("--rank", default="24", help="hydraopt's --rank")
    parser.add_argument("--extra", default="--side=in", help="more options of it, in one string")
    parser.add_argument("--budget", default="0.25", help="--budget of a second run of hydraopt")
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        # nothing is compiled yet, as on a new machine
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
        commands = environment(arguments.others, work)
        collection = synthetic.collection(
            arguments.seed,
            tasks=16,
            modules=synthetic.transformer_modules(24, 896, 128),
            rank=16,
            likeness=arguments.likeness,
        )
        folders = [work / "adapters" / x.task for x in collection]
        for folder, adapter in zip(folders, collection, strict=True):
            for path, dtype in ((folder, "bfloat16"), (float32(folder), "float32")):
                path.parent.mkdir(exist_ok=True)
                peft.write_adapter(path, adapter, dtype=dtype)
        contenders = tools(arguments, commands, folders)

        def places(n: int, command: list[str]) -> list[str]:
            fill = {"out": work / f"store{n}", "peft": work / f"peft{n}"}
            return [part.format(**fill) if "{" in part else part for part in command]

        timed: list[list[dict[str, Any]]] = [[] for _ in contenders]
        for _ in range(arguments.runs):
            for n, tool in enumerate(contenders):
                shutil.rmtree(work / f"store{n}", ignore_errors=True)
                timed[n].append(run(places(n, tool.compress)))
                print(f"{tool.name}: {timed[n][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
        results = []
        for n, tool in enumerate(contenders):
            for command in tool.export:
                run(places(n, command))
            results.append(measure(tool, timed[n], work / f"store{n}", work / f"peft{n}", folders))
        options = {k: v for k, v in vars(arguments).items() if k not in ("others", "json")}
        out = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS=1",
            "options": options | {"packages": PACKAGES},
            "input_bytes": sum(folder_bytes(x) for x in folders),
            "times_the_first": {x["tool"]: ratios(x, results[0]) for x in results[1:]},
            "results": results,
        }
    text = json.dumps(out, indent=1)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")
    Console(stderr=True, width=140).print(table(results))


if __name__ == "__main__":
    main()
