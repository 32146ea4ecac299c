"""Readers and writers of foreign adapter formats: only here are other libraries' names known."""

from hydraopt_jax.formats.peft import read_adapter, write_adapter
from hydraopt_jax.formats.peft_config import base_name, check_same_base

__all__ = ["base_name", "check_same_base", "read_adapter", "write_adapter"]
