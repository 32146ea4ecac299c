"""A folder that holds one run of bytes and a description of it, every file of it under a checksum.

The folder is an Orbax checkpoint of one uint8 array, `data`, cut into chunk files. One array with offsets
costs a few hundred bytes beside its content, an array a leaf as much for each leaf. Orbax's own metadata file
carries the description: sizes and checksums of all other files, and a seal over itself. Chunks are decoded
from the very bytes whose checksum was compared: a store replaced meanwhile is never read half and half.

A long run is cut into arrays `data`, `data_1`, `data_2`, ... Here containers are read; `container_writer`
writes them. Schemas before the present one are those of versions never released, and are refused by name.
"""

import bisect
import hashlib
import itertools
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore

from hydraopt_jax import strict_json
from hydraopt_jax.errors import HydraOptError

SCHEMA = 4
DESCRIPTION = "_CHECKPOINT_METADATA"
ARRAY = "data"
# what an array may claim to hold: so many bytes, and so many for each on disk (zstd of zeros)
ROOM, EXPANSION = 1 << 22, 1000
# deflate cannot expand further
DEFLATE = 1040
SEAL = "0" * 16
# errors of a file that is not there as a file
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class Chunked(NamedTuple):
    """One array of a container.

    Attributes:
      folder: of its chunk files, relative.
      start: where its bytes begin in the run.
      total: bytes of the array.
      chunk: bytes of a chunk.
      header: the array's own metadata file.
      chunks: bytes on disk and checksum of each chunk.
    """

    folder: str
    start: int
    total: int
    chunk: int
    header: bytes
    chunks: Sequence[Any]


class Container(NamedTuple):
    """An opened container; nothing but its description has been read.

    Attributes:
      path: the folder.
      meta: the description, seal checked.
      arrays: that hold the run of bytes, in order.
      total: bytes of the run.
    """

    path: Path
    meta: Mapping[str, Any]
    arrays: Sequence[Chunked]
    total: int


def digest(data: bytes | np.ndarray) -> str:
    """Checksum: the first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(bytes(data)).hexdigest()[:16]


def damaged(path: str | os.PathLike, what: str) -> HydraOptError:
    """The error for a store that is not what was written."""
    return HydraOptError(f"{path}: damaged store: {what}: restore it from a copy or compress again")


def array_name(n: int) -> str:
    """Name of the n-th array."""
    return f"{ARRAY}_{n}" if n else ARRAY


def read_file(path: Path, name: str) -> bytes:
    """A file of a store."""
    try:
        return (path / name).read_bytes()
    except MISSING as error:
        raise damaged(path, f"{name} is missing or cannot be read ({error.strerror})") from None
    except OSError as error:
        # no permission, no memory, a disk that is gone: nothing is wrong with the store
        raise HydraOptError(f"{path}: {name} cannot be read: {error.strerror or error}") from None


def read_description(path: Path) -> tuple[dict[str, Any], str]:
    """The description, its seal compared, and the name of the checkpoint's item.

    Raises:
      HydraOptError: no store there, a damaged one, or one of a newer schema.
    """
    if not path.is_dir():
        raise HydraOptError(f"{path}: no store there")
    if not (path / DESCRIPTION).is_file():
        raise HydraOptError(f"{path}: not a store (it has no {DESCRIPTION})")
    text = read_file(path, DESCRIPTION)
    try:
        content = strict_json.loads(text)
        meta, item = content["custom_metadata"], next(iter(content["item_handlers"]))
        schema = meta["schema"] if meta["format"] == "hydraopt" else None
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise HydraOptError(f"{path}: not a store, or its {DESCRIPTION} is damaged") from None
    if schema is None:
        raise HydraOptError(f"{path}: not a store ({DESCRIPTION} describes something else)")
    if type(schema) is not int or schema < 1:
        raise damaged(path, f"{DESCRIPTION} has schema {schema!r}")
    if schema > SCHEMA:
        raise HydraOptError(
            f"{path}: schema {schema} is newer than this version reads ({SCHEMA}): upgrade hydraopt_jax "
            f"(or {DESCRIPTION} is damaged)"
        )
    seal = str(meta.get("seal")).encode()
    if digest(text.replace(b'"seal":"' + seal, b'"seal":"' + SEAL.encode())) != seal.decode():
        raise damaged(path, f"{DESCRIPTION} does not match its checksum")
    if schema < SCHEMA:
        raise HydraOptError(
            f"{path}: schema {schema} is that of a version before the first release: compress the adapters "
            "again"
        )
    return meta, item


def open_container(path: Path, meta: Mapping[str, Any], item: str) -> Container:
    """Open a store: all files have their sizes, small ones are as written.

    Raises:
      HydraOptError: a file that is missing, of another size, or not as written.
    """
    small = {name: read_file(path, name) for name in meta["files"]}
    for name, checksum in meta["files"].items():
        if digest(small[name]) != checksum:
            raise damaged(path, f"{name} does not match its checksum")
    groups = meta["chunks"]
    folders = [f"{item}/{array_name(n)}" for n in range(len(groups))]
    stored = 0
    for folder, chunks in zip(folders, groups, strict=True):
        for k, (size, _) in enumerate(chunks):
            file = path / folder / str(k)
            if not file.is_file():
                raise damaged(path, f"{folder}/{k} is missing")
            if file.stat().st_size != size:
                raise damaged(path, f"{folder}/{k} has {file.stat().st_size} bytes instead of {size}")
            stored += size
    arrays: list[Chunked] = []
    at = 0
    for folder, chunks in zip(folders, groups, strict=True):
        header = small[f"{folder}/.zarray"]
        # many arrays together may claim no more room than one
        total, chunk = array_shape(path, folder, header, stored, at)
        if total != chunk * len(chunks):
            raise damaged(path, f"{folder}/.zarray has {total} bytes in chunks of {chunk}")
        arrays.append(Chunked(folder, at, total, chunk, header, chunks))
        at += total
    return Container(path, meta, arrays, at)


def array_shape(path: Path, array: str, header: bytes, stored: int, before: int = 0) -> tuple[int, int]:
    """Bytes of an array, after `before` others, and of a chunk, if its header can be believed."""
    try:
        fields = strict_json.loads(header)
        (total,), (chunk,), kind = fields["shape"], fields["chunks"], fields["dtype"]
        sane = kind == "|u1" and 0 < chunk <= total <= ROOM + EXPANSION * stored - before
    except (ValueError, KeyError, TypeError):
        sane = False
    if not sane:
        raise damaged(path, f"{array}/.zarray claims what its files cannot hold")
    return total, chunk


def read_span(container: Container, start: int, stop: int, cache: dict[str, bytes]) -> np.ndarray:
    """Bytes `start` to `stop` of the run, from the chunks that hold them, each against its checksum.

    Args:
      container: opened.
      start, stop: of the span.
      cache: the chunk where the span before ended, by name; of this one only the last is left in it.
    """
    if not 0 <= start < stop <= container.total:
        raise damaged(container.path, f"its index points at bytes {start} to {stop} of {container.total}")
    out = np.empty(stop - start, np.uint8)
    first = bisect.bisect_right(container.arrays, start, key=lambda x: x.start) - 1
    for array in itertools.takewhile(lambda x: x.start < stop, container.arrays[first:]):
        low, high = max(start, array.start), min(stop, array.start + array.total)
        part = read_array(container.path, array, low - array.start, high - array.start, cache)
        out[low - start : high - start] = part
    return out


def read_array(path: Path, array: Chunked, start: int, stop: int, cache: dict[str, bytes]) -> np.ndarray:
    """As `read_span`, of one array."""
    files = {".zarray": array.header}
    for k in range(start // array.chunk, (stop - 1) // array.chunk + 1):
        name = f"{array.folder}/{k}"
        files[str(k)] = cache[name] if name in cache else read_chunk(path, array, k)
    cache.clear()
    cache[name] = files[str(k)]
    return decode(path, array.folder, files, start, stop)


def read_chunk(path: Path, array: Chunked, k: int) -> bytes:
    """A chunk file, against its checksum."""
    data = read_file(path, f"{array.folder}/{k}")
    if digest(data) != array.chunks[k][1]:
        raise damaged(path, f"{array.folder}/{k} does not match its checksum")
    return data


def decode(path: Path, array: str, files: Mapping[str, bytes], start: int, stop: int) -> np.ndarray:
    """Bytes `start` to `stop` of a zarr array whose files are in memory."""
    context = tensorstore.Context()
    try:
        memory = tensorstore.KvStore.open({"driver": "memory"}, context=context).result()
        for name, value in files.items():
            memory.write(name, value).result()
        spec = {"driver": "zarr", "kvstore": {"driver": "memory"}}
        opened = tensorstore.open(spec, context=context, open=True).result()
        return np.asarray(opened[start:stop].read().result())
    except ValueError as error:
        # what TensorStore raises for data and headers that do not fit; all else is not the store's fault
        raise damaged(path, f"{array} cannot be decoded ({' '.join(str(error).split())[:120]})") from None


def verify(path: Path) -> int:
    """Compare every file with its checksum; returns how many there are."""
    meta, item = read_description(path)
    opened = open_container(path, meta, item)
    for array in opened.arrays:
        for k in range(len(array.chunks)):
            read_chunk(path, array, k)
    return 1 + len(meta["files"]) + sum(len(x.chunks) for x in opened.arrays)


def stamp(path: Path) -> tuple[int, int, bytes]:
    """What tells one state of a store from another, be they of equal content."""
    file = path / DESCRIPTION
    try:
        # the time of the inode's last change: that of the content may be a copy's, the number may come again
        return path.stat().st_ino, file.stat().st_ctime_ns, file.read_bytes()
    except OSError:
        return 0, 0, b""


def is_compressed(path: Path) -> bool:
    """Whether a store's chunks are compressed by Orbax."""
    _, item = read_description(path)
    header = read_file(path, f"{item}/{ARRAY}/.zarray")
    return strict_json.loads(header).get("compressor") is not None


def read_index(container: Container, cache: dict[str, bytes]) -> dict[str, Any]:
    """The index."""
    packed, size = container.meta["index"]
    data = read_span(container, 0, packed, cache).tobytes()
    text = b"" if size > DEFLATE * packed else inflate(data, size + 1)
    if len(text) != size:
        raise damaged(container.path, "its index is not as long as it claims")
    return parse(container.path, text)


def inflate(data: bytes, limit: int) -> bytes:
    """At most `limit` bytes of deflated data; what is none comes back empty."""
    try:
        return zlib.decompressobj().decompress(data, limit)
    except zlib.error:
        return b""


def parse(path: Path, text: bytes) -> dict[str, Any]:
    """The index from its text."""
    try:
        index = strict_json.loads(text)
    except ValueError:
        raise damaged(path, "its index is no JSON") from None
    return index
