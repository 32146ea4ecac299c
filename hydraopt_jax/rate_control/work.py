"""Who does a piece of work, what it tells meanwhile, and where it keeps what is done."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from hydraopt_jax.store.store import Segment


class Processes(NamedTuple):
    """Who takes part in a job: process `rank` of `size`, how it waits for the others, and leaves."""

    rank: int = 0
    size: int = 1
    wait: Callable[[str], None] = lambda name: None
    leave: Callable[[], None] = lambda: None


class Progress(NamedTuple):
    """What a job tells while it works.

    Attributes:
      start: called once with modules in all and modules already done.
      step: called with modules just done.
      read: called with bytes just read.
    """

    start: Callable[[int, int], None] = lambda total, done: None
    step: Callable[[int], None] = lambda done: None
    read: Callable[[int], None] = lambda count: None


class Place(Protocol):
    """Where segments and notes on them are kept while a job works; what is there is not made again.

    Attributes:
      path: of the store that is being made, None for one in memory.
      scratch: a folder for files that are gone when the work is done.
    """

    @property
    def path(self) -> Path | None:
        """See above."""

    @property
    def scratch(self) -> Path:
        """See above."""

    def segment(self, name: str) -> Segment | None:
        """A segment that was kept, as it is read from there; None where there is none."""

    def keep(self, name: str, segment: Segment) -> None:
        """Keep a segment."""

    def drop(self, name: str) -> None:
        """Make room."""

    def note(self, name: str) -> Mapping[str, Any] | None:
        """A note that was kept; None where there is none."""

    def keep_note(self, name: str, note: Mapping[str, Any]) -> None:
        """Keep a note, JSON-able; after its segment, so that a note says that something is done."""


class Memory:
    """A place in memory, which forgets everything with its process."""

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
