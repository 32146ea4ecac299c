"""Kill it, flip it, feed it rubbish, read it while it is written: a store must not lose anything.

    python -m experiments.reliability.run [PART...]

- kill, or "kill add" and so on: processes that run `hydraopt` add, remove, compress, pack and unpack get
  SIGKILL at random instants, before and after every rename, and before every third removal of a file.
- damage, or "damage coded" and so on: a bit of every byte of every file of three stores is flipped, files are
  cut short and removed.
- mutations, fuzz: random changes of valid input, and coverage-guided fuzzing with atheris (the `fuzz` extra).
- races: two processes replace a store over and over, two read it.

Prints a line for each part and writes run.json beside this file; exit status 1 if anything was lost. Parts
that are named are run again and the others are kept.
"""

import datetime
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.peers.measure import commit

OUT = Path(__file__).parent / "run.json"
# kills of each command at random instants; random changes of each target's input; seconds of fuzzing; writes
INSTANTS, MUTATIONS, SECONDS, WRITES = 3, 1100, 60, 50


def parts() -> dict[str, Callable[[Path], tuple[Any, list[str]]]]:
    """Name -> what runs it in an empty folder, and returns how often things were tried, and what was lost."""
    from experiments.reliability import damage, kills, races, strangers

    names = (x.name for x in kills.cases([""] * 4))
    killed = {f"kill {x}": functools.partial(kills.kills, name=x, count=INSTANTS) for x in names}
    return {
        **killed,
        **{f"damage {x}": functools.partial(damage.damage, name=x) for x in damage.STORES},
        "mutations": lambda root: strangers.mutations(MUTATIONS),
        "fuzz": lambda root: strangers.fuzz(SECONDS),
        "races": lambda root: races.races(root, WRITES),
    }


def main(chosen: list[str]) -> int:
    """Run some parts, all where none is named."""
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        # read when JAX is imported
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(folder) / "cache"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        every = parts()
        for name in [x for x in every if not chosen or x in chosen or x.split()[0] in chosen]:
            root = Path(folder) / name.replace(" ", "-")
            root.mkdir()
            begun = time.perf_counter()
            tried, lost = every[name](root)
            row = {"tried": tried, "lost": lost, "seconds": round(time.perf_counter() - begun)}
            row |= {"commit": commit(), "date": datetime.date.today().isoformat()}
            rows = json.loads(OUT.read_text()) if OUT.exists() else {}
            OUT.write_text(json.dumps({**rows, name: row}, indent=1) + "\n")
            print(f"{name}: {json.dumps(tried)} lost {len(lost)}", flush=True)
            status |= bool(lost)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
