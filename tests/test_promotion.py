"""JAX without implicit promotion of dtypes, as some users of it have it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hydraopt_jax as hydra
from hydraopt_jax import forms, merging, serving, synthetic
from hydraopt_jax.linalg import decompose


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def many():
    return synthetic.collection(tasks=["a", "b", "c"], modules={"q": (24, 32)}, rank=4, likeness=0.5)


OPTIONS = [
    {"budget": 1.0},
    {"max_error": 0.05},
    {"form": forms.Hydra(heads=2)},
    {"form": forms.Hydra(heads=2, cores=True)},
    {"form": forms.Hydra(heads=2, solver=forms.Gradient(steps=3))},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_compress(many, options):
    assert np.isfinite(hydra.compress(many, **options).errors).all()


@pytest.mark.parametrize("name", [k for k, v in merging.METHODS.items() if v.single and not v.needs])
def test_merge(many, name):
    assert np.isfinite(merging.merge_adapters(many, name).b["q"]).all()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_serving(many, dtype):
    store = hydra.compress(many, max_error=0.05)
    x, ids = jnp.ones((4, 24)), jnp.array([0, 2, 1, -1])
    slots = serving.Slots(store, 3, dtype=dtype)
    state, places = slots.load(slots.init(), ["a", "c", "b", None])
    found = [
        serving.apply(x, serving.load(store, dtype=dtype)["q"], ids),
        serving.apply(x, state.modules["q"], places),
    ]
    np.testing.assert_allclose(*found, rtol=0.05, atol=0.05)


def test_similarity(many):
    assert hydra.similarity(many).tasks == ("a", "b", "c")


def test_hydra_and_its_gradient(many):
    a, b = (jnp.stack([getattr(x, n)["q"] for x in many]).astype(jnp.float32) for n in "ab")

    def error(a, b, used):
        deltas = jax.vmap(decompose.svd)(a, b)
        return forms.hydra(deltas, heads=2, rank=4, used=used)[1].error.sum()

    slope = jax.jit(jax.grad(error))(a, b, jnp.array(3))
    assert np.isfinite(slope).all()
