"""LoRA adapters of the upper layers: initialization, PEFT folders, cosine to the start."""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from experiments.llm.base import HUB_ID
from experiments.llm.model import GROUPS, MODULES, Tree

# one initialization for all tasks, one for each, and one for all again: of rank 16, from another seed
REGIMES = ("shared", "independent", "rank-16")
# files of a PEFT folder
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_made(path: Path, option: str, **asked: Any) -> None:
    """Ends with a line if a log or result that is there says that it was made otherwise than is asked now."""
    said = json.loads(path.read_text())
    other = [f"{k} {said[k]}, not {v}" for k, v in asked.items() if said.get(k, v) != v]
    if other:
        raise SystemExit(f"{path}: is there, made with {', '.join(other)}: give another {option}")


def check_there(folder: Path) -> None:
    """Ends with a line if a folder has no adapter."""
    if not (folder / WEIGHTS).exists():
        raise SystemExit(
            f"{folder}: has no {WEIGHTS}: train the adapter, or export one (`hydraopt export STORE --task "
            f"{folder.name} --out {folder}`)"
        )


def key_of(regime: str, task: str, seed: int) -> jax.Array:
    """Key of a task's initialization: one per task if `regime` is independent, else one for all tasks."""
    key = jax.random.key(seed)
    return jax.random.fold_in(key, zlib.crc32(task.encode())) if regime == "independent" else key


def initialize(key: jax.Array, layers: Tree, rank: int) -> Tree:
    """`a` `[L, in, R]` uniform within `1 / sqrt(in)` as PEFT draws it, `b` `[L, R, out]` zero, per module."""
    out = {}
    for module, part in zip(MODULES, jax.random.split(key, len(MODULES)), strict=True):
        count, width, to = layers[module].shape
        bound = width**-0.5
        a = jax.random.uniform(part, (count, width, rank), minval=-bound, maxval=bound)
        out[module] = {"a": a, "b": jnp.zeros((count, rank, to))}
    return out


def cosine(a: Any, b: Any) -> float:
    """Cosine of two trees of arrays, taken as one vector each."""
    pairs = list(zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)), strict=True))
    dot, first, second = (
        sum(float(np.vdot(x, y)) for x, y in p)
        for p in (pairs, [(x, x) for x, _ in pairs], [(y, y) for _, y in pairs])
    )
    return dot / (first * second) ** 0.5


def side(lora: Tree, name: str) -> dict[str, Any]:
    """The factors `name` ("a" or "b") of every module."""
    return {module: factors[name] for module, factors in lora.items()}


def save_adapter(folder: Path, lora: Tree, *, base: str, first_layer: int, alpha: float) -> None:
    """Writes a PEFT folder in half precision; layers count from `first_layer`."""
    tensors = {}
    for module, factors in lora.items():
        for i, (a, b) in enumerate(zip(np.asarray(factors["a"]), np.asarray(factors["b"]), strict=True)):
            name = f"base_model.model.model.layers.{first_layer + i}.{GROUPS[module]}.{module}"
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a.T, np.float16)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b.T, np.float16)
    count, _, rank = lora[MODULES[0]]["a"].shape
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": HUB_ID.get(base, base),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "target_modules": list(MODULES),
        "layers_to_transform": list(range(first_layer, first_layer + count)),
        "layers_pattern": "layers",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_deltas(folder: Path) -> dict[str, np.ndarray]:
    """Weight changes `[L, in, out]` per module of a PEFT folder, in fp32: `alpha / r * A^T B^T`."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = {name: value.astype(np.float32) for name, value in load_file(folder / WEIGHTS).items()}
    scale = config["lora_alpha"] / config["r"]
    out = {}
    for module in config["target_modules"]:
        names = [
            f"base_model.model.model.layers.{i}.{GROUPS[module]}.{module}"
            for i in config["layers_to_transform"]
        ]
        out[module] = np.stack(
            [scale * tensors[f"{n}.lora_A.weight"].T @ tensors[f"{n}.lora_B.weight"].T for n in names]
        )
    return out
