"""Refinement: stored factors moved until the model's outputs match, with the quantizer in the loop."""

from hydraopt_jax.refinement.outputs import default_optimizer, divergence, originals, refine, stacked

__all__ = ["default_optimizer", "divergence", "originals", "refine", "stacked"]
