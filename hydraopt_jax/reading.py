"""Read adapters from folders, files, patterns and the hub; export tasks of a store."""

import glob
from collections.abc import Iterable
from pathlib import Path

from hydraopt_jax.adapters import Adapter, check
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import check_same_base, read_adapter
from hydraopt_jax.formats.adapter_folder import PICKLE_FILE, WEIGHTS_FILE
from hydraopt_jax.formats.image_files import file_of
from hydraopt_jax.formats.peft_config import CONFIG_FILE
from hydraopt_jax.store.decoding import decode
from hydraopt_jax.store.folder import MANIFEST
from hydraopt_jax.store.store import Store


def holds_adapter(path: Path) -> bool:
    """Whether a path is an adapter, complete or not: a PEFT folder, or a LoRA file of diffusers or kohya."""
    names = (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE)
    return any((path / x).is_file() for x in names) or file_of(path) is not None


def inside(folder: Path) -> list[str]:
    """Paths of the adapters in a folder, sorted by name.

    Raises:
      HydraOptError: the folder has no adapter; the message says what it has instead.
    """
    found = [str(x) for x in sorted(folder.iterdir()) if holds_adapter(x)]
    if found:
        return found
    if (folder / MANIFEST).is_file():
        raise HydraOptError(
            f"{folder}: is a store, not an adapter: hydraopt export writes its adapters as folders"
        )
    deeper = next(folder.glob(f"*/*/{CONFIG_FILE}"), None)
    if deeper is not None:
        raise HydraOptError(
            f"{folder}: its adapters lie deeper, such as {deeper.parent}: name the folders that they lie in"
        )
    raise HydraOptError(
        f"{folder}: no adapter (no {CONFIG_FILE} in it, or in a folder in it): give a folder that PEFT's "
        "save_pretrained wrote, or a folder of such folders"
    )


# place of an adapter, and its task name; None for that of its folder
NamedPath = tuple[str, str | None]


def locate(given: str | Path | Iterable[str | Path], strict: bool = True) -> list[NamedPath]:
    """`(place, task name)` of each adapter; the name is None if the folder's name is to be used.

    Args:
      given: PEFT folders, folders of such folders, LoRA files of diffusers or kohya, patterns of all these
        (`"adapters/*"`), `hf:ORG/NAME` ids, each adapter also as NAME=SOURCE; or one of these. Those of a
        folder or a pattern are sorted by name.
      strict: raise here for a folder without adapters, instead of when it is read.

    Raises:
      HydraOptError: a pattern or a folder without any adapter, or a name for several.
    """
    out: list[NamedPath] = []
    for text in map(str, [given] if isinstance(given, str | Path) else given):
        path, task = Path(text), None
        if not path.exists():
            if glob.has_magic(text) and "=" not in text:
                found = [x for x in sorted(glob.glob(text)) if holds_adapter(Path(x))]
                if not found:
                    raise HydraOptError(f"{text}: no folder of that pattern holds an adapter")
                out += [(x, None) for x in found]
                continue
            name, sep, rest = text.partition("=")
            path, task, text = (Path(rest), name, rest) if sep else (path, None, text)
        if not path.is_dir() or holds_adapter(path):
            out.append((text, task))
            continue
        try:
            found = inside(path)
        except (HydraOptError, OSError) as error:
            if strict and isinstance(error, HydraOptError):
                raise
            # the reader reports what is wrong
            found = [text]
        if task is not None and len(found) > 1:
            raise HydraOptError(
                f"{task}={text}: one name for the {len(found)} adapters in it: leave the name out"
            )
        out += [(x, task) for x in found]
    return out


def read(
    sources: str | Path | Iterable[str | Path],
    *,
    any_base: bool = False,
    base_suffixes: tuple[str, ...] = (),
) -> list[Adapter]:
    """Adapters of one base model, read into memory.

    Args:
      sources: see `locate`: folders, folders of folders, files, patterns, ids of the hub.
      any_base: accept adapters of differently named base models.
      base_suffixes: suffixes of a quantized mirror's base name to ignore.

    Returns:
      One `Adapter` per task.

    Raises:
      HydraOptError: a source that is no adapter, two tasks of one name, or different base models.
    """
    out = [read_adapter(path, task=task) for path, task in locate(sources)]
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
    """Write one task of a store as a PEFT folder; return the error that a cut of the rank caused.

    Args:
      store: in memory or on disk.
      task: its name.
      path: the folder.
      dtype: on disk; None for that of the input adapter.
      overwrite: replace an existing folder.
      rank, padded, profile: of the server that loads it, see `formats.server.fit_server`.

    Returns:
      Module -> relative squared error of its delta, for modules whose rank was cut.

    Raises:
      HydraOptError: no such task, a tensor that the profile does not allow, or a folder that exists or cannot
        be written.
    """
    from hydraopt_jax.formats import server, write_adapter

    fitted = server.fit_server(decode(store, task), rank=rank, padded=padded, profile=profile)
    write_adapter(path, fitted.adapter, dtype=dtype, overwrite=overwrite)
    return dict(fitted.errors)
