"""The tap on PyTorch models: real PEFT adapters, what a hook by hand sees, what a probe's gradient is.

Needs the `peft` extra; models are tiny, random and built from their configurations.
"""

import contextlib
import copy
import json
from pathlib import Path

import jax
import jsonschema
import numpy as np
import pytest
from commands import run

import hydraopt_jax as hydra
from hydraopt_jax import calibration, synthetic
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.integrations.transformers import open_model

torch = pytest.importorskip("torch", reason="pip install '.[peft]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[peft]'")
peft = pytest.importorskip("peft", reason="pip install '.[peft]'")

# PEFT and transformers warn about their own and each other's changes; none of it is ours to mend.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SIZES = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def drawn(model, seed=0):
    """Every LoRA factor anew: `b` starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, x in model.named_parameters():
        if "lora_" in name:
            x.data = 0.5 * torch.randn(x.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


@pytest.fixture
def model(base):
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    return drawn(peft.get_peft_model(copy.deepcopy(base), config))


@pytest.fixture(scope="module")
def batches():
    """Two of a mapping each, with padding behind."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 32, (2, 3, 7), generator=generator)
    mask = torch.ones(2, 3, 7, dtype=torch.int64)
    mask[0, 1, 4:] = 0
    mask[1, 2, 2:] = 0
    return [{"input_ids": t, "attention_mask": m} for t, m in zip(tokens, mask, strict=True)]


def watched(model, batches, path):
    """Inputs of a layer that count, as rows, by a hook of one's own."""
    rows, layer = [], model.get_submodule(path)
    handle = layer.register_forward_pre_hook(lambda layer, args: rows.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model.eval()(**batch)
    handle.remove()
    kept = [x[batch["attention_mask"].bool()] for x, batch in zip(rows, batches, strict=True)]
    return torch.cat(kept).double().numpy()


@pytest.mark.parametrize("name", [Q, DOWN])
def test_second_moments_are_those_of_the_adapted_modules_inputs(model, batches, name):
    found = calibration.collect(model.train(), batches)
    rows = watched(copy.deepcopy(model), batches, f"base_model.model.{name}")
    np.testing.assert_allclose(found[name], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
    full = calibration.collect(model, batches, rank=0, modules=[name])
    np.testing.assert_allclose(full[name], np.diag(found[name]), rtol=1e-4, atol=1e-6)
    assert set(full) == {name}
    low = calibration.collect(model, batches, rank=3, modules=[name])
    assert low[name].shape == (len(found[name]), 4)
    wanted = calibration.matrix_of(np.asarray(calibration.reduced(found[name], 3)))
    np.testing.assert_allclose(calibration.matrix_of(low[name]), wanted, atol=1e-3 * np.abs(wanted).max())
    # as PEFT's own files have them
    keys = peft.get_peft_model_state_dict(model)
    assert set(found) == {x.removeprefix("base_model.model.").split(".lora_")[0] for x in keys}


@pytest.mark.parametrize("rank", [None, 0, 3])
def test_sums_are_in_float32_whatever_the_model_runs_in(model, batches, rank):
    def forward(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**batch)

    wanted = calibration.collect(model, batches, outputs=True, rank=rank)
    found = calibration.collect(model, batches, forward=forward, outputs=True, rank=rank)
    for name in (Q, f"{Q}:output"):
        one, two = (calibration.matrix_of(x[name]) for x in (found, wanted))
        np.testing.assert_allclose(one, two, atol=0.05 * np.abs(two).max())
    low = calibration.collect(model, batches, outputs=True, rank=3)[f"{Q}:output"]
    whole = calibration.collect(model, batches, outputs=True)[f"{Q}:output"]
    assert low.shape == (len(whole), 4)
    reduced = calibration.matrix_of(np.asarray(calibration.reduced(whole, 3)))
    np.testing.assert_allclose(calibration.matrix_of(low), reduced, atol=1e-3 * np.abs(reduced).max())


@pytest.mark.parametrize("name", [Q, DOWN])
def test_output_moments_are_those_of_the_gradients(model, batches, name):
    key = jax.random.key(3)
    found = calibration.collect(model, batches[:1], outputs=True, key=key)
    # labels as the tap draws them, and a probe that is added to the module's output
    (batch, *_), mask = batches, batches[0]["attention_mask"]
    copied = copy.deepcopy(model).eval()
    probe = torch.zeros(3, 7, 24, requires_grad=True)
    copied.get_submodule(f"base_model.model.{name}").register_forward_hook(lambda m, args, y: y + probe)
    scores = copied(**batch).logits.log_softmax(-1)
    draw = torch.Generator().manual_seed(int(jax.random.bits(key)))
    labels = torch.multinomial(scores.detach().exp().reshape(-1, 32), 1, generator=draw).reshape(3, 7, 1)
    (scores.gather(-1, labels)[..., 0] * mask).sum().backward()
    g = probe.grad[mask.bool()].double().numpy()
    np.testing.assert_allclose(found[f"{name}:output"], g.T @ g / len(g), rtol=1e-3, atol=1e-7)
    assert len(found) == 2 * len([x for x in found if not x.endswith(":output")])


def test_the_model_stays_as_it_was(model, batches):
    model.train()
    before = {k: x.clone() for k, x in model.state_dict().items()}
    flags = [x.requires_grad for x in model.parameters()]
    assert True in flags
    calibration.collect(model, batches, outputs=True)
    assert [x.requires_grad for x in model.parameters()] == flags
    assert all(x.training for x in model.modules())
    assert all(x.grad is None for x in model.parameters())
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in model.modules())
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())


def test_each_task_is_seen_with_its_own_adapter(model, batches):
    """An iterator that sets the adapter pools the tasks."""
    model.add_adapter("other", model.peft_config["default"])
    drawn(model, seed=5)
    single = []
    for name, batch in zip(("default", "other"), batches, strict=True):
        model.set_adapter(name)
        single.append(calibration.collect(model, [batch])[DOWN])

    def turns():
        for name, batch in zip(("default", "other"), batches, strict=True):
            model.set_adapter(name)
            yield batch

    counts = [int(x["attention_mask"].sum()) for x in batches]
    pooled = sum(n * x for n, x in zip(counts, single, strict=True)) / sum(counts)
    np.testing.assert_allclose(calibration.collect(model, turns())[DOWN], pooled, rtol=1e-4, atol=1e-6)
    model.set_adapter("default")
    alone = calibration.collect(model, batches)[DOWN]
    assert np.linalg.norm(alone - pooled) > 0.01 * np.linalg.norm(pooled)


def test_a_model_without_adapters_has_all_linear_layers_but_its_head(base, batches):
    found = calibration.collect(base, batches)
    assert len(found) == 2 * 7
    assert "lm_head" not in found
    assert set(calibration.collect(base, batches, modules=["lm_head"])) == {"lm_head"}
    small = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=24, n_layer=1, n_head=2)
    gpt2 = transformers.GPT2LMHeadModel(small).eval()
    assert calibration.collect(gpt2, batches, rank=0)["transformer.h.0.attn.c_attn"].shape == (24,)


def test_a_forward_and_a_mask_of_ones_own(base, batches):
    """Hidden states only, tokens without a mapping, half precision."""
    found = calibration.collect(
        copy.deepcopy(base).to(torch.bfloat16),
        [x["input_ids"] for x in batches],
        forward=lambda model, tokens: model.model(tokens),
        mask=lambda tokens: tokens > 3,
        modules=["layers.1.up"],
        rename=lambda path: path.removeprefix("model.").replace("mlp.up_proj", "up"),
    )
    (moment,) = found.values()
    assert (moment.dtype, moment.shape) == (np.float32, (24, 24))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"modules": ["model.layers.0.self_attn.qproj"]},
            r"qproj: the model has no such .*near paths are 'model\.layers",
        ),
        ({"batches": []}, "there are no batches"),
        ({"mask": lambda batch: np.ones(4)}, "the mask has shape"),
        ({"forward": lambda model, batch: None}, "forward calls no layer"),
        ({"modules": ["lm_head"], "forward": lambda model, batch: None}, "lm_head: forward never calls it"),
        (
            {"forward": lambda model, batch: model(**batch).logits * np.nan, "outputs": True},
            "the model's output: its numbers are not finite",
        ),
    ],
)
def test_what_is_refused(model, batches, options, said):
    with pytest.raises(HydraOptError, match=said):
        calibration.collect(model, **{"batches": batches, **options})
    assert not any(x._forward_hooks for x in model.modules())


def test_what_it_gives_is_a_calibration(model, batches, tmp_path):
    """Of a PEFT model to a store, by way of a file."""
    shapes = {f"model.layers.{n}.self_attn.q_proj": (24, 24) for n in range(2)}
    shapes |= {f"model.layers.{n}.mlp.down_proj": (40, 24) for n in range(2)}
    made = synthetic.collection(1, tasks=["a", "b"], modules=shapes, rank=2, dtype="float32")
    calibration.write_moments(tmp_path / "c.safetensors", calibration.collect(model, batches, outputs=True))
    store = hydra.compress(
        made, max_error=0.05, calibration=calibration.read_moments(tmp_path / "c.safetensors")
    )
    assert store.output_errors.shape == (4, 2)
    assert "uncalibrated" not in store.report


TEXT = " ".join("abcdefghij"[n * n % 10] for n in range(50))


@pytest.fixture
def place(base, model, tmp_path, monkeypatch):
    """Where a user is: with a base model, its tokenizer, an adapter of it, and a text."""
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    words = {x: n for n, x in enumerate(["<unk>", *"abcdefghij"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained("org/base")
    base.save_pretrained("org/base")
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained("adapter")
    Path("text.txt").write_text(TEXT)
    return tmp_path


@pytest.mark.parametrize("name", ["org/base", "./none"])
def test_what_transformers_prints_is_left_as_its_user_has_it(place, name):
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_info()
    log.enable_progress_bar()
    with contextlib.suppress(HydraOptError):
        open_model(name)
    found = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(before[0])
    (log.enable_progress_bar if before[1] else log.disable_progress_bar)()
    assert found == (log.INFO, True)


@pytest.mark.parametrize(("name", "modules"), [("adapter", 4), ("org/base", 14)])
def test_the_command_gathers_what_collect_does(place, model, base, capsys, name, modules):
    asked = ["calibrate", name, "text.txt", "--out", "c.safetensors", "--length", "20", "--tokens", "45"]
    status, said, error = run(capsys, *asked, "--json")
    assert (status, error) == (0, "")
    payload = json.loads(said)
    schemas = json.loads((Path(__file__).parents[2] / "docs" / "schemas.json").read_text())
    jsonschema.Draft202012Validator({**schemas, "$ref": "#/$defs/calibrate"}).validate(payload)
    assert [payload[x] for x in ("modules", "tokens", "widest")] == [modules, 45, 40]
    found = calibration.read_moments("c.safetensors")
    tokens = torch.tensor([["abcdefghij".index(x) + 1 for x in TEXT.split()]])
    batches = [tokens[:, n : min(n + 20, 45)] for n in (0, 20, 40)]
    wanted = calibration.collect({"adapter": model, "org/base": base}[name], batches)
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        np.testing.assert_allclose(found[key], x, rtol=1e-3, atol=1e-3 * np.abs(x).max())


def test_the_command_gathers_gradients_and_says_what_is_little(place, capsys):
    asked = ["calibrate", "adapter", "text.txt", "--out", "c.safetensors", "--outputs", "--tokens", "9"]
    status, said, error = run(capsys, *asked)
    assert (status, error) == (0, "")
    assert "9 tokens are fewer than the widest module's 40 inputs: give more text" in " ".join(said.split())
    assert {x for x in calibration.read_moments("c.safetensors") if x.endswith(":output")} >= {f"{Q}:output"}
    status, _, error = run(capsys, *asked)
    assert status == 2
    assert "c.safetensors: exists" in error


def test_the_command_gathers_moments_of_low_rank(place, capsys):
    asked = ["calibrate", "adapter", "text.txt", "--out", "c.safetensors", "--outputs", "--rank", "4"]
    status, said, error = run(capsys, *asked, "--json")
    assert (status, error) == (0, "")
    assert json.loads(said)["rank"] == 4
    found = calibration.read_moments("c.safetensors")
    assert {x.shape[1] for x in found.values()} == {5}
    status, said, error = run(capsys, *asked, "--tokens", "3", "--overwrite")
    assert (status, error) == (0, "")
    assert "3 tokens are fewer than the 4 directions of --rank: give more text" in " ".join(said.split())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "none: cannot be loaded: "),
        ("broken", "broken: cannot be loaded: "),
        ("orphan", "orphan: cannot be loaded: "),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line(place, capsys, monkeypatch, name, said):
    """No such model and no network, half a folder, an adapter whose base model is nowhere."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("broken").mkdir()
    Path("broken/config.json").write_text(Path("org/base/config.json").read_text())
    Path("orphan").mkdir()
    for x in Path("adapter").iterdir():
        text = x.read_bytes().replace(b'"org/base"', b'"org/gone"')
        (Path("orphan") / x.name).write_bytes(text)
    status, shown, error = run(capsys, "calibrate", name, "text.txt", "--out", "c.safetensors")
    assert (status, shown) == (2, "")
    assert said in error
    assert error.count("\n") == 1
    assert not Path("c.safetensors").exists()
    Path("empty.txt").touch()
    status, _, error = run(capsys, "calibrate", "adapter", "empty.txt", "--out", "c.safetensors")
    assert status == 2
    assert "the text has no tokens" in error
