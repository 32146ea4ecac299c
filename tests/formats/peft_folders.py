"""Small PEFT adapters for the tests of the format."""

import json

import numpy as np
from safetensors.numpy import save_file

from hydraopt_jax.adapters import Adapter

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
