"""Adapters that PEFT saved, read and written here, give PEFT the same model again.

Needs the `peft` extra; models are tiny, random and built from their configurations.
"""

import copy
import warnings

import numpy as np
import pytest

from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import read_adapter, server, write_adapter

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT and transformers warn about their own and each other's changes; none of it is ours to mend.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TOKENS = torch.tensor([[1, 5, 9, 2, 7], [3, 3, 8, 0, 4]])


def gpt2(kind=transformers.GPT2LMHeadModel):
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=24, n_layer=2, n_head=2, num_labels=3, pad_token_id=0
    )
    return kind(config)


def qwen2():
    config = transformers.Qwen2Config(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.Qwen2ForCausalLM(config)


class Convolutions(torch.nn.Module):
    """Two convolutions, one and two dimensions wide."""

    def __init__(self):
        super().__init__()
        self.narrow = torch.nn.Conv1d(5, 6, 3)
        self.wide = torch.nn.Conv2d(1, 4, (3, 2))

    def forward(self, tokens):
        x = torch.nn.functional.one_hot(tokens % 5, 5).float().transpose(1, 2)
        return self.wide(self.narrow(x)[:, None])


def output(model):
    with torch.no_grad():
        result = model.eval()(TOKENS)
    return getattr(result, "logits", result).numpy()


def trained(base, config, seed=0):
    """A PEFT model whose every trainable number is random, as after training."""
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3
            parameter.add_(noise * parameter.requires_grad)
    return model


def round_trip(tmp_path, base, config, **options):
    """Outputs of the base, of the trained adapter, and of the adapter after reading and writing it."""
    plain, again = copy.deepcopy(base), copy.deepcopy(base)
    model = trained(base, config)
    want = output(model)
    model.save_pretrained(tmp_path / "in", **options)
    got = read_adapter(tmp_path / "in")
    write_adapter(tmp_path / "out", got)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(again, tmp_path / "out")
    assert not [str(x.message) for x in caught if "missing adapter keys" in str(x.message)]
    return got, output(plain), want, output(loaded)


LM = {"task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (
            gpt2,
            {
                "target_modules": ["c_attn", "c_proj", "c_fc"],
                "r": 4,
                "lora_alpha": 12,
                "fan_in_fan_out": True,
            },
        ),
        (gpt2, {"target_modules": ["c_attn", "wte"], "r": 3, "lora_alpha": 2}),
        (gpt2, {"target_modules": ["c_attn"], "trainable_token_indices": [1, 5]}),
        (gpt2, {"target_modules": ["c_attn"], "bias": "lora_only"}),
        (gpt2, {"target_modules": ["c_attn"], "r": 4, "init_lora_weights": "orthogonal"}),
        (gpt2, {"target_modules": "all-linear", "r": 2, "lora_alpha": 5}),
        (qwen2, {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 16}),
        (qwen2, {"target_modules": ["q_proj", "v_proj"], "r": 5, "lora_alpha": 7, "use_rslora": True}),
        (
            qwen2,
            {
                "target_modules": ["q_proj", "v_proj", "up_proj"],
                "r": 4,
                "lora_alpha": 6,
                "use_rslora": True,
                "rank_pattern": {"layers.1.self_attn.q_proj": 7, r"^model\.layers\.0\..*v_proj": 2},
                "alpha_pattern": {"up_proj": 3, "layers.11.self_attn.q_proj": 1},
            },
        ),
        (
            qwen2,
            {
                "target_modules": ["q_proj", "v_proj"],
                "r": 8,
                "layers_to_transform": [1, 3],
                "layers_pattern": "layers",
                "rank_pattern": {"q_proj": 3},
            },
        ),
    ],
)
def test_language_models(tmp_path, make, config):
    torch.manual_seed(0)
    _, plain, want, got = round_trip(tmp_path, make(), peft.LoraConfig(**LM, **config))
    assert np.abs(want - plain).max() > 1e-2
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "change", [{"init_lora_weights": "mica"}, {"velora_config": {"num_groups": 4, "init_type": "random"}}]
)
def test_recent_variants_that_are_plain_lora_in_use(tmp_path, change):
    pytest.importorskip("peft", minversion="0.21")
    torch.manual_seed(0)
    config = peft.LoraConfig(**LM, target_modules=["q_proj"], r=4, **change)
    _, plain, want, got = round_trip(tmp_path, qwen2(), config)
    assert np.abs(want - plain).max() > 1e-2
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("asked", [{}, {"profile": "vllm"}, {"rank": 8, "padded": True}])
def test_mixed_ranks_of_which_the_widest_is_rare(tmp_path, asked):
    torch.manual_seed(0)
    ranks = {"layers.3.self_attn.q_proj": 7, "v_proj": 2}
    config = peft.LoraConfig(**LM, target_modules=["q_proj", "v_proj"], r=3, lora_alpha=5, rank_pattern=ranks)
    base, again = qwen2(), qwen2()
    again.load_state_dict(base.state_dict())
    model = trained(base, config)
    want = output(model)
    model.save_pretrained(tmp_path / "in")
    fitted = server.fit_server(read_adapter(tmp_path / "in"), **asked)
    assert fitted.errors == {}
    write_adapter(tmp_path / "out", fitted.adapter)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "out")
    assert loaded.peft_config["default"].r == asked.get("rank", 7)
    np.testing.assert_allclose(output(loaded), want, rtol=1e-4, atol=2e-5)


def test_sequence_classifier_keeps_its_head(tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], modules_to_save=["score"])
    adapter, plain, want, got = round_trip(tmp_path, gpt2(transformers.GPT2ForSequenceClassification), config)
    assert set(adapter.extras) == {"base_model.model.score.weight"}
    assert want.shape == (2, 3)
    assert np.abs(want - plain).max() > 1e-2
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def test_convolutions(tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["narrow", "wide"], r=2, lora_alpha=3)
    adapter, plain, want, got = round_trip(tmp_path, Convolutions(), config)
    assert adapter.layout["wide"] == {"kind": "convolution", "kernel": [3, 2]}
    assert np.abs(want - plain).max() > 1e-2
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def test_deltas_are_those_pefts_merge_adds(tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4, lora_alpha=6, use_rslora=True
    )
    model = trained(qwen2(), config)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    layers = dict(model.base_model.model.named_modules())
    for name in adapter.a:
        want = layers[name].get_delta_weight("default").detach().numpy().T
        np.testing.assert_allclose(adapter.a[name] @ adapter.b[name], want, rtol=1e-4, atol=1e-6)


def test_bin_and_bfloat16(tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, lora_alpha=8)
    model = trained(qwen2(), config)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {x: y.bfloat16() for x, y in safetensors_torch().load_file(file).items()}
    safetensors_torch().save_file(tensors, file, metadata={"format": "pt"})
    first = read_adapter(tmp_path)
    file.unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    second = read_adapter(tmp_path)
    assert first.dtype == second.dtype == "bfloat16"
    for name in first.a:
        np.testing.assert_array_equal(first.a[name], second.a[name])
        np.testing.assert_array_equal(first.b[name], second.b[name])
    write_adapter(tmp_path / "out", first)
    written = safetensors_torch().load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {x.dtype for x in written.values()} == {torch.bfloat16}


def safetensors_torch():
    return pytest.importorskip("safetensors.torch")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(2)], "holds a list"),
        ({"x": 3}, "entry 'x' is no named tensor"),
        ({3: torch.zeros(2)}, "entry 3 is"),
    ],
)
def test_bin_of_something_else(tmp_path, content, words):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save(content, tmp_path / "adapter_model.bin")
    with pytest.raises(HydraOptError, match=words):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    ],
)
def test_variants_that_peft_saves_are_refused(tmp_path, change, words):
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, **change)
    peft.get_peft_model(qwen2(), config).save_pretrained(tmp_path)
    with pytest.raises(HydraOptError, match=words):
        read_adapter(tmp_path)


def test_convolution_with_groups_is_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=2))
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=4)).save_pretrained(tmp_path)
    with pytest.raises(HydraOptError, match="groups"):
        read_adapter(tmp_path)


def test_a_lossless_store_exports_what_peft_had(tmp_path):
    from hydraopt_jax import cli

    before = {}
    for n, task in enumerate(["one", "two"]):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            gpt2(), peft.LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn", "c_proj"])
        )
        torch.manual_seed(n + 1)
        for name, value in model.named_parameters():
            value.data += 0.3 * torch.randn_like(value) if "lora_" in name else 0.0
        model.save_pretrained(tmp_path / task)
        before[task] = output(model)
    folders = [str(tmp_path / t) for t in before]
    for arguments in (
        ["compress", *folders, "--out", str(tmp_path / "store"), "--form", "hydra", "--rank", "6", "--force"],
        ["export", str(tmp_path / "store"), "--all", "--out", str(tmp_path / "out")],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
    for task, wanted in before.items():
        torch.manual_seed(0)
        again = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "out" / task)
        np.testing.assert_allclose(output(again), wanted, rtol=1e-4, atol=1e-5)
