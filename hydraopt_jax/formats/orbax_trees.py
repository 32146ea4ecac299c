"""Orbax checkpoints of parameter trees with LoRA factors; only the leaves of factors are read."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as ocp

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.checkpoints import save_context
from hydraopt_jax.errors import HydraOptError, exists, one_line, system_error
from hydraopt_jax.formats.trees import Scale, flatten, insert, is_factor, leaves, read_tree

# what Orbax and its back ends raise for files that are not a checkpoint's, or not whole; not among them are
# memory that is short, a missing package and faults of a device
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)


def described_by(folder: Path) -> Any:
    """The metadata of a checkpoint.

    Raises:
      HydraOptError: not an Orbax checkpoint of a tree.
    """
    try:
        return ocp.metadata(folder.absolute())
    except UNREADABLE as error:
        raise HydraOptError(
            f"{folder}: no readable Orbax checkpoint of a tree ({one_line(error, 120)}): pass the folder "
            "that was saved, such as RUN/STEP of a checkpoint manager"
        ) from None


def load_factors(path: str | os.PathLike[str], within: str = "") -> dict[Any, Any]:
    """The LoRA leaves of a checkpoint as nested dicts of NumPy arrays; other leaves are not read.

    Args:
      path: the checkpoint's folder.
      within: path of the subtree to read, such as "params"; "" for the whole tree.

    Raises:
      HydraOptError: not an Orbax checkpoint of a tree, a checkpoint without LoRA leaves, or a damaged one.
    """
    folder = Path(path).absolute()
    described = described_by(folder).metadata
    want: dict[Any, Any] = {}
    root = [part for part in within.split("/") if part]
    for keys, leaf in flatten(described):
        inside = list(map(str, keys[: len(root)])) == root
        if inside and is_factor(keys) and getattr(leaf, "shape", None) is not None:
            insert(want, keys, np.empty(leaf.shape, leaf.dtype))
    if not want:
        raise HydraOptError(
            f"{path}: the checkpoint holds no LoRA factor{f' within {within}' if within else ''}"
        )
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            return ocp.load(folder, want)
    except UNREADABLE as error:
        raise HydraOptError(f"{path}: damaged checkpoint: {one_line(error, 200)}") from None


def latest_step(path: Path) -> Path:
    """The checkpoint of the last step in a run's folder; the folder itself if it has no steps."""
    steps = [x for x in path.iterdir() if x.name.isdecimal() and x.is_dir()] if path.is_dir() else []
    return max(steps, key=lambda x: int(x.name), default=path)


def read_checkpoint(
    path: str | os.PathLike[str],
    name: str,
    *,
    task: str | None = None,
    scale: Scale | None = None,
    stack: int | str | None = "ask",
    within: str = "",
) -> Adapter:
    """The adapter in an Orbax checkpoint (old or new Orbax API), as `read_tree` returns it.

    Args:
      path: folder of the checkpoint, or of a run, whose last step is read.
      name, scale, stack: see `trees.read_tree`.
      task: the task's name; None for the folder's.
      within: path of the subtree to read, such as "params" of a train state.

    Returns:
      The adapter, with a digest of its factors.

    Raises:
      HydraOptError: see `load_factors` and `trees.read_tree`.
    """
    tree = load_factors(latest_step(Path(path)), within)
    source = os.fspath(path)
    task = task or Path(os.path.abspath(path)).name
    adapter = read_tree(tree, name, task=task, scale=scale, stack=stack, source=source)
    return adapter.replace(digest=tree_digest(tree))


def tree_digest(tree: Any) -> str:
    """SHA-256 of a tree's leaves, hexadecimal."""
    digest = hashlib.sha256()
    for keys, leaf in sorted(flatten(tree), key=lambda x: str(x[0])):
        digest.update(
            repr((keys, leaf.dtype.name, leaf.shape)).encode() + np.ascontiguousarray(leaf).tobytes()
        )
    return digest.hexdigest()


def write_checkpoint(
    path: str | os.PathLike[str],
    adapter: Adapter,
    name: str,
    *,
    scale: Scale | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    item: str = "state",
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the result of `write_tree` as an Orbax checkpoint, atomically.

    More than eight arguments: those of `write_tree`, and what Orbax asks.

    Args:
      path: a new folder.
      adapter, name, scale, rank, dtype: see `trees.write_tree`.
      item: name of the parameters in the checkpoint; Tunix' `CheckpointManager` reads "model_params" in a
        folder named by a number.
      metadata: JSON-able custom metadata.
      overwrite: replace an existing Orbax checkpoint.

    Raises:
      HydraOptError: the path exists, or cannot be written; see `trees.write_tree`.
    """
    folder = Path(path).absolute()
    if folder.exists() and not overwrite:
        raise exists(path)
    if folder.exists():
        load_factors(folder)  # anything else is never replaced
    tree: dict[Any, Any] = {}
    for keys, value in leaves(adapter, name, scale, rank, dtype):
        insert(tree, [str(key) for key in keys], value)
    said = dict(metadata or {})
    try:
        with save_context():
            ocp.save(folder, tree, checkpointable_name=item, overwrite=overwrite, custom_metadata=said)
    except (OSError, ValueError) as error:
        raise system_error(path, "written", error) from None
