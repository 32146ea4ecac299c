"""Seeded collections: reproducible, of the promised spectra and likeness, at any shape."""

import jax.numpy as jnp
import numpy as np
import pytest

from hydraopt_jax import adapters, synthetic
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import similarity

MODULES = synthetic.transformer_modules(1, 96, 32)


def test_seed_decides():
    one, same = synthetic.collection(3, tasks=2), synthetic.collection(3, tasks=4)
    other = synthetic.collection(4, tasks=2)
    for name in one[1].a:
        np.testing.assert_array_equal(one[1].a[name], same[1].a[name])
        np.testing.assert_array_equal(one[1].b[name], same[1].b[name])
        assert np.abs(one[1].a[name] - other[1].a[name]).max() > 0.01


@pytest.mark.parametrize("likeness", [0.0, 0.3, 0.7, 1.0])
def test_likeness_is_the_cosine_of_deltas(likeness):
    found = synthetic.collection(tasks=4, modules=MODULES, likeness=likeness)
    cosine = similarity.summarize(adapters.stack(found)).mean.delta[~np.eye(4, dtype=bool)]
    np.testing.assert_allclose(cosine.mean(), likeness, atol=0.1)


def test_likeness_one_is_identical():
    one, two = synthetic.collection(tasks=2, likeness=1.0)
    for name in one.a:
        np.testing.assert_allclose(one.a[name] @ one.b[name], two.a[name] @ two.b[name], atol=1e-6)


@pytest.mark.parametrize("rank", [8, 16])
def test_default_spectrum_is_that_of_trained_adapters(rank):
    (adapter,) = synthetic.collection(tasks=1, modules=MODULES, rank=rank, dtype="float32")
    shares = [np.linalg.svd(a @ adapter.b[name])[1][:rank] ** 2 for name, a in adapter.a.items()]
    cumulative = np.mean([np.cumsum(x) / x.sum() for x in shares], 0)
    np.testing.assert_allclose(cumulative[[0, 1, 3]], [0.85, 0.95, 0.985], atol=0.015)


@pytest.mark.parametrize("shape", [(3, 20), (20, 3), (2, 2), (20, 20)])
def test_narrow_modules(shape):
    (adapter,) = synthetic.collection(tasks=1, modules={"w": shape}, rank=4)
    assert adapter.a["w"].shape == (shape[0], 4)
    assert adapter.b["w"].shape == (4, shape[1])
    assert np.linalg.matrix_rank(adapter.a["w"] @ adapter.b["w"], tol=1e-3) == min(*shape, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_values_are_exact_in_dtype(dtype):
    (adapter,) = synthetic.collection(tasks=["x"], dtype=dtype)
    scale = adapter.config["lora_alpha"] / adapter.config["r"]
    assert adapter.dtype == dtype
    for name, a in adapter.a.items():
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, a.astype(jnp.dtype(dtype)).astype(np.float32))
        stored = adapter.b[name] / scale
        tiny = 1e-6 * (dtype == "float16")
        np.testing.assert_allclose(
            stored, stored.astype(jnp.dtype(dtype)).astype(np.float32), rtol=0, atol=tiny
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likeness": 1.5}, "likeness: 1.5"),
        ({"likeness": float("nan")}, "likeness"),
        ({"rank": 0}, "at least 1"),
        ({"tasks": 0}, "at least 1"),
        ({"dtype": "int8"}, "dtype: 'int8'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(HydraOptError, match=message):
        synthetic.collection(**options)
