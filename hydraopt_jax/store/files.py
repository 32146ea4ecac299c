"""Open, save, change and verify stores: a folder, or one `.safetensors` file, depending on the name.

Both may be in a bucket (`bucket`). A file may also be on a web server or the hub (`remote`); it is then read
in part and cannot be changed.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from hydraopt_jax import buckets, network, remote
from hydraopt_jax.deferred import Deferred, bytes_of
from hydraopt_jax.errors import HydraOptError, exists
from hydraopt_jax.locks import locked
from hydraopt_jax.store import bucket, folder, portable, replacing
from hydraopt_jax.store.decoding import decode_terms
from hydraopt_jax.store.folder import MANIFEST
from hydraopt_jax.store.job_folder import remove_renamed
from hydraopt_jax.store.store import Store, cut_to

Path_ = str | os.PathLike
T = TypeVar("T")


def is_file(path: Path_) -> bool:
    """Whether a path is that of a single-file store, local or remote."""
    return remote.is_address(path) or portable.named(path)


def located(path: Path_) -> Path | str:
    """The absolute path of a store that can be written, or its address in a bucket.

    Raises:
      HydraOptError: the store is on a web server or the hub.
    """
    if remote.is_address(path):
        raise HydraOptError(
            f"{network.redact(str(path))}: remote stores are read-only: pull it, change it, and push it"
        )
    return buckets.address(str(path)) if buckets.is_bucket(path) else folder.absolute(path)


def open(path: Path_) -> Store:
    """A store on disk. Its leaves are read and checked on demand.

    Args:
      path: a folder or a `.safetensors` file, local or in a bucket (`s3://BUCKET/NAME`, `gs://...`), or the
        address of a file (`hf:ORG/NAME[@REVISION]`, `https://...`). Of a remote store only the bytes that are
        needed are fetched.

    Raises:
      HydraOptError: no store there, a damaged store, or a store of another version. Reading a leaf raises it
        too, if the leaf is damaged or the store was replaced meanwhile.
    """
    if remote.is_address(path):
        return portable.open_source(remote.find(str(path)))
    at = located(path)
    return steadily(at, lambda before: watched(at, open_at(at), before))


def steadily(at: Path | str, look: Callable[[Any], T]) -> T:
    """What `look` finds of a store with a `stamp`; if it fails, and the stamp has changed, it looks again."""
    for _ in range(RETRIES):
        before = stamp(at)
        try:
            return look(before)
        except HydraOptError:
            if stamp(at) == before:
                raise
    raise replaced_too_fast(at)


def replaced_too_fast(path: Path | str) -> HydraOptError:
    """The error for a store that changes while it is read."""
    return HydraOptError(f"{network.redact(str(path))}: is replaced faster than it can be read: try again")


def open_at(at: Path | str) -> Store:
    """One attempt of `open`, at the result of `located`."""
    if isinstance(at, str):
        return bucket.open_bucket(at)
    return portable.open_source(portable.source_of(at)) if is_file(at) else folder.open_folder(at)


def watched(path: Path | str, store: Store, opened: Any) -> Store:
    """The store, with leaves whose read errors say if it was replaced since `opened`, its `stamp` then."""

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
                what = "is gone" if stamp(path) is None else "was replaced"
                raise HydraOptError(f"{path}: {what} since it was opened: open it again") from None
            raise

    def one(leaf: Deferred) -> Deferred:
        return Deferred(leaf.shape, leaf.dtype, functools.partial(read, leaf), leaf.origin, leaf.digest)

    each = ({k: one(v) for k, v in x.leaves.items() if isinstance(v, Deferred)} for x in store.segments)
    segments = (x.replace(leaves={**x.leaves, **y}) for x, y in zip(store.segments, each, strict=True))
    return store.replace(segments=tuple(segments))


def read_manifest(path: Path | str) -> dict[str, Any]:
    """The manifest of a folder or a file, local or in a bucket."""
    if isinstance(path, str):
        return bucket.read_manifest(path)
    return portable.read_header(portable.source_of(path))[0] if is_file(path) else folder.read_manifest(path)


# how often a reader starts again when writers replace the store while it is opened
RETRIES = 20


def stamp(path: Path | str) -> Any:
    """A stamp that changes with the store; None if there is no store."""
    if isinstance(path, str):
        return bucket.stamp(path)
    file = path if is_file(path) else path / MANIFEST
    try:
        found = file.stat()
    except OSError:
        return None
    # the inode is another one after every rename, unless it came back at another time
    return found.st_ino, found.st_ctime_ns, found.st_size


def check_output(path: Path_, overwrite: bool) -> None:
    """Raise if an output exists, unless it is a store that may be replaced, or one of an unfinished job."""
    at = located(path)
    if bucket.stamp(at) is None if isinstance(at, str) else not at.exists() or folder.unfinished(at):
        return
    if not overwrite:
        raise exists(at)
    read_manifest(at)


def save(
    path: Path_, store: Store, *, overwrite: bool = False, limit: int | None = None, zstd: bool = True
) -> None:
    """Write a store completely or not at all; existing stores are replaced only with `overwrite`.

    Args:
      path: a new folder, or a new file whose name ends in `.safetensors`; or an address in a bucket.
      store: the store; its leaves may be on disk.
      overwrite: replace an existing store (anything else is never replaced).
      limit: most bytes that the store may take on disk; a larger store is not written.
      zstd: let Orbax compress plain factors in a folder.

    Raises:
      HydraOptError: the path exists, is not a store, or cannot be written.
      TooLarge: the store would exceed `limit`.
    """
    at = located(path)
    if isinstance(at, str):
        before = bucket.state(at).version
        check_output(at, overwrite)
        upload(at, store, before, limit, zstd)
        return
    check_output(at, overwrite)
    with locked(at, again=True):
        check_output(at, overwrite)
        if is_file(at):
            write_file(at, store, limit)
        else:
            replacing.write_folder(at, store, limit, zstd)


@contextmanager
def staged(path: Path_, overwrite: bool, dry_run: bool = False) -> Iterator[Path]:
    """A context with the path where a local job makes a store; its end uploads a store for a bucket.

    It holds the lock of a local folder per address. With `dry_run` nothing is uploaded.

    Raises:
      HydraOptError: see `save`. A store that could not be uploaded stays in the local folder, which is named.
    """
    at = located(path)
    if not isinstance(at, str):
        yield at
        return
    here = bucket.staging(at)
    with locked(here.parent, label=at):
        before = bucket.state(at).version
        check_output(at, overwrite)
        yield here
        if dry_run:
            with suppress(OSError):
                here.parent.rmdir()
            return
        try:
            bucket.publish(here, at, before)
        except HydraOptError as error:
            raise HydraOptError(
                f"{error} (the store itself is made: run the same command again to upload it, with "
                f"--overwrite if a store is there by then, or hydraopt unpack or pack {here})"
            ) from None
        remove_renamed(here.parent, here.parent.with_suffix(".gone"))


def upload(
    at: str,
    store: Store,
    before: bytes,
    limit: int | None = None,
    zstd: bool = True,
    rows: Mapping[str, Any] | None = None,
) -> None:
    """Write the new segments of a store on this machine and upload them to a bucket.

    Args:
      before: version of the `state` that is replaced.
      limit, zstd: see `save`.
      rows: segment id -> manifest row of the segments that are in the bucket and may stay.
    """
    with tempfile.TemporaryDirectory() as work:
        here = Path(work) / at.split("/")[-1]
        if is_file(at):
            write_file(here, store, limit)
        else:
            replacing.write_folder(here, store, limit, zstd, rows, home=at, mark=bucket.new_mark())
        bucket.publish(here, at, before)


def update(path: Path_, change: Callable[[Store], Store]) -> Store:
    """Apply a function to a store on disk, under its lock; segments that stay are not touched.

    Returns:
      The store as written.

    Raises:
      HydraOptError: see `open` and `save`; and every error of `change`. The store is then unchanged.
    """
    with updated(path, change) as found:
        return found


@contextmanager
def updated(path: Path_, change: Callable[[Store], Store]) -> Iterator[Store]:
    """`update`, with the store as written in a context in which its lock is still held."""
    at = located(path)
    if isinstance(at, str):
        # there is no lock in a bucket: a writer whose store was replaced fails
        before = bucket.state(at).version
        changed = change(open(at))
        there = {} if is_file(at) else {x["id"]: x for x in bucket.read_manifest(at)["segments"]}
        upload(at, changed, before, rows=there)
        yield open(at)
        return
    open(at)
    with locked(at):
        changed = change(open(at))
        if is_file(at):
            write_file(at, changed)
        else:
            replacing.write_folder(at, changed)
        yield open(at)


def job_home(path: Path) -> Path:
    """The folder in which a job keeps finished segments: the store's folder, or one beside a single file."""
    return path.with_name(path.name + ".job") if is_file(path) else path


def write_file(path: Path, store: Store, limit: int | None = None) -> None:
    """Write a single-file store, and remove the leftovers of an unfinished job beside it."""
    portable.write_portable(path, store, limit)
    left = job_home(path)
    if folder.unfinished(left):
        folder.remove_unfinished(left)


def verify(path: Path_) -> int:
    """Number of leaves of a store, after all were compared with their checksums and all tasks decoded.

    Raises:
      HydraOptError: see `open`. A changed, truncated or missing file is named.
    """
    if remote.is_address(path):
        return check_leaves(open(path))
    at = located(path)

    def check(before: Any) -> int:
        leaves = check_leaves(open(at))
        if isinstance(at, str) and not is_file(at):
            bucket.check_files(at, read_manifest(at))
        elif isinstance(at, Path) and not is_file(at):
            folder.check_files(at, read_manifest(at))
        return leaves

    return steadily(at, check)


def check_leaves(store: Store) -> int:
    """Number of leaves of a store, after all leaves were read and all tasks decoded."""
    leaves = [leaf for x in store.segments for leaf in x.leaves.values()]
    for leaf in leaves:
        bytes_of(leaf)
    for few in batches(store):
        decode_terms(few)
    return len(leaves)


# float32 bytes of factors that are decoded at once, if tasks can be read one after the other
BATCH = 1 << 28


def batches(store: Store, tasks: Any = None, limit: int = BATCH) -> Iterator[Store]:
    """The store in pieces of consecutive tasks, each of about `limit` bytes in float32."""
    names = store.tasks if tasks is None else tuple(tasks)
    length = max(limit * len(store.tasks) // max(4 * store.report.get("entries", 0), 1), 1)
    # whole segments if they fit: each is then decoded once
    span = max((len(x.tasks) for x in store.segments), default=1)
    length -= length % span if length > span else 0
    for at in range(0, len(names), length):
        yield cut_to(store, names[at : at + length])
