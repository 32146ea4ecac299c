"""What is no sound PEFT adapter is refused by name, on disk and on the hub."""

import json
import math
import os
import pickle
import sys
import types

import numpy as np
import pytest
from peft_folders import PREFIX, folder, linear, values

from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import read_adapter
from hydraopt_jax.formats.peft_collection import open_adapter

# merge reads an adapter whole; compress and verify open it and read its factors later
BOTH = pytest.mark.parametrize("read", [read_adapter, lambda path: open_adapter(str(path), None, {})])


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
        ({"lora_alpha": math.inf}, "Infinity is not JSON: write a finite number"),
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
@BOTH
def test_tensors_refused(tmp_path, read, tensors, words):
    path = folder(tmp_path, tensors)
    with pytest.raises(HydraOptError, match=words) as caught:
        read(path)
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
        (config_a_list, "adapter_config.json: is not a JSON object"),
        (config_deep, "adapter_config.json: is not JSON"),
        (missing_weights, "adapter_model.safetensors: no such file"),
        (truncated, "adapter_model.safetensors: is not a complete safetensors file"),
        (empty_file, "adapter_model.safetensors: is not a complete safetensors file"),
        (lying_header, "adapter_model.safetensors: is not a complete safetensors file"),
        (huge_header, "adapter_model.safetensors: is not a complete safetensors file"),
        (eight_bit_floats, r"adapter_model.safetensors: .*lora_A\.weight"),
    ],
)
@BOTH
def test_damaged_folders(tmp_path, read, make, words):
    path = make(tmp_path / "x")
    with pytest.raises(HydraOptError, match=words) as caught:
        read(path)
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
