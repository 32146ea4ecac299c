"""Time and peak memory of every verb on a store that memory need not hold.

    python -m experiments.scale.living --json experiments/scale/living.json
    python -m experiments.scale.living --tasks 300 --json experiments/scale/living-300.json
    python -m experiments.scale.living --budget 0.125 --tasks 300 --json experiments/scale/living-budget.json

Generates adapters, compresses all but the last, and runs each verb as a process: `inspect`, `verify`,
`verify` against some adapters, `export` of one task and of all, `add` of the last adapter, `remove` of one.
Peaks are the whole process's; `nothing` is one that only starts. The JSON file is written after every verb,
so that what was measured is kept if a later verb does not end; with `--verbs` only these and `compress` run,
and the others' rows in the file are kept. Each row has its commit.
"""

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.peers.measure import commit, folder_bytes, watched
from experiments.scale import generated

START = "import jax, jax.numpy as jnp, hydraopt_jax.cli; jax.block_until_ready(jnp.ones(8) @ jnp.ones(8))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    generated.options(parser, "8b", 1, 1000)
    parser.add_argument("--budget", help="of the bytes that come in, in place of rank 16")
    parser.add_argument("--samples", type=int, default=3, help="adapters that are verified against")
    parser.add_argument("--verbs", nargs="*", help="only these, and compress, which makes the store")
    parser.add_argument("--limit", type=float, default=3600, help="seconds that each verb has")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folders = generated.on_disk(arguments, work / "in")
        names = [str(x) for x in folders]
        store, out = str(work / "store"), str(work / "out")
        form = ["--form", "hydra", "--rank", "16", "--side", "in"]
        form = ["--budget", arguments.budget] if arguments.budget else form
        verbs = {
            "nothing": ["-c", START],
            "compress": ["compress", *names[:-1], "--out", store, *form, "--json"],
            "inspect": ["inspect", store, "--json"],
            "verify": ["verify", store, "--json"],
            f"verify {arguments.samples}": ["verify", store, *names[: arguments.samples], "--json"],
            "export one": ["export", store, "--task", folders[1].name, "--out", out, "--json"],
            "export all": ["export", store, "--all", "--out", out, "--json"],
            "add": ["add", store, names[-1], "--json"],
            "remove": ["remove", store, folders[0].name, "--json"],
            "verify changed": ["verify", store, names[1], names[-1], "--json"],
        }
        result: dict[str, Any] = {
            "model": arguments.model,
            "layers": arguments.layers,
            "tasks": arguments.tasks - 1,
            "budget": arguments.budget,
            "input_bytes": sum(folder_bytes(x) for x in folders[:-1]),
            "verbs": {},
        }
        if arguments.verbs is not None:
            verbs = {k: v for k, v in verbs.items() if k in ("compress", *arguments.verbs)}
            result["verbs"] = json.loads(Path(arguments.json).read_text())["verbs"]
        rows = result["verbs"]
        for name, verb in verbs.items():
            command = verb if name == "nothing" else ["-m", "hydraopt_jax.cli", *verb]
            before = folder_bytes(Path(store)) if Path(store).exists() else 0
            row = watched([sys.executable, *command], arguments.limit, {})
            rows[name] = {k: v for k, v in row.items() if row["failed"] or k not in ("failed", "tail")}
            after = folder_bytes(Path(store)) if Path(store).exists() else 0
            rows[name] |= {"store_bytes": after} if after != before else {}
            now = {"commit": commit(), "date": datetime.date.today().isoformat()}
            rows[name] |= now | {"load": round(os.getloadavg()[0], 1)}
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
            print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
            shutil.rmtree(out, ignore_errors=True)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
