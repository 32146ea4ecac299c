"""Stores inside JAX programs: mixed batches, slots for the tasks in use, Flax NNX layers.

A single task can also be loaded into a model's own LoRA parameters.
"""

from hydraopt_jax.serving.layers import (
    Served,
    Stored,
    load_task,
    set_modules,
    set_task_ids,
    task_ids,
    wrap,
)
from hydraopt_jax.serving.loading import Shardings, load
from hydraopt_jax.serving.mixed_tasks import Module, PackedFactors, apply, branches, dequantize, shape
from hydraopt_jax.serving.slots import Slots, SlotState

__all__ = [
    "Module",
    "PackedFactors",
    "Served",
    "Shardings",
    "SlotState",
    "Slots",
    "Stored",
    "apply",
    "branches",
    "dequantize",
    "load",
    "load_task",
    "set_modules",
    "set_task_ids",
    "shape",
    "task_ids",
    "wrap",
]
