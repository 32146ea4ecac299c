"""Strangers' input: random changes of valid input, and the coverage-guided fuzzer of `tests/hostile`."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.hostile import targets

SEED = 2
FUZZER = Path(__file__).parents[2] / "tests" / "hostile" / "fuzz.py"


def mutations(count: int) -> tuple[dict[str, int], list[str]]:
    """So many random changes of the valid input of every target; returns how often, and findings."""
    rng = np.random.default_rng(SEED)
    lost: list[str] = []
    seeds = targets.seeds()
    for name, seed in seeds.items():
        for _ in range(count):
            data = bytearray(seed)
            for at in rng.integers(0, len(data), rng.integers(1, 5)):
                data[at] = rng.integers(256)
            if rng.random() < 0.2:
                del data[int(rng.integers(len(data))) :]
            try:
                targets.TARGETS[name](bytes(data))
            except Exception as error:
                lost.append(f"{name}: {error!r}: {bytes(data)[:200]!r}")
                print(lost[-1], file=sys.stderr, flush=True)
    return dict.fromkeys(seeds, count), lost


def fuzz(seconds: float) -> tuple[dict[str, int] | None, list[str]]:
    """Inputs of the fuzzer, and its findings; None where atheris (the `fuzz` extra) is not installed."""
    if importlib.util.find_spec("atheris") is None:
        return None, []
    command = [sys.executable, str(FUZZER), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = json.loads(done.stdout)
    return found["inputs"], [done.stderr[-2000:]] if found["findings"] else []
