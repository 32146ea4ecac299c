"""A store as a folder: immutable segments, each an Orbax checkpoint, and a manifest that names them.

    STORE/manifest.json.gz      names of tasks and segments
    STORE/segments/ID/          one Orbax checkpoint of bytes, immutable

A change writes new segments, then replaces the manifest with one rename. A reader sees the old store or the
new one. A crash can leave segments that no manifest names; the next writer removes them. Segments are written
by Orbax and read through TensorStore, without JAX.
"""

import errno
import itertools
import logging
import os
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from hydraopt_jax.checkpoints import save_context
from hydraopt_jax.durable import sync, sync_tree
from hydraopt_jax.errors import HydraOptError, damaged, system_error
from hydraopt_jax.store import checksums, manifest, segment_data
from hydraopt_jax.store.arrays import run_reader
from hydraopt_jax.store.job_folder import GONE, JOB, is_begun, is_job, remove_job
from hydraopt_jax.store.segment_data import SegmentEntry
from hydraopt_jax.store.store import Reference, Segment, Store

MANIFEST = "manifest.json.gz"
SEGMENTS = "segments"
# temporary name of the next manifest; without a manifest it marks a store that is being written
NEW = f".{MANIFEST}.new"
# how the name of a store in one file ends
SUFFIX = ".safetensors"
# chunk size in bytes, and maximum chunks per array: small chunks waste fewer bytes when one task is read
CHUNK, MAX_CHUNKS = 1 << 16, 256
# maximum bytes per array; a writer holds an array twice, its own and Orbax's copy
ARRAY_BYTES = 1 << 26
# the same for a segment that so many arrays suffice for; for more of them Orbax takes longer and longer
SMALL_ARRAY_BYTES, FEW_ARRAYS = 1 << 25, 16
# what a checkpoint takes beside its chunks and the path in its commit marker, and what a path is counted as
# where it is not known
CHECKPOINT_BYTES, PATH_BYTES = 735, 128
# limit on the size that a segment may claim: an array, as chunks of zeros are not on disk, plus so many bytes
# per byte on disk (zstd of zeros)
ROOM, EXPANSION = ARRAY_BYTES, 1000
# number of segments whose headers are read at once
READERS = 8
# Orbax numbers its operations for the whole process: two threads may not save at once
WRITING = threading.Lock()
# texts of TensorStore for errors of the system, such as a full disk
SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def absolute(path: str | os.PathLike[str]) -> Path:
    """A path without links and `..`: one name for one place, and TensorStore reads no `..`.

    Raises:
      HydraOptError: it cannot be a path, or no right to it.
    """
    try:
        found = Path(os.path.realpath(path))
        found.exists()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise system_error(path, "read", error) from None
        said = error.strerror if isinstance(error, OSError) else error
        raise HydraOptError(f"{str(path)[:120]!r}: cannot be a path ({said}): give another one") from None
    if found.suffix != Path(path).suffix and Path(path).suffix == SUFFIX:
        # a cache names files by their content: the link says what it is
        return Path(os.path.realpath(Path(path).parent), Path(path).name)
    return found


def read_file(path: Path, name: str) -> bytes:
    """The content of a file of a store."""
    try:
        return (path / name).read_bytes()
    except MISSING as error:
        raise damaged(path, f"{name} is missing or cannot be read ({error.strerror})") from None
    except OSError as error:
        # no permission, no memory, a lost disk: the store itself is not damaged
        raise system_error(f"{path}: {name}", "read", error) from None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
      HydraOptError: no store there, a damaged one, or one of another version.
    """
    if not path.is_dir():
        raise HydraOptError(f"{path}: no store there: look for a wrong name")
    if not (path / MANIFEST).is_file():
        if (path / "_CHECKPOINT_METADATA").is_file():
            raise manifest.old(path, "1 to 4")
        if unfinished(path) and any(path.iterdir()):
            raise HydraOptError(
                f"{path}: an unfinished job: run its command again to go on, or delete the folder"
            )
        raise HydraOptError(f"{path}: not a store (it has no {MANIFEST}): give one that `compress` wrote")
    return manifest.parse_folder(path, read_file(path, MANIFEST))


def unfinished(path: Path) -> bool:
    """Whether a folder is empty or has the leftovers of a stopped writer."""
    names = {x.name for x in path.iterdir()} if path.is_dir() else {MANIFEST}
    if MANIFEST in names:
        return False
    # a folder of a job that says nothing is the user's where there is more
    bare = names <= {JOB, GONE, SEGMENTS} and is_job(path / JOB) and not any((path / SEGMENTS).glob("*"))
    return bare or is_begun(path / JOB) or NEW in names or names <= {GONE}


def reader(
    path: Path, entry: SegmentEntry, arrays: Sequence[Sequence[Any]]
) -> Callable[[int, int], np.ndarray]:
    """A function `(start, stop)` -> bytes of a segment's run."""
    folder = path / SEGMENTS / entry.id
    try:
        most = ROOM + EXPANSION * tree_bytes(folder)
    except OSError:
        raise damaged(path, f"segment {entry.id} is missing") from None
    return run_reader(path, entry, arrays, lambda x: {"driver": "file", "path": f"{folder / x}/"}, most)


def tree_bytes(folder: Path | str) -> int:
    """Sum of the sizes of all files below a folder, in bytes."""
    total = 0
    with os.scandir(folder) as found:
        for x in found:
            # another process may remove it meanwhile
            with suppress(FileNotFoundError):
                if x.is_dir(follow_symlinks=False):
                    total += tree_bytes(x.path)
                elif x.is_file():
                    total += x.stat().st_size
    return total


def store_bytes(path: Path) -> int:
    """Bytes of a store's manifest and of the segments that it names; an unfinished job may have others."""
    total = (path / MANIFEST).stat().st_size
    for x in segment_folders(path):
        # another process may remove it meanwhile
        with suppress(FileNotFoundError):
            total += tree_bytes(x)
    return total


def segment_folders(path: Path) -> list[Path]:
    """The folders of the segments that a store's manifest names."""
    return [path / SEGMENTS / x["id"] for x in read_manifest(path)["segments"]]


def open_folder(path: Path) -> Store:
    """A store whose leaves are read on demand.

    Raises:
      HydraOptError: see `read_manifest`; or a missing or damaged segment.
    """
    return from_manifest(
        path, read_manifest(path), lambda row: reader(path, manifest.entry_from_row(row), row["arrays"])
    )


def from_manifest(
    path: Any, said: Mapping[str, Any], read: Callable[[Any], Callable[[int, int], np.ndarray]]
) -> Store:
    """A store from its manifest, and a function from a segment's row to a reader of its run."""
    tasks = said["tasks"]

    def one(row: Mapping[str, Any]) -> Segment:
        names = tuple(t if isinstance(t, str) else tasks[t] for t in row["tasks"])
        gone = frozenset(k for k, t in enumerate(row["tasks"]) if isinstance(t, str))
        references = tuple(Reference(*r) for r in row.get("references", ()))
        entry, tables = manifest.entry_from_row(row), row.get("tables", -1)
        return segment_data.open_segment(path, entry, read(row), names, gone, references, tables)

    with ThreadPoolExecutor(READERS) as pool:
        segments = tuple(pool.map(one, said["segments"]))
    report = manifest.Static(said["report"])
    return Store(segments, tuple(tasks), manifest.split_sources(said["sources"]), report)


def division(total: int) -> list[tuple[int, int]]:
    """How a run of so many bytes is split into arrays: size of each array, and of its chunks.

    An array is a whole number of chunks; the last chunk is padded with zeros. Without padding Orbax would
    choose a chunk size that divides the array, which may be one byte.

    >>> [len(division(x << 20)) for x in (32, 33, 512, 513)]
    [1, 2, 16, 9]
    """
    out = []
    limit, most = ARRAY_BYTES, MAX_CHUNKS
    if SMALL_ARRAY_BYTES < total <= FEW_ARRAYS * SMALL_ARRAY_BYTES:
        limit, most = min(SMALL_ARRAY_BYTES, ARRAY_BYTES), MAX_CHUNKS // 2
    for at in range(0, total, limit):
        size = min(total - at, limit)
        count = min(max(round(size / CHUNK), 1), most)
        chunk = -(-size // count)
        out.append((chunk * -(-size // chunk), chunk))
    return out


def segment_size(total: int, path_bytes: int = PATH_BYTES) -> int:
    """Bytes on disk of a segment, without compression, from the bytes of its run."""
    parts = division(total)
    return sum(size for size, _ in parts) + CHECKPOINT_BYTES + path_bytes + 350 * (len(parts) - 1)


def arrays_of(pieces: Iterable[Any], parts: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
    """The arrays of a run, from its pieces. An array is valid until the next one is requested."""
    sizes = iter(parts)
    buffer, at = np.empty(next(sizes)[0], np.uint8), 0
    for piece in pieces:
        rest = memoryview(piece).cast("B")
        while rest:
            taken = min(len(rest), len(buffer) - at)
            buffer[at : at + taken] = rest[:taken]
            rest, at = rest[taken:], at + taken
            if at == len(buffer):
                yield buffer
                following = next(sizes, None)
                if following is not None:
                    buffer, at = np.empty(following[0], np.uint8), 0
    if 0 < at < len(buffer):
        buffer[at:] = 0
        yield buffer


def write_segment(
    store: Path, segment: Segment, *, name: str | None = None, zstd: bool = True
) -> dict[str, Any]:
    """Write a segment into a store's folder, completely or not at all; return its row of the manifest.

    Args:
      store: the folder.
      segment: whose leaves may be deferred: those of one array are in memory at a time.
      name: of the segment; None for one that its bytes give, where the same bytes are then written once.
      zstd: compress plain factors; coded ones would not get smaller.

    Returns:
      The manifest row: the entry, "arrays" with the path and bytes of each array, and "files", a checksum of
      all files.
    """
    import jax
    from orbax.checkpoint import v1 as ocp

    if jax.process_count() > 1:
        # Orbax has all processes save one checkpoint together, whatever its options say
        raise HydraOptError(
            f"{store}: folders are written by programs of one process, this is one of "
            f"{jax.process_count()}: save a .safetensors file, from one of them"
        )
    parts = division(segment_data.run_size(segment))
    found: list[SegmentEntry] = []
    name = name or segment_data.entry_of(segment).id
    folder = store / SEGMENTS / name
    # callers choose a name that no manifest has: what is there was left by a dead writer
    shutil.rmtree(folder, ignore_errors=True)
    context = save_context()
    context.array.saving.use_compression = zstd and bool(segment.modules) and not segment.coded
    # plain zarr: few arrays need no database, whose own files cost more and vary in size
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = False
    context.array.saving.storage_options = ocp.options.ArrayOptions.Saving.StorageOptions(
        chunk_byte_size=parts[0][1]
    )
    pieces = arrays_of(segment_data.run_pieces(segment, found.append), parts)
    try:
        with WRITING, context, quiet():
            if len(parts) == 1:
                (array,) = pieces
                ocp.save(folder, {"data": array})
            else:
                # map keeps no array while the next one is filled
                save = lambda k, array: ocp.partial.save(folder, {f"data_{k}": array})  # noqa: E731
                deque(map(save, itertools.count(), pieces), 0)
                ocp.partial.finalize(folder)
    except BaseException as error:
        # Orbax's temporary names are NAME.SOMETHING, and names of segments have no dot
        for left in (folder, *folder.parent.glob(f"{name}.*")):
            shutil.rmtree(left, ignore_errors=True)
        code = SYSTEM_ERROR.search(str(error))
        if code is not None:
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error
        raise
    sync_tree(folder)
    names = ["data"] if len(parts) == 1 else [f"data_{k}" for k in range(len(parts))]
    arrays = [[array_path(folder, n), size] for n, (size, _) in zip(names, parts, strict=True)]
    files = checksums.checksum(folder, [str(x) for x, _ in arrays])
    return {**found[0]._replace(id=name)._asdict(), "arrays": arrays, "files": files}


def check_files(path: Path, said: Mapping[str, Any]) -> None:
    """Compare the files of every segment with the checksum of the manifest.

    Raises:
      HydraOptError: a file of a segment differs from what was written.
    """
    for row in said["segments"]:
        folder = path / SEGMENTS / row["id"]
        try:
            right = checksums.checksum(folder, [x for x, _ in row["arrays"]]) == row["files"]
        except FileNotFoundError:
            # gone since it was listed: removed, or the store is being replaced
            right = False
        if not right:
            raise damaged(path, f"a file of segment {row['id']} does not match its checksum")


def array_path(folder: Path, name: str) -> str:
    """The path of an array that Orbax has written, relative to its checkpoint."""
    (found,) = folder.glob(f"*/{name}")
    return found.relative_to(folder).as_posix()


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress Orbax's warnings about small files and the format without a database."""

    logger = logging.getLogger("absl")

    def mute(record: logging.LogRecord) -> bool:
        return not any(x in str(record.msg) for x in ("OCDBT", "target_byte_size"))

    logger.addFilter(mute)
    try:
        yield
    finally:
        logger.removeFilter(mute)


def write_manifest(path: Path, said: Mapping[str, Any]) -> None:
    """Replace the manifest with one rename, which makes the new store current."""
    new = path / NEW
    new.write_bytes(manifest.gzipped(manifest.to_text(said, path.name)))
    sync(new)
    os.replace(new, path / MANIFEST)
    sync(path)


def remove_segment(path: Path, name: str) -> None:
    """Remove a segment's files."""
    shutil.rmtree(path / SEGMENTS / name, ignore_errors=True)


def remove_unnamed(path: Path, said: Mapping[str, Any] | None) -> None:
    """Remove segments that the manifest does not name, and the folder of an unfinished job."""
    # the job first: it must not be resumed after its segments are gone
    remove_job(path)
    named = {x["id"] for x in said["segments"]} if said is not None else set()
    folder = path / SEGMENTS
    for x in folder.iterdir() if folder.is_dir() else ():
        if x.name not in named:
            shutil.rmtree(x, ignore_errors=True)
    if said is not None:
        (path / NEW).unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what a stopped writer has left of a store that never was; stopped, it is known as that still.

    Other files in the folder stay, and the folder with them.
    """
    with suppress(OSError):
        (path / NEW).touch()
    remove_job(path)
    shutil.rmtree(path / SEGMENTS, ignore_errors=True)
    with suppress(OSError):
        (path / NEW).unlink(missing_ok=True)
        path.rmdir()
