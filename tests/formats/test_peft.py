"""Reading and writing PEFT folders, with NumPy only."""

import hashlib
import json
import math
import os
import pickle
import re
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import base_name, check_same_base, peft, read_adapter, write_adapter
from hydraopt_jax.formats.peft_config import module_rank, module_scale, unit_scale_config

SHARED = Path(__file__).parents[2].parent / "shared" / "adapters"
PREFIX = "base_model.model."
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "gpt2",
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["q", "v"],
    "task_type": "CAUSAL_LM",
}


def values(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def linear(module="layers.0.q", rank=2, inputs=5, outputs=3, dtype=np.float32, seed=0):
    return {
        f"{PREFIX}{module}.lora_A.weight": values(seed, rank, inputs, dtype=dtype),
        f"{PREFIX}{module}.lora_B.weight": values(seed + 1, outputs, rank, dtype=dtype),
    }


def folder(path, tensors, **fields):
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | fields))
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


def adapter(ranks, **fields):
    a = {name: values(i, 5, r) for i, (name, r) in enumerate(ranks.items())}
    b = {name: values(10 + i, r, 3) for i, (name, r) in enumerate(ranks.items())}
    return Adapter("t", a, b, **fields)


def delta(x, name):
    return x.a[name].astype(np.float64) @ x.b[name].astype(np.float64)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_factors_are_transposed_and_scaled(tmp_path, dtype):
    tensors = linear(dtype=dtype)
    path = folder(tmp_path / "legal", tensors)
    got = read_adapter(path)
    low, high = (x.astype(np.float32) for x in tensors.values())
    assert got.task == "legal"
    assert got.dtype == np.dtype(dtype).name
    assert got.a["layers.0.q"].shape == (5, 2)
    assert got.b["layers.0.q"].dtype == np.float32
    np.testing.assert_array_equal(got.a["layers.0.q"].astype(np.float32), low.T)
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
    assert written["r"] == written["lora_alpha"] == 2
    assert len(written["rank_pattern"]) == 2
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


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "use_dora.*DoRA"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters.*expert"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"monteclora_config": {}}, "monteclora_config"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"use_tomorrow": True}, "use_tomorrow.*not known"),
        ({"tomorrow_config": {}}, "tomorrow_config.*not known"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base.*path_initial_model"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "tomorrow"}, "'tomorrow' is not known"),
        ({"r": 0}, "r is 0: the rank must be a positive integer"),
        ({"r": "8"}, "r is '8'"),
        ({"r": True}, "r is True"),
        ({"r": 2.0}, r"r is 2\.0"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf"),
        ({"rank_pattern": [1]}, "rank_pattern is"),
        ({"rank_pattern": {"q": -1}}, r"rank_pattern\['q'\] is -1"),
        ({"alpha_pattern": {"q": None}}, r"alpha_pattern\['q'\] is None"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern key '\('.*regular expression"),
        ({"use_rslora": "no"}, "use_rslora is 'no'"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
    ],
)
def test_configurations_refused(tmp_path, fields, words):
    path = folder(tmp_path, linear(), **fields)
    with pytest.raises(HydraOptError, match=words) as caught:
        read_adapter(path)
    assert "adapter_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [{"init_lora_weights": x} for x in (True, False, "gaussian", "Gaussian", "eva", "orthogonal", "mica")]
    + [
        {"use_dora": False, "target_parameters": None, "kasa_config": None, "alora_invocation_tokens": []},
        {"loftq_config": {}, "eva_config": {"rho": 2.0}, "runtime_config": {"ephemeral_gpu_offload": False}},
        {"velora_config": {"num_groups": 64}, "megatron_config": {"tp": 1}, "fan_in_fan_out": True},
    ],
)
def test_configurations_accepted(tmp_path, fields):
    assert set(read_adapter(folder(tmp_path, linear(), **fields)).a) == {"layers.0.q"}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds no LoRA tensor"),
        ({f"{PREFIX}score.weight": values(0, 2, 2)}, "holds no LoRA tensor"),
        ({f"{PREFIX}q.lora_A.weight": values(0, 2, 5)}, r"q\.lora_A\.weight has no lora_B"),
        ({f"{PREFIX}q.lora_B.weight": values(0, 5, 2)}, r"q\.lora_B\.weight has no lora_A"),
        (linear() | {f"{PREFIX}q.lora_magnitude_vector": values(0, 5)}, "lora_magnitude_vector: DoRA"),
        (linear() | {f"{PREFIX}q.lora_B.bias": values(0, 5)}, r"lora_B\.bias: a bias"),
        (linear() | {f"{PREFIX}q.lora_diag": values(0, 2)}, "lora_diag: KaSA"),
        (linear() | {f"{PREFIX}q.lora_C.weight": values(0, 2)}, r"lora_C\.weight: .*not understood"),
        (linear("q", rank=3), r"q\.lora_A\.weight has rank 3 but adapter_config\.json says 2"),
        (linear() | {f"{PREFIX}layers.0.q.lora_B.weight": values(0, 5, 3)}, r"lora_B\.weight has rank 3"),
        (linear() | {f"{PREFIX}layers.0.q.lora_A.weight": values(0, 2)}, r"lora_A\.weight has shape \[2\]"),
        (linear() | {f"{PREFIX}layers.0.q.lora_B.weight": values(0, 3, 2, 1)}, r"lora_B.* shape \[3, 2, 1\]"),
        (
            {f"{PREFIX}c.lora_A.weight": values(0, 2, 4, 3), f"{PREFIX}c.lora_B.weight": values(0, 6, 1, 1)},
            r"c\.lora_B\.weight.*convolution with groups",
        ),
        (
            {f"{PREFIX}c.lora_A.weight": values(0, 2, 4, 3), f"{PREFIX}c.lora_B.weight": values(0, 6, 2, 2)},
            r"c\.lora_B\.weight.*size 1",
        ),
        (
            {
                f"{PREFIX}e.lora_embedding_A": values(0, 2, 4, 1),
                f"{PREFIX}e.lora_embedding_B": values(0, 6, 2, 1),
            },
            r"e\.lora_embedding_A has shape \[2, 4, 1\]",
        ),
        (
            {f"{PREFIX}e.lora_embedding_A": values(0, 2, 4), f"{PREFIX}e.lora_B.weight": values(0, 6, 2)},
            "clashes with",
        ),
        (linear("q") | {f"{PREFIX}q.lora_A.b.weight": values(0, 2, 5)}, "clashes with"),
        (
            {x.removeprefix(PREFIX): y for x, y in linear("q").items()},
            "does not start with base_model.model.",
        ),
        ({x: y.astype(np.int8) for x, y in linear("q").items()}, r"q\.lora_A\.weight is int8"),
    ],
)
def test_tensors_refused(tmp_path, tensors, words):
    path = folder(tmp_path, tensors)
    with pytest.raises(HydraOptError, match=words) as caught:
        read_adapter(path)
    assert "adapter_model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def missing_folder(path):
    return path / "nowhere"


def a_file(path):
    return folder(path, linear()) / "adapter_config.json"


def missing_config(path):
    (folder(path, linear()) / "adapter_config.json").unlink()
    return path


def config_not_json(path):
    (folder(path, linear()) / "adapter_config.json").write_text("{")
    return path


def config_not_text(path):
    (folder(path, linear()) / "adapter_config.json").write_bytes(b"\xff\xfe\x00")
    return path


def config_a_list(path):
    (folder(path, linear()) / "adapter_config.json").write_text("[1]")
    return path


def config_deep(path):
    (folder(path, linear()) / "adapter_config.json").write_text("[" * 200_000)
    return path


def missing_weights(path):
    (folder(path, linear()) / "adapter_model.safetensors").unlink()
    return path


def truncated(path):
    file = folder(path, linear()) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    return path


def empty_file(path):
    (folder(path, linear()) / "adapter_model.safetensors").write_bytes(b"")
    return path


def lying_header(path):
    file = folder(path, linear()) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"[2,5]", b"[9,5]"))
    return path


def huge_header(path):
    (folder(path, linear()) / "adapter_model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")
    return path


def eight_bit_floats(path):
    key = f"{PREFIX}q.lora_A.weight"
    header = json.dumps({key: {"dtype": "F8_E4M3", "shape": [2, 4], "data_offsets": [0, 8]}}).encode()
    file = folder(path, linear()) / "adapter_model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (missing_folder, "nowhere: no such folder"),
        (a_file, "adapter_config.json: is not a folder"),
        (missing_config, "adapter_config.json: no such file"),
        (config_not_json, "adapter_config.json: is not JSON"),
        (config_not_text, "adapter_config.json: is not JSON"),
        (config_a_list, "adapter_config.json: holds no JSON object"),
        (config_deep, "adapter_config.json: is not JSON"),
        (missing_weights, "adapter_model.safetensors: no such file"),
        (truncated, "adapter_model.safetensors: is not a whole safetensors file"),
        (empty_file, "adapter_model.safetensors: is not a whole safetensors file"),
        (lying_header, "adapter_model.safetensors: is not a whole safetensors file"),
        (huge_header, "adapter_model.safetensors: is not a whole safetensors file"),
        (eight_bit_floats, r"adapter_model.safetensors: .*lora_A\.weight"),
    ],
)
def test_damaged_folders(tmp_path, make, words):
    path = make(tmp_path / "x")
    with pytest.raises(HydraOptError, match=words) as caught:
        read_adapter(path)
    assert "\n" not in str(caught.value)


def test_bin_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (missing_weights(tmp_path) / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(HydraOptError, match=r"adapter_model\.bin.*needs torch.*safetensors"):
        read_adapter(tmp_path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_malicious_bin_is_refused(tmp_path):
    pytest.importorskip("torch")
    path = missing_weights(tmp_path / "x")
    (path / "adapter_model.bin").write_bytes(pickle.dumps({"w": Bomb(tmp_path / "owned")}))
    with pytest.raises(HydraOptError, match=r"adapter_model\.bin: refused"):
        read_adapter(path)
    assert not (tmp_path / "owned").exists()


def test_hub_without_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HydraOptError, match=r"hf:org/name: needs huggingface_hub"):
        read_adapter("hf:org/name")


def fake_hub(monkeypatch, files):
    """A huggingface_hub whose repository holds the given files: name -> path."""
    missing = type("EntryNotFoundError", (Exception,), {})
    calls = []

    def hf_hub_download(repository, file, *, revision):
        calls.append((repository, file, revision))
        try:
            return str(files[file])
        except KeyError:
            raise missing(f"404\n{file}") from None

    hub = types.SimpleNamespace(
        hf_hub_download=hf_hub_download, errors=types.SimpleNamespace(EntryNotFoundError=missing)
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return calls


def test_hub(tmp_path, monkeypatch):
    path = folder(tmp_path, linear())
    names = ("adapter_config.json", "adapter_model.safetensors")
    calls = fake_hub(monkeypatch, {x: path / x for x in names})
    got = read_adapter("hf:org/name@v1")
    assert (got.task, got.source) == ("org/name@v1", "hf:org/name@v1")
    assert calls == [("org/name", x, "v1") for x in names]


def test_hub_without_the_adapter(monkeypatch):
    fake_hub(monkeypatch, {})
    with pytest.raises(HydraOptError, match=r"hf:org/name: cannot be downloaded: 404 adapter_config"):
        read_adapter("hf:org/name")


def test_overflow_is_named(tmp_path):
    big = adapter({"q": 2})
    big = big._replace(b={"q": np.full((2, 3), 1e6, np.float32)})
    with pytest.raises(
        HydraOptError, match=r"q\.lora_B\.weight: its values overflow float16: write bfloat16"
    ):
        write_adapter(tmp_path / "out", big, dtype="float16")
    with pytest.raises(HydraOptError, match=r"q\.lora_B\.weight: has NaN"):
        write_adapter(tmp_path / "out", big._replace(b={"q": np.full((2, 3), np.nan)}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "int8"}, "dtype 'int8': choose one of float16, bfloat16, float32"),
        ({"a": {}, "b": {}}, "holds no LoRA factor"),
        ({"extras": {f"{PREFIX}q.lora_A.weight": np.zeros(2)}}, "is both a LoRA factor"),
        ({"extras": {"x": np.array([object()])}}, "cannot be written"),
        ({"config": CONFIG | {"x": {1, 2}}}, "cannot be written: .*JSON"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path, change, words):
    with pytest.raises(HydraOptError, match=words):
        write_adapter(tmp_path / "deep" / "out", adapter({"q": 2})._replace(**change))
    assert not list(tmp_path.iterdir())


def test_existing_path_is_kept_unless_overwritten(tmp_path):
    out = tmp_path / "out"
    write_adapter(out, adapter({"q": 2}))
    before = {x.name: x.read_bytes() for x in out.iterdir()}
    with pytest.raises(HydraOptError, match=r"out: exists.*--overwrite"):
        write_adapter(out, adapter({"v": 3}))
    assert {x.name: x.read_bytes() for x in out.iterdir()} == before
    (out / "README.md").write_text("mine")
    (out / "adapter_model.bin").write_text("stale")
    write_adapter(out, adapter({"v": 3}), overwrite=True)
    assert set(read_adapter(out).a) == {"v"}
    assert (out / "README.md").read_text() == "mine"
    assert not (out / "adapter_model.bin").exists()
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_overwrite_spares_what_is_no_adapter(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("x")
    for name in ("file", "home"):
        with pytest.raises(HydraOptError, match="is not overwritten"):
            write_adapter(tmp_path / name, adapter({"q": 2}), overwrite=True)
    assert (tmp_path / "home" / "letter").read_text() == "x"
    (tmp_path / "empty").mkdir()
    write_adapter(tmp_path / "empty", adapter({"q": 2}), overwrite=True)
    assert set(read_adapter(tmp_path / "empty").a) == {"q"}


@pytest.mark.parametrize("fails", ["save_file", "_swap"])
def test_a_failed_overwrite_leaves_the_old_adapter(tmp_path, monkeypatch, fails):
    out = tmp_path / "out"
    write_adapter(out, adapter({"q": 2}))

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft, fails, fail)
    with pytest.raises(HydraOptError, match=r"out: cannot be written: .*No space left"):
        write_adapter(out, adapter({"v": 3}), overwrite=True)
    assert set(read_adapter(out).a) == {"q"}
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_a_failed_rename_puts_the_old_adapter_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_adapter(out, adapter({"q": 2}))
    rename = Path.rename

    def fail_for_new(self, target):
        return {"new": fail}.get(self.name, rename)(self, target)

    def fail(self, target):
        raise OSError("no rename today")

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(HydraOptError, match="no rename today"):
        write_adapter(out, adapter({"v": 3}), overwrite=True)
    assert set(read_adapter(out).a) == {"q"}
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(HydraOptError, match=r"out: cannot be written") as caught:
        write_adapter(tmp_path / "file" / "out", adapter({"q": 2}))
    assert "\n" not in str(caught.value)
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_folder_names_are_safe_and_distinct():
    tasks = ["a", "a/b", "a_b", "a%2Fb", "", ".", "..", "../x", "/", "é", "x" * 300, "x" * 301, "\0", "a b"]
    names = [peft.folder_name(x) for x in tasks]
    assert len(set(names)) == len(tasks)
    assert all(re.fullmatch(r"[^./\\\0][^/\\\0]{0,199}", x) for x in names)
    assert names[0] == "a"


@pytest.mark.parametrize(
    ("first", "second", "suffixes"),
    [
        ("gpt2", "gpt2", ()),
        ("gpt2", "openai-community/gpt2", ()),
        ("unsloth/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", ()),
        ("unsloth/Qwen2.5-0.5B-Instruct-bnb-4bit", "Qwen/Qwen2.5-0.5B-Instruct", ("-bnb-4bit",)),
        ("x/m-unsloth-bnb-4bit", "m", ("-bnb-4bit", "-unsloth")),
        ("/data/base/", "/data/base", ()),
        (None, "", ()),
    ],
)
def test_same_base(first, second, suffixes):
    pair = [adapter({"q": 2}, config={"base_model_name_or_path": x}) for x in (first, second)]
    check_same_base(pair, base_suffixes=suffixes)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("gpt2", "gpt2-medium"),
        ("gpt2", None),
        ("/home/a/base", "/home/b/base"),
        ("./base", "base"),
        ("x/m-bnb-4bit", "x/m"),
        ("-8bit", "m"),
    ],
)
def test_other_base(first, second):
    one = adapter({"q": 2}, config={"base_model_name_or_path": first}, source="one")
    two = adapter({"q": 2}, config={"base_model_name_or_path": second}, source="two")
    with pytest.raises(HydraOptError, match=r"one names .* and two names .*--any-base"):
        check_same_base([one, two], base_suffixes=("-8bit",))
    check_same_base([one, two], any_base=True)


def test_base_name():
    assert [base_name(x) for x in ({}, {"base_model_name_or_path": "gpt2"})] == ["", "gpt2"]


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
