"""Small stores that the parts have in common, and what is in a store, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np

from hydraopt_jax import adapters, changes, compression, forms, store, synthetic
from hydraopt_jax.deferred import bytes_of
from hydraopt_jax.store import folder

MODULES = {"layers.0.q": (96, 64), "layers.1.q": (96, 64)}
# where every byte is tried
SMALL = {"layers.0.q": (32, 24), "layers.1.q": (32, 24)}
TASKS = ("t0", "t1", "t2", "t3")


def collection(
    tensors: bool = False, modules: dict[str, tuple[int, int]] = MODULES
) -> list[adapters.Adapter]:
    """Four adapters that are alike, with a full tensor each where asked."""
    made = synthetic.collection(3, tasks=TASKS, modules=modules, rank=3, likeness=0.7, dtype="float32")
    extras = [{"head.weight": np.full((4, 10), k, np.float32) + np.arange(10)} for k in range(len(made))]
    return [x.replace(extras=e) for x, e in zip(made, extras, strict=True)] if tensors else made


def coded(modules: dict[str, tuple[int, int]] = MODULES) -> store.Store:
    """Two segments: three tasks, and one that was added and is predicted from them."""
    made = collection(modules=modules)
    return changes.add(compression.compress(made[:3], max_error=0.02), made[3])


def plain(modules: dict[str, tuple[int, int]] = MODULES) -> store.Store:
    """Plain factors and full tensors of two tasks."""
    return compression.compress(
        collection(True, modules)[:2], form=forms.Hydra(heads=1, rank=2), dtype="float16"
    )


def content(path: Path) -> Any:
    """Every leaf of a store and what it means; the store has passed `verify`, which decodes it."""
    store.verify(path)
    found = store.open(path)
    segments = [
        (x.tasks, sorted(x.removed), repr(x.modules), {k: bytes(bytes_of(v)) for k, v in x.leaves.items()})
        for x in found.segments
    ]
    return found.tasks, segments


def litter(path: Path) -> list[str]:
    """What lies in a store's folder that its manifest does not name."""
    if not path.is_dir():
        return []
    named = {x["id"] for x in folder.read_manifest(path)["segments"]}
    others = [x.name for x in path.iterdir() if x.name not in (folder.MANIFEST, folder.SEGMENTS)]
    return others + [x.name for x in (path / folder.SEGMENTS).iterdir() if x.name not in named]
