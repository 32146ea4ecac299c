"""The folder of a store that is being made. Finished segments are written to their final place.

    STORE/segments/MARK-NAME/       segments, as in any store
    STORE/job/job.json              identity of the job
    STORE/job/NAME.json             notes on finished steps

A former store stays valid in the folder until the new manifest replaces the old one.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydraopt_jax.collection import Collection
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.jobs.writer import Writer
from hydraopt_jax.store import folder, job_folder, manifest, segment_data
from hydraopt_jax.store.store import Segment

SCHEMA = 3


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    new = job_folder.new_name(path)
    with new.open("w") as sink:
        # `dump` writes number by number, in Python
        sink.write(json.dumps(content))
        sink.flush()
        os.fsync(sink.fileno())
    os.replace(new, path)


def read_json(path: Path) -> Any:
    """The content of a file of `write_json`.

    Raises:
      HydraOptError: the file is incomplete.
    """
    try:
        # a path in it may have bytes that are no text
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise HydraOptError(
            f"{path}: is incomplete ({error}): delete {path.parent.parent} and start again"
        ) from None


def fingerprint(found: Collection, asked: Mapping[str, Any]) -> str:
    """A fingerprint of a job's inputs and options; a job resumes only one with the same fingerprint."""
    rows = [[x.task, x.source, x.digest, x.stamp[0], dict(x.config)] for x in found.cards]
    said = {"asked": dict(asked), "schema": SCHEMA, "adapters": rows}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


class Folder:
    """A `rate_control.work.Place` in a store's folder.

    Args:
      path: of the store.
      mark: of the job, see `fingerprint`.
      zstd: compress plain factors.
      shared: whether several processes use it; each then writes its segments through a child process.
    """

    def __init__(self, path: Path, mark: str, zstd: bool = True, shared: bool = False) -> None:
        self.path: Path | None = path
        self.store, self.mark, self.zstd = path, mark, zstd
        self.scratch = path / job_folder.JOB
        self.writer = Writer(path, self.scratch) if shared else None

    def enter(self) -> None:
        """Start or resume the job.

        Raises:
          HydraOptError: the folder belongs to another job.
        """
        job_folder.check_job(self.scratch)
        file = self.scratch / job_folder.IDENTITY
        if file.exists():
            if read_json(file) != {"mark": self.mark}:
                # what must not be lost is a store that the job was to replace
                old = (self.store / folder.MANIFEST).exists()
                raise HydraOptError(
                    f"{self.scratch if old else self.store}: is an unfinished job with other adapters or "
                    "options: delete it, or choose another --out"
                )
            return
        self.scratch.mkdir(parents=True, exist_ok=True)
        write_json(file, {"mark": self.mark})

    def _row(self, name: str) -> Path:
        return self.scratch / f"{name}.segment.json"

    @functools.cached_property
    def named(self) -> frozenset[str]:
        """Segments of the store that is there: they stay until another manifest replaces it."""
        there = (self.store / folder.MANIFEST).exists()
        return (
            frozenset(x["id"] for x in folder.read_manifest(self.store)["segments"]) if there else frozenset()
        )

    def _id(self, name: str) -> str:
        return segment_data.free_id(f"{self.mark[:8]}-{name}", self.named)

    def segment(self, name: str) -> Segment | None:
        """See `Place`."""
        if not self._row(name).exists():
            return None
        row = read_json(self._row(name))
        entry = manifest.entry_from_row(row)
        read = folder.reader(self.store, entry, row["arrays"])
        return segment_data.open_segment(self.store, entry, read, tuple(row["names"]), frozenset())

    def keep(self, name: str, segment: Segment) -> None:
        """See `Place`."""
        own = self._id(name)
        (self.store / folder.SEGMENTS).mkdir(parents=True, exist_ok=True)
        if self.writer is None:
            row = folder.write_segment(self.store, segment, name=own, zstd=self.zstd)
        else:
            row = self.writer.write(segment, own, self.zstd)
        write_json(self._row(name), {**row, "names": segment.tasks})

    def drop(self, name: str) -> None:
        """See `Place`."""
        self._row(name).unlink(missing_ok=True)
        folder.remove_segment(self.store, self._id(name))

    def note(self, name: str) -> Mapping[str, Any] | None:
        """See `Place`."""
        file = self.scratch / f"{name}.json"
        return read_json(file) if file.exists() else None

    def keep_note(self, name: str, note: Mapping[str, Any]) -> None:
        """See `Place`."""
        write_json(self.scratch / f"{name}.json", note)

    def rows(self) -> dict[str, Any]:
        """Segment id -> manifest row of every segment that is in its final place."""
        found = (read_json(x) for x in self.scratch.glob("*.segment.json"))
        return {x["id"]: x for x in found}
