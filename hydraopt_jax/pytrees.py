"""Registers the package's types with JAX: arrays are leaves, names and shapes are static.

The types themselves do not need JAX, so that stores can be read without it. The public names import this
module, and so does every module that traces the types.
"""

from jax.tree_util import register_dataclass, register_pytree_node

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.store.store import Segment, Store
from hydraopt_jax.store.tensors import Tensors

register_dataclass(
    Adapter,
    data_fields=["a", "b", "extras", "raw"],
    meta_fields=["task", "dtype", "config", "layout", "source", "digest"],
)
register_dataclass(
    Segment,
    data_fields=["leaves"],
    meta_fields=["tasks", "removed", "modules", "tensors", "references", "tables"],
)
register_dataclass(Store, data_fields=["segments"], meta_fields=["tasks", "sources", "report"])
register_pytree_node(Tensors, lambda x: ((x.blob,), x.table), lambda table, blob: Tensors(table, blob[0]))
