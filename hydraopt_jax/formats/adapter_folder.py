"""Atomic writing of an adapter's folder: completely or not at all."""

import contextlib
import hashlib
import shutil
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hydraopt_jax.errors import HydraOptError, exists
from hydraopt_jax.formats.peft_config import CONFIG_FILE
from hydraopt_jax.formats.tensor_files import write_tensors

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"


def folder_name(task: str) -> str:
    """A folder name for a task: safe in any file system, different for different tasks.

    Every character outside a safe set is percent-encoded. The name is never empty, never hidden, and never a
    path of several parts.

    >>> folder_name("legal"), folder_name("a/b"), folder_name("..")
    ('legal', 'a%2Fb', '%2E.')
    """
    name = urllib.parse.quote(task, safe=" +=@,", errors="surrogatepass")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > 200:
        name = f"{name[:120]}%{hashlib.sha256(name.encode()).hexdigest()}"
    return name or "%"


def weights_file(folder: Path) -> Path:
    """The weights file in an adapter's folder."""
    for name in (WEIGHTS_FILE, PICKLE_FILE):
        if (folder / name).is_file():
            return folder / name
    raise HydraOptError(f"{folder / WEIGHTS_FILE}: no such file: the folder has no adapter weights")


def check_output(path: Path, overwrite: bool) -> None:
    if not (path.exists() or path.is_symlink()):
        return
    if not overwrite:
        raise exists(path)
    if not path.is_dir():
        raise HydraOptError(f"{path}: is not a folder, so it is not overwritten: choose another path")
    if any(path.iterdir()) and not (path / CONFIG_FILE).is_file():
        raise HydraOptError(
            f"{path}: is not an adapter's folder, so it is not overwritten: choose another path"
        )


@contextlib.contextmanager
def parents(path: Path) -> Iterator[None]:
    """A context that makes a path's missing parents, and removes them again if the body fails."""
    missing = [x for x in path.parents if not x.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _swap(new: Path, path: Path) -> None:
    """Replace a folder by a finished one, keeping files that do not belong to an adapter."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", suffix=".old", dir=path.parent))
    old = aside / "old"
    try:
        path.rename(old)
        new.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        aside.rmdir()
        raise
    for child in old.iterdir():
        if child.name not in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE):
            child.rename(path / child.name)
    shutil.rmtree(aside)


def replace_folder(path: Path, text: str, tensors: dict[str, np.ndarray]) -> None:
    """Put a configuration and tensors at a path whose parent is there, in the place of what is there."""
    work = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent))
    try:
        new = work / "new"
        new.mkdir()  # with the user's usual permissions, unlike mkdtemp's own folder
        (new / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        write_tensors(new / WEIGHTS_FILE, tensors, {"format": "pt"})
        if path.exists():
            _swap(new, path)
        else:
            new.rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
