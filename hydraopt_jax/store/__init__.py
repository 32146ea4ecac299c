"""The store: what is kept of a collection, in memory and on disk. Nothing here needs JAX, but for writing.

- `store`: the types: segments, names, references; some tasks of a store.
- `schema`: what the leaves of a segment hold. `plain`, `lossless`: factors that are kept as they are.
- `decoding`: from leaves back to factors and adapters; `references`: prediction from earlier segments.
- `tensors`: full tensors beside the factors.
- `segment_data`, `manifest`, `checks`: bytes and JSON, written, read and not believed blindly.
- `folder`, `portable`: a folder of Orbax checkpoints, one safetensors file; `files`: either, by its name.
- `sizes`: what a store takes on disk, and what of it is whose.
"""

from hydraopt_jax.store.decoding import decode, decode_terms, task_factors
from hydraopt_jax.store.files import open, save, update, verify
from hydraopt_jax.store.sizes import size_on_disk
from hydraopt_jax.store.store import (
    Reference,
    Segment,
    Source,
    Store,
    count,
    select,
    task_index,
)

__all__ = [
    "Reference",
    "Segment",
    "Source",
    "Store",
    "count",
    "decode",
    "decode_terms",
    "open",
    "save",
    "select",
    "size_on_disk",
    "task_factors",
    "task_index",
    "update",
    "verify",
]
