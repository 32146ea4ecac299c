"""Transform coding for collections of LoRA adapters: HydraOpt (arXiv 2507.17706) and beyond, in JAX.

Names are imported when they are first used, so that what needs no JAX does not load it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydraopt_jax import formats, serving
    from hydraopt_jax.adapters import Adapter, Adapters, Bucket, stack
    from hydraopt_jax.compression import Options, compress, measure
    from hydraopt_jax.errors import HydraOptError
    from hydraopt_jax.forms import Factors, Info, hydra, pair, separate
    from hydraopt_jax.forms.gradient import minimize
    from hydraopt_jax.forms.similarity import summarize
    from hydraopt_jax.rate_control import navigate
    from hydraopt_jax.refinement import refine
    from hydraopt_jax.store import Store, adapter
    from hydraopt_jax.store.checkpoint import restore, save

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
    "minimize",
    "navigate",
    "pair",
    "refine",
    "restore",
    "save",
    "separate",
    "serving",
    "stack",
    "summarize",
]

# where each name lives
_HOMES = {
    "adapters": ("Adapter", "Adapters", "Bucket", "stack"),
    "store.checkpoint": ("restore", "save"),
    "compression": ("Options", "compress", "measure"),
    "errors": ("HydraOptError",),
    "forms": ("Factors", "Info", "hydra", "pair", "separate"),
    "forms.gradient": ("minimize",),
    "refinement": ("refine",),
    "forms.similarity": ("summarize",),
    "store": ("Store", "adapter"),
}
_MODULES = {"formats": "formats", "navigate": "rate_control.navigate", "serving": "serving"}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"hydraopt_jax.{module}"), name)
    if name in _MODULES:
        return importlib.import_module(f"hydraopt_jax.{_MODULES[name]}")
    raise AttributeError(f"module 'hydraopt_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
