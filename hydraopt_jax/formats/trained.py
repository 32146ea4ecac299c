"""Checkpoints of trained adapters of Tunix, MaxText and gemma, by model family.

Adapters that are read have Hugging Face's names, so that they can go into a store, a PEFT folder or another
library.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import orbax_trees, trees
from hydraopt_jax.formats.families import FAMILIES, LIBRARIES
from hydraopt_jax.formats.model_maps import from_library, table_of, to_library

# of PEFT's configuration, what a checkpoint that is written here keeps
KEPT = ("base_model_name_or_path", "task_type")
# the axis of MaxText's stacked layers; no other factor of these libraries has extra axes on both sides
STACK = 1


def read_trained(
    path: str | os.PathLike[str],
    family: str,
    library: str | None = None,
    *,
    task: str | None = None,
    scale: float | None = None,
    head_dim: int | None = None,
    prefix: str = "model.layers",
) -> Adapter:
    """The adapter in a library's checkpoint of a LoRA run, with Hugging Face's names.

    The base model's name is known where `write_trained` wrote the checkpoint of an adapter that has it.

    Args:
      path: folder of a run, whose last step is read, or of one step.
      family: a key of `families.FAMILIES`.
      library: "tunix", "maxtext" or "gemma"; None to recognize it by the names in the checkpoint.
      task: the task's name; None for the folder's.
      scale: alpha / rank of the run; None if the checkpoint has it (MaxText) or the library has no scale
        (gemma).
      head_dim, prefix: see `model_maps.from_library`.

    Raises:
      HydraOptError: no such checkpoint, a missing scale, or names that no library's table has.
    """
    source = os.fspath(path)
    if library is not None or family not in FAMILIES:
        table_of(family, str(library))
    folder = orbax_trees.latest_step(Path(path))
    said = (orbax_trees.described_by(folder).custom_metadata or {}).get("lora")
    said = said if isinstance(said, Mapping) else {}
    tree = orbax_trees.load_factors(folder)
    failures = []
    for name in [library] if library is not None else FAMILIES[family]:
        dialect = LIBRARIES[name].dialect
        found = checkpoint_scale(said) if scale is None else scale
        try:
            adapter = trees.read_tree(
                tree,
                dialect,
                task=task or Path(os.path.abspath(path)).name,
                scale=1.0 if found is None and name == "gemma" else found,
                stack=STACK,
                source=source,
            )
            adapter = from_library(
                adapter, family, name, head_dim=head_dim or said.get("head_dim"), prefix=prefix
            )
        except HydraOptError as error:
            failures.append(error)
            continue
        config = {"task_type": "CAUSAL_LM"} | {k: said[k] for k in KEPT if isinstance(said.get(k), str)}
        return adapter.replace(config=config, digest=orbax_trees.tree_digest(tree))
    if len(failures) == 1 or any("no scale" in str(x) for x in failures):
        raise next((x for x in failures if "no scale" in str(x)), failures[0])
    raise HydraOptError(f"{source}: of no library of family {family!r}: {'; '.join(map(str, failures))}")


def checkpoint_scale(said: Mapping[str, Any]) -> float | None:
    """The scale in a checkpoint's metadata."""
    rank, alpha = said.get("lora_rank"), said.get("lora_alpha")
    return alpha / rank if isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float) else None


def write_trained(
    path: str | os.PathLike[str],
    adapter: Adapter,
    family: str,
    library: str,
    *,
    scale: float = 1.0,
    rank: int | None = None,
    head_dim: int | None = None,
    scan: bool = False,
    layers: int | None = None,
    fused: bool | None = None,
    prefix: str | None = None,
    step: int = 0,
    dtype: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write a checkpoint that a library restores into its model's LoRA parameters; return the rank.

    More than eight arguments: what a library's own model was made with, as its own loader asks for it.

    Args:
      path: the run's folder; the checkpoint is its subfolder `step`, for gemma the folder itself.
      adapter: modules with Hugging Face's names.
      family, library, head_dim, scan, layers, fused, prefix: see `model_maps.to_library`.
      scale: alpha / rank of the library's model; 1 for gemma, which has no scale.
      rank: of the library's model; None for that of the widest parameter. The ranks of modules that share a
        parameter add up.
      step: the checkpoint's number.
      dtype: of the factors; None for their original dtype.
      overwrite: replace an existing checkpoint.

    Returns:
      The rank: make the model with it and with alpha = rank * scale.

    Raises:
      HydraOptError: the path exists or cannot be written; see `model_maps.to_library`, `trees.write_tree`.
    """
    kept = table_of(family, library)[1]
    if library == "gemma" and scale != 1:
        raise HydraOptError(f"scale = {scale}: gemma has no scale: leave it at 1")
    found = to_library(
        adapter,
        family,
        library,
        head_dim=head_dim,
        scan=scan,
        layers=layers,
        fused=fused,
        prefix=prefix,
    )
    width = rank or max(x.shape[1] for x in found.a.values())
    known = {k: adapter.config[k] for k in KEPT if isinstance(adapter.config.get(k), str)}
    orbax_trees.write_checkpoint(
        Path(path) / str(step) if kept.numbered else path,
        found,
        kept.dialect,
        scale=scale,
        rank=width,
        dtype=dtype,
        item=kept.item,
        metadata={"lora": {"lora_rank": width, "lora_alpha": width * scale, "head_dim": head_dim, **known}},
        overwrite=overwrite,
    )
    return width
