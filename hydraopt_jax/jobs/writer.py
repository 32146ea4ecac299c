"""A child process that writes segments for one of several processes of a job.

Orbax makes all processes of a JAX program save one checkpoint together. A child is a program with one
process, so each process of a job can write its own segments. It reads one JSON object per line and answers
with one.
"""

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.store import folder, segment_data
from hydraopt_jax.store.segment_data import SegmentEntry
from hydraopt_jax.store.store import Segment

# variables that would make JAX treat the child as a process of the job, or claim its devices
CLUSTER = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def write_run(path: Path, segment: Segment) -> SegmentEntry:
    """Write a segment's run as a file, and return its entry."""
    found: list[SegmentEntry] = []
    with path.open("wb") as sink:
        for piece in segment_data.run_pieces(segment, found.append):
            sink.write(piece)
    return found[0]


def open_run(store: Path, path: Path, entry: SegmentEntry, tasks: Sequence[str]) -> Segment:
    """The segment that `write_run` wrote."""

    def read(start: int, stop: int) -> np.ndarray:
        return np.fromfile(path, np.uint8, stop - start, offset=start)

    return segment_data.open_segment(store, entry, read, tuple(tasks), frozenset())


class Writer:
    """Writes segments into a store's folder, as `folder.write_segment` does, in a child process.

    Args:
      store: the folder.
      scratch: folder for a segment until the child has written it.
    """

    def __init__(self, store: Path, scratch: Path) -> None:
        self.store, self.scratch = store, scratch
        self.child: subprocess.Popen[str] | None = None
        self.turn = threading.Lock()

    def start(self) -> "subprocess.Popen[str]":
        """The child, started on first use; it ends when its input is closed."""
        if self.child is None:
            environment = {k: v for k, v in os.environ.items() if k not in CLUSTER}
            self.child = subprocess.Popen(
                [sys.executable, "-m", "hydraopt_jax.jobs.writer"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment | {"JAX_PLATFORMS": "cpu"},
            )
            weakref.finalize(self, end, self.child)
        return self.child

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
                asked = {"store": str(self.store), "run": str(run), "entry": entry, "tasks": segment.tasks}
                child = self.start()
                assert child.stdin is not None
                assert child.stdout is not None
                try:
                    print(json.dumps({**asked, "name": name, "zstd": zstd}), file=child.stdin, flush=True)
                    line = child.stdout.readline()
                except BrokenPipeError:
                    line = ""
                if not line:
                    raise HydraOptError(
                        f"{self.store}: the process that writes segments ended with status {child.wait()}: "
                        "what is done is kept; start all processes again to go on"
                    )
            finally:
                run.unlink(missing_ok=True)
        said = json.loads(line)
        if "errno" in said:
            raise OSError(said["errno"], os.strerror(said["errno"]), str(self.store))
        if "error" in said:
            raise HydraOptError(said["error"])
        return said["row"]


def end(child: "subprocess.Popen[str]") -> None:
    """Let the child end, and wait for it."""
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            stream.close()
    child.wait()


def respond(asked: dict[str, Any]) -> dict[str, Any]:
    """The child's answer to one request."""
    identity, size, header, sha = asked["entry"]
    entry = SegmentEntry(identity, size, (header[0], header[1]), sha)
    store = Path(asked["store"])
    try:
        segment = open_run(store, Path(asked["run"]), entry, asked["tasks"])
        return {"row": folder.write_segment(store, segment, name=asked["name"], zstd=asked["zstd"])}
    except OSError as error:
        return {"errno": error.errno or 5}
    except HydraOptError as error:
        return {"error": str(error)}


def main() -> None:
    """Answer requests until the input ends; all other output goes to standard error."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for line in sys.stdin:
            print(json.dumps(respond(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
