"""Adapters of Llama, Qwen and Gemma between PEFT, Tunix, MaxText and gemma, on layouts that models of these
libraries had (`trainer_layouts.json`; google-tunix 0.1.7, qwix 0.1.8, MaxText 0.2.5, gemma 3.3.0)."""

import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import trainers
from commands import run

import hydraopt_jax as hydra
from hydraopt_jax import formats
from hydraopt_jax.formats import families, model_maps

RECORDED = json.loads((Path(__file__).parent / "trainer_layouts.json").read_text())
TABLES = [
    (family, library, scan)
    for family, tables in families.FAMILIES.items()
    for library, table in tables.items()
    for scan in ([False, True] if table.scanned else [False])
]
DIM = trainers.HEAD_DIM


def layers_of(recorded):
    """Count of layers of the model that was recorded."""
    return {"gemma2 maxtext scan": 4, "gemma3 maxtext scan": 8}.get(recorded, 2)


@pytest.mark.parametrize("recorded", RECORDED)
def test_names_and_shapes_are_those_of_the_librarys_own_model(recorded):
    family, library, *more = recorded.split()
    one = trainers.adapter(layers_of(recorded), kv_heads=4 if "fused" in more else 2)
    one = trainers.known(one, family, library)
    out = formats.to_library(one, family, library, head_dim=DIM, scan="scan" in more)
    dialect = families.LIBRARIES[library].dialect
    found = trainers.shapes(formats.write_tree(out, dialect, scale=1.0))
    # what shares a parameter has the ranks of all
    ranks = {"kv": 6, "qkv": 9, "gating": 6}
    for path, shape in RECORDED[recorded].items():
        rank = next((r for part, r in ranks.items() if f"/{part}_" in path or f"_{part}_" in path), 3)
        axis = 0 if path.endswith("b") else -1
        assert shape[axis] == 3
        shape[axis] = rank
        assert found[path] == shape, path
    indices = r"(layers[_/]|layer_)[1-9]\d*/"
    assert {p for p in found if not re.search(indices, p)} == set(RECORDED[recorded])


@pytest.mark.parametrize(("family", "library", "scan"), TABLES)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_family_goes_there_and_back(family, library, scan, kv_heads):
    one = trainers.known(trainers.adapter(8, kv_heads), family, library)
    dialect = families.LIBRARIES[library].dialect
    out = formats.to_library(one, family, library, head_dim=DIM, scan=scan)
    tree = formats.write_tree(out, dialect, scale=2.0, rank=12)
    read = formats.read_tree(tree, dialect, task="one", scale=2.0, stack=1)
    back = formats.from_library(read, family, library, head_dim=DIM)
    trainers.check_same(back, one)
    for name, b in back.b.items():
        used = b.any(axis=1)
        np.testing.assert_allclose(b[used], one.b[name], rtol=1e-5)
        np.testing.assert_array_equal(back.a[name][:, used], one.a[name])


def test_modules_with_one_input_side_share_it():
    one = trainers.adapter()
    a = dict(one.a) | {"model.layers.0.self_attn.v_proj": one.a["model.layers.0.self_attn.k_proj"]}
    out = formats.to_library(one.replace(a=a), "gemma3", "tunix", head_dim=DIM)
    assert out.a["layers.0.attn.kv_einsum.w"].shape[1] == 3
    assert out.a["layers.1.attn.kv_einsum.w"].shape[1] == 6
    trainers.check_same(formats.from_library(out, "gemma3", "tunix"), one.replace(a=a))


def renamed(one, *names):
    """An adapter whose modules are the first query projection under other names."""
    own = "model.layers.0.self_attn.q_proj"
    return one.replace(a=dict.fromkeys(names, one.a[own]), b=dict.fromkeys(names, one.b[own]))


@pytest.mark.parametrize(
    ("places", "named"),
    [
        (("model.encoder.layers", "model.decoder.layers"), r"model\.encoder.* and model\.decoder"),
        (("vision_tower.encoder.layers", "language_model.model.layers"), "vision.* and language_model"),
        (("model.layers", "layers"), r"are one parameter of tunix: leave one"),
        (("model.vision_tower.vision_model.encoder.layers",), "is not named as a layer of a language model"),
        (("audio_tower.layers",), r"give prefix .--prefix audio_tower\.layers"),
        (("model.visual.0.layers",), "is not named"),
    ],
)
def test_modules_of_another_tower_are_refused(places, named):
    one = renamed(trainers.adapter(1), *(f"{x}.0.self_attn.q_proj" for x in places))
    with pytest.raises(hydra.HydraOptError, match=named):
        formats.to_library(one, "llama", "tunix", head_dim=DIM)


@pytest.mark.parametrize(
    ("place", "prefix"),
    [
        ("layers", None),
        ("model.language_model.layers", None),
        ("language_model.model.layers", None),
        ("model.text_model.layers", None),
        ("thinker.model.layers", "thinker.model.layers"),
    ],
)
def test_a_language_model_inside_another_is_converted(place, prefix):
    one = renamed(trainers.adapter(1), f"{place}.0.self_attn.q_proj")
    out = formats.to_library(one, "llama", "tunix", head_dim=DIM, prefix=prefix)
    assert set(out.a) == {"layers.0.attn.q_proj.w"}
    with pytest.raises(hydra.HydraOptError, match=r"is not named as a layer of a language model .other"):
        formats.to_library(one, "llama", "tunix", head_dim=DIM, prefix="other.layers")


def only(one, *kept):
    """The modules of some names of an adapter."""
    names = [x for x in one.a if x.endswith(kept)]
    return one.replace(a={x: one.a[x] for x in names}, b={x: one.b[x] for x in names})


@pytest.mark.parametrize("library", ["tunix", "gemma"])
@pytest.mark.parametrize(
    "kept", [("q_proj",), ("k_proj", "v_proj"), ("0.self_attn.q_proj", "1.self_attn.k_proj")]
)
def test_what_shapes_do_not_say_of_a_fused_parameter_is_asked_for(library, kept):
    one = only(trainers.adapter(2, kv_heads=4), *kept, "o_proj")
    with pytest.raises(hydra.HydraOptError, match=r"_proj: without queries and keys .*--fused .*--no-fused"):
        formats.to_library(one, "gemma", library, head_dim=DIM)
    for fused in (True, False):
        out = formats.to_library(one, "gemma", library, head_dim=DIM, fused=fused)
        assert any("qkv_einsum" in x for x in out.a) is fused
        assert any(".q_einsum" in x or ".kv_einsum" in x for x in out.a) is not fused


def test_one_layer_with_queries_and_keys_says_it_for_all():
    one = only(trainers.adapter(2, kv_heads=4), "q_proj", "0.self_attn.v_proj")
    out = formats.to_library(one, "gemma", "tunix", head_dim=DIM)
    assert set(out.a) == {"layers.0.attn.qkv_einsum.w", "layers.1.attn.qkv_einsum.w"}
    few = only(one, "o_proj", "mlp.up_proj", "0.self_attn.q_proj", "0.self_attn.v_proj")
    assert not any("q_einsum" in x for x in formats.to_library(few, "gemma", "tunix", head_dim=DIM).a)
    with pytest.raises(hydra.HydraOptError, match="has no parameter that queries, keys and values share"):
        formats.to_library(one, "qwen", "tunix", head_dim=DIM, fused=True)


def test_maxtexts_llama_has_rotary_pairs_beside_each_other_and_scaled_queries():
    one = trainers.adapter(1)
    out = formats.to_library(one, "llama", "maxtext", head_dim=DIM)
    q, k = (one.b[f"model.layers.0.self_attn.{x}_proj"].reshape(3, -1, 2, DIM // 2) for x in "qk")
    pairs = out.b["decoder.layers_0.self_attention.query"].reshape(3, -1, DIM // 2, 2)
    np.testing.assert_allclose(pairs[..., 1] * np.sqrt(DIM), q[:, :, 1], rtol=1e-6)
    pairs = out.b["decoder.layers_0.self_attention.key"].reshape(3, -1, DIM // 2, 2)
    np.testing.assert_array_equal(pairs[..., 0], k[:, :, 0])


@pytest.mark.parametrize(("family", "library", "scan"), TABLES)
def test_a_checkpoint_goes_there_and_back(family, library, scan, tmp_path):
    one = trainers.known(trainers.adapter(2 if family == "gemma2" or not scan else 7), family, library)
    options = {"head_dim": DIM, "scan": scan, "scale": 1.0 if library == "gemma" else 4.0}
    rank = formats.write_trained(tmp_path / "run", one, family, library, step=30, **options)
    formats.write_trained(tmp_path / "run", one, family, library, step=4, overwrite=True, **options)
    assert rank == (3 if library == "maxtext" else {"llama": 3, "qwen": 3}.get(family, 6))
    found = formats.read_trained(tmp_path / "run", family)
    trainers.check_same(found, one)
    assert (found.task, len(found.digest)) == ("run", 64)
    (tmp_path / "legal").symlink_to(tmp_path / "run")
    assert formats.read_trained(tmp_path / "legal", family).task == "legal"


def test_one_verb_from_peft_to_a_checkpoint_and_back(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = trainers.adapter()
    formats.write_adapter("peft", one)
    options = ["--family", "qwen", "--head-dim", DIM, "--scale", 2, "--json"]
    status, said, _ = run(capsys, "convert", "peft", "run", "--to", "tunix", *options)
    assert (status, json.loads(said)["rank"], json.loads(said)["alpha"]) == (0, 3, 6.0)
    assert json.loads(said)["modules"] == len(formats.read_trained("run", "qwen").a)
    schemas = json.loads((Path(__file__).parents[2] / "docs" / "schemas.json").read_text())
    jsonschema.Draft202012Validator({**schemas, "$ref": "#/$defs/convert"}).validate(json.loads(said))
    assert (Path("run") / "0" / "model_params").is_dir()
    assert run(capsys, "convert", "run", "back", "--family", "qwen", "--base", "org/base")[0] == 0
    back = formats.read_adapter("back")
    assert formats.base_name(back.config) == "org/base"
    trainers.check_same(back, one)
    # as it came, where it is not given
    named = {"base_model_name_or_path": "org/first", "task_type": "SEQ_CLS"}
    formats.write_adapter("named", one.replace(config=named))
    assert run(capsys, "convert", "named", "kept", "--to", "tunix", *options)[0] == 0
    assert run(capsys, "convert", "kept", "again", "--family", "qwen", "--to", "maxtext")[0] == 0
    status, said, _ = run(capsys, "convert", "again", "kept-back", "--family", "qwen")
    assert (status, "--base" in said) == (0, False)
    assert named.items() <= formats.read_adapter("kept-back").config.items()
    status, said, _ = run(capsys, "convert", "run", "nameless", "--family", "qwen")
    assert "The base model's name is not in the checkpoint: --base NAME writes it." in said
    assert formats.read_adapter("nameless").config["task_type"] == "CAUSAL_LM"
    # from one library to another
    assert run(capsys, "convert", "run", "other", "--family", "qwen", "--to", "maxtext", "--scan")[0] == 0
    trainers.check_same(formats.read_trained("other", "qwen", "maxtext"), one)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ("peft", "out", "--family", "qwen", "--to", "tunix"),
            "its outputs are split into heads: give head_dim .--head-dim",
        ),
        (
            ("peft", "out", "--family", "qwen", "--to", "tunix", "--head-dim", 7),
            "are not a multiple of that size",
        ),
        (
            ("peft", "out", "--family", "qwen", "--to", "gemma"),
            "no table of family 'qwen': .* tunix, maxtext",
        ),
        (("peft", "out", "--family", "qwen"), "is a PEFT folder already: give --to tunix"),
        (
            ("odd", "out", "--family", "qwen", "--to", "tunix", "--head-dim", DIM),
            "q_prj: .*near: 'self_attn.q_",
        ),
        (("none", "out", "--family", "qwen"), "none: no such folder"),
        (("run", "out", "--family", "gemma", "--from", "tunix"), "no LoRA layer of tunix's 'gemma' .near: "),
        (("run", "peft", "--family", "qwen"), "peft: exists"),
        (
            ("towers", "out", "--family", "llama", "--to", "tunix", "--head-dim", DIM),
            "coder.* and model.*coder.*: are one parameter of tunix",
        ),
        (
            ("query", "out", "--family", "gemma", "--to", "tunix", "--head-dim", DIM),
            "q_proj: without queries and keys",
        ),
        (
            ("head", "out", "--family", "qwen", "--to", "tunix", "--head-dim", DIM),
            "score.weight: a LoRA tree holds no full tensors: keep them apart and give the adapter",
        ),
        (
            ("run", "out", "--family", "qwen", "--scale", "1e-300"),
            "--scale 1e-300: is not a number that float32",
        ),
        (
            ("peft", "out", "--family", "qwen", "--to", "tunix", "--head-dim", DIM, "--layers", 2),
            "--layers: used with --scan only",
        ),
        (("run", "out", "--family", "qwen", "--no-fused"), "--fused: --to peft does not use it"),
        (
            ("peft", "out", "--family", "qwen", "--to", "tunix", "--prefix", "x.layers", "--head-dim", DIM),
            "is not named as a layer of a language model .x.layers",
        ),
        (("bare", "out", "--family", "qwen"), "stores no scale .*give scale"),
    ],
)
def test_what_does_not_convert_is_named_in_one_line(arguments, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = trainers.adapter(1)
    formats.write_adapter("peft", one)
    odd = {f"{name[:-5]}_prj" if "q_proj" in name else name: name for name in one.a}
    formats.write_adapter(
        "odd", one.replace(a={k: one.a[v] for k, v in odd.items()}, b={k: one.b[v] for k, v in odd.items()})
    )
    towers = [f"model.{x}.layers.0.self_attn.q_proj" for x in ("encoder", "decoder")]
    formats.write_adapter("towers", renamed(one, *towers))
    formats.write_adapter("query", only(one, "q_proj"))
    head = {"base_model.model.score.weight": np.ones((2, 4), np.float32)}
    formats.write_adapter("head", one.replace(extras=head))
    formats.write_trained("run", one, "qwen", "tunix", head_dim=DIM)
    formats.write_checkpoint(
        "bare", model_maps.to_library(one, "qwen", "tunix", head_dim=DIM), "qwix", scale=1
    )
    status, _, said = run(capsys, "convert", *arguments)
    assert (status, said.count("\n")) == (2, 1)
    assert re.search(named, said), said
    assert not Path("out").exists()


def test_a_template_gives_names_shapes_and_ranks():
    one = trainers.adapter(1)
    like = {"blocks": {"q": {"w_lora_a": np.zeros((16, 5)), "w_lora_b": np.zeros((5, 2, 16), np.float16)}}}
    like["blocks"]["k"] = {"w_lora_a": np.zeros((16, 4)), "w_lora_b": np.zeros((4, 16))}
    own = {f"blocks.{x}.w": f"model.layers.0.self_attn.{x}_proj" for x in "qk"}
    few = one.replace(
        a={own["blocks.q.w"]: one.a[own["blocks.q.w"]]}, b={own["blocks.q.w"]: one.b[own["blocks.q.w"]]}
    )
    tree = formats.write_tree(few, "qwix", scale=1.0, like=like, rename=own.get)
    assert trainers.shapes(tree) == trainers.shapes(like)
    assert not tree["blocks"]["k"]["w_lora_b"].any()
    q = tree["blocks"]["q"]
    delta = np.tensordot(q["w_lora_a"], q["w_lora_b"], 1).reshape(16, 32)
    np.testing.assert_allclose(delta, few.a[own["blocks.q.w"]] @ few.b[own["blocks.q.w"]], atol=1e-5)
    for changed, named in (
        (one, "model has no LoRA layer there .near: "),
        (trainers.adapter(1, rank=6), "no LoRA layer|has rank"),
    ):
        with pytest.raises(hydra.HydraOptError, match=named):
            formats.write_tree(changed, "qwix", scale=1.0, like=like, rename=own.get)
