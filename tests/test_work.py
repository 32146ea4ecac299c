"""What a verb costs, counted: passes, codes through the trellis and deltas decomposed, over a collection's.

A time would depend on the machine. The bounds are what was reached, times the 1.3 that choices may cost.
"""

import collections
import contextlib
import functools

import pytest

from hydraopt_jax import changes, synthetic, tradeoff
from hydraopt_jax.codec import encode
from hydraopt_jax.compression import compress
from hydraopt_jax.formats.memory_collection import in_memory
from hydraopt_jax.linalg import decompose
from hydraopt_jax.rate_control import coding, engine, parts, pilot, prepared
from hydraopt_jax.rate_control.options import Options

MODULES = {f"layers.{n}.{p}": (192, o) for n in range(4) for p, o in (("q", 192), ("up", 256))}
TASKS = [f"t{k}" for k in range(6)]
SLOWER = 1.3
FIRST = {"budget": 0.125}


@functools.cache
def collection():
    return synthetic.collection(3, tasks=TASKS, modules=MODULES, rank=4, likeness=0.7, dtype="float32")


@contextlib.contextmanager
def counted(monkeypatch):
    """Counts of a block over those of the collection: `passes`, `trellis`, `decomposed`."""
    whole = sum(x.a[n].size + x.b[n].size for x in collection() for n in x.a)
    pairs = sum(len(x.a) for x in collection())
    found = collections.Counter()
    encoded, quantize, decomposition = (
        engine.quantize_at_step,
        encode.quantize_streams,
        decompose.batched_svd,
    )

    def coded(problem, *rest):
        found["passes"] += problem.weights.size / pairs
        return encoded(problem, *rest)

    def through(values, *rest):
        found["trellis"] += sum(map(len, values)) / whole
        return quantize(values, *rest)

    def decomposed(a, b):
        found["decomposed"] += a.shape[0] * a.shape[1] / pairs
        return decomposition(a, b)

    with monkeypatch.context() as patch:
        # samples of a share of the collection, as those of large collections are
        patch.setattr(coding, "TABLE_CODES", 1 << 13)
        patch.setattr(pilot, "SAMPLE_CODES", 1 << 14)
        patch.setattr(engine, "quantize_at_step", coded)
        patch.setattr(encode, "quantize_streams", through)
        patch.setattr(decompose, "batched_svd", decomposed)
        yield found


def in_parts(target):
    return engine.compress_to_target(in_memory(collection()), Options(**target), segment_bytes=1 << 16)


def of_many_parts(target):
    """A collection of more parts than are kept analyzed."""
    found = in_memory(collection())
    assert len(parts.parts_of(found, 1 << 15)) > prepared.CACHED
    return engine.compress_to_target(found, Options(**target), segment_bytes=1 << 15)


@functools.cache
def made():
    return compress(collection()[:5], **FIRST)


def each(do, name, values, **more):
    """Of several targets, as one target may take a pass more or less by chance."""
    for x in values:
        do({name: x, **more})


def of_one_part(target):
    return compress(collection(), **target)


BUDGETS, ERRORS = (0.5, 0.125, 0.0625), (0.1, 0.01)
# verb -> what it does, and what was reached: passes, of the trellis, decompositions
VERBS = {
    "budgets": (lambda: each(of_one_part, "budget", BUDGETS), 15, 19.4, 3),
    "budgets, nothing shared": (lambda: each(of_one_part, "budget", BUDGETS, share=False), 19, 15.7, 3),
    "errors": (lambda: each(of_one_part, "max_error", ERRORS), 11, 14.4, 2),
    "errors of every task": (lambda: each(of_one_part, "max_task_error", ERRORS[1:]), 10, 12.6, 3),
    "budgets, few parts": (lambda: each(in_parts, "budget", BUDGETS[:2]), 10, 13, 2.75),
    "budgets, many parts": (lambda: each(of_many_parts, "budget", BUDGETS[:2]), 8, 10.1, 8.75),
    "errors, many parts": (lambda: each(of_many_parts, "max_error", ERRORS[1:]), 3, 8.2, 3.4),
    "lossless": (lambda: compress(collection(), budget=1), 0, 0, 0),
    "frontier": (lambda: tradeoff.frontier(collection(), BUDGETS[:2], heads=[1]), 24, 27.6, 6),
    "add": (lambda: changes.add(made(), collection()[5]), 0, 0.13, 0.17),
    "refit": (lambda: changes.refit(made(), collection()[:5]), 0.84, 2, 0.84),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_does_no_more_than_it_did(monkeypatch, verb):
    do, passes, trellis, decomposed = VERBS[verb]
    made()
    with counted(monkeypatch) as found:
        do()
    assert found["passes"] <= SLOWER * passes
    assert found["trellis"] <= SLOWER * trellis
    assert found["decomposed"] <= SLOWER * decomposed
