"""The store: what is kept of a collection, in memory and on disk, and every change of it.

`store` has the types, `packing` and `structure` turn a store into leaves and an index, `container` lays bytes
in a folder, `checkpoint` saves and restores; `changes`, `joining` and `purging` add, remove and forget tasks.
"""

from hydraopt_jax.store.store import (
    Addition,
    Payload,
    Segment,
    Source,
    Store,
    adapter,
    count,
    sources_of,
    task_factors,
    task_index,
    times,
)

__all__ = [
    "Addition",
    "Payload",
    "Segment",
    "Source",
    "Store",
    "adapter",
    "count",
    "sources_of",
    "task_factors",
    "task_index",
    "times",
]
