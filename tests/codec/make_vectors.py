"""Write the test vectors of docs/format.md: `python tests/codec/make_vectors.py`.

Each vector is a JSON file: the structure of the terms, the leaves in base 64, and what they decode to. They
cover narrow and wide contexts, those of blocks, escapes, prediction, head leaves, several lanes and an absent
task.
"""

import base64
import json
from pathlib import Path

import numpy as np

from hydraopt_jax.codec import contexts, encode, streams, syntax
from hydraopt_jax.codec.decode import decode_leaves
from hydraopt_jax.codec.layout import KINDS, PROJECTED, TermShape

FOLDER = Path(__file__).parent / "vectors"


def plain(rng):
    """Two tasks of two modules, narrow and wide contexts; the second task lacks the second module."""
    a, b = rng.normal(size=(2, 40, 3)) * [3.0, 40.0, 900.0], rng.normal(size=(2, 24, 3)) * [2.0, 30.0, 0.0]
    one = rng.normal(size=(1, 16, 2)) * 5, rng.normal(size=(1, 24, 2)) * 5
    return {
        "q": (target(TermShape((0, 1), (0, 1), 40, 3, 24, 0), a, b),),
        "v": (target(TermShape((0, -1), (0, -1), 16, 2, 24, 0), *one),),
    }


def predicted(rng):
    """Three tasks whose factors are predicted from a base that none of them reads."""
    base = rng.normal(size=(1, 64, 4)) * 25, rng.normal(size=(1, 48, 4)) * 25
    a, b = (
        np.concatenate([x, x @ rng.normal(size=(3, 4, 4)) + 2 * rng.normal(size=(3, *x.shape[1:]))])
        for x in base
    )
    return {"q": (target(TermShape((1, 2, 3), (1, 2, 3), 64, 4, 48, PROJECTED), a, b),)}


def escapes(rng):
    """One task, one entry of two million steps."""
    a, b = rng.normal(size=(1, 300, 1)) * 4, rng.normal(size=(1, 20, 1)) * 4
    a[0, 7] = -2e6
    return {"q": (target(TermShape((0,), (0,), 300, 1, 20, 0), a, b),)}


def heads(rng):
    """Four tasks with one input factor, two heads of which are read by two tasks each, and many lanes."""
    a, b = rng.normal(size=(1, 500, 6)) * 6, rng.normal(size=(2, 700, 6)) * 6
    return {"q": (target(TermShape((0, 0, 0, 0), (0, 1, 1, 0), 500, 6, 700, 0), a, b),)}


def blocks(rng):
    """One task whose output side has heads of different sizes, and so contexts of its own for each block."""
    sizes = np.repeat([1.0, 30.0, 4.0, 0.2], 64)[:210, None]
    a, b = rng.normal(size=(1, 64, 3)) * 9, rng.normal(size=(1, 210, 3)) * 3 * sizes
    return {"q": (target(TermShape((0,), (0,), 64, 3, 210, 0), a, b),)}


def target(shape, a, b):
    """A term to be coded."""
    return encode.TermInSteps(shape, np.asarray(a, np.float32), np.asarray(b, np.float32))


def describe(name, make):
    """A vector, JSON-able."""
    rng = np.random.default_rng(len(name))
    coded = encode.quantize(make(rng), contexts.gaussian())
    tasks = range(max(len(x.a_of) for terms in coded.shapes.values() for x in terms))
    gains = {
        t: syntax.round_gains(
            [
                rng.normal(size=int(x.sum()))
                for x in syntax.live_directions(coded.shapes, coded.contexts, t).values()
            ],
            6 + t,
        )
        for t in tasks
    }
    leaves = encode.serialize(coded, gains)
    found = decode_leaves(leaves, coded.shapes, tasks)
    fields = TermShape._fields
    shapes = {
        n: [dict(zip(fields, x, strict=True)) | {"predicted": KINDS[x.predicted]} for x in terms]
        for n, terms in coded.shapes.items()
    }
    return {
        "modules": shapes,
        "leaves": {k: base64.b64encode(v).decode() for k, v in leaves.items()},
        "pieces": [
            {"module": x.module, "term": x.term, "side": x.side, "factor": x.factor, "leaf": x.leaf}
            | {"values_times_16": np.rint(v * 16).astype(int).T.tolist()}
            for x, v in zip(found.pieces, found.values, strict=True)
        ],
        "gains": {str(t): [x.tolist() for x in found.gains[t]] for t in tasks},
    }


def main():
    """Write them all; lanes are short, so that there are several."""
    FOLDER.mkdir(exist_ok=True)
    streams.LANE_BYTES, streams.LANE_CODES = 300, 500
    for make in (plain, predicted, escapes, heads, blocks):
        text = json.dumps(describe(make.__name__, make), separators=(",", ":"))
        (FOLDER / f"{make.__name__}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
