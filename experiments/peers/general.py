"""What general compressors make of LoRA factors in half precision.

    python -m experiments.peers.general gpt2=FOLDER llm=experiments/llm/adapters/shared \
        --json experiments/peers/general.json

Each NAME=FOLDER holds adapter folders. The fp16 bytes of all factors are compressed as they are, and with
the high bytes of all numbers before the low ones. Seconds to a minute.
"""

import argparse
import json
import lzma
import zlib
from pathlib import Path

import numpy as np

import hydraopt_jax as hydra
from experiments.frontier.entropy import LEVEL, zstd


def factors(folder: str) -> np.ndarray:
    """All factors of a folder of adapters, one after another, fp16: `[N]`."""
    found = hydra.read(folder)
    parts = [np.asarray(y, np.float16).ravel() for x in found for n in x.a for y in (x.a[n], x.b[n])]
    return np.concatenate(parts)


def ratios(numbers: np.ndarray) -> dict[str, float]:
    """Compressed over original bytes, by compressor."""
    raw = numbers.tobytes()
    planes = numbers.view(np.uint8).reshape(-1, 2).T.tobytes()
    found = {}
    for name, data in (("", raw), (", byte planes", planes)):
        found[f"zlib -9{name}"] = len(zlib.compress(data, 9))
        found[f"zstd -{LEVEL}{name}"] = zstd(np.frombuffer(data, np.int16))
        found[f"xz -6{name}"] = len(lzma.compress(data, preset=6))
    return {k: round(v / len(raw), 4) for k, v in found.items()}


def main() -> None:
    """Measure every folder that is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    result = {}
    for given in options.folders:
        name, folder = given.split("=", 1)
        result[name] = ratios(factors(folder))
        print(name, json.dumps(result[name]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
