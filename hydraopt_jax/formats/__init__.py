"""Readers and writers of foreign adapter formats. No other room knows the names of other libraries.

PEFT folders do not need JAX. Formats that need it are imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hydraopt_jax.formats.peft import read_adapter, write_adapter
from hydraopt_jax.formats.peft_config import base_name, check_same_base

if TYPE_CHECKING:
    from hydraopt_jax.formats.dialects import DIALECTS
    from hydraopt_jax.formats.model_maps import from_library, hugging_face_name, to_library
    from hydraopt_jax.formats.orbax_trees import read_checkpoint, write_checkpoint
    from hydraopt_jax.formats.trained import read_trained, write_trained
    from hydraopt_jax.formats.trees import fit_tree, read_tree, write_tree

__all__ = [
    "DIALECTS",
    "base_name",
    "check_same_base",
    "fit_tree",
    "from_library",
    "hugging_face_name",
    "read_adapter",
    "read_checkpoint",
    "read_trained",
    "read_tree",
    "to_library",
    "write_adapter",
    "write_checkpoint",
    "write_trained",
    "write_tree",
]

_HOMES = {
    "DIALECTS": "dialects",
    "read_checkpoint": "orbax_trees",
    "write_checkpoint": "orbax_trees",
    "fit_tree": "trees",
    "from_library": "model_maps",
    "hugging_face_name": "model_maps",
    "read_trained": "trained",
    "read_tree": "trees",
    "to_library": "model_maps",
    "write_trained": "trained",
    "write_tree": "trees",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"hydraopt_jax.formats.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hydraopt_jax.formats' has no attribute {name!r}")
