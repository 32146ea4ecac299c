"""Adapters from wherever they are: one call for forty folders."""

import glob
from collections.abc import Iterable
from pathlib import Path

from hydraopt_jax.adapters import Adapter, check
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import check_same_base, read_adapter
from hydraopt_jax.formats.image_files import file_of
from hydraopt_jax.formats.peft_config import CONFIG_FILE
from hydraopt_jax.store.decoding import decode
from hydraopt_jax.store.store import Store


def read(
    sources: str | Path | Iterable[str | Path],
    *,
    any_base: bool = False,
    base_suffixes: tuple[str, ...] = (),
) -> list[Adapter]:
    """Read adapters of one base model.

    Args:
      sources: PEFT folders, LoRA files of diffusers or kohya, patterns of them (`"adapters/*"`, sorted by
        name), `hf:ORG/NAME` ids, each also as NAME=SOURCE for another name of the task; or one of these.
      any_base: accept adapters of differently named base models.
      base_suffixes: suffixes of a quantized mirror's base name to ignore.

    Returns:
      One `Adapter` per task.

    Raises:
      HydraOptError: a source that is no adapter, two tasks of one name, or different base models.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    out = []
    for source in given:
        text = str(source)
        folders = [x for x in sorted(glob.glob(text)) if (Path(x) / CONFIG_FILE).is_file() or file_of(x)]
        if glob.has_magic(text) and not Path(text).exists():
            if not folders:
                raise HydraOptError(f"{text}: no folder of that pattern holds an adapter")
            out += [read_adapter(x) for x in folders]
            continue
        task, sep, path = text.partition("=")
        named = bool(sep) and not Path(text).exists()
        out.append(read_adapter(path, task=task) if named else read_adapter(text))
    check_same_base(out, any_base=any_base, base_suffixes=base_suffixes)
    check(out)
    return out


def export(
    store: Store,
    task: str,
    path: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    rank: int | None = None,
    padded: bool = False,
    profile: str | None = None,
) -> dict[str, float]:
    """Write a task of a store as a PEFT folder.

    Args:
      store: in memory or on disk.
      task: its name.
      path: the folder.
      dtype: on disk; None for the one it came in.
      overwrite: replace what is there.
      rank, padded, profile: of the server that loads it, see `formats.server.fit`.

    Returns:
      Module -> relative squared error of its delta, of the modules that were cut to a rank.

    Raises:
      HydraOptError: no such task, what the profile refuses, or a folder that exists or cannot be written.
    """
    from hydraopt_jax.formats import server, write_adapter

    fitted = server.fit(decode(store, task), rank=rank, padded=padded, profile=profile)
    write_adapter(path, fitted.adapter, dtype=dtype, overwrite=overwrite)
    return dict(fitted.errors)
