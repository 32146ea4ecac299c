"""Stores inside JAX programs: mixed batches, Flax NNX layers, one task into a model's own LoRA parameters."""

from hydraopt_jax.serving.apply import Module, apply, branches, dequantize, load, shape
from hydraopt_jax.serving.layers import Served, Stored, load_task, set_task_ids, task_ids, wrap

__all__ = [
    "Module",
    "Served",
    "Stored",
    "apply",
    "branches",
    "dequantize",
    "load",
    "load_task",
    "set_task_ids",
    "shape",
    "task_ids",
    "wrap",
]
