"""Transform coding for collections of LoRA adapters: HydraOpt (arXiv 2507.17706) and beyond, in JAX.

Names are imported when they are first used, so that what needs no JAX does not load it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# where each name lives; the others of `__all__` are modules
_HOMES = {
    "adapters": ("Adapter", "Adapters", "Bucket", "stack"),
    "checkpoint": ("restore", "save"),
    "compression": ("Options", "compress", "measure"),
    "errors": ("HydraOptError",),
    "forms": ("Factors", "Info", "hydra", "pair", "separate"),
    "optimize": ("minimise",),
    "refinement": ("refine",),
    "similarity": ("summarise",),
    "store": ("Store", "adapter"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"hydraopt_jax.{module}"), name)
    if name in __all__:
        return importlib.import_module(f"hydraopt_jax.{name}")
    raise AttributeError(f"module 'hydraopt_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
