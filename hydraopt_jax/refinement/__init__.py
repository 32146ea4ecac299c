"""Refinement: gradient steps on stored factors, with the quantizer in the loop."""

from hydraopt_jax.refinement.objectives import divergence, originals, stacked
from hydraopt_jax.refinement.training import default_optimizer, refine

__all__ = ["default_optimizer", "divergence", "originals", "refine", "stacked"]
