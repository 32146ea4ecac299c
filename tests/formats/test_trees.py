"""LoRA factors in the parameter trees of JAX libraries, on their documented layouts."""

import gc
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import hydraopt_jax as hydra
from hydraopt_jax import formats, synthetic
from hydraopt_jax.formats import trees
from hydraopt_jax.store import folder

RNG = np.random.default_rng(0)


def draw(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


# dialect, tree, module -> shape of its kernel's delta, what to read it with
LAYOUTS = {
    "flax_nnx": (
        "flax_nnx",
        {
            "layers": {
                0: {"q": {"kernel": draw(6, 4), "lora": {"lora_a": draw(6, 2), "lora_b": draw(2, 4)}}},
                1: {"q": {"lora_a": draw(6, 2), "lora_b": draw(2, 4), "base_module": {"kernel": draw(6, 4)}}},
            }
        },
        {"layers.0.q": (6, 4), "layers.1.q": (6, 4)},
        {},
    ),
    "flax_nnx under vmap": (
        "flax_nnx",
        {"blocks": {"q": {"lora": {"lora_a": draw(3, 6, 2), "lora_b": draw(3, 2, 4)}}}},
        {f"blocks.q[{n}]": (6, 4) for n in range(3)},
        {"stack": 0},
    ),
    "qwix": (
        "qwix",
        {
            "params": {
                "dense": {"kernel": draw(6, 4), "kernel_lora_a": draw(6, 2), "kernel_lora_b": draw(2, 4)},
                "q": {"w": draw(2, 6, 4), "w_lora_a": draw(6, 3), "w_lora_b": draw(3, 2, 4)},
                "out": {"w_lora_a": draw(2, 4, 3), "w_lora_b": draw(3, 6)},
            }
        },
        {"dense": (6, 4), "q.w": (6, 2, 4), "out.w": (2, 4, 6)},
        {},
    ),
    "qwix experts": (
        "qwix",
        {"experts": {"kernel_lora_a": draw(4, 6, 2), "kernel_lora_b": draw(4, 2, 5)}},
        {f"experts[{n}]": (6, 5) for n in range(4)},
        {"stack": 0},
    ),
    "qwix einsum with extra axes on both sides": (
        "qwix",
        {"both": {"w_lora_a": draw(2, 4, 3), "w_lora_b": draw(3, 5, 6)}},
        {"both.w": (2, 4, 5, 6)},
        {"stack": None},
    ),
    "gemma": (
        "gemma",
        {
            "layer_0": {
                "attn": {
                    "q_einsum": {"w": draw(2, 6, 4), "lora": {"a": draw(6, 3), "b": draw(3, 2, 4)}},
                    "attn_vec_einsum": {"lora": {"a": draw(2, 4, 3), "b": draw(3, 6)}},
                }
            }
        },
        {"layer_0.attn.q_einsum": (6, 2, 4), "layer_0.attn.attn_vec_einsum": (2, 4, 6)},
        {},
    ),
    "MaxText": (
        "maxtext",
        {
            "decoder": {
                "layers": {
                    "self_attention": {
                        "query": {"lora_a.kernel": draw(6, 3, 2), "lora_b.kernel": draw(2, 3, 2, 4)},
                        "out": {"lora_a.kernel": draw(2, 3, 4, 2), "lora_b.kernel": draw(2, 3, 6)},
                        "key": {"kernel": None},
                    }
                },
                "decoder_norm": {"scale": None},
            }
        },
        {f"decoder.layers.self_attention.query[{n}]": (6, 2, 4) for n in range(3)}
        | {f"decoder.layers.self_attention.out[{n}]": (2, 4, 6) for n in range(3)},
        {"stack": 1},
    ),
    "MaxText through qwix": (
        "maxtext",
        {
            "decoder": {
                "layers_0": {"mlp": {"wi_0": {"kernel_lora_a": draw(6, 2), "kernel_lora_b": draw(2, 8)}}}
            }
        },
        {"decoder.layers_0.mlp.wi_0": (6, 8)},
        {},
    ),
    "EasyDeL": (
        "easydel",
        {"model": {"layers": {0: {"self_attn": {"q_proj": {"lora_a": draw(6, 2), "lora_b": draw(2, 4)}}}}}},
        {"model.layers.0.self_attn.q_proj": (6, 4)},
        {},
    ),
    "EasyDeL, flat": (
        "easydel",
        {"model.layers.0.q_proj.lora_a": draw(6, 2), "model.layers.0.q_proj.lora_b": draw(2, 4)},
        {"model.layers.0.q_proj": (6, 4)},
        {},
    ),
    "Keras": (
        "keras",
        {
            "block/query/lora_kernel_a": draw(6, 2),
            "block/query/lora_kernel_b": draw(2, 4),
            "tokens/lora_embeddings_a": draw(9, 2),
            "tokens/lora_embeddings_b": draw(2, 6),
            "block/query/kernel": draw(6, 4),
        },
        {"block.query": (6, 4), "tokens": (9, 6)},
        {},
    ),
    "levanter": (
        "levanter",
        {
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": draw(2, 6),
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": draw(4, 2),
        },
        {"model.layers.0.self_attn.q_proj": (6, 4)},
        {},
    ),
}


def product(low, high):
    return np.tensordot(low, high, 1)


def expected(dialect, tree, module):
    """The delta of a module, straight from its two arrays."""
    name, _, index = module.removesuffix("]").partition("[")
    weight = {"q.w": "q", "out.w": "out", "both.w": "both"}
    key = weight.get(name, name).replace(".", "/")
    found = {}
    for path, leaf in trees.flatten(tree):
        where = trees.path_text(path)
        if trees.is_factor(path) and f"/{key}/" in f"/{where.replace('.lora', '/lora').replace('.', '/')}/":
            found[where.lower().rstrip("/")] = leaf
    low, high = (
        found[k] for k in sorted(found, key=lambda k: k.replace(".kernel", "").replace(".weight", "")[-1])
    )
    axis = {"MaxText": 1}.get(dialect, 0)
    both = (low, high) if not index else (x.take(int(index), axis) for x in (low, high))
    return product(*both) if dialect != "levanter" else product(low.T, high.T)


def text_keys(tree):
    return {str(k): text_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def leaves(tree):
    return {trees.path_text(path): leaf for path, leaf in trees.flatten(tree) if trees.is_factor(path)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_comes_in_and_goes_out(name):
    dialect, tree, modules, options = LAYOUTS[name]
    adapter = formats.read_tree(tree, dialect, task="one", scale=0.25, **options)
    assert set(adapter.a) == set(modules)
    for module, shape in modules.items():
        delta = (adapter.a[module] @ adapter.b[module]).reshape(shape)
        np.testing.assert_allclose(delta, 0.25 * expected(name, tree, module), rtol=1e-5, atol=1e-6)
    stored = adapter.replace(layout=json.loads(json.dumps(adapter.layout)))
    again = leaves(formats.write_tree(stored, dialect, scale=0.25))
    want = leaves(tree)
    assert set(again) == set(want)
    for key, value in want.items():
        np.testing.assert_array_equal(again[key], value)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_goes_through_orbax(name, tmp_path):
    dialect, tree, modules, options = LAYOUTS[name]
    # Orbax's keys are text
    ocp.save(tmp_path / "in", jax.tree.map(np.asarray, text_keys(tree)))
    adapter = formats.read_checkpoint(tmp_path / "in", dialect, scale=0.25, **options)
    assert set(adapter.a) == set(modules)
    formats.write_checkpoint(tmp_path / "out", adapter, dialect, scale=0.25)
    again, want = leaves(ocp.load(tmp_path / "out")), leaves(text_keys(tree))
    assert set(again) == set(want)
    for key, value in want.items():
        np.testing.assert_array_equal(again[key], value)


@pytest.mark.parametrize("dialect", formats.DIALECTS)
def test_a_peft_adapter_goes_where_the_library_keeps_it(dialect, small):
    tree = formats.write_tree(small[0], dialect, scale=2.0, rank=6)
    back = formats.read_tree(tree, dialect, task="back", scale=2.0)
    assert set(back.a) == set(small[0].a)
    for name, a in small[0].a.items():
        assert back.a[name].shape == (a.shape[0], 6)
        np.testing.assert_allclose(back.a[name] @ back.b[name], a @ small[0].b[name], atol=1e-5)


@pytest.mark.parametrize("dialect", formats.DIALECTS)
def test_the_scale_is_asked_for(dialect, small):
    tree = formats.write_tree(small[0], dialect, scale=1.0)
    with pytest.raises(
        hydra.HydraOptError, match=f"stores no scale .*give scale .{formats.DIALECTS[dialect].scale[:9]}"
    ):
        formats.read_tree(tree, dialect, task="one")
    with pytest.raises(hydra.HydraOptError, match="stores no scale"):
        formats.write_tree(small[0], dialect)


def test_scales_by_module():
    tree = LAYOUTS["qwix"][1]
    adapter = formats.read_tree(tree, "qwix", task="one", scale={"dense": 2.0, "q.w": 1.0, "out.w": 0.5})
    plain = formats.read_tree(tree, "qwix", task="one", scale=1.0)
    np.testing.assert_array_equal(adapter.b["out.w"], 0.5 * plain.b["out.w"])
    with pytest.raises(hydra.HydraOptError, match=r"scale of q\.w is None"):
        formats.read_tree(tree, "qwix", task="one", scale={"dense": 2.0})


@pytest.mark.parametrize(
    ("dialect", "tree", "options", "named"),
    [
        ("qwix", {"q": {"kernel_lora_a": draw(2, 3)}}, {}, "q/kernel_lora_a has no lora_b beside it"),
        ("qwix", {"q": {"kernel": draw(2, 3)}}, {}, "holds no LoRA factor as qwix names them"),
        ("gemma", {"q": {"lora": {"c": draw(2, 3)}}}, {}, "q/lora/c is no LoRA factor as gemma.peft"),
        ("flax", {}, {}, "dialect 'flax': must be one of flax_nnx, qwix"),
        ("qwix", {"q": {"kernel_lora_a": draw(5, 3), "kernel_lora_b": draw(2, 4)}}, {}, "must share a rank"),
        (
            "maxtext",
            {"q": {"lora_a.kernel": draw(6, 3, 2), "lora_b.kernel": draw(2, 3, 4)}},
            {},
            "both factors of q have extra axes, .* give stack=AXIS .* stack=None",
        ),
        (
            "maxtext",
            {"q": {"lora_a.kernel": draw(6, 3, 2), "lora_b.kernel": draw(2, 5, 4)}},
            {"stack": 1},
            "stack = 1: the factors of q, .* differ there",
        ),
        ("easydel", {"q": {"lora_a": draw(5, 3).astype(int), "lora_b": draw(3, 4)}}, {}, "q/lora_a is int64"),
        (
            "easydel",
            {"opt_state": {"mu": {"q": {"lora_a": draw(5, 3), "lora_b": draw(3, 4)}}}},
            {},
            "is an optimizer's: read the parameters alone",
        ),
    ],
)
def test_bad_trees_are_named(dialect, tree, options, named):
    with pytest.raises(hydra.HydraOptError, match=named):
        formats.read_tree(tree, dialect, task="one", scale=1.0, **options)


def test_what_a_tree_cannot_hold_is_named(small):
    one = small[0]
    first = next(iter(one.a))
    for changed, options, named in (
        (one.replace(extras={"score.weight": draw(2, 2)}), {}, r"score\.weight: a LoRA tree holds no full"),
        (one.replace(layout={first: {"kind": "convolution"}}), {}, "convolution's factors have no place"),
        (one, {"rank": 2}, "rank = 2: its factors have rank 4"),
        (one, {"dtype": "int8"}, "dtype 'int8': choose one of"),
        (one.replace(b={n: 1e9 * x for n, x in one.b.items()}), {"dtype": "float16"}, "overflow float16"),
    ):
        with pytest.raises(hydra.HydraOptError, match=named):
            formats.write_tree(changed, "qwix", scale=1.0, **options)


def test_layers_of_other_ranks_are_stacked_with_zeros():
    dialect, tree, _, options = LAYOUTS["MaxText"]
    adapter = formats.read_tree(tree, dialect, task="one", scale=1.0, **options)
    name = "decoder.layers.self_attention.query[1]"
    less = adapter.replace(
        a={n: a[:, :1] if n == name else a for n, a in adapter.a.items() if not n.endswith("query[2]")},
        b={n: b[:1] if n == name else b for n, b in adapter.b.items() if not n.endswith("query[2]")},
    )
    out = formats.write_tree(less, dialect, scale=1.0)["decoder"]["layers"]["self_attention"]["query"]
    a, b = out["lora_a.kernel"], out["lora_b.kernel"]
    assert (a.shape, b.shape) == ((6, 3, 2), (2, 3, 2, 4))
    assert not a[:, 2].any()
    np.testing.assert_allclose(
        product(a[:, 1], b[:, 1]).reshape(6, -1), less.a[name] @ less.b[name], rtol=1e-5
    )


def test_an_orbax_tree_becomes_a_peft_folder(tmp_path, monkeypatch):
    ocp.save(tmp_path / "tree", {"attn": LAYOUTS["gemma"][1]["layer_0"]["attn"]})
    monkeypatch.chdir(tmp_path / "tree")
    adapter = formats.read_checkpoint(".", "gemma", scale=1.0)
    assert adapter.task == "tree"
    formats.write_adapter(tmp_path / "peft", adapter)
    back = formats.read_adapter(tmp_path / "peft")
    for name, a in adapter.a.items():
        np.testing.assert_allclose(back.a[name] @ back.b[name], a @ adapter.b[name], rtol=1e-6)


@pytest.mark.parametrize(
    "write",
    [
        lambda at, store, adapter: formats.write_checkpoint(at, adapter, "qwix", scale=1.0),
        lambda at, store, adapter: folder.write_segment(at, store.segments[0]),
    ],
    ids=["checkpoint", "segment"],
)
def test_nothing_waits_for_a_place_that_cannot_be_written(write, small, tmp_path):
    """Orbax's threads would keep the process for minutes after the error."""
    (tmp_path / "file").write_text("x")
    store = hydra.compress(small[:2], form=hydra.forms.Hydra(heads=1))
    before = set(threading.enumerate())
    with pytest.raises((hydra.HydraOptError, OSError), match=r"^[^\n]*Not a directory[^\n]*$"):
        write(tmp_path / "file" / "x", store, small[0])
    # idle ones of an event loop end with it
    gc.collect()
    for x in set(threading.enumerate()) - before:
        x.join(3)
    assert set(threading.enumerate()) <= before
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_layouts_survive_a_store(tmp_path):
    modules = {"layers.0.q": (6, 8)}
    adapters = []
    for one in synthetic.collection(0, tasks=2, modules=modules, rank=2, dtype="float32"):
        tree = {
            "layers_0": {
                "q": {"w_lora_a": one.a["layers.0.q"], "w_lora_b": one.b["layers.0.q"].reshape(2, 2, 4)},
            }
        }
        adapters.append(formats.read_tree(tree, "qwix", task=one.task, scale=2.0))
    hydra.save(tmp_path / "store", hydra.compress(adapters, form=hydra.forms.Hydra(rank=4, side="in")))
    kept = hydra.open(tmp_path / "store")
    for n, one in enumerate(adapters):
        out = formats.write_tree(hydra.decode(kept, one.task), "qwix", scale=2.0)["layers_0"]["q"]
        assert out["w_lora_b"].shape[1:] == (2, 4)
        delta = 2.0 * product(out["w_lora_a"], out["w_lora_b"]).reshape(6, 8)
        np.testing.assert_allclose(
            delta, adapters[n].a["layers_0.q.w"] @ adapters[n].b["layers_0.q.w"], atol=1e-5
        )


def test_arrays_of_jax_are_read(small):
    tree = jax.tree.map(jnp.asarray, formats.write_tree(small[0], "qwix", scale=1.0))
    back = formats.read_tree(tree, "qwix", task="one", scale=1.0)
    assert set(back.a) == set(small[0].a)
