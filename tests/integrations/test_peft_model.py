"""Tasks of a store in PEFT models: outputs of the exported folder, side by side, replaced, unloaded, refused.

Needs the `peft` extra; models are tiny, random and built from their configurations.
"""

import copy

import numpy as np
import pytest

from hydraopt_jax import compression, reading, store, synthetic
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import read_adapter
from hydraopt_jax.integrations import peft_model as ours

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT and transformers warn about their own and each other's changes; none of it is ours to mend.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TOKENS = torch.tensor([[1, 5, 9, 2, 7], [3, 3, 8, 0, 4]])
TASKS = ["one", "two/three", "a.b"]


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def adapters():
    modules = synthetic.transformer_modules(2, 24, 12, mlp=40)
    return synthetic.collection(1, tasks=TASKS, modules=modules, rank=4, likeness=0.6, dtype="bfloat16")


@pytest.fixture(scope="module")
def coded(adapters):
    """Whose modules have several ranks."""
    return compression.compress(adapters, max_error=0.05)


def output(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits.numpy()


def exported(content, task, base, where):
    """Outputs of PEFT with the exported folder."""
    reading.export(content, task, where)
    return output(peft.PeftModel.from_pretrained(copy.deepcopy(base), where))


def same(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_outputs_are_those_of_the_exported_folder(base, coded, task, tmp_path):
    model = ours.load_adapter(copy.deepcopy(base), coded, task)
    assert isinstance(model, peft.PeftModel)
    assert model.active_adapters == [ours.adapter_name(task)]
    want = exported(coded, task, base, tmp_path / "out")
    same(output(model), want)
    assert np.abs(want - output(base)).max() > 1e-2


def test_a_path_and_a_lossless_store(base, adapters, tmp_path):
    store.save(tmp_path / "s.safetensors", compression.compress(adapters, budget=1.0))
    model = ours.load_adapter(copy.deepcopy(base), tmp_path / "s.safetensors", "one")
    same(output(model), exported(store.open(tmp_path / "s.safetensors"), "one", base, tmp_path / "out"))


def test_tasks_are_side_by_side_and_unloaded(base, coded, tmp_path):
    model = copy.deepcopy(base)
    for task in TASKS:
        model = ours.load_adapter(model, coded, task)
    for n, task in enumerate(TASKS):
        model.set_adapter(ours.adapter_name(task))
        same(output(model), exported(coded, task, base, tmp_path / str(n)))
    ours.unload_adapter(model, "one")
    with pytest.raises(
        HydraOptError, match="task 'one' is not loaded: the model's adapters are 'two%2Fthree'"
    ):
        ours.unload_adapter(model, "one")
    model.set_adapter(ours.adapter_name("a.b"))
    same(output(model), exported(coded, "a.b", base, tmp_path / "again"))
    # the last one, and another in its place
    for task in TASKS[1:]:
        ours.unload_adapter(model, task)
    assert not model.peft_config
    assert ours.load_adapter(model, coded, "one") is model
    same(output(model), exported(coded, "one", base, tmp_path / "last"))


def weights(model, name):
    return {k: x.data_ptr() for k, x in model.named_parameters() if f".{name}." in k}


def test_a_task_replaces_another_in_place_at_one_rank(base, coded, tmp_path):
    model = ours.load_adapter(copy.deepcopy(base), coded, "one", name="slot", rank=4)
    before = weights(model, "slot")
    for task in TASKS:
        assert ours.load_adapter(model, coded, task, name="slot", rank=4) is model
        same(output(model), exported(coded, task, base, tmp_path / ours.adapter_name(task)))
    assert weights(model, "slot") == before


def test_a_base_model_in_half_precision_has_factors_in_float32(base, coded, tmp_path):
    """As PEFT loads a folder: they were rounded to bfloat16."""
    half = copy.deepcopy(base).to(torch.bfloat16)
    model = ours.load_adapter(copy.deepcopy(half), coded, "two/three")  # wraps
    model = ours.load_adapter(model, coded, "one")  # adds
    model = ours.load_adapter(model, coded, "a.b", name="slot", rank=4)
    model = ours.load_adapter(model, coded, "one", name="slot", rank=4)  # in place
    reading.export(coded, "one", tmp_path / "out")
    folder = peft.PeftModel.from_pretrained(copy.deepcopy(half), tmp_path / "out")
    for name in ("one", "slot"):
        model.set_adapter(name)
        for module in coded.shapes:
            found, want = (
                layer.get_delta_weight(adapter)
                for layer, adapter in (
                    (model.get_submodule(f"base_model.model.{module}"), name),
                    (folder.get_submodule(f"base_model.model.{module}"), "default"),
                )
            )
            assert found.dtype == want.dtype == torch.float32
            np.testing.assert_allclose(found.detach(), want.detach(), atol=1e-6 * float(want.abs().max()))


def test_a_task_of_other_ranks_replaces_another(base, coded, adapters, tmp_path):
    model = ours.load_adapter(copy.deepcopy(base), coded, "one", name="slot")
    other = compression.compress(adapters, budget=0.25)
    model = ours.load_adapter(model, other, "one", name="slot")
    assert list(model.peft_config) == ["slot"]
    same(output(model), exported(other, "one", base, tmp_path / "out"))
    # the same ranks at another scale
    raw = read_adapter(tmp_path / "out")
    doubled = compression.compress(
        [raw.replace(b={n: 2 * x for n, x in raw.b.items()}), raw.replace(task="x")], budget=1.0
    )
    model = ours.load_adapter(model, doubled, raw.task, name="slot")
    same(output(model), exported(doubled, raw.task, base, tmp_path / "doubled"))


def test_a_head_is_loaded_too(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=24, n_layer=2, n_head=2, num_labels=3, pad_token_id=0
    )
    base = transformers.GPT2ForSequenceClassification(config)
    wanted = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], modules_to_save=["score"])
    trained = peft.get_peft_model(copy.deepcopy(base), wanted)
    with torch.no_grad():
        for x in trained.parameters():
            x.add_(0.3 * torch.randn(x.shape) * x.requires_grad)
    trained.save_pretrained(tmp_path / "in")
    kept = compression.compress([read_adapter(tmp_path / "in", task=t) for t in ("one", "two")], budget=1.0)
    model = ours.load_adapter(copy.deepcopy(base), kept, "one")
    same(output(model), output(trained))
    model = ours.load_adapter(model, kept, "two")
    same(output(model), output(trained))


def test_what_cannot_be_loaded_leaves_the_model_as_it_was(base, coded, adapters, monkeypatch):
    model = ours.load_adapter(copy.deepcopy(base), coded, "one", name="slot")
    before = output(model)
    strange = [
        x.replace(a={"model.none": x.a[n]}, b={"model.none": x.b[n]})
        for x in adapters
        for n in [next(iter(x.a))]
    ]
    bad = compression.compress(strange, budget=1.0)
    with pytest.raises(HydraOptError, match=r"task 'one' adapts model\.none, which the model lacks"):
        ours.load_adapter(model, bad, "one", name="slot")
    with pytest.raises(HydraOptError, match="no task 'onr' in the store: did you mean 'one'"):
        ours.load_adapter(model, coded, "onr")
    named = copy.deepcopy(model)
    named.base_model.model.config.name_or_path = "org/other"
    monkeypatch.setattr(ours, "decode", None)
    with pytest.raises(
        HydraOptError, match=r"names 'hydraopt-jax/synthetic', but the model is 'org/other'.*any_base=True"
    ):
        ours.load_adapter(named, coded, "one")
    monkeypatch.undo()
    wide = compression.compress(
        [x.replace(a={n: v[:3] for n, v in x.a.items()}) for x in adapters], budget=1.0
    )
    plain = copy.deepcopy(base)
    for given, name in ((model, "slot"), (model, None), (plain, None)):
        with pytest.raises(HydraOptError, match=r"adapts .* as \[in, out\] = \[3, .*the model has as \["):
            ours.load_adapter(given, wide, "one", name=name)
    for name in ("v1.2", ""):
        with pytest.raises(HydraOptError, match=f"name '{name}': PyTorch takes no dots"):
            ours.load_adapter(model, coded, "one", name=name)
    assert not [x for x, _ in plain.named_modules() if "lora" in x]
    same(output(model), before)


def state_of(model):
    """All that a failed load must leave as it was: layers, adapters, what is trained, and values."""
    adapters = getattr(model, "peft_config", {})
    return (
        [(x, type(layer)) for x, layer in model.named_modules()],
        [(x, p.requires_grad, p.detach().clone().numpy().tolist()) for x, p in model.named_parameters()],
        [layer.training for layer in model.modules()],
        {x: id(config) for x, config in adapters.items()},
        list(model.active_adapters) if adapters else [],
        "peft_config" in vars(model),
    )


def plain(base, coded):
    return copy.deepcopy(base).train()


def two_adapters(base, coded):
    model = ours.load_adapter(copy.deepcopy(base), coded, "one", name="slot", rank=4)
    model = ours.load_adapter(model, coded, "a.b")
    model.set_adapter("slot")
    return model.train()


def both_active(base, coded):
    model = two_adapters(base, coded)
    model.base_model.set_adapter(["slot", "a%2Eb"])
    return model


@pytest.mark.parametrize("fails", ["set_peft_model_state_dict", "set_adapter"])
@pytest.mark.parametrize(
    ("make", "given"),
    [
        (plain, {}),
        (two_adapters, {"name": "new"}),
        (two_adapters, {"name": "slot", "rank": 4}),
        (two_adapters, {"name": "slot", "rank": 2}),
        (two_adapters, {"name": "a%2Eb", "rank": 2}),
        (both_active, {"name": "new"}),
        (both_active, {"name": "a%2Eb", "rank": 2}),
    ],
)
def test_an_error_of_peft_leaves_the_model_as_it_was(base, coded, monkeypatch, fails, make, given):
    model = make(base, coded)
    before = state_of(model)
    owner = peft if hasattr(peft, fails) else peft.PeftModel
    change = getattr(owner, fails)

    def fail(*given, **options):
        change(*given, **options)
        monkeypatch.undo()
        raise RuntimeError("of another kind")

    monkeypatch.setattr(owner, fails, fail)
    with pytest.raises(HydraOptError, match=r"cannot be loaded: .*of another kind"):
        ours.load_adapter(model, coded, "two/three", **given)
    assert state_of(model) == before
    model = ours.load_adapter(model, coded, "two/three", **given)
    same(output(model), output(ours.load_adapter(copy.deepcopy(base), coded, "two/three", **given)))


@pytest.mark.parametrize("rank", [4, 2])
def test_a_merged_adapter_is_neither_replaced_nor_unloaded(base, coded, rank):
    model = two_adapters(base, coded)
    model.merge_adapter()
    before, outputs = state_of(model), output(copy.deepcopy(model))
    said = r"adapter 'slot' is merged into the model: call model\.unmerge_adapter\(\) first"
    with pytest.raises(HydraOptError, match=said):
        ours.load_adapter(model, coded, "two/three", name="slot", rank=rank)
    with pytest.raises(HydraOptError, match=said):
        ours.unload_adapter(model, "slot")
    assert state_of(model) == before
    same(output(model), outputs)
    model.unmerge_adapter()
    ours.load_adapter(model, coded, "two/three", name="slot", rank=rank)
    ours.unload_adapter(model, "slot")
    with model.disable_adapter():
        same(output(model), output(base))


def test_beside_a_merged_adapter_a_task_is_loaded_or_the_model_is_as_it_was(base, coded, monkeypatch):
    model = two_adapters(base, coded)
    model.merge_adapter()
    outputs = output(copy.deepcopy(model))
    monkeypatch.setattr(ours, "_restore_precision", lambda model, *_: model.set_adapter("a%2Eb") or 1 / 0)
    with pytest.raises(HydraOptError, match="cannot be loaded: ZeroDivisionError"):
        ours.load_adapter(model, coded, "two/three")
    monkeypatch.undo()
    assert model.get_model_status().merged_adapters == ["slot"]
    same(output(model), outputs)
    ours.load_adapter(model, coded, "two/three")
    same(output(model), output(ours.load_adapter(copy.deepcopy(base), coded, "two/three")))
    with model.disable_adapter():
        same(output(model), output(base))


@pytest.mark.parametrize("name", ["keys", "items", "training"])
def test_a_task_named_as_an_attribute_takes_another_name(base, adapters, name):
    content = compression.compress([adapters[0].replace(task=name), adapters[1]], budget=1.0)
    model = copy.deepcopy(base)
    with pytest.raises(HydraOptError, match=f"adapter '{name}': .*: give another name="):
        ours.load_adapter(model, content, name)
    assert ours.load_adapter(model, content, name, name="x").active_adapters == ["x"]


def test_a_model_that_is_no_peft_model_is_named(base, coded):
    first = copy.deepcopy(base)
    model = ours.load_adapter(first, coded, "one")
    outputs = output(model)
    said = "pass the PEFT model that load_adapter returned"
    with pytest.raises(HydraOptError, match=f"this model already has adapters: {said}"):
        ours.load_adapter(first, coded, "a.b")
    for given in (first, base):
        with pytest.raises(HydraOptError, match=f"the model has no adapters: {said}"):
            ours.unload_adapter(given, "one")
    same(output(model), outputs)
    for given in (copy.deepcopy(base), model):
        with pytest.raises(HydraOptError, match=r"the model is compiled: .* model\._orig_mod"):
            ours.load_adapter(torch.compile(given), coded, "one")
    with pytest.raises(HydraOptError, match="the model is a NoneType: pass a PyTorch model"):
        ours.load_adapter(None, coded, "one")


def test_without_peft_the_extra_is_named(base, coded, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(HydraOptError, match="install the peft extra"):
        ours.load_adapter(base, coded, "one")
    with pytest.raises(HydraOptError, match="install the peft extra"):
        ours.unload_adapter(base, "one")


def sizes(model):
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def test_a_model_that_cannot_take_a_task_is_left_as_it_was(base, coded, adapters):
    """Too small a head, a head that the model lacks, and GPT-2's layers of another width."""
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    )
    wide = synthetic.collection(tasks=1, modules={"transformer.h.0.attn.c_attn": (24, 72)}, rank=2)
    before = sizes(gpt2)
    with pytest.raises(
        HydraOptError, match=r"c_attn as \[in, out\] = \[24, 72\], which the model has as \[32, 96\]"
    ):
        ours.load_adapter(gpt2, compression.compress(wide, budget=1.0), "task-00")
    assert sizes(gpt2) == before
    fits = synthetic.collection(tasks=1, modules={"transformer.h.0.attn.c_attn": (32, 96)}, rank=2)[0]
    head = {"score.weight": np.zeros((3, 32), np.float32)}
    config = {**fits.config, "modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    with_head = compression.compress([fits.replace(extras=head, config=config)], budget=1.0)
    with pytest.raises(HydraOptError, match="brings a trained score, which the model lacks"):
        ours.load_adapter(gpt2, with_head, "task-00")
    assert sizes(gpt2) == before
    five = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=32, n_positions=16, num_labels=5)
    )
    before = sizes(five)
    said = (
        r"brings score\.weight as \[3, 32\], which the model has as \[5, 32\]: load its base model with this"
    )
    with pytest.raises(HydraOptError, match=said):
        ours.load_adapter(five, with_head, "task-00")
    assert sizes(five) == before
    plain = compression.compress([fits.replace(config={**fits.config, "task_type": None})], budget=1.0)
    wrapped = ours.load_adapter(five, plain, "task-00", name="one")
    wrapped.config.pad_token_id = 0
    before = output(wrapped)
    for name in ("one", "two"):
        with pytest.raises(HydraOptError, match=said):
            ours.load_adapter(wrapped, with_head, "task-00", name=name)
    assert list(wrapped.peft_config) == ["one"]
    same(output(wrapped), before)
    assert wrapped.active_adapters == ["one"]
