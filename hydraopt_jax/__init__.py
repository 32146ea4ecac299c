"""Transform coding for collections of LoRA adapters: HydraOpt (arXiv 2507.17706) and beyond, in JAX."""

from hydraopt_jax import formats, navigate, serving
from hydraopt_jax.adapters import Adapter, Adapters, Bucket, stack
from hydraopt_jax.checkpoint import restore, save
from hydraopt_jax.compression import Options, compress, measure
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import Factors, Info, hydra, pair, separate
from hydraopt_jax.optimize import minimise
from hydraopt_jax.refinement import refine
from hydraopt_jax.similarity import summarise
from hydraopt_jax.store import Store, adapter

__all__ = [
    "Adapter",
    "Adapters",
    "Bucket",
    "Factors",
    "HydraOptError",
    "Info",
    "Options",
    "Store",
    "adapter",
    "compress",
    "formats",
    "hydra",
    "measure",
    "minimise",
    "navigate",
    "pair",
    "refine",
    "restore",
    "save",
    "separate",
    "serving",
    "stack",
    "summarise",
]
