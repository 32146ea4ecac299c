"""Transform coding for collections of LoRA adapters: HydraOpt (arXiv 2507.17706) and beyond, in JAX.

The face is the types, the verbs, and the rooms whose functions are arguments of the verbs. What is rarer is
in its room: `adapters.stack`, `store.select`, `changes.refit`. Names are imported when they are first used:
what needs no JAX does not load it. A name of this face registers the package's types as pytrees;
`hydraopt_jax.store` and its modules read stores without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydraopt_jax import formats, forms, serving
    from hydraopt_jax.adapters import Adapter
    from hydraopt_jax.changes import add
    from hydraopt_jax.compression import compress
    from hydraopt_jax.errors import HydraOptError
    from hydraopt_jax.forms.similarity import summarize as similarity
    from hydraopt_jax.merging.whole_adapters import merge_adapters as merge
    from hydraopt_jax.rate_control.distortion import measure
    from hydraopt_jax.reading import export, read
    from hydraopt_jax.refinement import refine
    from hydraopt_jax.store import Store, decode, open, save, update, verify
    from hydraopt_jax.store.removal import remove
    from hydraopt_jax.tradeoff import frontier

__all__ = [
    "Adapter",
    "HydraOptError",
    "Store",
    "add",
    "compress",
    "decode",
    "export",
    "formats",
    "forms",
    "frontier",
    "measure",
    "merge",
    "open",
    "read",
    "refine",
    "remove",
    "save",
    "serving",
    "similarity",
    "update",
    "verify",
]

# where each name lives
_HOMES = {
    "adapters": ("Adapter",),
    "changes": ("add",),
    "compression": ("compress",),
    "errors": ("HydraOptError",),
    "forms.similarity": ("similarity",),
    "merging.whole_adapters": ("merge",),
    "rate_control.distortion": ("measure",),
    "reading": ("export", "read"),
    "refinement": ("refine",),
    "store": ("Store", "decode", "open", "save", "update", "verify"),
    "store.removal": ("remove",),
    "tradeoff": ("frontier",),
}
_MODULES = ("formats", "forms", "serving")
# names that a module has for itself
_OTHER = {"similarity": "summarize", "merge": "merge_adapters"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        importlib.import_module("hydraopt_jax.pytrees")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"hydraopt_jax.{module}"), _OTHER.get(name, name))
    if name in _MODULES:
        return importlib.import_module(f"hydraopt_jax.{name}")
    raise AttributeError(f"module 'hydraopt_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
