"""The store on disk: saved at once or not at all, restored whole or a task at a time.

`packing` says what the leaves of a store are, `container` how bytes lie in a folder. Restoring one task reads
the index and the chunks of the leaves whose set of tasks it belongs to, and nothing else.
"""

import dataclasses
import itertools
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hydraopt_jax import atomic, memory
from hydraopt_jax.deferred import Deferred, bytes_of
from hydraopt_jax.errors import HydraOptError, TooLarge
from hydraopt_jax.store import Store, container, container_writer, description, packing, task_index
from hydraopt_jax.store.container import SCHEMA

__all__ = [
    "SCHEMA",
    "Account",
    "TooLarge",
    "account",
    "batches",
    "check_target",
    "measure_size",
    "outline",
    "read_index",
    "restore",
    "save",
    "settle",
    "size_on_disk",
    "update",
    "verify",
    "write",
]

Read = TypeVar("Read")
# float32 bytes of factors that are read at once where tasks can be read one after the other
BATCH = 1 << 28
# how often a reader begins anew when writers replace the store under it
RETRIES = 20


def write(folder: Path, store: Store, compress: bool = True) -> None:
    """Write a store into a new folder, in place."""
    leaves, index = packing.pack(store)
    parts = itertools.chain(*leaves.values())
    container_writer.write(folder, index, map(bytes_of, parts), compress)


def save(
    path: str | os.PathLike,
    store: Store,
    *,
    overwrite: bool = False,
    compress: bool = True,
    limit: int | None = None,
) -> None:
    """Write a store with Orbax: atomically, and never over anything unless told.

    Args:
      path: a new folder.
      store: what to write.
      overwrite: replace an existing store (nothing else is ever replaced).
      compress: let Orbax compress the chunks with zstd.
      limit: most bytes the store may take on disk; a larger one is not kept.

    Raises:
      HydraOptError: the path exists, is not a store, or cannot be written.
      TooLarge: the store would exceed `limit`.
    """
    path = Path(path).resolve()
    check_target(path, overwrite)
    with atomic.writing(path) as place:
        check_target(path, overwrite)
        put(place, path, store, compress, limit)


def put(place: Path, path: Path, store: Store, compress: bool, limit: int | None = None) -> None:
    """Write a store to a place of `atomic.writing`, then put it where it belongs."""
    write(place / "new", store, compress)
    settle(place / "new", path, limit)


def settle(new: Path, path: Path, limit: int | None) -> None:
    """Put a finished folder where it belongs; one that is too large is not kept."""
    size = size_on_disk(new)
    if limit is not None and size > limit:
        raise TooLarge(f"{path}: the store would take {size:,} bytes, its input takes {limit:,}")
    atomic.sync_tree(new)
    atomic.replace(new, path)


def update(path: str | os.PathLike, change: Callable[[Store], Store]) -> Store:
    """Change the `outline` of a store and put it in its place, with nobody writing between.

    Returns:
      Store as it was written; its deferred numbers are gone with the old one.

    Raises:
      HydraOptError: as `save` and `restore`, and whatever `change` raises: the store is then as it was.
    """
    path = Path(path).resolve()
    read_whole(path, container.read_description)
    with atomic.writing(path) as place:
        changed = change(outline(path))
        put(place, path, changed, compress=container.is_compressed(path))
    return changed


def check_target(path: str | os.PathLike, overwrite: bool) -> None:
    """Refuse an output that exists, unless it is a store that may be replaced."""
    path = Path(path).absolute()
    if not atomic.current(path).exists():
        return
    if not overwrite:
        raise HydraOptError(f"{path}: exists; choose another --out or give --overwrite")
    read_whole(path, container.read_description)


def read_index(path: str | os.PathLike) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Task names and the index of a store, whose "leaves" are name -> bytes."""
    index = read_whole(Path(path).absolute(), lambda at: open_store(at).index)
    return tuple(index["tasks"]), index


@contextmanager
def believing(path: Path) -> Iterator[None]:
    """Call a store damaged where an index is no index or does not fit its data, and nothing else so.

    Memory that is short, on the host or a device, a package that is missing, an interruption: all pass.
    """
    try:
        yield
    except HydraOptError:
        raise
    except (ValueError, zlib.error, struct.error) as error:
        what = " ".join(str(error).split())[:120] or type(error).__name__
        raise container.damaged(path, f"its index does not fit its data ({what})") from None
    except (LookupError, TypeError, OverflowError) as error:
        # checksums hold, and the index was believed: a forgery, or a fault of ours
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise HydraOptError(
            f"{path}: cannot be read ({what}), though its checksums hold: report this as a fault of "
            "hydraopt_jax if it was written by this version"
        ) from error


@dataclasses.dataclass(frozen=True)
class Opened:
    """A store whose leaves have not been read.

    Attributes:
      index: checked.
      read: `(leaf, start, stop)` -> those of its bytes.
    """

    index: dict[str, Any]
    read: Callable[[str, int, int], np.ndarray]

    def leaf(self, name: str) -> np.ndarray:
        """A leaf's bytes."""
        return self.read(name, 0, self.index["leaves"][name])

    def deferred(self, name: str) -> Deferred:
        """A leaf that is read when it is asked for."""
        return Deferred((self.index["leaves"][name],), np.uint8, lambda *span: self.read(name, *span))


def open_store(path: Path) -> Opened:
    """Open a store."""
    meta, item = container.read_description(path)
    chunks: dict[str, bytes] = {}
    with believing(path):
        opened = container.open_container(path, meta, item)
        index = container.read_index(opened, chunks)
        description.check_index(index)
    starts, at = {}, meta["index"][0]
    for name, size in index["leaves"].items():
        starts[name], at = at, at + size

    def read(name: str, start: int, stop: int) -> np.ndarray:
        return container.read_span(opened, starts[name] + start, starts[name] + stop, chunks)

    return Opened(index, read)


def restore(path: str | os.PathLike, tasks: Sequence[str] | None = None) -> Store:
    """Read a store, or some tasks of it.

    Args:
      path: the store.
      tasks: names to read; None for all. Only the chunks that hold their leaves are read.

    Returns:
      Store of those tasks, in the order given.

    Raises:
      HydraOptError: not a store, damaged, newer than this version, or an unknown task.
    """

    def read(at: Path) -> Store:
        opened = open_store(at)
        names = opened.index["tasks"]
        return load(at, opened, range(len(names)) if tasks is None else [task_index(names, t) for t in tasks])

    return read_whole(Path(path).absolute(), read)


def load(path: Path, opened: Opened, chosen: Sequence[int]) -> Store:
    """Some tasks of an opened store."""
    with believing(path):
        leaves = {n: opened.leaf(n) for n in packing.leaves_of(opened.index, chosen)}
        return packing.unpack(opened.index, leaves, chosen)


def load_in_batches(path: Path, opened: Opened, chosen: Sequence[int]) -> Iterator[Store]:
    """As `load`, as many tasks at once as take about `BATCH` bytes."""
    for few in packing.runs(opened.index, chosen, BATCH):
        yield load(path, opened, few)
        memory.give_back()


def batches(path: str | os.PathLike, tasks: Sequence[str]) -> Iterator[Store]:
    """`restore` tasks, some after the other: as many at once as take about `BATCH` bytes.

    Raises:
      HydraOptError: as `restore`, and where the store is replaced meanwhile.
    """
    path = Path(path).absolute()
    at, opened, before = read_whole(path, lambda at: (at, open_store(at), container.stamp(at)))
    try:
        yield from load_in_batches(at, opened, [task_index(opened.index["tasks"], t) for t in tasks])
    except (HydraOptError, OSError):
        if (atomic.current(path), container.stamp(at)) == (at, before):
            raise
        raise HydraOptError(f"{path}: was replaced while it was read: run it again") from None


def outline(path: str | os.PathLike) -> Store:
    """A store of which little is in memory, as long as nobody writes over it.

    Factors of a plain store, and leaves of one that was coded in segments, are read each time they are asked
    for (`deferred`); the factors of segments cannot be read. A store that was coded in one piece is as
    `restore` reads it.

    Raises:
      HydraOptError: as `restore`; of numbers, when they are read.
    """

    def read(at: Path) -> Store:
        opened = open_store(at)
        whole = opened.index.get("coded") and not opened.index.get("segments")
        with believing(at):
            leaves: dict[str, Any] = {
                n: opened.leaf(n) if whole or n in packing.TABLES else opened.deferred(n)
                for n in opened.index["leaves"]
            }
            return packing.unpack(opened.index, leaves, range(len(opened.index["tasks"])))

    return read_whole(Path(path).absolute(), read)


def read_whole(path: Path, read: Callable[[Path], Read]) -> Read:
    """`read` the store at a path; again if a writer replaced it meanwhile, which the description tells."""
    for _ in range(RETRIES):
        at = atomic.current(path)
        before = container.stamp(at)
        try:
            return read(at)
        except (HydraOptError, OSError):
            if (atomic.current(path), container.stamp(at)) == (at, before):
                raise
    raise HydraOptError(f"{path}: is replaced faster than it can be read: try again")


def verify(path: str | os.PathLike) -> int:
    """Read a store whole, every file of it against its checksum; returns the number of files.

    Raises:
      HydraOptError: as `restore`; a flipped bit, a truncated or a missing file is named.
    """

    def read(at: Path) -> int:
        opened = open_store(at)
        for _ in load_in_batches(at, opened, range(len(opened.index["tasks"]))):
            pass
        return container.verify(at)

    return read_whole(Path(path).absolute(), read)


def measure_size(store: Store) -> int:
    """Bytes the store takes on disk, by writing it to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "store", store)
        return size_on_disk(Path(folder) / "store")


class Account(NamedTuple):
    """What takes the bytes of a store on disk; the three add up to all of it.

    Attributes:
      factors: of the factors, after all compression.
      heads: of the full tensors beside them, which a fraction as a budget does not count.
      metadata: of all else: the index, errors, checksums, and what an empty store takes.
    """

    factors: int
    heads: int
    metadata: int


def account(path: str | os.PathLike) -> Account:
    """What takes the bytes of a store."""
    at = Path(path).absolute()
    (meta, _), index = read_whole(at, lambda x: (container.read_description(x), open_store(x).index))
    heads = sum(size for name, size in index["leaves"].items() if name.startswith("extras_"))
    claims = sum(size for name, size in index["leaves"].items() if name in packing.TABLES)
    # full tensors, the index and the errors are as small as they get before zstd sees them
    factors = sum(size for chunks in meta["chunks"] for size, _ in chunks) - heads - claims - meta["index"][0]
    return Account(max(factors, 0), heads, size_on_disk(at) - max(factors, 0) - heads)


def size_on_disk(path: str | os.PathLike) -> int:
    """Bytes of all files below a path, as a user counts them."""
    return sum(x.stat().st_size for x in Path(path).rglob("*") if x.is_file())
