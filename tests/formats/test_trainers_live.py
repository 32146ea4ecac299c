"""Small models of google-tunix, MaxText and gemma: their LoRA is read, and restores what is written here.

Run with 0.1.7, 0.2.5 (Python 3.12) and 3.3.0, qwix 0.1.8; each test needs its library alone, and none is an
extra: they pin packages of their own (`pip install google-tunix`; `pip install --no-deps maxtext`).
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trainers
from flax import nnx

import hydraopt_jax as hydra
from hydraopt_jax import formats, serving

# the libraries warn about their own and each other's changes
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "base_moe_mlp_dim": 24,
    "megablox": False,
    "sparse_matmul": False,
}
DIM, RANK, ALPHA = trainers.HEAD_DIM, 3, 6.0
SIZES = {"num_layers": 2, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": DIM}
LORA = r".*(_proj|q_einsum|kv_einsum|qkv_einsum|attn_vec_einsum)"
TOKENS = jnp.arange(5)[None] % 7


def tunix_model(family, kv_heads, rank=None):
    """A model of Tunix', with LoRA of qwix' where a rank is given."""
    qwix = pytest.importorskip("qwix", reason="pip install qwix")
    sizes = SIZES | {"num_kv_heads": kv_heads}
    if family in ("llama", "qwen"):
        name, classes = {"llama": ("llama3", "Llama3"), "qwen": ("qwen3", "Qwen3")}[family]
        sizes |= {"vocab_size": 32, "rope_theta": 10000, "norm_eps": 1e-5}
    else:
        name, classes = "gemma3", "Gemma3"
        sizes |= {"num_embed": 32, "sliding_window_size": 8}
    module = pytest.importorskip(f"tunix.models.{name}.model", reason="pip install google-tunix")
    if family == "gemma3":
        sizes |= {"param_dtype": jnp.float32, "dtype": jnp.float32}
    known = module.ModelConfig.__dataclass_fields__
    config = module.ModelConfig(**{k: v for k, v in sizes.items() if k in known})
    model = getattr(module, classes)(config, rngs=nnx.Rngs(0))
    if rank is None:
        return model
    provider = qwix.LoraProvider(module_path=LORA, rank=rank, alpha=ALPHA)
    return qwix.apply_lora_to_model(model, provider, **model.get_model_input())


def draw(model):
    """Every LoRA factor anew: `b` starts at zero."""
    for n, (_, x) in enumerate(nnx.iter_graph(model)):
        if isinstance(x, nnx.LoRAParam):
            value = x.get_value()
            x.set_value(0.3 * jax.random.normal(jax.random.key(n), value.shape, value.dtype))


def logits(model):
    size = TOKENS.shape[1]
    mask = jnp.tril(jnp.ones((1, size, size), bool))
    return np.asarray(model(TOKENS, jnp.arange(size)[None], None, mask)[0], np.float32)


def merge(model, adapter):
    """Deltas added to Tunix' kernels, by Hugging Face's names."""
    for name, a in adapter.a.items():
        _, _, n, part, module = name.split(".")
        delta = a @ adapter.b[name]
        layer = model.layers[int(n)]
        if part == "mlp":
            kernel = getattr(layer.mlp, module).kernel
            kernel.set_value(kernel.get_value() + delta)
            continue
        heads = delta.reshape(16, -1, DIM)
        attention = layer.attn
        if hasattr(attention, module):
            w, delta = getattr(attention, module).w, delta if module == "o_proj" else heads
            w.set_value(w.get_value() + delta.reshape(w.get_value().shape))
        elif module == "o_proj":
            w = attention.attn_vec_einsum.w
            w.set_value(w.get_value() + delta.reshape(w.get_value().shape))
        else:
            place = {"k_proj": 0, "v_proj": 1}
            fused = hasattr(attention, "qkv_einsum")
            place = {"q_proj": 0, "k_proj": 1, "v_proj": 2} if fused else place
            w = (
                attention.qkv_einsum.w
                if fused
                else attention.q_einsum.w
                if module == "q_proj"
                else attention.kv_einsum.w
            )
            value, own = w.get_value(), heads.swapaxes(0, 1)
            w.set_value(value.at[place[module]].add(own) if value.ndim == 4 else value + own)


@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 2), ("qwen", 2), ("gemma3", 2), ("gemma3", 4)])
def test_tunix(family, kv_heads, tmp_path):
    manager = pytest.importorskip("tunix.sft.checkpoint_manager", reason="pip install google-tunix")
    import orbax.checkpoint as ocp

    trained = tunix_model(family, kv_heads, RANK)
    draw(trained)
    run = manager.CheckpointManager(str(tmp_path / "run"), options=ocp.CheckpointManagerOptions())
    run.save(7, trained, save_only_lora_params=True, force=True)
    run.close()
    adapter = formats.read_trained(tmp_path / "run", family, scale=ALPHA / RANK)
    merged = tunix_model(family, kv_heads)
    merge(merged, adapter)
    wanted = logits(trained)
    np.testing.assert_allclose(logits(merged), wanted, atol=1e-4 * np.abs(wanted).max())

    formats.write_adapter(tmp_path / "peft", adapter)
    peft = formats.read_adapter(tmp_path / "peft")
    # keys and values of different input sides, as PEFT trains them: the ranks add up
    rank = formats.write_trained(tmp_path / "back", peft, family, "tunix", head_dim=DIM, scale=0.5)
    fresh = tunix_model(family, kv_heads, rank)
    provided = ALPHA / rank
    formats.write_trained(tmp_path / "own", peft, family, "tunix", head_dim=DIM, scale=provided)
    restored = manager.CheckpointManager(str(tmp_path / "own"))
    restored.maybe_restore(fresh, restore_only_lora_params=True)
    restored.close()
    np.testing.assert_allclose(logits(fresh), wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("family", "kv_heads", "layers"), [("qwen", 2, 14), ("gemma3", 2, 12), ("gemma3", 4, 10)]
)
def test_tunix_serves_a_store_and_loads_its_tasks(family, kv_heads, layers):
    adapters = [trainers.adapter(kv_heads=kv_heads, seed=n, task=f"task-{n}") for n in range(2)]
    adapters = [x.replace(b={k: 0.3 * v for k, v in x.b.items()}) for x in adapters]
    held = hydra.compress(adapters, budget=0.9)
    decoded = [hydra.decode(held, x.task) for x in adapters]
    wanted = []
    for x in decoded:
        model = tunix_model(family, kv_heads)
        merge(model, x)
        wanted.append(logits(model))
    served = tunix_model(family, kv_heads)
    plain = logits(served)
    wrapped = serving.wrap(
        served, serving.load(held, dtype="float32"), rename=formats.hugging_face_name(family, "tunix")
    )
    assert len(wrapped) == layers
    for n, want in enumerate([*wanted, plain]):
        serving.set_task_ids(served, jnp.int32(n if n < 2 else -1))
        np.testing.assert_allclose(logits(served), want, atol=2e-4 * np.abs(want).max())
    # what a layer is asked for by others is the wrapped one's
    assert served.layers[0].attn.num_heads == tunix_model(family, kv_heads).layers[0].attn.num_heads

    convert = lambda x: formats.to_library(x, family, "tunix", head_dim=DIM)  # noqa: E731
    rank = max(x.shape[1] for y in decoded for x in convert(y).a.values())
    own = tunix_model(family, kv_heads, rank)
    for x, want in zip(decoded, wanted, strict=True):
        loaded = serving.load_task(own, held, x.task, convert=convert, scale=ALPHA / rank)
        assert len(loaded) == layers
        np.testing.assert_allclose(logits(own), want, atol=2e-4 * np.abs(want).max())


def maxtext_model(name, scan, layers):
    """A model of MaxText's with LoRA, and its configuration."""
    pytest.importorskip("maxtext", reason="pip install --no-deps maxtext, Python 3.12")
    from maxtext.configs import pyconfig
    from maxtext.utils import lora_utils, maxtext_utils, model_creation_utils
    from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR

    config = pyconfig.initialize(
        ["", os.path.join(MAXTEXT_CONFIGS_DIR, "base.yml")],
        model_name=name,
        override_model_config=True,
        run_name="small",
        base_output_directory="unused",
        scan_layers=scan,
        base_emb_dim=16,
        base_num_query_heads=4,
        base_num_kv_heads=2,
        head_dim=DIM,
        base_mlp_dim=24,
        base_num_decoder_layers=layers,
        vocab_size=32,
        per_device_batch_size=1,
        max_target_length=8,
        enable_checkpointing=False,
        skip_jax_distributed_system=True,
        attention="dot_product",
        dtype="float32",
        weight_dtype="float32",
        use_multimodal=False,
        **(EXPERTS if name.startswith("mixtral") else {}),
        lora={"enable_lora": True, "lora_rank": RANK, "lora_alpha": ALPHA},
    )
    mesh = maxtext_utils.get_mesh_from_config(config)
    model = model_creation_utils.from_config(config, mesh=mesh, rngs=nnx.Rngs(params=0, dropout=0, aqt=0))
    if not lora_utils.is_lora_enabled(model):
        model = lora_utils.apply_lora_to_model(model, mesh, config)
    return model, config


@pytest.mark.parametrize(
    ("name", "family", "scan", "layers"),
    [
        ("llama3.1-8b", "llama", False, 2),
        ("llama3.1-8b", "llama", True, 2),
        ("qwen3-0.6b", "qwen", True, 2),
        ("mixtral-8x7b", "mixtral", True, 2),
    ],
)
def test_maxtext(name, family, scan, layers, tmp_path):
    model, config = maxtext_model(name, scan, layers)
    from maxtext.checkpoint_conversion.utils.param_mapping import HOOK_FNS, PARAM_MAPPING
    from maxtext.utils import lora_utils

    one = trainers.known(trainers.adapter(layers), family, "maxtext")
    formats.write_trained(tmp_path, one, family, "maxtext", head_dim=DIM, scan=scan, scale=ALPHA / RANK)
    config.lora.lora_restore_path = str(tmp_path / "0" / "items")
    lora_utils.restore_lora_from_path(model, config)
    tree = formats.read_tree(model, "maxtext", task="one", scale=ALPHA / RANK, stack=1)
    # deltas of the restored parameters, by MaxText's own map of weights to Hugging Face's
    own = {"num_hidden_layers": layers, "head_dim": DIM, "hidden_size": 16}
    names = PARAM_MAPPING[name](own, config, scan)
    hooks = HOOK_FNS[name](own, config, scan, saving_to_hf=True)
    seen = set()
    for module, a in tree.a.items():
        path, _, index = module.removesuffix("]").partition("[")
        key = f"params-{path.replace('.', '-')}-kernel"
        target = names[key][int(index)] if scan else names[key]
        wanted = target.removesuffix(".weight")
        delta = (a @ tree.b[module]).astype(np.float32)
        if "attention" in path and "out" not in path:
            delta = delta.reshape(16, -1, DIM)
        want = (one.a[wanted] @ one.b[wanted]).T
        if (family, path.rpartition(".")[2]) == ("mixtral", "out"):
            # MaxText's own hook takes this kernel for a square one, as it is in the real model
            hooks[key] = lambda x, shape: x.T
        for hook in hooks[key] if isinstance(hooks[key], list) else [hooks[key]]:
            delta = hook(delta, want.shape)
        np.testing.assert_allclose(delta, want, atol=1e-4)
        seen.add(wanted)
    assert seen == set(one.a)
    trainers.check_same(formats.from_library(tree, family, "maxtext", head_dim=DIM), one, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_gemma(kv_heads, tmp_path):
    pytest.importorskip("gemma.gm", reason="pip install gemma")
    import orbax.checkpoint as ocp
    from gemma import gm, peft
    from gemma.gm.nn import _config, _transformer

    shape = _config.TransformerConfig(
        final_logit_softcap=None,
        num_embed=32,
        num_kv_heads=kv_heads,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        attention_types=[gm.nn.AttentionType.GLOBAL] * 2,
        **{k: v for k, v in SIZES.items() if k != "num_layers"},
    )

    class Transformer(_transformer.Transformer):
        config: _config.TransformerConfig = shape

    one = trainers.adapter(2, kv_heads)
    one = one.replace(b={k: 0.3 * v for k, v in one.b.items()})
    rank = formats.write_trained(tmp_path / "out", one, "gemma", "gemma", head_dim=DIM)
    model = gm.nn.LoRA(rank=rank, model=Transformer(dtype=jnp.float32), dtype=jnp.float32)
    params = model.init(jax.random.key(0), TOKENS)["params"]
    base, lora = peft.split_params(params)
    # as gm.ckpts.load_params does, which gemma 3.3.0 cannot import beside kauldron 1.4
    loaded = ocp.StandardCheckpointer().restore((tmp_path / "out" / "default").absolute())
    assert trainers.shapes(loaded) == trainers.shapes(lora)
    got = model.apply({"params": peft.merge_params(base, loaded)}, TOKENS).logits
    for name, a in one.a.items():
        _, _, n, part, module = name.split(".")
        block, delta = base[f"layer_{n}"][{"self_attn": "attn", "mlp": "mlp"}[part]], a @ one.b[name]
        if part == "mlp":
            key = {"down_proj": "linear"}.get(module, "gating_einsum")
            place = {"gate_proj": 0, "up_proj": 1}.get(module, ...)
            block[key] = block[key].at[place].add(delta)
        elif module == "o_proj":
            block["attn_vec_einsum"]["w"] += delta.reshape(4, DIM, 16)
        else:
            heads = delta.reshape(16, -1, DIM).swapaxes(0, 1)
            key = "qkv_einsum" if kv_heads == 4 else {"q_proj": "q_einsum"}.get(module, "kv_einsum")
            order = ["q_proj", "k_proj", "v_proj"] if kv_heads == 4 else ["k_proj", "v_proj"]
            place = order.index(module) if module in order else ...
            block[key]["w"] = block[key]["w"].at[place].add(heads)
    want = Transformer(dtype=jnp.float32).apply({"params": base}, TOKENS).logits
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())
    trainers.check_same(formats.read_trained(tmp_path / "out", "gemma"), one, rtol=1e-4)
