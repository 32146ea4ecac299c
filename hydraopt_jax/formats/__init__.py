"""Readers and writers of foreign adapter formats: only here are other libraries' names known.

PEFT folders need no JAX; what does is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hydraopt_jax.formats.peft import read_adapter, write_adapter
from hydraopt_jax.formats.peft_config import base_name, check_same_base

if TYPE_CHECKING:
    from hydraopt_jax.formats.dialects import DIALECTS
    from hydraopt_jax.formats.orbax_trees import read_checkpoint, write_checkpoint
    from hydraopt_jax.formats.trees import read_tree, write_tree

__all__ = [
    "DIALECTS",
    "base_name",
    "check_same_base",
    "read_adapter",
    "read_checkpoint",
    "read_tree",
    "write_adapter",
    "write_checkpoint",
    "write_tree",
]

_HOMES = {
    "DIALECTS": "dialects",
    "read_checkpoint": "orbax_trees",
    "write_checkpoint": "orbax_trees",
    "read_tree": "trees",
    "write_tree": "trees",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"hydraopt_jax.formats.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hydraopt_jax.formats' has no attribute {name!r}")
