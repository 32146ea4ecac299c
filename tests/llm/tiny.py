"""A random Llama-architecture model of two layers in Hugging Face's files."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def write_tokenizer(path: Path) -> int:
    """Writes a tokenizer of bytes and chat marks; returns the size of its vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(path))
    return tokenizer.get_vocab_size()


def write_model(folder, *, bias):
    """A random Llama of two layers in Hugging Face's files."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    width, ffn, heads, kv, vocabulary = 24, 32, 3, 1, write_tokenizer(folder / "tokenizer.json")
    shapes = {"q": width, "k": width // heads, "v": width // heads}
    tensors = {
        "model.embed_tokens.weight": rng.normal(size=(vocabulary, width)),
        "model.norm.weight": np.ones(width),
    }
    for i in range(2):
        at = f"model.layers.{i}"
        for name, out in shapes.items():
            tensors[f"{at}.self_attn.{name}_proj.weight"] = rng.normal(size=(out, width)) / 5
            if bias:
                tensors[f"{at}.self_attn.{name}_proj.bias"] = rng.normal(size=out)
        tensors[f"{at}.self_attn.o_proj.weight"] = rng.normal(size=(width, width)) / 5
        tensors[f"{at}.mlp.gate_proj.weight"] = rng.normal(size=(ffn, width)) / 5
        tensors[f"{at}.mlp.up_proj.weight"] = rng.normal(size=(ffn, width)) / 5
        tensors[f"{at}.mlp.down_proj.weight"] = rng.normal(size=(width, ffn)) / 5
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = np.ones(width)
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, folder / "model.safetensors")
    config = {
        "architectures": ["Qwen2ForCausalLM" if bias else "LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ffn,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
