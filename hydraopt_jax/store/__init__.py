"""The store: a compressed collection, in memory and on disk. Only writing needs JAX.

- `store`: the types: segments, names, references.
- `removal`: some tasks of a store, and what is left of removed ones.
- `schema`: the contents of a segment's leaves. `plain`, `lossless`: factors that are not coded.
- `decoding`: from leaves back to factors and adapters; `references`: prediction from earlier segments.
- `tensors`: full tensors beside the factors.
- `segment_data`, `manifest`, `checks`: bytes and JSON, written, read and checked.
- `folder`, `portable`: a folder of Orbax checkpoints, one safetensors file; `files`: either, by its name.
- `job_folder`: what an unfinished job has left there.
- `sizes`: bytes on disk, in total and per task.
"""

from hydraopt_jax.store.decoding import decode, decode_terms, task_factors
from hydraopt_jax.store.files import open, save, update, verify
from hydraopt_jax.store.removal import select
from hydraopt_jax.store.sizes import size_on_disk
from hydraopt_jax.store.store import (
    Reference,
    Segment,
    Source,
    Store,
    count,
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
