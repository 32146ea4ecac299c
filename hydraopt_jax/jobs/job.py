"""A job: PEFT folders in, a store on disk out, whatever their number.

Everything that is done is kept in the store's folder (`place`), so that a killed job goes on where it stopped
and ends with the same store. Processes of one job share the folder and divide the work; the first one writes
the manifest.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydraopt_jax.collection import Collection
from hydraopt_jax.errors import HydraOptError, TooLarge
from hydraopt_jax.jobs.place import Folder, fingerprint
from hydraopt_jax.locks import locked
from hydraopt_jax.rate_control.search import Unmet
from hydraopt_jax.rate_control.work import Processes
from hydraopt_jax.store import files, folder
from hydraopt_jax.store.store import Store

# names of notes that say that something is done
KEPT = ("group-", "pass-", "tensors-")


def disk_error(path: Path, error: OSError) -> HydraOptError:
    """One line for a file system that does not take what is written."""
    return HydraOptError(
        f"{path}: cannot be written: {error.strerror or error}; what was done is kept: make room and run the "
        "same command again"
    )


@contextlib.contextmanager
def alone(path: Path, rank: int = 0) -> Iterator[None]:
    """Hold the lock of all work on a store, from the first look at its adapters on; the first process does.

    What a job has begun stays where something is done, and is removed where nothing is, or where no other try
    mends what is wrong.

    Raises:
      HydraOptError: another job works on it, or there is no place to say so.
    """
    with locked(path, again=True) if rank == 0 else contextlib.nullcontext():
        try:
            yield
        except (TooLarge, Unmet):
            clear(path)
            raise
        except OSError as error:
            if rank == 0:
                clear_if_empty(path)
            raise disk_error(path, error) from error
        except BaseException:
            if rank == 0:
                clear_if_empty(path)
            raise


def clear(path: Path) -> None:
    """Remove what a job has begun; a store that was there before stays."""
    at = files.job_home(path)
    if (at / folder.MANIFEST).exists():
        folder.remove_unnamed(at, folder.read_manifest(at))
    elif at.is_dir():
        (at / folder.NEW).touch()
        folder.remove_unnamed(at, None)
        shutil.rmtree(at / folder.SEGMENTS, ignore_errors=True)
        shutil.rmtree(at, ignore_errors=True)


def clear_if_empty(path: Path) -> None:
    """`clear` where nothing is done that another try could go on with."""
    job = files.job_home(path) / folder.JOB
    if job.is_dir() and not any(x.name.startswith(KEPT) for x in job.glob("*.json")):
        clear(path)


def run(
    path: Path,
    found: Collection,
    compress: Callable[..., Store],
    asked: Mapping[str, Any],
    *,
    overwrite: bool = False,
    limit: int | None = None,
    zstd: bool = True,
    processes: Processes | None = None,
    provenance: Mapping[str, Any] | None = None,
    **common: Any,
) -> Store | None:
    """Compress a collection into a store on disk.

    Args:
      path: the store; `alone` holds its lock.
      found: the collection.
      compress: `(found, place=..., processes=..., **common)` -> store, such as `compression.compress`.
      asked: all that the result depends on, JSON-able.
      overwrite, limit, zstd: as `store.save`.
      processes: who takes part.
      provenance: as in `compression.compress`; that of the job's begin, where it goes on.
      **common: for `compress`.

    Returns:
      The store as it lies on disk; None in all processes but the first.

    Raises:
      HydraOptError: a folder that is another job's, or whatever `compress` raises.
      TooLarge: as `store.save`.
    """
    processes = processes or Processes()
    files.check_target(path, overwrite)
    at = files.job_home(path)
    place = Folder(at, fingerprint(found, asked), zstd, processes.size > 1)
    if processes.rank == 0:
        place.enter()
        if provenance is not None and place.note("provenance") is None:
            place.keep_note("provenance", provenance)
    processes.wait("entered")
    if provenance is not None:
        # one day for all processes, and for those that go on
        common["provenance"] = place.note("provenance")
    store = compress(found, place=place, processes=processes, **common)
    # the first removes what the others may still be reading
    processes.wait("compressed")
    processes.leave()
    if processes.rank:
        return None
    if at == path:
        files.check_target(path, True)
        files.write_folder(path, store, limit, zstd, place.rows())
    else:
        files.save(path, store, overwrite=True, limit=limit)
        clear(path)
    return files.open(path)
