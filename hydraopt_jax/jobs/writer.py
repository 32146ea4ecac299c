"""A child process that writes segments for one of several processes of a job.

Orbax makes all processes of a JAX program save one checkpoint together. A child is a program with one
process, so each process of a job can write its own segments.
"""

import contextlib
import functools
import multiprocessing
import os
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.store import folder, segment_data
from hydraopt_jax.store.segment_data import SegmentEntry
from hydraopt_jax.store.store import Segment

# variables that would make JAX treat the child as a process of the job
CLUSTER = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def write_run(path: Path, segment: Segment) -> SegmentEntry:
    """Write a segment's run as a file, and return its entry."""
    found: list[SegmentEntry] = []
    with path.open("wb") as sink:
        for piece in segment_data.run_pieces(segment, found.append):
            sink.write(piece)
    return found[0]


class Writer:
    """Writes segments into a store's folder, as `folder.write_segment` does, in a child process.

    Args:
      store: the folder.
      scratch: folder for a segment until the child has written it.
    """

    def __init__(self, store: Path, scratch: Path) -> None:
        self.store, self.scratch = store, scratch
        self.turn = threading.Lock()

    @functools.cached_property
    def child(self) -> Connection:
        """The child's pipe. The child starts on first use, and ends when this end is closed."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        context.Process(target=serve, args=(there,), daemon=True).start()
        there.close()
        return here

    def write(self, segment: Segment, name: str, zstd: bool) -> dict[str, Any]:
        """Write a segment and return its manifest row, see `folder.write_segment`.

        Raises:
          OSError: the write failed.
          HydraOptError: the child has died.
        """
        run = self.scratch / f"{name}.run"
        with self.turn:
            try:
                entry = write_run(run, segment)
                try:
                    self.child.send((self.store, run, entry, segment.tasks, name, zstd))
                    said = self.child.recv()
                except (EOFError, ConnectionError):
                    raise HydraOptError(
                        f"{self.store}: the process that writes segments has ended: what is done is kept; "
                        "start all processes again to go on"
                    ) from None
            finally:
                run.unlink(missing_ok=True)
        if isinstance(said, Exception):
            raise said
        return said


def answer(
    store: Path, run: Path, entry: SegmentEntry, tasks: Sequence[str], name: str, zstd: bool
) -> dict[str, Any] | Exception:
    """The manifest row of the segment in a file of `write_run`, written into the store; or what failed."""

    def read(start: int, stop: int) -> np.ndarray:
        return np.fromfile(run, np.uint8, stop - start, offset=start)

    try:
        segment = segment_data.open_segment(store, entry, read, tuple(tasks), frozenset())
        return folder.write_segment(store, segment, name=name, zstd=zstd)
    except (OSError, HydraOptError) as error:
        return error


def serve(pipe: Connection) -> None:
    """Answer requests until the other end is closed; all output goes to standard error."""
    for name in CLUSTER:
        os.environ.pop(name, None)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.dup2(2, 1)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(answer(*pipe.recv()))
