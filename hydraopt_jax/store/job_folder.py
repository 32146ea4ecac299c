"""The folder `job` in that of a store: notes of an unfinished job, told from a folder of the user."""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hydraopt_jax.errors import HydraOptError

# its name, and its name while it is being removed
JOB, GONE = "job", ".job.gone"
# identity of the job
IDENTITY = "job.json"
MARK = re.compile("[0-9a-f]{64}")
# names of a process's files until they are complete
NEW = re.compile(r"\..*\.json\.\d+\.new")


def new_name(path: Path) -> Path:
    """The name of a JSON file until it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.new")


def is_written(file: Path) -> bool:
    """Whether a file is one that a job begins with: its identity, or what a process has checked."""
    try:
        said = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(said, dict):
        return False
    if file.name == IDENTITY:
        return said.keys() == {"mark"} and MARK.fullmatch(str(said["mark"])) is not None
    return said.keys() == {"known", "bad"} and all(isinstance(x, dict) for x in said.values())


def is_begun(path: Path) -> bool:
    """Whether a folder has a file that only a job writes."""
    return any(map(is_written, (path / IDENTITY, *path.glob("checked-*.json"))))


def is_job(path: Path) -> bool:
    """Whether a folder is that of a job, or has nothing of the user in it."""
    return path.is_dir() and (is_begun(path) or all(NEW.fullmatch(x.name) for x in path.iterdir()))


def check_job(path: Path, is_ours: Callable[[Path], bool] = is_job) -> None:
    """Raise if a folder of the user is where a job needs one."""
    if path.exists() and not is_ours(path):
        raise HydraOptError(
            f"{path}: is no folder of a job, which needs this name: move it, or choose another --out"
        )


def remove_renamed(path: Path, gone: Path) -> None:
    """Remove a folder after a rename: a partly removed one would be taken for a whole one."""
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):
        os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_job(path: Path) -> None:
    """Remove the folder of a job, if there is one, from that of a store."""
    shutil.rmtree(path / GONE, ignore_errors=True)
    if is_job(path / JOB):
        remove_renamed(path / JOB, path / GONE)
