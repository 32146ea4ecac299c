"""Reading and writing PEFT folders, with NumPy only."""

import hashlib
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from peft_folders import CONFIG, PREFIX, adapter, delta, folder, linear, values
from safetensors.numpy import load_file

from hydraopt_jax.formats import read_adapter, write_adapter
from hydraopt_jax.formats.peft_config import module_rank, module_scale, unit_scale_config

SHARED = Path(__file__).parents[2].parent / "shared" / "adapters"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_factors_are_transposed_and_scaled(tmp_path, dtype):
    tensors = linear(dtype=dtype)
    path = folder(tmp_path / "legal", tensors)
    got = read_adapter(path)
    wide = np.promote_types(dtype, np.float32)
    low, high = (x.astype(wide) for x in tensors.values())
    assert got.task == "legal"
    assert got.dtype == np.dtype(dtype).name
    assert got.a["layers.0.q"].shape == (5, 2)
    assert got.b["layers.0.q"].dtype == wide
    np.testing.assert_array_equal(got.a["layers.0.q"].astype(wide), low.T)
    np.testing.assert_array_equal(got.b["layers.0.q"], 3 * high.T)
    assert got.digest == hashlib.sha256((path / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert got.source == str(path)
    assert got.config == CONFIG
    assert not got.layout
    assert read_adapter(path, task="a/b").task == "a/b"


def test_mixed_dtypes_are_recorded_as_float32(tmp_path):
    tensors = linear("q", dtype=np.float16) | linear("v", dtype=ml_dtypes.bfloat16)
    assert read_adapter(folder(tmp_path, tensors)).dtype == "float32"


@pytest.mark.parametrize(
    ("fields", "module", "rank", "scale"),
    [
        ({}, "layers.1.q", 2, 3),
        ({"use_rslora": True}, "layers.1.q", 2, 6 / math.sqrt(2)),
        ({"rank_pattern": {"q": 4}}, "layers.1.q", 4, 6 / 4),
        ({"rank_pattern": {"q": 4}}, "layers.1.seq", 2, 3),
        ({"rank_pattern": {"q": 4}, "use_rslora": True}, "layers.1.q", 4, 3),
        ({"alpha_pattern": {"layers.1.q": 1}}, "layers.1.q", 2, 0.5),
        ({"alpha_pattern": {"layers.1.q": 1}}, "layers.11.q", 2, 3),
        ({"alpha_pattern": {"layers.1.q": 1}}, "model.layers.1.q", 2, 0.5),
        ({"alpha_pattern": {"^layers.1.q": 1}}, "model.layers.1.q", 2, 3),
        ({"alpha_pattern": {r"layers\.\d\.q": 4, "q": 8}}, "layers.1.q", 2, 2),
        ({"alpha_pattern": {"q": 8, r"layers\.\d\.q": 4}}, "layers.1.q", 2, 4),
        ({"alpha_pattern": {"q": 0.5}, "rank_pattern": {"v": 7}}, "q", 2, 0.25),
        ({"alpha_pattern": None, "rank_pattern": None}, "q", 2, 3),
    ],
)
def test_scale(tmp_path, fields, module, rank, scale):
    tensors = linear(module, rank=rank)
    got = read_adapter(folder(tmp_path, tensors, **fields))
    high = tensors[f"{PREFIX}{module}.lora_B.weight"]
    np.testing.assert_allclose(got.b[module], scale * high.T, rtol=1e-6)


def test_fields_left_out_by_old_versions_take_pefts_defaults(tmp_path):
    path = folder(tmp_path, linear("q", rank=8))
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    np.testing.assert_array_equal(
        read_adapter(path).b["q"], linear("q", rank=8)[f"{PREFIX}q.lora_B.weight"].T
    )


def test_adapter_name_inside_the_keys(tmp_path):
    tensors = {x.replace(".weight", ".default.weight"): y for x, y in linear("q").items()}
    tensors |= {
        f"{PREFIX}wte.lora_embedding_A.default": values(3, 2, 9),
        f"{PREFIX}wte.lora_embedding_B.default": values(4, 5, 2),
    }
    assert set(read_adapter(folder(tmp_path, tensors)).a) == {"q", "wte"}


def test_embedding(tmp_path):
    tensors = {
        f"{PREFIX}wte.lora_embedding_A": values(0, 2, 9),
        f"{PREFIX}wte.lora_embedding_B": values(1, 5, 2),
    }
    got = read_adapter(folder(tmp_path / "in", tensors))
    want = 3 * (tensors[f"{PREFIX}wte.lora_embedding_B"] @ tensors[f"{PREFIX}wte.lora_embedding_A"]).T
    np.testing.assert_allclose(delta(got, "wte"), want, rtol=1e-5, atol=1e-6)
    assert got.layout == {"wte": {"kind": "embedding"}}
    write_adapter(tmp_path / "out", got)
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == set(tensors)


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (1, 1), (2, 3, 2)])
def test_convolution(tmp_path, kernel):
    tensors = {
        f"{PREFIX}conv.lora_A.weight": values(0, 2, 4, *kernel),
        f"{PREFIX}conv.lora_B.weight": values(1, 5, 2, *(1 for _ in kernel)),
    }
    low, high = tensors.values()
    got = read_adapter(folder(tmp_path / "in", tensors))
    want = 3 * np.einsum("or,ri...->oi...", high.reshape(5, 2), low).reshape(5, -1).T
    np.testing.assert_allclose(delta(got, "conv"), want, rtol=1e-5, atol=1e-6)
    write_adapter(tmp_path / "out", got)
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    np.testing.assert_array_equal(again[f"{PREFIX}conv.lora_A.weight"], low)
    np.testing.assert_array_equal(again[f"{PREFIX}conv.lora_B.weight"], 3 * high)


def test_extras_travel_verbatim(tmp_path):
    extras = {
        f"{PREFIX}score.weight": values(5, 2, 5),
        f"{PREFIX}score.modules_to_save.bias": values(6, 2, dtype=ml_dtypes.bfloat16),
        f"{PREFIX}layers.0.q.base_layer.bias": values(7, 3, dtype=np.float16),
        f"{PREFIX}wte.token_adapter.trainable_tokens_delta": values(8, 4, 5),
        f"{PREFIX}q.lora_velora_embed": values(9, 4),
        "step": np.array(7),
    }
    got = read_adapter(folder(tmp_path / "in", linear() | extras))
    assert set(got.a) == {"layers.0.q"}
    write_adapter(tmp_path / "out", got)
    again = read_adapter(tmp_path / "out").extras
    assert {x: (y.dtype, y.tolist()) for x, y in again.items()} == {
        x: (y.dtype, y.tolist()) for x, y in extras.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_round_trip_keeps_the_dtype(tmp_path, dtype):
    tensors = linear("q", dtype=np.dtype(dtype)) | linear("v", outputs=2, dtype=np.dtype(dtype))
    # A scale of 4 is exact in every dtype.
    first = read_adapter(folder(tmp_path / "in", tensors, lora_alpha=8))
    write_adapter(tmp_path / "out", first)
    second = read_adapter(tmp_path / "out")
    assert second.dtype == dtype
    for name in first.a:
        np.testing.assert_array_equal(second.a[name], first.a[name])
        np.testing.assert_array_equal(second.b[name], first.b[name])
    write_adapter(tmp_path / "asked", first, dtype="bfloat16")
    assert read_adapter(tmp_path / "asked").dtype == "bfloat16"


def test_written_config_has_scale_one_and_each_modules_own_rank(tmp_path):
    ranks = {"layers.1.q": 4, "model.layers.1.q": 2, "layers.11.q": 2, "layersX1.q": 3, "l.q": 2}
    config = CONFIG | {
        "use_rslora": True,
        "rank_pattern": {"q": 9},
        "alpha_pattern": {"q": 1},
        "init_lora_weights": "eva",
        "eva_config": {"rho": 2.0},
        "lora_dropout": 0.1,
    }
    source = adapter(ranks, config=config)
    write_adapter(tmp_path / "out", source)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {x: module_rank(written, x) for x in ranks} == ranks
    assert [module_scale(written, x) for x in ranks] == [1] * 5
    # the widest, which a server that knows no patterns makes room for, though most modules have rank 2
    assert written["r"] == written["lora_alpha"] == 4
    assert written["rank_pattern"] == written["alpha_pattern"]
    assert sorted(written["rank_pattern"].values()) == [2, 2, 2, 3]
    assert written["use_rslora"] is False
    assert (written["init_lora_weights"], written["eva_config"]) == (True, None)
    assert (written["lora_dropout"], written["task_type"]) == (0.1, "CAUSAL_LM")
    again = read_adapter(tmp_path / "out")
    for name in ranks:
        np.testing.assert_array_equal(again.b[name], source.b[name])


def test_unit_scale_config_does_not_depend_on_order():
    ranks = {"a": 2, "b": 4}
    assert unit_scale_config({}, ranks)["r"] == 4
    assert unit_scale_config({}, dict(reversed(ranks.items())))["r"] == 4
    assert unit_scale_config({}, ranks)["target_modules"] == ["a", "b"]


def test_rank_zero_is_written_as_one_zero_direction(tmp_path):
    write_adapter(tmp_path / "out", adapter({"q": 0, "v": 2}, config=CONFIG))
    again = read_adapter(tmp_path / "out")
    assert again.a["q"].shape == (5, 1)
    assert not delta(again, "q").any()


def test_metadata_says_pt(tmp_path):
    write_adapter(tmp_path / "out", adapter({"q": 2}))
    assert b'"__metadata__":{"format":"pt"}' in (tmp_path / "out" / "adapter_model.safetensors").read_bytes()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real adapters are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "modules", "extras", "scale", "shape"),
    [
        ("gpt2/legal", 36, 0, 2, (768, 2304)),
        ("gpt2/app-reviews-rating", 36, 1, 4, (768, 2304)),
        ("other/qwen25-vi-alpaca", 48, 0, 2, (896, 896)),
    ],
)
def test_real_adapters_come_back(tmp_path, name, modules, extras, scale, shape):
    got = read_adapter(SHARED / name)
    raw = load_file(SHARED / name / "adapter_model.safetensors")
    assert (len(got.a), len(got.extras)) == (modules, extras)
    module = next(iter(got.a))
    assert delta(got, module).shape == shape
    np.testing.assert_array_equal(got.b[module], scale * raw[f"{PREFIX}{module}.lora_B.weight"].T)
    write_adapter(tmp_path / "out", got)
    again = read_adapter(tmp_path / "out")
    for x in got.a:
        np.testing.assert_array_equal(again.a[x], got.a[x])
        np.testing.assert_array_equal(again.b[x], got.b[x])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real adapters are not beside this checkout")
@pytest.mark.parametrize(("name", "extras"), [("bert-sms-spam", 2), ("distilbert-imdb", 4)])
def test_real_bin_adapters(tmp_path, name, extras):
    pytest.importorskip("torch")
    got = read_adapter(SHARED / "other" / name)
    assert len(got.extras) == extras
    write_adapter(tmp_path / "out", got)
    again = read_adapter(tmp_path / "out")
    for x in got.a:
        np.testing.assert_array_equal(again.b[x], got.b[x])
