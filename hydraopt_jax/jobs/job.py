"""A job: compress any number of PEFT folders into a store on disk.

Finished segments are kept in the store's folder (`place`), so that a killed job resumes and ends with the
same store. Processes of one job share the folder and divide the work; the first one writes the manifest.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydraopt_jax.collection import Collection
from hydraopt_jax.errors import HydraOptError, TooLarge, system_error
from hydraopt_jax.jobs.place import Folder, fingerprint, read_json, write_json
from hydraopt_jax.locks import locked
from hydraopt_jax.rate_control.search import Unmet
from hydraopt_jax.rate_control.work import IN_MEMORY, Job
from hydraopt_jax.store import bucket, files, folder, replacing
from hydraopt_jax.store.job_folder import IDENTITY, JOB, check_job, is_job
from hydraopt_jax.store.store import Store

# file beside a store to be uploaded, with the mark of the job that has made it
MAKER = ".maker.json"
# names of notes that mean that a step is finished
KEPT = ("group-", "pass-", "tensors-")
AGAIN = "; what was done is kept: make room and run the same command again"


@contextlib.contextmanager
def alone(path: Path, rank: int = 0) -> Iterator[None]:
    """A context in which the first process holds the lock of a store, from the check of its adapters on.

    A job that begins in it is removed at its end if no step is finished. An earlier one stays, unless
    `run_job` goes on with it.

    Raises:
      HydraOptError: another job holds the lock, the lock file cannot be written, or a folder of the user is
        in the place of the job's.
    """
    home = files.job_home(path)
    with locked(path, again=True) if rank == 0 else contextlib.nullcontext():
        if home != path:
            check_job(home, folder.unfinished)
        fresh = rank == 0 and not (home / JOB / IDENTITY).exists()
        try:
            yield
        except OSError as error:
            raise system_error(path, "written", error, AGAIN) from error
        finally:
            if fresh:
                clear_if_empty(path)


@contextlib.contextmanager
def entered(path: Path, rank: int) -> Iterator[None]:
    """A context in which the job of a store is this one.

    After an error its folder stays if some step is finished. It is removed if none is, or if another attempt
    cannot help.
    """
    try:
        yield
    except (TooLarge, Unmet):
        clear(path)
        raise
    except BaseException:
        if rank == 0:
            clear_if_empty(path)
        raise


def clear(path: Path) -> None:
    """Remove the files of an unfinished job; a store that existed before stays."""
    at = files.job_home(path)
    if (at / folder.MANIFEST).exists():
        folder.remove_unnamed(at, folder.read_manifest(at))
    elif folder.unfinished(at):
        folder.remove_unfinished(at)


def clear_if_empty(path: Path) -> None:
    """`clear`, unless a step is finished from which another attempt can resume."""
    job = files.job_home(path) / JOB
    if is_job(job) and not any(x.name.startswith(KEPT) for x in job.glob("*.json")):
        clear(path)


def run_job(
    path: Path,
    found: Collection,
    compress: Callable[..., Store],
    asked: Mapping[str, Any],
    job: Job = IN_MEMORY,
    *,
    overwrite: bool = False,
    limit: int | None = None,
    zstd: bool = True,
) -> Store | None:
    """The store on disk, after compressing a collection; None in all processes but the first.

    A store that waits to be uploaded to a bucket, see `files.staged`, is returned if this job has made it.

    Args:
      path: the store; `alone` holds its lock.
      found: the collection.
      compress: `(found, job=...)` -> store, such as `compression.compress`.
      asked: all inputs and options that the result depends on, JSON-able.
      job: its `place` is not used; a job that goes on keeps the provenance of its start.
      overwrite, limit, zstd: see `store.save`.

    Raises:
      HydraOptError: the folder belongs to another job, or the store that waits to be uploaded is that of
        another one; and every error of `compress`.
      TooLarge: see `store.save`.
    """
    processes = job.processes
    mark = fingerprint(found, asked)
    maker = path.with_name(MAKER) if path.parent.parent == bucket.uploads() else None
    if maker is not None and files.stamp(path) is not None:
        return made_before(path, maker, mark)
    files.check_output(path, overwrite)
    at = files.job_home(path)
    place = Folder(at, mark, zstd, processes.size > 1)
    if processes.rank == 0:
        place.enter()
        if maker is not None:
            write_json(maker, {"mark": mark})
        if job.provenance is not None and place.note("provenance") is None:
            place.keep_note("provenance", job.provenance)
    processes.wait("entered")
    if job.provenance is not None:
        # one date for all processes, and for resumed jobs
        job = job._replace(provenance=place.note("provenance"))
    with entered(path, processes.rank):
        store = compress(found, job=job._replace(place=place))
        # the first removes what the others may still be reading
        processes.wait("compressed")
        processes.leave()
        if processes.rank:
            return None
        if at == path:
            files.check_output(path, True)
            replacing.write_folder(path, store, limit, zstd, place.rows())
        else:
            files.save(path, store, overwrite=True, limit=limit)
            clear(path)
    return files.open(path)


def made_before(path: Path, maker: Path, mark: str) -> Store:
    """The store at a path, which waits to be uploaded.

    Raises:
      HydraOptError: the file `maker` does not say that the job with this mark has made it.
    """
    if not maker.exists() or read_json(maker) != {"mark": mark}:
        raise HydraOptError(
            f"{path}: is a store of a job with other adapters or options that was not uploaded: upload it "
            "with hydraopt unpack or pack if it is wanted, and delete the folder"
        )
    return files.open(path)
