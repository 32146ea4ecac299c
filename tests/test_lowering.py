"""Everything that is jitted lowers for GPUs and TPUs, which need not be at hand, in 32 bits."""

import importlib
import pkgutil

import jax
import numpy as np
import pytest
from derivative_cases import CASES
from jax import export

import hydraopt_jax
from hydraopt_jax import compression, forms, refinement, serving, synthetic, tradeoff
from hydraopt_jax.explicit import group_loop
from hydraopt_jax.formats.memory_collection import in_memory
from hydraopt_jax.forms import similarity
from hydraopt_jax.merging import curves, whole_adapters

PLATFORMS = ("cuda", "tpu")
# the demo's own model is not the library
LIBRARY = [
    x.name
    for x in pkgutil.walk_packages(hydraopt_jax.__path__, "hydraopt_jax.")
    if ".demo" not in x.name and "__main__" not in x.name
]
JITTED = type(jax.jit(lambda x: x))


def lower(function, *args, **options):
    """Lower a jitted function for accelerators; refuse 64-bit types in it."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x, (args, options)
    )
    found = export.export(function, platforms=PLATFORMS)(*shapes[0], **shapes[1])
    wide = [x for x in (*found.in_avals, *found.out_avals) if x.dtype in (np.float64, np.int64)]
    assert not wide
    assert "f64" not in found.mlir_module()


@pytest.mark.parametrize("name", CASES)
def test_a_pure_function_lowers(name):
    lower(jax.jit(CASES[name].function), *CASES[name].args)


def test_what_the_engines_jit_lowers(monkeypatch):
    """With the arguments of a small run of each; what is jitted and is not met fails."""
    places: dict = {}
    for name in LIBRARY:
        module = importlib.import_module(name)
        for key, value in vars(module).items():
            if isinstance(value, JITTED):
                places.setdefault(id(value), (value, f"{name}.{key}", []))[2].append((module, key))
    met: dict = {}
    for function, name, where in places.values():

        def record(*args, function=function, name=name, **options):
            met.setdefault(name, (function, args, options))
            return function(*args, **options)

        for module, key in where:
            monkeypatch.setattr(module, key, record)
    few = synthetic.collection(tasks=5, modules={"q": (96, 64), "k": (64, 96)}, rank=3)
    coded = compression.compress(few, max_error=0.01)
    moment = np.cov(np.random.default_rng(0).normal(size=(96, 200)))
    compression.compress(few, max_error=0.01, calibration={"q": moment})
    refinement.refine(
        coded,
        few,
        steps=1,
        forward=lambda lora, x: sum(x[: len(a)] @ a @ b[:, :64] for a, b in lora.values()),
        batches=[np.ones((5, 96), np.float32)],
    )
    serving.load(coded, on_device=True)
    group_loop.compress_in_form(in_memory(few), forms.Hydra(heads=2, rank=3))
    # all heads: exact errors where nothing is lost, and sums over more tasks than a side is long
    group_loop.compress_in_form(
        in_memory(few[:1]), forms.Hydra(heads=1, rank=3, solver=forms.Gradient(steps=2))
    )
    many = synthetic.collection(tasks=40, modules={"q": (96, 64)}, rank=3)
    for found in (few, many):
        group_loop.compress_in_form(in_memory(found), forms.Hydra(rank=3))
    tradeoff.frontier(few, [0.5])
    similarity.summarize(few)
    curves.curves_of(few, ["linear", "share"])
    whole_adapters.best_scale(few, whole_adapters.merge_adapters(few, "linear"))
    missed = {name for _, name, _ in places.values()} - set(met)
    assert not missed
    for function, args, options in met.values():
        lower(function, *args, **options)
