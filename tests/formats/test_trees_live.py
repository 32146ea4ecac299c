"""Parameters made by qwix, gemma.peft and Keras, read here, add up to what those libraries compute.

qwix and Keras are the `dialects` extra; of gemma only `gemma.peft` is needed (`pip install --no-deps gemma`,
`pip install einops`). Models are random and of one or a few layers.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from hydraopt_jax import formats

# the libraries warn about their own and each other's changes; none of it is ours to mend
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

X = jax.random.normal(jax.random.key(0), (2, 5, 6))


def randomized(params):
    """The same parameters, with every LoRA factor drawn anew: libraries start `b` at zero."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        drawn = jax.random.normal(jax.random.key(len(name) + ord(name[-3])), leaf.shape, leaf.dtype)
        return drawn if "lora" in name else leaf

    return jax.tree_util.tree_map_with_path(draw, params)


class Attention(linen.Module):
    """An einsum into heads, an einsum out of them, and a dense layer."""

    @linen.compact
    def __call__(self, x):
        x = linen.Einsum((6, 2, 4), "BTD,DNH->BTNH", use_bias=False, name="q")(x)
        x = linen.Einsum((2, 4, 6), "BTNH,NHD->BTD", use_bias=False, name="out")(x)
        return linen.Dense(3, use_bias=False, name="dense")(x)


SHAPES = {"q": (6, 2, 4), "out": (2, 4, 6), "dense": (6, 3)}


def merged(params, adapter):
    """Base kernels plus deltas."""
    return {
        "params": {
            name: {
                "kernel": params["params"][name]["kernel"]
                + (adapter.a[name] @ adapter.b[name]).reshape(SHAPES[name])
            }
            for name in SHAPES
        }
    }


def check_round_trip(params, adapter, dialect, scale):
    again = formats.write_tree(adapter, dialect, scale=scale)
    want = dict(formats.trees.flatten(params))
    found = dict(formats.trees.flatten(again))
    assert set(found) == {path for path in want if formats.trees.is_factor(path)}
    for path, value in found.items():
        np.testing.assert_allclose(value, want[path], rtol=1e-6)


def test_qwix_linen():
    qwix = pytest.importorskip("qwix")
    dense = linen.Dense(3, use_bias=False)
    base = linen.Sequential([dense])
    model = qwix.apply_lora_to_model(base, qwix.LoraProvider(module_path=".*", rank=2, alpha=3.0))
    params = randomized(model.init(jax.random.key(1), X))
    adapter = formats.read_tree(params, "qwix", task="one", scale=1.5)
    ((name, a),) = adapter.a.items()
    kernel = params["params"][name]["kernel"] + a @ adapter.b[name]
    np.testing.assert_allclose(model.apply(params, X), X @ kernel, atol=1e-4)
    check_round_trip(params, adapter, "qwix", 1.5)


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.q = nnx.Einsum("BTD,DNH->BTNH", (6, 2, 4), rngs=rngs)
        self.out = nnx.Einsum("BTNH,NHD->BTD", (2, 4, 6), rngs=rngs)
        self.dense = nnx.Linear(6, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.out(self.q(x)))


def test_qwix_nnx():
    qwix = pytest.importorskip("qwix")
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=3.0)
    model = qwix.apply_lora_to_model(NnxAttention(nnx.Rngs(0)), provider, X, rngs=nnx.Rngs(1))
    nnx.update(model, randomized(nnx.state(model, nnx.LoRAParam)))
    adapter = formats.read_tree(model, "qwix", task="one", scale=1.5)
    shapes = {n: (a.shape[0], adapter.b[n].shape[1]) for n, a in adapter.a.items()}
    assert shapes == {"q": (6, 8), "out": (8, 6), "dense": (6, 3)}
    plain = NnxAttention(nnx.Rngs(0))
    for name, shape in SHAPES.items():
        kernel = getattr(plain, name).kernel
        kernel.set_value(kernel.get_value() + (adapter.a[name] @ adapter.b[name]).reshape(shape))
    wanted = plain(X)
    np.testing.assert_allclose(model(X), wanted, atol=1e-5 * np.abs(wanted).max())
    check_round_trip(nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)), adapter, "qwix", 1.5)
    same = formats.read_tree(model, "maxtext", task="one", scale=1.5)
    np.testing.assert_array_equal(same.a["q"], adapter.a["q"])


def test_gemma_peft():
    peft = pytest.importorskip("gemma.peft")

    def replace(module):
        kinds = {linen.Einsum: peft.LoRAEinsum, linen.Dense: peft.LoRADense}
        kind = kinds.get(type(module))
        return module if kind is None else kind(rank=2, wrapped=module, dtype=jnp.float32)

    with peft.ModuleInterceptor(replace):
        params = randomized(Attention().init(jax.random.key(1), X))
    with peft.ModuleInterceptor(replace):
        wanted = Attention().apply(params, X)
    adapter = formats.read_tree(params, "gemma", task="one", scale=1.0)
    np.testing.assert_allclose(wanted, Attention().apply(merged(params, adapter), X), atol=1e-3)
    check_round_trip(params, adapter, "gemma", 1.0)
    original, lora = peft.split_params(params["params"])
    assert set(formats.read_tree(lora, "gemma", task="one", scale=1.0).a) == set(adapter.a)
    whole = peft.merge_params(original, formats.write_tree(adapter.replace(layout={}), "gemma", scale=1.0))
    assert set(whole["dense"]) == {"kernel", "lora"}


def test_keras():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    tokens = keras.layers.Embedding(9, 6, name="tokens")
    dense = keras.layers.Dense(3, use_bias=False, name="dense")
    heads = keras.layers.EinsumDense("abc,cde->abde", (None, 2, 4), name="heads")
    model = keras.Sequential([tokens, heads, keras.layers.Reshape((5, 8)), dense])
    ids = np.array([[1, 2, 3, 4, 5]])
    model(ids)
    plain = {layer.name: np.asarray(layer.weights[0]) for layer in (tokens, dense, heads)}
    for layer in (tokens, dense, heads):
        layer.enable_lora(2, lora_alpha=3)
        for variable in layer.trainable_weights:
            variable.assign(np.random.default_rng(variable.path.__len__()).normal(size=variable.shape))
    tree = {v.path: v for v in model.weights}
    adapter = formats.read_tree(tree, "keras", task="one", scale=1.5)
    short = {name.split(".")[-1]: name for name in adapter.a}
    assert set(short) == {"tokens", "dense", "heads"}
    for layer, kernel in ((dense, dense.kernel), (heads, heads.kernel), (tokens, tokens.embeddings)):
        delta = adapter.a[short[layer.name]] @ adapter.b[short[layer.name]]
        want = np.asarray(kernel) - plain[layer.name]
        np.testing.assert_allclose(delta.reshape(want.shape), want, atol=1e-4)
    again = formats.write_tree(adapter, "keras", scale=1.5)
    assert set(again) == {path for path in tree if "lora" in path}
    for path, value in again.items():
        np.testing.assert_allclose(value, np.asarray(tree[path]), rtol=1e-5)
