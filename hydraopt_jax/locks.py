"""A lock that admits one writer per path."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hydraopt_jax.errors import HydraOptError, system_error


@contextmanager
def locked(path: Path, again: bool = False, label: str | None = None) -> Iterator[None]:
    """Hold the lock file of a path, `.NAME.lock` beside it, and remove the file afterwards.

    Args:
      path: what is written.
      again: allow a lock that this thread already holds.
      label: name of what is written, for errors; None for the path.

    Raises:
      HydraOptError: another process or another writer in this one holds it, or the place cannot be written.
    """
    file, named = path.with_name(f".{path.name}.lock"), label or path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, timeout=0, is_singleton=again)
        lock.acquire()
    except Timeout:
        raise HydraOptError(f"{named}: another process is writing it: try again when it is done") from None
    except OSError as error:
        raise system_error(named, "written", error) from error
    try:
        yield
    except OSError as error:
        raise system_error(named, "written", error) from error
    finally:
        if lock.lock_counter == 1:
            # a process that opened it meanwhile sees that it is gone, and opens a new one
            with suppress(OSError):
                file.unlink()
        lock.release()
