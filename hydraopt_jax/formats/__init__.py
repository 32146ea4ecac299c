"""Readers and writers of foreign adapter formats: only here are other libraries' names known."""

from hydraopt_jax.formats.dialects import DIALECTS
from hydraopt_jax.formats.orbax_trees import read_checkpoint, write_checkpoint
from hydraopt_jax.formats.peft import read_adapter, write_adapter
from hydraopt_jax.formats.peft_config import base_name, check_same_base
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
