"""Stores inside JAX programs: mixed batches, Flax NNX layers, one task into a model's own LoRA parameters."""

from hydraopt_jax.serving.apply import Module, apply, branches, dequantise, load, shape

__all__ = ["Module", "apply", "branches", "dequantise", "load", "shape"]
