"""What is compiled: nothing by a second call of the same shapes, a bounded number for other sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compiled

from hydraopt_jax import compression, forms, refinement, serving, store, synthetic, tradeoff

# two of one shape and one of others: tasks, width of the inputs and the outputs, rank, seed
FIRST, ALIKE, OTHER = (4, 24, 12, 4, 1), (4, 24, 12, 4, 2), (5, 28, 20, 3, 3)
ERROR = 0.02


def collection(tasks, inputs, outputs, rank, seed):
    modules = synthetic.transformer_modules(1, inputs, outputs)
    names = [f"task{t}" for t in range(tasks)]
    return synthetic.collection(seed, tasks=names, modules=modules, rank=rank, likeness=0.6, dtype="float32")


@pytest.fixture(scope="module")
def given():
    """Collections and their coded stores; the two of one shape, and the third of another."""
    found = [collection(*x) for x in (FIRST, ALIKE, OTHER)]
    return [(x, compression.compress(x, max_error=ERROR)) for x in found]


def forward(lora, x):
    return sum(jnp.sum((x @ a) @ b, -1, keepdims=True) for a, b in lora.values() if a.shape[0] == x.shape[-1])


def distilled(adapters, kept):
    width = max(a.shape[0] for a in adapters[0].a.values())
    batch = np.ones((len(adapters), 3, width), np.float32)
    return refinement.refine(kept, adapters, forward=forward, batches=[batch], steps=3)


SGD_FORM = forms.Hydra(heads=2, rank=2, solver=forms.Gradient(steps=3))
# verb -> what it does with adapters and their store, and the most that other sizes compile anew
VERBS = {
    "compress": (lambda x, kept: compression.compress(x, max_error=ERROR), 60),
    "compress in a form": (lambda x, kept: compression.compress(x, form=forms.Hydra(heads=2, rank=2)), 40),
    "compress in a form by gradients": (lambda x, kept: compression.compress(x, form=SGD_FORM), 40),
    "decode": (lambda x, kept: store.decode_terms(kept), 0),
    "decode on the device": (lambda x, kept: serving.load(kept, on_device=True), 12),
    "frontier": (lambda x, kept: tradeoff.frontier(x, [0.5]), 60),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_second_call_of_the_same_shapes_compiles_nothing(given, verb):
    do, most = VERBS[verb]
    one, alike, other = given
    do(*one)
    with compiled() as again:
        do(*one)
    assert again == []
    # other numbers may choose other ranks and clusters
    with compiled() as few:
        do(*alike)
    assert len(few) <= 2, few
    with compiled() as anew:
        do(*other)
    assert len(anew) <= most, anew


def test_a_refinement_of_outputs_compiles_its_two_functions_once_a_call(given):
    """Of the caller's model, which no cache may keep."""
    distilled(*given[0])
    with compiled() as again:
        distilled(*given[0])
    assert len(again) == 2, again


def test_counts_are_of_what_is_compiled():
    with compiled() as names:
        jax.jit(lambda x: x * 2 + 1)(np.ones(7, np.float32))
    assert names == ["jit(<lambda>)"]
