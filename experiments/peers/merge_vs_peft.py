"""Merging against PEFT's add_weighted_adapter on one seeded collection: seconds, peak memory, error.

    python -m experiments.peers.merge_vs_peft --peft PYTHON --json results.json

16 adapters of rank 16, 24 layers x q, k, v, o of width 896, float32. PYTHON is an interpreter with torch and
peft. Each tool has a process of its own, pinned to one core; times are of the merging alone, wall-clock and
processor (other processes of the machine count in the former only). Ours are taken twice over, the first time
with the compilation inside. Errors by the float64 code of measure.py. About five minutes.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
OURS: dict[str, dict[str, Any]] = {
    "linear-factors": {},
    "linear": {"rank": 16},
    "ties": {"rank": 16},
    "knots": {"rank": 16},
}
# what PEFT calls each, where it has it
THEIRS = {"linear-factors": "linear", "linear": "svd", "ties": "ties_svd"}


def ours(adapters: Path, out: Path) -> None:
    """The worker of this package: prints wall-clock and processor seconds of two runs as JSON."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    os.environ["XLA_FLAGS"] = ONE_CORE
    from hydraopt_jax import formats, merging

    collection = [formats.read_adapter(x) for x in sorted(adapters.iterdir())]
    seconds = {}
    for method, options in OURS.items():
        times = []
        for _ in range(2):
            start = time.perf_counter(), time.process_time()
            merged = merging.merge_adapters(collection, method, **options)
            times.append([time.perf_counter() - start[0], time.process_time() - start[1]])
        seconds[method] = times
        formats.write_adapter(out / method, merged)
    print(json.dumps(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peft", metavar="PYTHON", help="an interpreter that has torch and peft")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        ours(*map(Path, arguments.worker))
        return
    from experiments.peers.measure import relative_error, run
    from hydraopt_jax import formats, synthetic

    modules = synthetic.transformer_modules(arguments.layers, 896)
    collection = synthetic.collection(
        arguments.seed, tasks=16, modules=modules, rank=16, likeness=0.5, dtype="float32"
    )
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for adapter in collection:
            (work / "in").mkdir(exist_ok=True)
            # no causal language model is needed to hold the layers
            plain = adapter.replace(config={**adapter.config, "task_type": None})
            formats.write_adapter(work / "in" / adapter.task, plain)
        folders = sorted((work / "in").iterdir())
        places = str(work / "in"), str(work / "out")
        (work / "out").mkdir()
        peft_merge = str(Path(__file__).with_name("peft_merge.py"))
        mine = run([sys.executable, "-m", "experiments.peers.merge_vs_peft", "--worker", *places])
        theirs = run([arguments.peft, peft_merge, *places])
        seconds, peft = (json.loads(x["tail"].strip().splitlines()[-1]) for x in (mine, theirs))

        def error(folder: Path) -> float:
            return statistics.mean(relative_error(x, folder) for x in folders)

        rows = {}
        for method, (first, second) in seconds.items():
            rows[method] = {
                "seconds": second[0],
                "cpu_seconds": second[1],
                "seconds_first": first[0],
                "cpu_seconds_first": first[1],
                "error": error(work / "out" / method),
            }
            if method in THEIRS:
                case = THEIRS[method]
                rows[method] |= {
                    "peft": case,
                    "peft_seconds": peft[case][0],
                    "peft_cpu_seconds": peft[case][1],
                    "peft_error": error(work / "out" / case / f"merged-{case}"),
                    "speedup": peft[case][0] / second[0],
                    "speedup_cpu": peft[case][1] / second[1],
                    "speedup_first": peft[case][0] / first[0],
                }
        rows["peft ties of factors"] = {
            "peft": "ties",
            "peft_seconds": peft["ties"][0],
            "peft_cpu_seconds": peft["ties"][1],
            "peft_error": error(work / "out" / "ties" / "merged-ties"),
        }
    result = {
        "machine": f"{platform.machine()}, one core each",
        "options": {k: v for k, v in vars(arguments).items() if k in ("layers", "seed")},
        "peak_memory_bytes": {"hydraopt_jax": mine["peak_memory_bytes"], "peft": theirs["peak_memory_bytes"]},
        "methods": rows,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
