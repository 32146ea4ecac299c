"""Encoding, decoding, forms and batches that mix tasks on an accelerator, over this machine's processor.

    python -m experiments.accelerator.run

Two processes measure the same, one on the accelerator and one with JAX_PLATFORMS=cpu, one after the other.
"Cold" is the first call of a process with an empty cache of compilations, "warm" the fastest of the next
ones; ratios are the processor's seconds over the accelerator's, above 1 where the accelerator is faster.
Factors decoded on a device must be NumPy's, errors of both within a hundredth. Part after part goes into
results.json beside this file; where there is no accelerator it says so and measures nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.scale import generated
from experiments.serving import mixed_batch
from hydraopt_jax import compress, serving
from hydraopt_jax.codec import lanes, rans
from hydraopt_jax.forms import Gradient, Hydra
from hydraopt_jax.store import Store, decode_terms

OUT = Path(__file__).parent / "results.json"
TASKS, LAYERS, BUDGET, STEPS, FEW = 4, 4, 0.125, 300, 1024
# tokens, tasks, rank, width of a projection
BATCHES = {
    "4096 tokens, 40 tasks, r 32, 2048 x 2048": (4096, 40, 32, 2048),
    "16384 tokens, 64 tasks, r 16, 4096 x 4096": (16384, 64, 16, 4096),
}
Row = dict[str, Any]


def timed(run: Callable[..., Any], *given: Any, warm: int = 2) -> tuple[Any, Row]:
    """What `run(*given)` returns, and wall seconds of its first call and of the fastest of the next ones."""
    seconds, found = [], None
    for _ in range(1 + warm):
        start = time.perf_counter()
        found = jax.block_until_ready(run(*given))
        seconds.append(time.perf_counter() - start)
    return found, {"cold": round(seconds[0], 4), "warm": round(min(seconds[1:]), 4)}


def error_of(store: Store) -> Row:
    """Mean relative squared error of a store."""
    return {"error": float(f"{store.errors.mean():.5g}")}


def coding() -> Iterator[tuple[str, Row]]:
    """A store at a budget: made, and its factors put on the device, decoded there and by NumPy."""
    collection = generated.collection(TASKS, generated.model("8b", LAYERS))
    store, row = timed(partial(compress, collection, budget=BUDGET), warm=1)
    yield f"encode {TASKS} adapters, {collection.size / 1e6:.0f} MB, at {BUDGET:g}", row | error_of(store)
    same = []
    for name, how in (("on the device", lanes.decode), ("by NumPy", rans.decode)):
        terms, row = timed(partial(decode_terms, store, decode_lanes=how))
        same.append([np.asarray(x) for x in jax.tree.leaves(terms)])
        yield f"decode all {TASKS}, {name}", row
    if not all(map(np.array_equal, *same)):
        raise SystemExit("factors decoded on the device differ from NumPy's")
    for name, here in (("on the device", True), ("by NumPy", False)):
        _, row = timed(partial(serving.load, store, on_device=here))
        yield f"serving.load of all {TASKS}, decoded {name}", row


def forms() -> Iterator[tuple[str, Row]]:
    """HydraOpt's form of a collection, by the closed form and by Adam."""
    collection = generated.collection(TASKS, generated.model("8b", LAYERS))
    for heads in (TASKS, 1):
        adam = Hydra(heads=heads, side="in", solver=Gradient(start="mean", steps=STEPS))
        for name, form in (("closed form", Hydra(heads=heads)), (f"Adam, {STEPS} steps", adam)):
            store, row = timed(partial(compress, collection, form=form), warm=1)
            yield f"HydraOpt K = {heads} of {TASKS}, {name}", row | error_of(store)


def batches() -> Iterator[tuple[str, Row]]:
    """Batches that mix tasks: this package's `serving.apply` and a gather of each token's factors."""
    for case, sizes in BATCHES.items():
        for form in mixed_batch.FORMS:
            x, term, ids = mixed_batch.problem(*sizes, form)
            functions = {name: jax.jit(f) for name, f in mixed_batch.contenders(form).items()}
            ours, row = timed(functions["this package"], x, term, ids, warm=5)
            yield f"{case}, {form}, serving.apply", row
            # the factors of all tokens of the large case take gigabytes
            found, row = timed(functions["gather"], x[:FEW], term, ids[:FEW], warm=5)
            yield f"{case}, {form}, gather of the first {FEW} tokens' factors", row
            if np.abs(ours[:FEW] - found).max() > 1e-4 * np.abs(found).max():
                raise SystemExit(f"{case}, {form}: serving.apply differs from the gather")


PARTS = {part.__name__: part for part in (batches, coding, forms)}


def measure(part: str) -> None:
    """Print this process's device and what it measures of a part, a line of JSON each."""
    device = jax.devices()[0]
    print(json.dumps({"device": device.device_kind, "platform": device.platform}), flush=True)
    for what, row in PARTS[part]():
        print(json.dumps({"part": part, "what": what} | row), flush=True)


def ratios(fast: Row, plain: Row) -> Row:
    """One measurement on the accelerator and on the processor, side by side.

    >>> ratios({"cold": 2.0, "warm": 0.5}, {"cold": 1.0, "warm": 2.0})["times faster"]
    {'cold': 0.5, 'warm': 4.0}
    """
    if "error" in fast and abs(fast["error"] - plain["error"]) > 0.01 * plain["error"]:
        errors = f"{fast['error']} on the accelerator, {plain['error']} on the processor"
        raise SystemExit(f"{fast['what']}: error {errors}")
    both = {"accelerator": fast, "processor": plain}
    seconds = {name: {x: row[x] for x in ("cold", "warm")} for name, row in both.items()}
    times = {x: float(f"{plain[x] / fast[x]:.3g}") for x in ("cold", "warm")}
    kept = {x: fast[x] for x in ("part", "what", "error") if x in fast}
    return kept | {"times faster": times, "seconds": seconds}


def child(*arguments: str, **env: str) -> list[Row]:
    """Lines of JSON that a Python process prints."""
    with tempfile.TemporaryDirectory() as cache:
        whole = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache} | env
        found = subprocess.run([sys.executable, *arguments], env=whole, stdout=subprocess.PIPE, check=True)
    return [json.loads(line) for line in found.stdout.decode().splitlines()]


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--measure", choices=PARTS, help="measure a part in this process alone and print")
    given = parser.parse_args(argv)
    if given.measure:
        measure(given.measure)
        return
    if child("-c", "import jax, json; print(json.dumps(jax.default_backend()))") == ["cpu"]:
        print("no accelerator: JAX finds only this machine's processor; nothing was measured")
        return
    results = json.loads(OUT.read_text()) if OUT.exists() else {}
    for part in given.parts or PARTS:
        asked = ("-m", "experiments.accelerator.run", "--measure", part)
        (device, *fast), (_, *plain) = child(*asked), child(*asked, JAX_PLATFORMS="cpu")
        machine = device | {"cores": os.cpu_count(), "jax": jax.__version__}
        results[part] = {"machine": machine, "rows": list(map(ratios, fast, plain))}
        OUT.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({part: results[part]}, indent=1), flush=True)


if __name__ == "__main__":
    main()
