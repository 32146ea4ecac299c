"""NNX layers that serve a store, and one task in a model's own LoRA parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from plain_stores import plain_store, store_of

import hydraopt_jax as hydra
from hydraopt_jax import nnx_layers, serving
from hydraopt_jax.forms import Factors
from hydraopt_jax.store import decode_terms, task_factors

TASKS = ("legal", "medical", "sports")
SHAPES = {"attention.query": (12, 8), "attention.out": (8, 12), "layers.0": (12, 6), "layers.1": (12, 6)}


@pytest.fixture(scope="module")
def kept():
    rng = np.random.default_rng(0)
    draw = lambda *shape: 0.3 * rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return store_of({t: {n: (draw(i, 3), draw(3, o)) for n, (i, o) in SHAPES.items()} for t in TASKS})


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.query = nnx.LinearGeneral(12, (2, 4), rngs=rngs)
        self.out = nnx.Einsum("BTNH,NHD->BTD", (2, 4, 12), rngs=rngs)

    def __call__(self, x):
        return self.out(self.query(x))


class Small(nnx.Module):
    def __init__(self, rngs):
        self.attention = Attention(rngs)
        self.layers = nnx.List([nnx.Linear(12, 6, rngs=rngs), nnx.Linear(12, 6, rngs=rngs)])
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        return self.head(jnp.tanh(self.layers[0](x)) * self.layers[1](x))


run = nnx.jit(lambda model, x: model(x))


def merged(kept, task):
    """The model with one task's deltas added to its kernels: what a layer must give."""
    model = Small(nnx.Rngs(0))
    for name, (a, b) in task_factors(kept, task).items():
        layer = model
        for key in name.split("."):
            layer = layer[int(key)] if key.isdigit() else getattr(layer, key)
        layer.kernel.set_value(layer.kernel.get_value() + (a @ b).reshape(layer.kernel.shape))
    return model


def test_a_wrapped_model_serves_each_row_its_task(kept):
    model = Small(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 5, 12))
    plain = run(model, x)
    assert sorted(serving.wrap(model, serving.load(kept, dtype=jnp.float32))) == sorted(SHAPES)
    graph, state = nnx.split(model)
    traces = []

    @jax.jit
    def serve(state, ids, x):
        traces.append(1)
        model = nnx.merge(graph, state)
        serving.set_task_ids(model, ids)
        return model(x)

    names = ["sports", "legal", "sports", "medical"]
    ids = serving.task_ids(kept, names)
    got = serve(state, ids[:, None], x)
    want = {name: run(merged(kept, name), x) for name in TASKS}
    for row, name in enumerate(names):
        np.testing.assert_allclose(got[row], want[name][row], atol=1e-4)
    np.testing.assert_allclose(serve(state, np.full((4, 1), -1, np.int32), x), plain, atol=1e-6)
    assert len(traces) == 1
    np.testing.assert_allclose(serve(state, jnp.int32(1), x), want["medical"], atol=1e-4)


def test_tokens_of_one_sequence_may_differ(kept):
    model = Small(nnx.Rngs(0))
    serving.wrap(model, serving.load(kept, dtype=jnp.float32), ["layers.*"])
    x = jax.random.normal(jax.random.key(0), (1, 5, 12))
    ids = jnp.array([0, 2, -1, 1, 1])
    got = model.layers[0](x, task_ids=ids)[0]
    for n, task in enumerate(ids.tolist()):
        a, b = (*task_factors(kept, TASKS[task])["layers.0"],)
        want = model.layers[0].base(x)[0, n] + (task >= 0) * (x[0, n] @ a @ b)
        np.testing.assert_allclose(got[n], want, atol=1e-4)


def test_patterns_choose_layers_and_rename_finds_them(kept):
    model = Small(nnx.Rngs(0))
    modules = {f"base.{name}": value for name, value in serving.load(kept, dtype=jnp.float32).items()}
    rename = lambda path: f"base.{path}"  # noqa: E731
    assert serving.wrap(model, modules, ["layers.*", "*.out"], rename=rename) == [
        "attention.out",
        "layers.0",
        "layers.1",
    ]
    assert isinstance(model.attention.query, nnx.LinearGeneral)
    assert isinstance(model.layers[1], serving.Served)


def test_the_factors_are_no_parameters_but_can_be_trained(kept):
    model = Small(nnx.Rngs(0))
    count = len(jax.tree.leaves(nnx.state(model, nnx.Param)))
    serving.wrap(model, serving.load(kept, dtype=jnp.float32))
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == count
    serving.set_task_ids(model, jnp.int32(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, 12))
    graph, stored, rest = nnx.split(model, serving.Stored, ...)

    def loss(stored):
        return jnp.mean(nnx.merge(graph, stored, rest)(x) ** 2)

    grads = jax.jit(jax.grad(loss, allow_int=True))(stored)
    leaves = [g for g in jax.tree.leaves(grads) if g.dtype == jnp.float32]
    assert len(leaves) == 8
    assert all(np.abs(g).max() > 0 for g in leaves)


@pytest.mark.parametrize(
    ("equation", "kernel", "inputs"),
    [
        ("BTD,DNH->BTNH", (6, 2, 4), (3, 5, 6)),
        ("BTD,NDH->BTNH", (2, 6, 4), (3, 5, 6)),
        ("...NH,NHD->...D", (2, 3, 4), (5, 2, 3)),
        ("BSD,KDNH->KBSNH", (2, 6, 2, 4), (3, 5, 6)),
        ("TBD,DH->BTH", (6, 4), (3, 5, 6)),
    ],
)
def test_einsums_of_any_order_are_their_kernel_plus_delta(equation, kernel, inputs):
    layer = nnx.Einsum(equation, kernel, rngs=nnx.Rngs(0))
    i, o = nnx_layers.matrix(layer)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(1, i, 2)).astype(np.float32), rng.normal(size=(1, 2, o)).astype(np.float32)
    module = (Factors(jnp.asarray(a), jnp.asarray(b), jnp.zeros(1, int), jnp.zeros(1, int)),)
    served = serving.Served(layer, [module], serving.layers.TaskIds(jnp.array(0)))
    x = jax.random.normal(jax.random.key(0), inputs)
    _, contracted, made = nnx_layers.roles(*nnx_layers.labels(equation, x.ndim))
    size = dict(zip(equation.split(",")[1].split("->")[0], kernel, strict=True))
    delta = (a[0] @ b[0]).reshape([size[c] for c in contracted + made])
    names = equation.split(",")[1].split("->")[0]
    delta = np.einsum(f"{contracted}{made}->{names}", delta)
    np.testing.assert_allclose(run(served, x) - run(layer, x), np.einsum(equation, x, delta), atol=1e-4)


def test_a_linear_general_over_several_axes():
    layer = nnx.LinearGeneral((4, 3), (2, 5), axis=(-1, 1), rngs=nnx.Rngs(0))
    a, b = jax.random.normal(jax.random.key(1), (1, 12, 2)), jax.random.normal(jax.random.key(2), (1, 2, 10))
    module = (Factors(a, b, jnp.zeros(1, int), jnp.zeros(1, int)),)
    served = serving.Served(layer, [module], serving.layers.TaskIds(jnp.array(0)))
    x = jax.random.normal(jax.random.key(0), (7, 4, 6, 3))
    delta = (a[0] @ b[0]).reshape(4, 3, 2, 5)
    want = np.einsum("bixj,ijop->bxop", x, delta)
    np.testing.assert_allclose(run(served, x) - run(layer, x), want, atol=1e-4)


def test_one_task_in_the_model_s_own_lora(kept):
    class Adapted(nnx.Module):
        def __init__(self, rngs):
            wrapped = nnx.Linear(12, 6, rngs=rngs)
            self.layers = nnx.List(
                [
                    nnx.LoRALinear(12, 6, lora_rank=4, rngs=rngs),
                    nnx.LoRA(12, 3, 6, base_module=wrapped, rngs=rngs),
                ]
            )

    model = Adapted(nnx.Rngs(0))
    modules = decode_terms(kept)
    modules = {n: modules[n] for n in ("layers.0", "layers.1")}
    mine = plain_store(TASKS, modules)
    assert sorted(serving.load_task(model, mine, "medical")) == ["layers.0", "layers.1"]
    x = jax.random.normal(jax.random.key(0), (5, 12))
    for layer, base, name in (
        (model.layers[0], lambda x: nnx.Linear.__call__(model.layers[0], x), "layers.0"),
        (model.layers[1], model.layers[1].base_module, "layers.1"),
    ):
        a, b = task_factors(kept, "medical")[name]
        np.testing.assert_allclose(layer(x) - base(x), x @ a @ b, atol=1e-4)

    (term,) = modules["layers.1"]
    without = Factors(term.a[[0, 2]], term.b[[0, 2]], *2 * [np.array([0, -1, 1])])
    lacking = plain_store(TASKS, modules | {"layers.1": (without,)})
    assert serving.load_task(model, lacking, "medical") == ["layers.0"]
    np.testing.assert_array_equal(model.layers[1](x), model.layers[1].base_module(x))
    with pytest.raises(hydra.HydraOptError, match="did you mean 'sports'"):
        serving.load_task(model, mine, "sport")
    with pytest.raises(hydra.HydraOptError, match=r"attention\.query: the model has no LoRA layer there"):
        serving.load_task(model, kept, "legal")
    model.layers[0] = nnx.LoRALinear(12, 6, lora_rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(
        hydra.HydraOptError, match=r"layers\.0: .* has rank 2, 'legal' needs 3: .* with rank 3"
    ):
        serving.load_task(model, mine, "legal")
    model.layers[0] = nnx.LoRALinear(12, 7, lora_rank=3, rngs=nnx.Rngs(0))
    with pytest.raises(hydra.HydraOptError, match=r"layers.0: .* = \[12, 7\], layers.0 of 'legal' \[12, 6\]"):
        serving.load_task(model, mine, "legal")


class Projection(nnx.Module):
    """A layer of another library's class, as Tunix' are, with the LoRA parameters that qwix adds."""

    def __init__(self, equation, shape, lora, rngs):
        self.einsum_str, self.shape = equation, shape
        self.w = nnx.Param(rngs.params.normal(shape))
        if lora:
            self.w_lora_a, self.w_lora_b = (nnx.LoRAParam(jnp.ones(x, jnp.bfloat16)) for x in lora)

    def __call__(self, x):
        y = jnp.einsum(self.einsum_str, x, self.w.get_value())
        if hasattr(self, "w_lora_a"):
            low, high = (x.get_value().astype(jnp.float32) for x in (self.w_lora_a, self.w_lora_b))
            delta = jnp.tensordot(low, high, 1)
            y = y + 0.5 * jnp.einsum(self.einsum_str, x, delta)
        return y


class Projections(nnx.Module):
    def __init__(self, rngs, lora=0):
        pairs = (((12, lora), (lora, 2, 4)), ((2, 4, lora), (lora, 12))) if lora else ((), ())
        self.query = Projection("BTD,DNH->BTNH", (12, 2, 4), pairs[0], rngs)
        self.out = Projection("BTNH,NHD->BTD", (2, 4, 12), pairs[1], rngs)

    def __call__(self, x):
        return self.out(self.query(x)).reshape(*x.shape[:2], self.query.shape[1] * 6)


def test_layers_of_another_librarys_class_are_served_and_loaded(kept):
    x = jax.random.normal(jax.random.key(0), (2, 5, 12))
    modules = {f"attention.{n}": decode_terms(kept)[f"attention.{n}"] for n in ("query", "out")}
    mine = plain_store(TASKS, modules)
    model = Projections(nnx.Rngs(0))
    rename = lambda path: f"attention.{path.removesuffix('.w')}"  # noqa: E731
    assert sorted(serving.wrap(model, serving.load(mine, dtype="float32"), rename=rename)) == ["out", "query"]
    own = Projections(nnx.Rngs(0), lora=5)
    for n, task in enumerate(TASKS):
        want = Projections(nnx.Rngs(0))
        for name, (a, b) in task_factors(mine, task).items():
            w = getattr(want, name.split(".")[1]).w
            w.set_value(w.get_value() + (a @ b).reshape(w.get_value().shape))
        serving.set_task_ids(model, jnp.int32(n))
        np.testing.assert_allclose(run(model, x), want(x), atol=1e-4)
        assert sorted(serving.load_task(own, mine, task, rename=rename, scale=0.5)) == ["out.w", "query.w"]
        # the parameters are bfloat16 and stay so
        assert own.query.w_lora_a.get_value().dtype == jnp.bfloat16
        np.testing.assert_allclose(own(x), want(x), atol=0.05 * np.abs(want(x)).max())
    with pytest.raises(hydra.HydraOptError, match=r"the model has no LoRA parameters: make them"):
        serving.load_task(Projections(nnx.Rngs(0)), mine, "legal")


class Shared(nnx.Module):
    """Keys and values in one kernel, as Tunix' Gemma has them."""

    def __init__(self, rngs):
        self.kv = Projection("BTD,CKDH->CBTKH", (2, 2, 12, 4), None, rngs)

    def __call__(self, x):
        key, value = self.kv(x)
        return jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in (key, value)], -1)


@pytest.mark.parametrize("present", [("k", "v"), ("v",), ("k",)])
def test_modules_that_share_a_kernel_are_served_side_by_side(present):
    random = np.random.default_rng(0)
    each = np.arange(2, dtype=np.int32)
    modules = {
        f"layer.{name}": (
            Factors(
                random.standard_normal((2, 12, 3)).astype(np.float32),
                random.standard_normal((2, 3, 8)).astype(np.float32),
                each,
                each,
            ),
        )
        for name in present
    }
    x = jax.random.normal(jax.random.key(0), (2, 5, 12))
    model = Shared(nnx.Rngs(0))
    plain = model(x)
    rename = lambda path: ("layer.k", "layer.v") if path == "kv" else path  # noqa: E731
    assert serving.wrap(model, modules, rename=rename) == ["kv"]
    serving.set_task_ids(model, jnp.array([[1], [-1]]))
    zeros = np.zeros((12, 8))
    deltas = [modules[f"layer.{n}"][0] if n in present else None for n in ("k", "v")]
    wanted = np.concatenate([zeros if d is None else d.a[1] @ d.b[1] for d in deltas], 1)
    found = model(x) - plain
    np.testing.assert_allclose(found[0], x[0] @ wanted, atol=1e-4)
    np.testing.assert_array_equal(found[1], 0)
    # others in their place, as of slots after a load
    doubled = {n: (f._replace(b=2 * f.b),) for n, (f,) in modules.items()}
    serving.set_modules(model, doubled)
    np.testing.assert_allclose((model(x) - plain)[0], 2 * x[0] @ wanted, atol=1e-4)
    with pytest.raises(hydra.HydraOptError, match=rf"layer\.{present[0]}: no such module"):
        serving.set_modules(model, {})
    wide = {n: (f._replace(b=f.b[:, :, :6]),) for n, (f,) in modules.items()}
    with pytest.raises(hydra.HydraOptError, match=r"layer of 2 modules has .* = \[12, 16\], .* \[12, 6\]"):
        serving.wrap(Shared(nnx.Rngs(0)), wide, rename=rename)
    with pytest.raises(hydra.HydraOptError, match=r"other: the model has no such layer"):
        serving.wrap(Shared(nnx.Rngs(0)), modules | {"other": wide[f"layer.{present[0]}"]}, rename=rename)


class Tied(nnx.Module):
    """One layer under two attributes."""

    def __init__(self, rngs):
        self.first = nnx.Linear(12, 6, rngs=rngs)
        self.second = self.first

    def __call__(self, x):
        return self.first(x), self.second(x)


def test_a_shared_layer_is_served_under_each_of_its_attributes(kept):
    modules = serving.load(kept, dtype=jnp.float32)
    modules = {"first": modules["layers.0"], "second": modules["layers.1"]}
    model, x = Tied(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 12))
    plain = model(x)
    assert sorted(serving.wrap(model, modules)) == ["first", "second"]
    serving.set_task_ids(model, 2)
    for name, y, before in zip(("layers.0", "layers.1"), model(x), plain, strict=True):
        a, b = task_factors(kept, "sports")[name]
        np.testing.assert_allclose(y - before, x @ a @ b, atol=1e-4)


@pytest.mark.parametrize("patterns", [None, ["*"], ["layers.*"], "layers.0"])
def test_a_layer_is_wrapped_once(kept, patterns):
    model = Small(nnx.Rngs(0))
    modules = serving.load(kept, dtype=jnp.float32)
    assert serving.wrap(model, modules, "layers.0") == ["layers.0"]
    wrapped = model.layers[0]
    with pytest.raises(hydra.HydraOptError, match=r"layers\.0: already serves a store: set_modules gives it"):
        serving.wrap(model, modules, patterns)
    assert model.layers[0] is wrapped
    assert isinstance(model.layers[1], nnx.Linear)
    assert serving.wrap(model, modules, ["layers.1", "attention.*"]) == [
        "attention.out",
        "attention.query",
        "layers.1",
    ]
    serving.set_task_ids(model, 1)
    x = jax.random.normal(jax.random.key(0), (2, 5, 12))
    np.testing.assert_allclose(run(model, x), run(merged(kept, "medical"), x), atol=1e-4)


def test_none_is_the_base_model(kept):
    np.testing.assert_array_equal(serving.task_ids(kept, [None, "sports"]), [-1, 2])
    np.testing.assert_array_equal(serving.task_ids(["sports"], ["sports", None]), [0, -1])


def test_bad_wrapping_is_named(kept):
    modules = serving.load(kept, dtype=jnp.float32)
    with pytest.raises(
        hydra.HydraOptError, match=r"pattern 'layer\.\*' matches no layer: near paths are 'layers"
    ):
        serving.wrap(Small(nnx.Rngs(0)), modules, ["layers.*", "layer.*"])
    with pytest.raises(
        hydra.HydraOptError, match="pattern 'head' matches only layers the store has no module for"
    ):
        serving.wrap(Small(nnx.Rngs(0)), modules, ["head"])
    with pytest.raises(hydra.HydraOptError, match=r"layers\.9: the model has no such .*'layers\.0'"):
        serving.wrap(Small(nnx.Rngs(0)), modules | {"layers.9": modules["layers.0"]})
    with pytest.raises(hydra.HydraOptError, match=r"layers\.1: the model's layer .* \[12, 6\], .* \[12, 8\]"):
        serving.wrap(Small(nnx.Rngs(0)), modules | {"layers.1": modules["attention.query"]})
    model = Small(nnx.Rngs(0))
    model.layers[0] = nnx.Einsum("BTD,TDH->BTH", (3, 12, 6), rngs=nnx.Rngs(0))
    with pytest.raises(hydra.HydraOptError, match=r"layers\.0: einsum .* not a single matrix"):
        serving.wrap(model, modules)
    with pytest.raises(hydra.HydraOptError, match=r"call serving\.wrap first"):
        serving.set_task_ids(Small(nnx.Rngs(0)), 0)
    with pytest.raises(hydra.HydraOptError, match="no task 'legl' in the store: did you mean 'legal'"):
        serving.task_ids(kept, ["legl"])
    for act, given in ((serving.task_ids, [0]), (hydra.decode, 0)):
        with pytest.raises(hydra.HydraOptError, match="no task 0 in the store: did you mean 'legal'"):
            act(kept, given)
    layer, rename = nnx.Linear(12, 6, rngs=nnx.Rngs(0)), lambda _: "layers.0"
    with pytest.raises(hydra.HydraOptError, match="the model is itself a layer: wrap a module that has it"):
        serving.wrap(layer, modules, ["*"], rename=rename)
