"""A job: its processes, its progress, and the place of its segments."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from hydraopt_jax.store.store import Segment


class Processes(NamedTuple):
    """The processes of a job: `rank` of this one, `size`, and functions to wait for others and to leave."""

    rank: int = 0
    size: int = 1
    wait: Callable[[str], None] = lambda name: None
    leave: Callable[[], None] = lambda: None


class Progress(NamedTuple):
    """Callbacks for the progress of a job.

    Attributes:
      start: called once with the number of modules and the number already done.
      step: called with the number of modules just done.
      read: called with the number of bytes just read.
    """

    start: Callable[[int, int], None] = lambda total, done: None
    step: Callable[[int], None] = lambda done: None
    read: Callable[[int], None] = lambda count: None


class Place(Protocol):
    """Where segments and their notes are kept during a job; existing ones are not made again.

    Attributes:
      path: of the store that is being made; None for one in memory.
      scratch: a folder for temporary files.
    """

    @property
    def path(self) -> Path | None:
        """See above."""

    @property
    def scratch(self) -> Path:
        """See above."""

    def segment(self, name: str) -> Segment | None:
        """A kept segment, as read from the place; None if there is none."""

    def keep(self, name: str, segment: Segment) -> None:
        """Keep a segment."""

    def drop(self, name: str) -> None:
        """Remove what was kept under a name, to free its bytes."""

    def note(self, name: str) -> Mapping[str, Any] | None:
        """A kept note; None if there is none."""

    def keep_note(self, name: str, note: Mapping[str, Any]) -> None:
        """Keep a JSON-able note, after its segment, so that a note means that the segment is finished."""


class Job(NamedTuple):
    """How a compression runs, whatever it is to reach.

    Attributes:
      place: where segments are kept; None for memory.
      progress: callbacks.
      processes: who takes part; all return the same store.
      left_out: adapters that were skipped, with the reason, for the report.
      provenance: how the store is made, for the report; None for no entry.
    """

    place: Place | None = None
    progress: Progress = Progress()
    processes: Processes = Processes()
    left_out: Mapping[str, str] | None = None
    provenance: Mapping[str, Any] | None = None

    @property
    def said(self) -> dict[str, Any]:
        """What the report says of it."""
        rows = {"left_out": self.left_out, "provenance": self.provenance}
        return {k: dict(v) for k, v in rows.items() if v}


IN_MEMORY = Job()
"""A job of this process alone, whose segments are kept in memory."""


class Memory:
    """A place in memory."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.segments: dict[str, Segment] = {}
        self.notes: dict[str, Mapping[str, Any]] = {}
        self._scratch: Path | None = None

    @property
    def scratch(self) -> Path:
        """See `Place`."""
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="hydraopt-"))
            # gone with the place; a TemporaryDirectory that nobody closes warns
            weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        return self._scratch

    def segment(self, name: str) -> Segment | None:
        """See `Place`."""
        return self.segments.get(name)

    def keep(self, name: str, segment: Segment) -> None:
        """See `Place`."""
        loaded = {k: np.asarray(v) for k, v in segment.leaves.items()}
        self.segments[name] = segment.replace(leaves=loaded)

    def drop(self, name: str) -> None:
        """See `Place`."""
        self.segments.pop(name, None)

    def note(self, name: str) -> Mapping[str, Any] | None:
        """See `Place`."""
        return self.notes.get(name)

    def keep_note(self, name: str, note: Mapping[str, Any]) -> None:
        """See `Place`."""
        self.notes[name] = note
