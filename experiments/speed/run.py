"""What a user waits for, in units of zlib level 6 compressing the same fp16 bytes on the same core.

    python -m experiments.speed.run [PART...] --gpt2 FOLDER

- decode: an adapter of four layers of an 8B-shaped model, warm; one of all 32 layers, in its own process.
- compress: four adapters of the four layers (rank 16, 42 MB in half precision, generated) to an eighth.
- llm: three adapters of SmolLM2-135M, `experiments/llm/adapters/shared`, to an eighth.
- gpt2: `frontier` of six adapters in FOLDER, and `compress --calibration` of two of them.
- start: `hydraopt --help` against `import numpy`.

Commands are whole processes. "Cold" is with an empty cache of compilations, "warm" with that of the run
before. Times are processor seconds, the least of the runs, so that a busy machine counts little; wall seconds
stand beside them where a target is in those. Writes results.json beside this file, or --json; parts that are
named are run again and the others are kept.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from experiments.peers.measure import watched
from experiments.scale import generated
from hydraopt_jax import calibration, formats, store
from hydraopt_jax.codec import lanes
from hydraopt_jax.store import sizes

HERE = Path(__file__).parent
OUT = HERE / "results.json"
LLM = HERE.parent / "llm" / "adapters" / "shared"
HYDRAOPT = [sys.executable, "-m", "hydraopt_jax.cli"]
RUNS, LAYERS, TASKS, BUDGET = 3, 4, 4, "0.125"
# seconds that a command has
LIMIT = 3600


class Cost(NamedTuple):
    """What a process took: wall and processor seconds, and bytes of memory at its peak."""

    wall: float
    processor: float
    memory: int


def least(run: Callable[[], Any], runs: int = RUNS) -> float:
    """Processor seconds of the fastest of several runs in this process."""
    found = []
    for _ in range(runs):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def command(*arguments: str, cache: Path | None = None, runs: int = 1) -> Cost:
    """The least that a command took of each; an error where it fails."""
    env = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if cache is not None:
        env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    found = []
    for _ in range(runs):
        out = watched(list(arguments), LIMIT, env)
        if out["failed"]:
            raise RuntimeError(f"{' '.join(arguments)}: {out['failed']}: {out['tail']}")
        found.append(Cost(out["seconds"], out["cpu_seconds"], out["peak_memory_bytes"]))
    return Cost(*map(min, zip(*found, strict=True)))


def cold_and_warm(spare: Path, *arguments: str, warm: int = 1) -> tuple[Cost, Cost]:
    """A command with an empty cache of compilations, and with what it has left there."""
    with tempfile.TemporaryDirectory(dir=spare) as cache:
        return command(*arguments, cache=Path(cache)), command(*arguments, cache=Path(cache), runs=warm)


def compressing(folders: Sequence[Path], out: Path, *options: str) -> list[str]:
    """The command that compresses some adapters."""
    asked = options or ("--budget", BUDGET)
    return [*HYDRAOPT, "compress", *map(str, folders), *asked, "--overwrite", "--any-base", "--out", str(out)]


def made(spare: Path, tasks: int, layers: int) -> list[Path]:
    """Generated adapters of an 8B-shaped model's first layers."""
    found = generated.collection(tasks, generated.model("8b", layers))
    folders = [spare / f"{layers}-layers-{x}" for x in found.tasks]
    for n, folder in enumerate(folders):
        if not folder.exists():
            generated.write(found, n, folder)
    return folders


def fp16_bytes(folder: Path) -> bytes:
    """An adapter's factors in half precision."""
    found = load_file(folder / "adapter_model.safetensors")
    return b"".join(x.astype(np.float16).tobytes() for x in found.values())


def unit(folder: Path) -> float:
    """Processor seconds of zlib level 6 for each number of an adapter."""
    data = fp16_bytes(folder)
    return least(lambda: zlib.compress(data, 6), 2) / (len(data) // 2)


Rows = list[dict[str, Any]]


def row(what: str, value: float, target: float | None = None, **more: Any) -> dict[str, Any]:
    """A measurement and what it must not exceed."""
    reached = {} if target is None else {"target": target, "reached": bool(value <= target)}
    return {"what": what, "value": round(value, 3), **reached, **more}


def start(spare: Path, options: argparse.Namespace) -> Rows:
    """`hydraopt --help`."""
    said = command(*HYDRAOPT, "--help", runs=5)
    numpy = command(sys.executable, "-c", "import numpy", runs=5)
    ratio = said.processor / numpy.processor
    seconds = {"processor seconds": round(said.processor, 3)}
    return [row("hydraopt --help over import numpy", ratio, 3, **seconds)]


def compress(spare: Path, options: argparse.Namespace) -> Rows:
    """The command on 42 MB of half precision."""
    folders = made(spare, TASKS, LAYERS)
    before = unit(folders[0])
    cold, warm = cold_and_warm(spare, *compressing(folders, spare / "four"), warm=2)
    each = min(before, unit(folders[0]))
    numbers = TASKS * len(fp16_bytes(folders[0])) // 2
    what = f"compress --budget {BUDGET} of {2 * numbers / 1e6:.0f} MB over zlib -6 of the same bytes"
    return [
        row(
            f"{what}, {name}", x.processor / numbers / each, 8, **{"processor seconds": round(x.processor, 1)}
        )
        for name, x in (("cold", cold), ("warm", warm))
    ]


def decode(spare: Path, options: argparse.Namespace) -> Rows:
    """One task, warm and in a process of its own."""
    (few,) = made(spare, 1, LAYERS)
    each = unit(few)
    command(*compressing([few], spare / "few"))
    content = store.open(spare / "few").load()
    task = content.tasks[0]
    numbers = len(fp16_bytes(few)) // 2
    factors = least(lambda: store.decode_terms(content, [task])) / numbers
    adapter = least(lambda: store.decode(content, task)) / numbers
    compiled = least(lambda: store.decode_terms(content, [task], decode_lanes=lanes.decode)) / numbers
    each = min(each, unit(few))
    rows = [
        row("zlib level 6, nanoseconds per number", each * 1e9),
        row("decode one task's factors, warm, NumPy, over zlib -6", factors / each, 1.2),
        row("decode one task's factors, warm, JAX on this processor, over zlib -6", compiled / each, 0.3),
        row("decode one adapter, balanced, warm, NumPy, over zlib -6", adapter / each),
    ]
    (whole,) = made(spare, 1, options.layers)
    at = spare / ("few" if whole == few else "whole")
    if whole != few:
        command(*compressing([whole], at))
    small, large = len(fp16_bytes(whole)), sizes.size_on_disk(at)
    text = "from hydraopt_jax import store; s = store.open({!r}); {}"
    opened, decoded = (
        command(sys.executable, "-c", text.format(str(at), x), runs=2)
        for x in ("0", "store.decode(s, s.tasks[0])")
    )
    seconds = {
        "processor seconds": round(decoded.processor, 2),
        "of them to start and open": round(opened.processor, 2),
    }
    rows += [
        row(
            f"a process that decodes one rank-16 adapter of {options.layers} layers, wall seconds",
            decoded.wall,
            3,
            **seconds,
        ),
        row(
            "its memory beyond an interpreter that has opened the store, over the fp16 bytes",
            (decoded.memory - opened.memory) / small,
            2,
            **{"fp16 bytes": small, "bytes of the store": large},
        ),
    ]
    return rows


def llm(spare: Path, options: argparse.Namespace) -> Rows:
    """Three adapters of a small language model."""
    folders = sorted(x for x in LLM.iterdir() if x.is_dir())[:3]
    cold, warm = cold_and_warm(spare, *compressing(folders, spare / "llm"), warm=2)
    size = sum(len(fp16_bytes(x)) for x in folders)
    names = ", ".join(x.name for x in folders)
    what = (
        f"compress --budget {BUDGET} of three SmolLM2 adapters ({names}; {size / 1e6:.1f} MB), wall seconds"
    )
    return [
        row(f"{what}, {name}", x.wall, target, **{"processor seconds": round(x.processor, 2)})
        for name, x, target in (("cold", cold, 10), ("warm", warm, 5))
    ]


def gpt2(spare: Path, options: argparse.Namespace) -> Rows:
    """The frontier of six adapters, and second moments for two of them."""
    folders = sorted(options.gpt2.iterdir())
    asked = [*HYDRAOPT, "frontier", *map(str, folders), "--any-base", "--json"]
    cold, warm = cold_and_warm(spare, *asked)
    rows = [
        row(
            f"frontier of {len(folders)} GPT-2 adapters, wall seconds, {name}",
            x.wall,
            target,
            **{"processor seconds": round(x.processor, 1)},
        )
        for name, x, target in (("cold", cold, 40), ("warm", warm, 15))
    ]
    few = folders[:2]
    shapes = {n: x.shape[0] for n, x in formats.read_adapter(few[0]).a.items()}
    rng = np.random.default_rng(0)
    moments: dict[str, dict[str, np.ndarray]] = {"diagonal": {}, "full": {}}
    for name, size in shapes.items():
        seen = rng.standard_normal((2 * size, size), np.float32) * rng.lognormal(0, 1, size)
        moments["full"][name] = (seen.T @ seen / len(seen)).astype(np.float32)
        moments["diagonal"][name] = np.diag(moments["full"][name]).copy()
    plain = cold_and_warm(spare, *compressing(few, spare / "plain"))[1]
    for kind, target in (("diagonal", 2), ("full", 4)):
        file = spare / f"{kind}.safetensors"
        calibration.write_moments(file, moments[kind])
        given = ("--budget", BUDGET, "--calibration", str(file))
        warm = cold_and_warm(spare, *compressing(few, spare / kind, *given))[1]
        what = f"compress --calibration with {kind} moments over the plain command, two GPT-2 adapters, warm"
        seconds = {"processor seconds": round(warm.processor, 1), "of the plain": round(plain.processor, 1)}
        rows.append(row(what, warm.processor / plain.processor, target, **seconds))
    return rows


PARTS = {x.__name__: x for x in (start, compress, decode, llm, gpt2)}


def main() -> None:
    """Measure some parts, all where none is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--layers", type=int, default=32, help="of the adapter that a cold process decodes")
    parser.add_argument("--gpt2", type=Path, help="a folder of GPT-2 adapters; the part is left out without")
    parser.add_argument("--json", type=Path, default=OUT, help="the results; parts it has are kept")
    options = parser.parse_args()
    chosen = options.parts or [x for x in PARTS if x != "gpt2" or options.gpt2]
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            rows = PARTS[name](Path(folder), options)
            machine = f"{platform.machine()}, {os.cpu_count()} cores"
            said = {"machine": machine, "load at the end": round(os.getloadavg()[0], 1), "rows": rows}
            print(json.dumps({name: said}, indent=1), flush=True)
            known = json.loads(options.json.read_text()) if options.json.exists() else {}
            options.json.write_text(json.dumps({**known, name: said}, indent=1) + "\n")


if __name__ == "__main__":
    main()
