"""Stores: opened, saved, changed, verified. A folder, or one `.safetensors` file, by its name.

Both may be in a bucket (`bucket`). A file may be elsewhere (`remote`): it is then read, in part, and not
changed.
"""

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydraopt_jax import buckets, network, remote
from hydraopt_jax.deferred import Deferred, bytes_of
from hydraopt_jax.errors import HydraOptError, TooLarge
from hydraopt_jax.locks import locked
from hydraopt_jax.store import bucket, folder, manifest, portable, segment_data
from hydraopt_jax.store.decoding import decode_terms
from hydraopt_jax.store.folder import MANIFEST
from hydraopt_jax.store.store import Segment, Store, select

Path_ = str | os.PathLike


def is_file(path: Path_) -> bool:
    """Whether a path is that of a portable file, here or elsewhere."""
    return remote.is_address(path) or portable.named(path)


def located(path: Path_) -> Path | str:
    """The absolute path of a store that can be written, or its address in a bucket.

    Raises:
      HydraOptError: it is elsewhere.
    """
    if remote.is_address(path):
        raise HydraOptError(
            f"{network.redact(str(path))}: only read, never changed there: pull it, change it, and push it"
        )
    return buckets.address(str(path)) if buckets.is_bucket(path) else Path(path).absolute()


def open(path: Path_) -> Store:
    """A store on disk; its leaves are read, and checked, when they are asked for.

    Args:
      path: a folder or a `.safetensors` file, here or in a bucket (`s3://BUCKET/NAME`, `gs://...`), or the
        address of a file (`hf:ORG/NAME[@REVISION]`, `https://...`). Of what is elsewhere only what is asked
        for is fetched.

    Raises:
      HydraOptError: no store there, a damaged one, or one of another version. Leaves raise it, too, when they
        are read: a damaged one, or where the store was replaced meanwhile.
    """
    if remote.is_address(path):
        return portable.open_remote(str(path))
    at = located(path)
    for _ in range(RETRIES):
        before = stamp(at)
        try:
            found = open_at(at)
        except HydraOptError:
            if stamp(at) == before:
                raise
        else:
            return watched(at, found, before)
    raise HydraOptError(f"{at}: is replaced faster than it can be read: try again")


def open_at(at: Path | str) -> Store:
    """As `open`, once, of a `located` store."""
    if isinstance(at, str):
        return bucket.open_bucket(at)
    return portable.open_portable(at) if is_file(at) else folder.open_folder(at)


def watched(path: Path | str, store: Store, opened: Any) -> Store:
    """The store, whose leaves, where they cannot be read, say so if it was replaced since it was opened.

    Args:
      path: where it lies.
      store: as it was opened from there.
      opened: its `stamp` before.
    """

    def replaced(segment: str) -> bool:
        if stamp(path) == opened:
            return False
        # an `add` replaces the manifest, too, and leaves the segments
        return is_file(path) or all(x["id"] != segment for x in read_manifest(path)["segments"])

    def read(leaf: Deferred, start: int, stop: int) -> Any:
        try:
            return leaf.read(start, stop)
        except HydraOptError:
            if replaced(leaf.origin[1]):
                raise HydraOptError(f"{path}: was replaced since it was opened: open it again") from None
            raise

    def one(leaf: Deferred) -> Deferred:
        return Deferred(leaf.shape, leaf.dtype, functools.partial(read, leaf), leaf.origin, leaf.digest)

    segments = (x.replace(leaves={k: one(v) for k, v in x.leaves.items()}) for x in store.segments)
    return store.replace(segments=tuple(segments))


def read_manifest(path: Path | str) -> dict[str, Any]:
    """The manifest of a folder or a file, here or in a bucket."""
    if isinstance(path, str):
        return bucket.read_manifest(path)
    return portable.read_header(path)[0] if is_file(path) else folder.read_manifest(path)


# how often a reader begins anew when writers replace the store under it
RETRIES = 20


def stamp(path: Path | str) -> Any:
    """What tells one state of a store from another; None where there is none."""
    if isinstance(path, str):
        return bucket.stamp(path)
    file = path if is_file(path) else path / MANIFEST
    try:
        found = file.stat()
    except OSError:
        return None
    # the inode is another one after every rename, unless it came back at another time
    return found.st_ino, found.st_ctime_ns, found.st_size


def check_target(path: Path_, overwrite: bool) -> None:
    """Refuse an output that exists, unless it is a store that may be replaced, or an unfinished job's."""
    at = located(path)
    if bucket.stamp(at) is None if isinstance(at, str) else not at.exists() or folder.unfinished(at):
        return
    if not overwrite:
        raise HydraOptError(f"{at}: exists; choose another --out or give --overwrite")
    read_manifest(at)


def save(
    path: Path_, store: Store, *, overwrite: bool = False, limit: int | None = None, zstd: bool = True
) -> None:
    """Write a store: at once or not at all, and never over anything unless told.

    Args:
      path: a new folder, or a new file whose name ends in `.safetensors`; or an address in a bucket.
      store: what to write; its leaves may be on disk.
      overwrite: replace an existing store (nothing else is ever replaced).
      limit: most bytes the store may take on disk; a larger one is not kept.
      zstd: let Orbax compress plain factors in a folder.

    Raises:
      HydraOptError: the path exists, is not a store, or cannot be written.
      TooLarge: the store would exceed `limit`.
    """
    at = located(path)
    if isinstance(at, str):
        before = bucket.state(at).version
        check_target(at, overwrite)
        upload(at, store, before, limit, zstd)
        return
    check_target(at, overwrite)
    with locked(at, again=True):
        check_target(at, overwrite)
        if is_file(at):
            write_file(at, store, limit)
        else:
            write_folder(at, store, limit, zstd)


@contextmanager
def staged(path: Path_, overwrite: bool) -> Iterator[Path]:
    """Where a job on this machine makes a store: in its place, or where it is uploaded from after the body.

    Raises:
      HydraOptError: as `save`; a store that could not be uploaded stays where it was made, and is named.
    """
    at = located(path)
    if not isinstance(at, str):
        yield at
        return
    before, here = bucket.state(at).version, bucket.staging(at)
    check_target(at, overwrite)
    if here.exists() and not folder.unfinished(here):
        # made by a job whose upload failed
        shutil.rmtree(here.parent)
    yield here
    if not here.exists():
        return
    try:
        bucket.publish(here, at, before)
    except HydraOptError as error:
        raise HydraOptError(f"{error} (the store itself is made: hydraopt unpack or pack {here})") from None
    shutil.rmtree(here.parent)


def upload(
    at: str,
    store: Store,
    before: bytes,
    limit: int | None = None,
    zstd: bool = True,
    rows: Mapping[str, Any] | None = None,
) -> None:
    """Write a store on this machine, what is new of it, and put it into a bucket.

    Args:
      at: its address.
      store: what to write.
      before: version of the `state` that it replaces.
      limit, zstd: as `save`.
      rows: rows, by id, of the segments that lie there and may stay.
    """
    with tempfile.TemporaryDirectory() as work:
        here = Path(work) / at.split("/")[-1]
        if is_file(at):
            write_file(here, store, limit)
        else:
            write_folder(here, store, limit, zstd, rows, home=at, mark=bucket.new_mark())
        bucket.publish(here, at, before)


def update(path: Path_, change: Callable[[Store], Store]) -> Store:
    """Change a store on disk, with nobody writing between; segments that stay are not touched.

    Returns:
      The store as it was written.

    Raises:
      HydraOptError: as `open` and `save`, and whatever `change` raises: the store is then as it was.
    """
    at = located(path)
    if isinstance(at, str):
        # nobody else is kept from writing: who is overtaken fails
        before = bucket.state(at).version
        changed = change(open(at))
        there = {} if is_file(at) else {x["id"]: x for x in bucket.read_manifest(at)["segments"]}
        upload(at, changed, before, rows=there)
        return open(at)
    open(at)
    with locked(at):
        changed = change(open(at))
        if is_file(at):
            write_file(at, changed)
        else:
            write_folder(at, changed)
    return open(at)


def job_home(path: Path) -> Path:
    """The folder in which a job that makes a store keeps what is done: the store's, or one beside a file."""
    return path.with_name(path.name + ".job") if is_file(path) else path


def write_file(path: Path, store: Store, limit: int | None = None) -> None:
    """Write a portable file; what a job that was to make one has left beside it goes, as in a folder."""
    portable.write_portable(path, store, limit)
    left = job_home(path)
    if folder.unfinished(left):
        folder.remove_job(left)
        shutil.rmtree(left, ignore_errors=True)


ROW = ("id", "bytes", "header", "sha256", "arrays", "files")


def kept_row(segment: Segment, home: str, rows: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest's row of a segment that lies in the folder as it is; None for one to be written."""
    origins = {x.origin if isinstance(x, Deferred) else None for x in segment.leaves.values()}
    origin = origins.pop() if len(origins) == 1 else None
    name = ""
    if origin is not None and origin[0] == home and origin[2] == len(segment.leaves):
        name = origin[1]
    elif not any(isinstance(x, Deferred) for x in segment.leaves.values()):
        # the same bytes may be there, under the name that they give
        name = segment_data.entry_of(segment).id
    return {k: rows[name][k] for k in ROW} if name in rows else None


def write_folder(
    path: Path,
    store: Store,
    limit: int | None = None,
    zstd: bool = True,
    known: Mapping[str, Any] | None = None,
    home: str | None = None,
    mark: str = "",
) -> None:
    """Write the segments that are not there, then the manifest; what it does not name goes.

    Args:
      path: the folder.
      store: what to write.
      limit, zstd: as `save`.
      known: rows, by id, of segments that lie there already, beside those of the manifest: of a job, or those
        in the bucket that the folder is written for.
      home: where those lie, if it is not the folder.
      mark: what ends the names of new segments, where others may write the same at the same time.
    """
    fresh = not path.exists() or (known is None and folder.unfinished(path))
    before = folder.read_manifest(path) if (path / MANIFEST).exists() else None
    rows = {**(known or {}), **({x["id"]: x for x in before["segments"]} if before is not None else {})}
    added: list[str] = []
    try:
        path.mkdir(parents=True, exist_ok=True)
        if before is None:
            (path / folder.NEW).touch()
        (path / folder.SEGMENTS).mkdir(exist_ok=True)
        written = []
        for x in store.segments:
            row = kept_row(x, home or str(path), rows)
            if row is None:
                name = f"{segment_data.entry_of(x).id}-{mark}" if mark else None
                row = folder.write_segment(path, x, name=name, zstd=None if zstd else False)
                added.append(row["id"])
            written.append(row)
        said = manifest.as_json(store, written, path.name)
        if limit is not None:
            size = len(manifest.gzipped(manifest.to_text(said))) + sum(
                folder.tree_bytes(path / folder.SEGMENTS / x["id"]) for x in written
            )
            if size > limit:
                raise TooLarge(f"{path}: the store would take {size:,} bytes, its input takes {limit:,}")
        folder.write_manifest(path, said)
    except BaseException:
        if fresh:
            shutil.rmtree(path, ignore_errors=True)
        elif known is not None:
            # what the job has done is gone on with
            for name in set(added) - set(rows):
                shutil.rmtree(path / folder.SEGMENTS / name, ignore_errors=True)
        else:
            folder.remove_unnamed(path, before)
        raise
    folder.remove_unnamed(path, said)


def verify(path: Path_) -> int:
    """Read a store whole: every leaf against its checksum, every task decoded; returns the number of leaves.

    Raises:
      HydraOptError: as `open`; a flipped bit, a truncated or a missing file is named.
    """
    if remote.is_address(path):
        return check_leaves(open(path))
    at = located(path)
    for _ in range(RETRIES):
        before = stamp(at)
        try:
            leaves = check_leaves(open(at))
            if not is_file(at):
                check = bucket.check_files if isinstance(at, str) else folder.check_files
                check(at, read_manifest(at))  # type: ignore[arg-type]
        except HydraOptError:
            if stamp(at) == before:
                raise
        else:
            return leaves
    raise HydraOptError(f"{at}: is replaced faster than it can be read: try again")


def check_leaves(store: Store) -> int:
    """Read every leaf and decode every task of a store; returns the number of leaves."""
    leaves = 0
    for x in store.segments:
        for leaf in x.leaves.values():
            bytes_of(leaf)
            leaves += 1
    for few in batches(store):
        decode_terms(few)
    return leaves


# float32 bytes of factors that are decoded at once where tasks can be read one after the other
BATCH = 1 << 28


def batches(store: Store, tasks: Any = None, limit: int = BATCH) -> Iterator[Store]:
    """A store as stores of some tasks each, in order, as many as take about `limit` bytes in float32."""
    names = store.tasks if tasks is None else tuple(tasks)
    length = max(limit * len(store.tasks) // max(4 * store.report.get("entries", 0), 1), 1)
    # whole segments, where they fit: each is then decoded once
    span = max((len(x.tasks) for x in store.segments), default=1)
    length -= length % span if length > span else 0
    for at in range(0, len(names), length):
        yield select(store, names[at : at + length])
