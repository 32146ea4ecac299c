"""The tap: what it adds up is what a layer sees, and what comes back to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hydraopt_jax as hydra
from hydraopt_jax import calibration, synthetic
from hydraopt_jax.errors import HydraOptError

WORDS, WIDTH, HEADS, HEAD = 11, 6, 2, 4


class Block(nnx.Module):
    """Einsum axes, two axes in and two out, and a layer that is called twice."""

    def __init__(self, rngs):
        self.q = nnx.LinearGeneral(WIDTH, (HEADS, HEAD), rngs=rngs)
        self.o = nnx.LinearGeneral((HEADS, HEAD), WIDTH, axis=(-2, -1), rngs=rngs)
        self.up = nnx.Einsum("BLD,DNH->BNLH", (WIDTH, HEADS, HEAD), rngs=rngs)
        self.twice = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.o(jnp.tanh(self.q(x)))
        x = x + jnp.tanh(self.up(x)).swapaxes(1, 2).reshape(*x.shape[:2], -1)[..., :WIDTH]
        return self.twice(jnp.tanh(self.twice(x)))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.layers = nnx.List([Block(rngs), Block(rngs)])
        self.head = nnx.Linear(WIDTH, WORDS, rngs=rngs)
        self.unused = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(scope="module")
def model():
    return Model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def batches():
    random = np.random.default_rng(0)
    return [
        random.integers(1, WORDS, (3, 5)),
        random.integers(0, WORDS, (2, 5)),
        random.integers(0, WORDS, (2, 7)),
    ]


def real(tokens):
    return tokens > 2


def layer(model, path):
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def watched(model, batches, path):
    """What a layer was given and gave, eagerly: lists of a batch each."""
    copy = nnx.merge(*nnx.split(model))
    *parents, last = path.split(".")
    base, seen = layer(copy, path), []

    class Watch(nnx.Module):
        def __call__(self, x):
            seen.append(np.asarray(x))
            return base(x)

    setattr(layer(copy, ".".join(parents)) if parents else copy, last, Watch())
    for x in batches:
        copy(jnp.asarray(x))
    return seen


@pytest.mark.parametrize("path", ["layers.0.q", "layers.1.o", "layers.1.up", "layers.0.twice", "head"])
@pytest.mark.parametrize("mask", [None, real])
def test_second_moments_are_those_of_the_inputs(model, batches, path, mask):
    found = calibration.collect(model, batches, mask=mask)
    full = calibration.collect(model, batches, mask=mask, rank=0)
    size = HEADS * HEAD if path.endswith("o") else WIDTH
    calls = watched(model, batches, path)
    every = np.concatenate([x.reshape(-1, size) for x in calls])
    counts = [np.ravel(np.ones(x.shape) if mask is None else mask(x)) for x in batches]
    keep = np.concatenate([x for x in counts for _ in range(len(calls) // 3)]).astype(bool)
    kept = every[keep].astype(np.float64)
    np.testing.assert_allclose(found[path], kept.T @ kept / len(kept), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(full[path], np.diag(found[path]), rtol=1e-5)
    assert "unused" not in found


@pytest.mark.parametrize("path", ["layers.0.q", "layers.1.o", "layers.1.up", "head"])
def test_output_moments_are_those_of_the_gradients(model, batches, path):
    key = jax.random.key(3)
    found = calibration.collect(model, batches[:1], outputs=True, mask=real, key=key, modules=[path])
    tokens = jnp.asarray(batches[0])
    base = layer(model, path)

    def loss(probe):
        copy = nnx.merge(*nnx.split(model))
        *parents, last = path.split(".")

        class Probed(nnx.Module):
            def __call__(self, x):
                return base(x) + probe

        setattr(layer(copy, ".".join(parents)) if parents else copy, last, Probed())
        scores = jax.nn.log_softmax(copy(tokens))
        drawn = jax.random.categorical(jax.random.fold_in(key, 0), jax.lax.stop_gradient(scores))
        return (jnp.take_along_axis(scores, drawn[..., None], -1)[..., 0] * real(tokens)).sum()

    shapes = {"q": (3, 5, HEADS, HEAD), "o": (3, 5, WIDTH), "up": (3, HEADS, 5, HEAD), "head": (3, 5, WORDS)}
    g = jax.grad(loss)(jnp.zeros(shapes[path.split(".")[-1]]))
    g = g.swapaxes(1, 2) if path.endswith("up") else g
    rows = np.asarray(g.reshape(15, -1), np.float64)[np.ravel(real(batches[0]))]
    np.testing.assert_allclose(found[f"{path}:output"], rows.T @ rows / len(rows), rtol=1e-3, atol=1e-6)


def test_the_model_stays_as_it_was(model, batches):
    before = jax.tree.map(np.asarray, nnx.state(model))
    structure = nnx.graphdef(model)
    calibration.collect(model, batches, outputs=True)
    assert nnx.graphdef(model) == structure
    assert jax.tree.all(jax.tree.map(np.array_equal, before, nnx.state(model)))


def test_shapes_are_traced_once(model, batches):
    traced = []

    def forward(model, batch):
        traced.append(batch.shape)
        return model(batch)

    calibration.collect(model, [*batches, *batches], forward=forward)
    assert sorted(traced) == [(2, 5), (2, 7), (3, 5)]


def test_names_are_the_adapters(model, batches):
    rename = lambda path: f"model.{path}"  # noqa: E731
    found = calibration.collect(model, batches, rename=rename, modules=["model.layers.0.q"])
    assert set(found) == {"model.layers.0.q"}
    with pytest.raises(
        HydraOptError, match=r"layers\.0\.qq: the model has no such .*near paths are 'layers\.0\.q'"
    ):
        calibration.collect(model, batches, modules=["layers.0.qq"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modules": ["unused"]}, "unused: forward never calls it"),
        ({"batches": []}, "there are no batches"),
        ({"mask": lambda x: np.ones(4)}, "the mask has shape"),
        ({"forward": lambda model, batch: model.embed(batch)}, "forward calls no layer"),
        ({"forward": lambda model, batch: model(batch) * jnp.nan, "outputs": True}, "not finite"),
    ],
)
def test_what_is_refused(model, batches, options, said):
    with pytest.raises(HydraOptError, match=said):
        calibration.collect(model, **{"batches": batches, **options})


def test_stacked_layers_are_refused():
    stacked = nnx.vmap(lambda key: nnx.Linear(3, 4, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0)))
    model = nnx.Dict(many=stacked)
    with pytest.raises(HydraOptError, match=r"many: its kernel has shape \[2, 3, 4\], layers stacked"):
        calibration.collect(model, [jnp.ones((2, 3))], forward=lambda model, x: x)


def test_what_it_gives_is_a_calibration(model, batches, tmp_path):
    """Of a model to a store, by way of a file."""
    shapes = {"layers.0.q": (WIDTH, HEADS * HEAD), "layers.1.o": (HEADS * HEAD, WIDTH)}
    made = synthetic.collection(1, tasks=["a", "b"], modules=shapes, rank=2, dtype="float32")
    found = calibration.collect(model, batches, modules=shapes, outputs=True)
    calibration.write_moments(tmp_path / "c.safetensors", found)
    store = hydra.compress(
        made, max_error=0.05, calibration=calibration.read_moments(tmp_path / "c.safetensors")
    )
    assert store.output_errors.shape == (2, 2)
    assert "uncalibrated" not in store.report


@pytest.mark.parametrize("rank", [None, 0])
def test_modules_that_share_a_kernel_have_its_inputs_and_their_own_outputs(model, batches, rank):
    shared = lambda path: ("left", "right") if path == "layers.0.q" else path  # noqa: E731
    given = {"outputs": True, "rank": rank}
    whole = calibration.collect(model, batches, modules=["layers.0.q"], **given)
    parts = calibration.collect(model, batches, modules=["right"], rename=shared, **given)
    for n, name in enumerate(("left", "right")):
        np.testing.assert_array_equal(parts[name], whole["layers.0.q"])
        own = (slice(n * HEAD, (n + 1) * HEAD),) * (1 if rank == 0 else 2)
        np.testing.assert_array_equal(parts[f"{name}:output"], whole["layers.0.q:output"][own])
