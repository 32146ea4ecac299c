"""LoRA files of image models, as kohya and diffusers write them: read, kept, written, refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from commands import run
from peft_folders import adapter, values
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hydraopt_jax import compression, reading, store
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import image_files, read_adapter, server, write_adapter
from hydraopt_jax.formats.peft_collection import collection_of, open_adapter

Q, CONV, POINT = "lora_unet_mid_block_attn1_to_q", "lora_unet_conv_in", "lora_te_text_model_proj"


def kohya(seed=0, dtype=np.float16, rank=4):
    """Tensors of a linear layer with alpha 2, a 3x3 convolution with alpha 4, and a 1x1 one without alpha."""
    shapes = {
        Q: ((rank, 12), (10, rank)),
        CONV: ((2, 3, 3, 3), (8, 2, 1, 1)),
        POINT: ((2, 6, 1, 1), (6, 2, 1, 1)),
    }
    out = {}
    for n, (module, (low, high)) in enumerate(shapes.items()):
        out[f"{module}.lora_down.weight"] = values(seed + 2 * n, *low, dtype=dtype)
        out[f"{module}.lora_up.weight"] = values(seed + 2 * n + 1, *high, dtype=dtype)
    return out | {f"{Q}.alpha": np.array(2, dtype), f"{CONV}.alpha": np.array(4, dtype)}


def delta(tensors, module, scale, names=("lora_down", "lora_up")):
    low, high = (tensors[f"{module}.{x}.weight"].astype(np.float64) for x in names)
    return scale * high.reshape(len(high), -1) @ low.reshape(len(low), -1)


def ours(found, module):
    return (found.a[module].astype(np.float64) @ found.b[module]).T


@pytest.fixture
def file(tmp_path):
    save_file(kohya(), tmp_path / "cat.safetensors", {"ss_base_model_version": "sd_v1", "format": "pt"})
    return tmp_path / "cat.safetensors"


def test_a_file_of_kohyas_is_read_with_its_scales(file):
    found = read_adapter(file)
    assert (found.task, found.dtype, found.config["base_model_name_or_path"]) == ("cat", "float16", "sd_v1")
    for module, scale in ((Q, 2 / 4), (CONV, 4 / 2), (POINT, 1)):
        np.testing.assert_allclose(ours(found, module), delta(kohya(), module, scale), rtol=1e-5, atol=1e-6)
    assert not found.extras


def test_the_command_keeps_files_as_they_came(file, tmp_path, capsys):
    rest = {"emb_params": values(9, 2, 5), "odd.alpha": np.array(1, np.float32)}
    save_file(kohya(20) | rest, tmp_path / "dog.safetensors", {"ss_base_model_version": "sd_v1"})
    names = [str(tmp_path / f"{x}.safetensors") for x in ("cat", "dog")]
    kept = tmp_path / "kept"
    status, _, error = run(capsys, "compress", *names, "--budget", "1", "--out", kept, "--json")
    assert status == 0, error
    out = tmp_path / "again.safetensors"
    assert run(capsys, "export", kept, "--task", "dog", "--out", out)[0] == 0
    before, after = load_file(names[1]), load_file(out)
    assert before.keys() == after.keys()
    assert all((before[k] == after[k]).all() and before[k].shape == after[k].shape for k in before)
    with safe_open(out, "np") as opened:
        assert opened.metadata() == {"ss_base_model_version": "sd_v1", "format": "pt"}
    status, _, error = run(capsys, "export", kept, "--task", "dog", "--out", out)
    assert (status, "exists" in error) == (2, True)
    assert run(capsys, "export", kept, "--all", "--out", tmp_path / "all")[0] == 0
    assert load_file(tmp_path / "all/cat/pytorch_lora_weights.safetensors").keys() == kohya().keys()
    status, said, error = run(capsys, "verify", kept, *names, "--json")
    assert (status, json.loads(said)["ok"]) == (0, True), error


def test_a_coded_file_says_nothing_of_the_factors_that_it_was(tmp_path):
    said = {
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "sshs_model_hash": "01",
        "sshs_legacy_hash": "23",
        "ss_output_name": "cat",
    }
    save_file(kohya(), tmp_path / "cat.safetensors", said)
    found = reading.read([tmp_path / "cat.safetensors"])
    for name, target, kept in (
        ("coded", {"max_error": 0.01}, {"ss_output_name": "cat"}),
        ("kept", {"budget": 1}, said),
    ):
        reading.export(compression.compress(found, **target), "cat", tmp_path / f"{name}.safetensors")
        with safe_open(tmp_path / f"{name}.safetensors", "np") as opened:
            assert opened.metadata() == {"format": "pt", **kept}


def test_a_coded_file_says_its_scales(file, tmp_path):
    found = reading.read([file])
    coded = compression.compress(found, max_error=0.01)
    reading.export(coded, "cat", tmp_path / "out.safetensors")
    again, decoded = read_adapter(tmp_path / "out.safetensors"), store.decode(coded, "cat")
    for module in found[0].a:
        np.testing.assert_allclose(ours(again, module), ours(decoded, module), rtol=2e-2, atol=2e-2)
        wanted = ours(found[0], module)
        assert ((ours(again, module) - wanted) ** 2).sum() < 0.05 * (wanted**2).sum()


UNET, TEXT = "unet.down.0.to_k", "text_encoder.layers.1.q_proj"


def diffusers(metadata, names=("lora_A", "lora_B")):
    tensors = {}
    for module, rank, (inputs, outputs) in (
        (UNET, 4, (12, 10)),
        (UNET[:-1] + "v", 2, (12, 10)),
        (TEXT, 4, (8, 8)),
    ):
        tensors[f"{module}.{names[0]}.weight"] = values(rank, rank, inputs)
        tensors[f"{module}.{names[1]}.weight"] = values(rank + 1, outputs, rank)
    said = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else {}
    return tensors, {"format": "pt", **said}


SAID = {
    "unet.r": 4,
    "unet.lora_alpha": 8,
    "unet.rank_pattern": {"down.0.to_v": 2},
    "unet.alpha_pattern": {"to_v": 3},
    "text_encoder.r": 4,
    "text_encoder.lora_alpha": 6,
    "text_encoder.use_rslora": True,
}


@pytest.mark.parametrize(
    ("metadata", "scales"),
    [
        (None, (1, 1, 1)),
        (SAID, (8 / 4, 3 / 2, 6 / 2)),
        ({"r": 4, "lora_alpha": 2, "rank_pattern": {"to_v": 2}}, (0.5, 1, 0.5)),
        ({"vae.r": 4, "vae.lora_alpha": 2}, (1, 1, 1)),
    ],
)
def test_scales_that_diffusers_says_in_the_header(tmp_path, metadata, scales):
    tensors, header = diffusers(metadata)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", header)
    found = read_adapter(tmp_path)
    assert found.task == tmp_path.name
    wanted = [
        delta(tensors, m, x, ("lora_A", "lora_B"))
        for m, x in zip(found.a, scales_of(found, scales), strict=True)
    ]
    for module, x in zip(found.a, wanted, strict=True):
        np.testing.assert_allclose(ours(found, module), x, rtol=1e-5, atol=1e-5)
    # what is written says nothing, and needs not: one rank, scale 1
    write_adapter(tmp_path / "out", found)
    written = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    assert {x.shape[0] for k, x in written.items() if "lora_A" in k} == {4}
    with safe_open(tmp_path / "out/pytorch_lora_weights.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt"}
    for module, x in zip(found.a, wanted, strict=True):
        np.testing.assert_allclose(delta(written, module, 1, ("lora_A", "lora_B")), x, rtol=1e-5, atol=1e-5)
    # kept as it came it says what it said
    reading.export(compression.compress([found], budget=1.0), found.task, tmp_path / "kept")
    with safe_open(tmp_path / "kept/pytorch_lora_weights.safetensors", "np") as opened:
        assert opened.metadata() == header


def scales_of(found, scales):
    """In the order of the modules."""
    by_name = dict(zip((UNET, UNET[:-1] + "v", TEXT), scales, strict=True))
    return [by_name[m] for m in found.a]


@pytest.mark.parametrize(
    "names", [("lora.down", "lora.up"), ("lora_linear_layer.down", "lora_linear_layer.up")]
)
def test_older_endings_come_back(tmp_path, names):
    tensors, header = diffusers(None, names)
    save_file(tensors, tmp_path / "old.safetensors", header)
    found = read_adapter(tmp_path / "old.safetensors")
    write_adapter(tmp_path / "again.safetensors", found)
    assert load_file(tmp_path / "again.safetensors").keys() == tensors.keys()


def test_bfloat16_and_files_are_looked_at_without_being_held(tmp_path):
    save_file(kohya(dtype=ml_dtypes.bfloat16), tmp_path / "a.safetensors")
    card = open_adapter(str(tmp_path / "a.safetensors"), None, {})
    assert (card.task, card.dtype, len(card.places)) == ("a", "bfloat16", 6)
    (tmp_path / "beside").write_bytes(b"x" * 10**6)
    found = collection_of([card])
    assert found.size == (tmp_path / "a.safetensors").stat().st_size
    ((low, high, scale),) = found.read(0, [CONV])
    np.testing.assert_allclose(
        scale * high.astype(np.float64) @ low, delta(kohya(dtype=ml_dtypes.bfloat16), CONV, 2)
    )


def refuse(tmp_path, tensors, words, metadata=None):
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(HydraOptError, match=words) as caught:
        read_adapter(tmp_path / "bad.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"x.hada_w1_a": values(0, 2, 2)}, "LoHa is no plain low-rank delta"),
        ({"x.lokr_w1": values(0, 2, 2)}, "LoKr"),
        ({f"{Q}.lora_mid.weight": values(0, 2, 2)}, "Tucker"),
        ({f"{Q}.dora_scale": values(0, 2, 2)}, "DoRA"),
        ({f"{Q}.lora_A.weight": values(0, 2, 2)}, "clashes with"),
        *(
            ({f"x.{bias}": values(0, 10)}, rf"{bias}: a bias on a LoRA factor is no low-rank delta: retrain")
            for bias in ("lora_B.bias", "lora_up.bias", "lora.up.bias", "lora_linear_layer.up.bias")
        ),
        ({f"{Q}.alpha": np.array(np.inf, np.float32)}, "must be a finite number"),
        ({f"{Q}.lora_up.weight": values(0, 10, 3)}, "rank 3 but .* has rank 4"),
        ({f"{Q}.lora_up.weight": np.ones((10, 4), np.int8)}, "is int8: a LoRA factor must be"),
    ],
)
def test_what_is_no_plain_delta_is_refused_by_name(tmp_path, tensors, words):
    refuse(tmp_path, kohya() | tensors, words)


def test_what_is_no_lora_file_is_refused(tmp_path, file):
    refuse(tmp_path, {"x": values(0, 2)}, "holds no LoRA tensor")
    refuse(
        tmp_path, {k: x for k, x in kohya().items() if k != f"{Q}.lora_up.weight"}, "has no lora_B beside it"
    )
    refuse(tmp_path, diffusers(None)[0], "is not a JSON object", {"lora_adapter_metadata": "["})
    refuse(tmp_path, diffusers(None)[0], "r is 'x'", {"lora_adapter_metadata": '{"unet.r": "x"}'})
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(HydraOptError, match=r"cat\.safetensors: is not a LoRA file"):
        read_adapter(file)
    with pytest.raises(HydraOptError, match="no such folder"):
        read_adapter(tmp_path / "none.safetensors")


def test_servers_of_language_models_refuse_it(file):
    with pytest.raises(HydraOptError, match="'cat' is of an image model"):
        server.fit_server(read_adapter(file), profile="vllm")


def test_a_failed_write_leaves_nothing(file, tmp_path, monkeypatch):
    found = read_adapter(file)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_files.os, "replace", fail)
    with pytest.raises(HydraOptError, match=r"out\.safetensors: cannot be written: .*No space left"):
        write_adapter(tmp_path / "deep" / "out.safetensors", found)
    assert [x.name for x in tmp_path.iterdir()] == ["cat.safetensors"]
    assert adapter({"q": 2}).config.get("lora_file") is None


def test_the_weights_file_of_a_peft_folder_is_refused(tmp_path):
    """It has no scale: alpha is in the configuration beside it."""
    write_adapter(tmp_path / "a", adapter({"q": 2}).replace(config={}, layout={}))
    with pytest.raises(HydraOptError, match="weights file of a PEFT adapter: give its folder"):
        read_adapter(tmp_path / "a" / "adapter_model.safetensors")
