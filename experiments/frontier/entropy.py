"""How near coders come to the entropy of a store's codes: the package's own, and a general one (zstd).

    python -m experiments.frontier.entropy ADAPTER... --json experiments/frontier/entropy.json

The same codes, three ways: the package's rANS streams; int8 (int16 where a code needs it) one after another
under zstd; the same with vectors sorted by context first, each context an array of its own. Against the
entropy of symbols given context and quantizer, signs and middle bits included.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import tensorstore as ts

from hydraopt_jax import adapters, formats
from hydraopt_jax.codec import encode, frequency_tables, lanes
from hydraopt_jax.codec.contexts import RAW_BITS, WIDE
from hydraopt_jax.compression import compress
from hydraopt_jax.rate_control.coding import encode_at_step
from hydraopt_jax.rate_control.problem import prepare

BUDGETS = (0.25, 0.125, 0.0625, 0.03)
LEVEL = 19


def zstd(codes: np.ndarray) -> int:
    """Bytes of an array as one zarr chunk under zstd, as Orbax would write it."""
    narrow = np.abs(codes).max(initial=0) < 128
    data = codes.astype(np.int8 if narrow else np.int16)
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "memory"},
        "metadata": {
            "shape": [len(data)],
            "chunks": [max(len(data), 1)],
            "dtype": data.dtype.str,
            "compressor": {"id": "zstd", "level": LEVEL},
        },
        "create": True,
    }
    array = ts.open(spec).result()
    array.write(data).result()
    kept = array.kvstore
    assert kept is not None
    names = [k for k in kept.list().result() if k != b".zarray"]
    return sum(map(len, [kept.read(k).result().value for k in names]), 0)


def measure(coded: encode.Coded) -> dict[str, float]:
    """Bytes of one coded collection's codes, by coder, over their entropy."""
    own = sum(map(len, lanes.encode(coded.symbols, frequency_tables.from_counts(coded.counts))))
    share = coded.counts / np.maximum(coded.counts.sum(-1, keepdims=True), 1)
    bits = -coded.counts * np.log2(np.where(share > 0, share, 1))
    # wide contexts count the symbols of both quantizers twice
    whole = (bits.sum() - bits[WIDE].sum() / 2) / 8
    plain = by_context = 0.0
    for x in coded.symbols:
        whole += float(RAW_BITS[x.context].sum() + np.count_nonzero((x.magnitude > 0) | WIDE[x.context])) / 8
        codes = np.where(x.negative, -x.magnitude, x.magnitude)
        plain += zstd(codes)
        by_context += sum(zstd(codes[x.context == c]) for c in np.unique(x.context))
    ratios = {"own coder": own, "zstd": plain, "zstd, by context": by_context}
    return {"entropy": round(whole)} | {k: round(v / whole, 4) for k, v in ratios.items()}


def main() -> None:
    """Measure at several budgets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    collection = [formats.read_adapter(x).replace(extras={}) for x in options.adapters]
    stacked = adapters.stack(collection)
    problem = prepare(stacked, list(adapters.check(collection)), np.ones(len(collection)))
    result = {}
    for budget in BUDGETS:
        step = compress(collection, budget=budget).report["step"]
        result[f"{budget:g}"] = measure(encode_at_step(problem, step).coded)
        print(budget, json.dumps(result[f"{budget:g}"]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
