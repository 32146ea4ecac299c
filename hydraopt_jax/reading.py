"""Read adapters from folders, files, patterns and the hub; export tasks of a store."""

import glob
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from hydraopt_jax.adapters import Adapter, check
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import check_same_base, read_adapter
from hydraopt_jax.formats.adapter_folder import PICKLE_FILE, WEIGHTS_FILE
from hydraopt_jax.formats.image_files import WEIGHTS_FILE as IMAGE_FILE
from hydraopt_jax.formats.image_files import file_of
from hydraopt_jax.formats.lora_keys import parse_key
from hydraopt_jax.formats.peft import ADDRESS
from hydraopt_jax.formats.peft_config import CONFIG_FILE
from hydraopt_jax.formats.tensor_files import names_and_metadata
from hydraopt_jax.store import portable
from hydraopt_jax.store.decoding import decode
from hydraopt_jax.store.folder import MANIFEST
from hydraopt_jax.store.store import Store


def holds_adapter(path: Path) -> bool:
    """Whether a path is an adapter, complete or not: a PEFT folder, or a LoRA file of diffusers or kohya."""
    if any((path / x).is_file() for x in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE)):
        return True
    file = file_of(path)
    # a store may be beside the files that it was made of
    return file is not None and portable.KEY not in names_and_metadata(file)[1]


def among(paths: Iterable[str | Path], source: str) -> list[str]:
    """Those of some paths that are adapters.

    Raises:
      HydraOptError: others are folders of adapters, which would be left out.
    """
    found: list[str] = []
    others: list[Path] = []
    for x in paths:
        if holds_adapter(Path(x)):
            found.append(str(x))
        else:
            others.append(Path(x))
    deeper = next((y for x in others if not x.name.startswith(".") for y in adapters_below(x)), None)
    if deeper is not None:
        raise HydraOptError(
            f"{source}: {'some of ' if found else ''}its adapters lie deeper, such as {deeper}: name the "
            "folders that they lie in"
        )
    return found


def adapters_below(folder: Path) -> Iterator[Path]:
    """Adapters in a folder: PEFT folders, then LoRA files, each sorted by name.

    Hidden folders are what a killed writer left.
    """
    yield from (x.parent for x in sorted(folder.glob(f"[!.]*/{CONFIG_FILE}")))
    for x in sorted((*folder.glob("*.safetensors"), *folder.glob(f"[!.]*/{IMAGE_FILE}"))):
        # any file has the ending of a LoRA file, such as a base model's
        if any(map(parse_key, names_and_metadata(x)[0])):
            yield x


def check_alone(folder: Path) -> None:
    """Raise if adapters lie in an adapter's folder, where PEFT saves all but "default".

    A trainer's `checkpoint-N` is an earlier state of the adapter, and no other one.
    """
    below = (x.parent for x in sorted(folder.glob(f"[!.]*/{CONFIG_FILE}")))
    other = next((x for x in below if not re.fullmatch(r"checkpoint-\d+", x.name)), None)
    if other is not None:
        raise HydraOptError(
            f"{folder}: other adapters lie in this adapter's folder, such as {other}: name each folder, this "
            f"one as NAME={folder}"
        )


def inside(folder: Path) -> list[str]:
    """Paths of the adapters in a folder, sorted by name.

    Raises:
      HydraOptError: the folder has no adapter; the message says what it has instead.
    """
    found = among(sorted(folder.iterdir()), str(folder))
    if found:
        return found
    if (folder / MANIFEST).is_file():
        raise HydraOptError(
            f"{folder}: is a store, not an adapter: hydraopt export writes its adapters as folders"
        )
    raise HydraOptError(
        f"{folder}: no adapter (no {CONFIG_FILE} in it, or in a folder in it): give a folder that PEFT's "
        "save_pretrained wrote, or a folder of such folders"
    )


def split_name(text: str) -> tuple[str, str] | None:
    """Name and source of a NAME=SOURCE, both of which may have "="; None for a source alone."""
    parts = text.split("=")
    pairs = [("=".join(parts[:n]), "=".join(parts[n:])) for n in range(1, len(parts))]
    for name, source in pairs:
        if source.startswith("hf:") or (source and Path(source).exists()):
            return name, source
    # of what is not there a slash is rather of a path than of a name
    return pairs[0] if pairs and "/" not in pairs[0][0] else None


# place of an adapter, and its task name; None for that of its folder
NamedPath = tuple[str, str | None]


def locate(given: str | Path | Iterable[str | Path], strict: bool = True) -> list[NamedPath]:
    """`(place, task name)` of each adapter; the name is None if the folder's name is to be used.

    Args:
      given: PEFT folders, folders of such folders, LoRA files of diffusers or kohya, patterns of all these
        (`"adapters/*"`), `hf:ORG/NAME` ids, each adapter also as NAME=SOURCE; or one of these. Those of a
        folder or a pattern are sorted by name. A path that exists, a pattern that matches, and a name
        before a path that exists may have "=".
      strict: raise here for a folder without adapters, instead of when it is read.

    Raises:
      HydraOptError: a pattern or a folder without any adapter, or with some that would be left out; or a name
        for several.
    """
    out: list[NamedPath] = []
    for text in map(str, [given] if isinstance(given, str | Path) else given):
        path, task = Path(text), None
        if not path.exists() and not ADDRESS.match(text):
            matched = sorted(glob.glob(text)) if glob.has_magic(text) else []
            named = None if matched else split_name(text)
            if named is not None:
                task, text = named
                path = Path(text)
            elif glob.has_magic(text):
                found = among(matched, text)
                if not found:
                    raise HydraOptError(f"{text}: no folder of that pattern holds an adapter")
                out += [(x, None) for x in found]
                continue
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
    for place, task in out:
        if task is None:
            check_alone(Path(place))
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
