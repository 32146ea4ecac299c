"""Merging methods: pure functions on the factors of one module, and a registry by name."""

from hydraopt_jax.merging import curves
from hydraopt_jax.merging.activations import regmean
from hydraopt_jax.merging.compressors import joint_diagonalization, k_merge, k_merge_slots, separate, share
from hydraopt_jax.merging.registry import METHODS, Method
from hydraopt_jax.merging.sparse import breadcrumbs, dare, dare_ties, della, magnitude, ties
from hydraopt_jax.merging.spectral import core_space, iso_c, knots, tsv_m
from hydraopt_jax.merging.sums import concatenation, linear, linear_factors
from hydraopt_jax.merging.whole_adapters import best_scale, merge_adapters, merge_modules, merged_errors

__all__ = [
    "METHODS",
    "Method",
    "best_scale",
    "breadcrumbs",
    "concatenation",
    "core_space",
    "curves",
    "dare",
    "dare_ties",
    "della",
    "iso_c",
    "joint_diagonalization",
    "k_merge",
    "k_merge_slots",
    "knots",
    "linear",
    "linear_factors",
    "magnitude",
    "merge_adapters",
    "merge_modules",
    "merged_errors",
    "regmean",
    "separate",
    "share",
    "ties",
    "tsv_m",
]
