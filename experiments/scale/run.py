"""Peak memory, time against the number of tasks, and shares of the roofline of compress on large collections.

    python -m experiments.scale.run --json experiments/scale/results.json

Every measurement is a process of its own (job, roofline); collections are generated as they are read,
so that reading is in the times and costs more than reading files would. About ten minutes on two idle cores.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table


def call(module: str, *arguments: str) -> dict[str, Any]:
    """What a module of this folder prints."""
    command = [sys.executable, "-m", f"experiments.scale.{module}", *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tasks", type=int, nargs="*", default=[50, 200, 1000], help="of the 2048-wide slice"
    )
    parser.add_argument(
        "--large-tasks", type=int, default=100, help="adapters of the 8B-shaped model; 0 for none"
    )
    parser.add_argument("--large-layers", type=int, default=32)
    parser.add_argument("--budget", type=float, default=0.125, help="each slice is also coded to; 0 not")
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    roofline = call("roofline")
    runs = [call("job", "slice", "--tasks", str(t)) for t in arguments.tasks]
    if arguments.large_tasks:
        more = ["--tasks", str(arguments.large_tasks), "--layers", str(arguments.large_layers)]
        runs.append(call("job", "8b", *more))
    for t in arguments.tasks if arguments.budget else ():
        runs.append(call("job", "slice", "--tasks", str(t), "--budget", str(arguments.budget)))
    for x in runs:
        x["peak_over_largest_bucket"] = round(x["peak_beyond_baseline_bytes"] / x["largest_bucket_bytes"], 3)
    exponents = {}
    for name, chosen in (("rank 16", None), ("budget", arguments.budget)):
        times = [(x["tasks"], x["seconds"]) for x in runs if (x["model"], x["budget"]) == ("slice", chosen)]
        if len(times) > 1:
            tasks, took = np.array(times).T
            exponents[name] = round(float(np.polyfit(np.log(tasks), np.log(took), 1)[0]), 3)
    out = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} at the start",
        "roofline": roofline,
        "exponent_of_time_in_tasks": exponents,
        "runs": runs,
    }
    text = json.dumps(out, indent=1)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")
    table = Table(
        "collection", "input MB", "bucket MB", "peak beyond baseline MB", "peak / bucket", "s", "error"
    )
    for x in runs:
        table.add_row(
            f"{x['tasks']} x {x['modules']} modules, {x['model']}, {x['budget'] or 'rank 16'}",
            f"{x['input_bytes'] / 1e6:.0f}",
            f"{x['largest_bucket_bytes'] / 1e6:.0f}",
            f"{x['peak_beyond_baseline_bytes'] / 1e6:.0f}",
            f"{x['peak_over_largest_bucket']:.2f}",
            f"{x['seconds']:.1f}",
            f"{x['error']:.4f}",
        )
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
