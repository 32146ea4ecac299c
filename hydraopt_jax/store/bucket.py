"""A store in a bucket: one object per file of a folder, or one object for a single-file store.

New segments are written on this machine by the writers of folders and files, then uploaded. The last request
replaces the manifest (or the single object), on the condition that nobody has replaced it since it was read.
"""

import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hydraopt_jax import buckets, remote
from hydraopt_jax.errors import HydraOptError, damaged
from hydraopt_jax.store import checksums, folder, manifest, portable
from hydraopt_jax.store.arrays import run_reader
from hydraopt_jax.store.folder import ARRAY_BYTES, MANIFEST, SEGMENTS
from hydraopt_jax.store.segment_data import SegmentEntry
from hydraopt_jax.store.store import Store

# mark of a writer in the names of its segments: its start time in seconds and a random number
MARK = re.compile(r".*-([0-9a-f]{8})[0-9a-f]{8}")
# seconds after which a segment that no manifest names is taken for that of a dead writer
DEAD = 86400


def new_mark() -> str:
    """A mark that is unique to a writer, so that no two writers ever write the same segment name."""
    return f"{int(time.time()):08x}{secrets.token_hex(4)}"


def root_object(at: str) -> str:
    """The object whose replacement changes the store: the manifest or the single file."""
    return at if portable.named(at) else f"{at}/{MANIFEST}"


def state(at: str) -> buckets.StoredObject:
    """The version of a store's main object; absence has a version too."""
    return buckets.read_object(root_object(at), 0, 1)


def stamp(at: str) -> bytes | None:
    """A stamp that changes with the store; None if there is no store."""
    found = state(at)
    return found.version if found.data is not None else None


def read_manifest(at: str) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
      HydraOptError: no store there, no right to it, a damaged one, or one of another version.
    """
    if portable.named(at):
        return portable.read_header(source(at))[0]
    return manifest.parse_folder(at, manifest_data(at))


def manifest_data(at: str) -> bytes:
    """The manifest of a folder, in its stored bytes.

    Raises:
      HydraOptError: no store there.
    """
    data = buckets.read_object(root_object(at)).data
    if data is None:
        raise HydraOptError(f"{at}: no store there: look for a wrong name")
    return data


def source(at: str) -> remote.RemoteFile:
    """The single file as a version with partial reads."""
    read = buckets.one_version(at)
    first = buckets.read_object(at, 0, 1)
    if first.data is None:
        raise HydraOptError(f"{at}: no store there: look for a wrong name")
    return remote.RemoteFile(at, None, first.version.hex(), read)


def open_bucket(at: str) -> Store:
    """A store whose leaves are read on demand."""
    if portable.named(at):
        return portable.open_source(source(at))
    said = read_manifest(at)
    chunks = segment_keys(at)
    return folder.from_manifest(
        at, said, lambda row: reader(at, manifest.entry_from_row(row), row["arrays"], chunks)
    )


def segment_keys(at: str) -> dict[str, list[str]]:
    """Segment id -> keys of its objects, relative to the segment."""
    out: dict[str, list[str]] = {}
    for key in buckets.keys(f"{at}/{SEGMENTS}/"):
        name, _, rest = key.partition("/")
        out.setdefault(name, []).append(rest)
    return out


def reader(
    at: str, entry: SegmentEntry, arrays: Any, known: Mapping[str, list[str]]
) -> Callable[[int, int], np.ndarray]:
    """A function `(start, stop)` -> bytes of a segment's run, see `folder.reader`."""
    if entry.id not in known:
        raise damaged(at, f"segment {entry.id} is missing")
    most = ARRAY_BYTES * len(known[entry.id])
    inside = f"{SEGMENTS}/{entry.id}"
    return run_reader(at, entry, arrays, lambda name: buckets.spec(f"{at}/{inside}/{name}/"), most)


def check_files(at: str, said: Mapping[str, Any]) -> None:
    """Compare the objects of every segment with the checksum of the manifest.

    Raises:
      HydraOptError: an object of a segment differs from what was written.
    """
    known = segment_keys(at)
    for row in said["segments"]:
        place = f"{at}/{SEGMENTS}/{row['id']}"
        inside = tuple(f"{x}/" for x, _ in row["arrays"])
        found = hashlib.sha256()
        for key in sorted((x for x in known[row["id"]] if x.startswith(inside)), key=lambda x: x.split("/")):
            data = buckets.read_object(f"{place}/{key}").data or b""
            checksums.hash_file(found, key, len(data), [data])
        if found.hexdigest()[:16] != row["files"]:
            raise damaged(at, f"an object of segment {row['id']} does not match its checksum")


def size_in_bucket(at: str) -> int:
    """Bytes of the file, or of a folder's manifest and uncompressed arrays."""
    if portable.named(at):
        return portable.remote_bytes(source(at))
    data = manifest_data(at)
    said = manifest.parse_folder(at, data)
    return len(data) + sum(n for row in said["segments"] for _, n in row["arrays"])


def publish(written: Path, at: str, before: bytes) -> None:
    """Upload what was written on this machine, then replace the store unless another writer has replaced it.

    Args:
      written: the file, or a folder with the manifest and the new segments.
      at: the address.
      before: version of the `state` to replace; absence has one too.

    Raises:
      HydraOptError: another writer has replaced the store, or it cannot be written. The store is unchanged.
    """
    if portable.named(at):
        if not buckets.write(at, written.read_bytes(), before):
            raise overtaken(at)
        return
    said, names = marked(written)
    old = current_manifest(at)
    segments = f"{at}/{SEGMENTS}/"
    new: dict[str, Path] = {}
    for name, home in names.items():
        found = (x for x in sorted(home.rglob("*")) if x.is_file())
        new |= {f"{name}/{x.relative_to(home).as_posix()}": x for x in found}
    try:
        buckets.write_objects(segments, {key: x.read_bytes for key, x in new.items()})
    except BaseException:
        remove_new(at, new)
        raise
    # after an error of this request it may have been carried out: what it names must stay
    if not buckets.write(root_object(at), manifest.gzipped(manifest.to_text(said, at)), before):
        remove_new(at, new)
        raise overtaken(at)
    remove_unnamed(at, said, old)


def current_manifest(at: str) -> dict[str, Any]:
    """The manifest of a store, or one without segments where there is no store."""
    return read_manifest(at) if state(at).data is not None else {"segments": []}


def marked(written: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """The manifest of a folder to be uploaded, and its new segments: name -> folder.

    Their names get a mark, as the same job elsewhere gives the same names. The folder stays as it is.
    """
    said, mark = folder.read_manifest(written), new_mark()
    names = {}
    for row in said["segments"]:
        home = written / SEGMENTS / row["id"]
        if home.is_dir():
            row["id"] = row["id"] if MARK.fullmatch(row["id"]) else f"{row['id']}-{mark}"
            names[row["id"]] = home
    return said, names


def remove_new(at: str, new: Iterable[str]) -> None:
    """Remove uploaded objects of segments, unless the store names them, or it cannot be read."""
    with suppress(HydraOptError):
        named = {x["id"] for x in current_manifest(at)["segments"]}
        gone = [key for key in new if key.partition("/")[0] not in named]
        buckets.remove_objects(f"{at}/{SEGMENTS}/", gone)


def overtaken(at: str) -> HydraOptError:
    """The error for a store that another writer has replaced."""
    return HydraOptError(f"{at}: another process has changed it meanwhile: nothing was written: try again")


def remove_unnamed(at: str, said: Mapping[str, Any], old: Mapping[str, Any]) -> None:
    """Remove replaced segments, and segments that a dead writer left long ago."""
    named, replaced = ({x["id"] for x in y["segments"]} for y in (said, old))
    gone = []
    for name, rest in segment_keys(at).items():
        began = MARK.fullmatch(name)
        dead = began is not None and time.time() - int(began[1], 16) > DEAD
        if name not in named and (name in replaced or dead):
            gone += [f"{name}/{x}" for x in rest]
    buckets.remove_objects(f"{at}/{SEGMENTS}/", gone)


def uploads() -> Path:
    """The local folder of what is to be uploaded."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "hydraopt_jax" / "uploads"


def staging(at: str) -> Path:
    """The local folder in which a job makes a store for a bucket; the same in each run, to resume there."""
    return uploads() / hashlib.sha256(at.encode()).hexdigest()[:16] / at.split("/")[-1]
