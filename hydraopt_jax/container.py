"""A folder that holds one run of bytes and a description of it, every file of it under a checksum.

The folder is an Orbax checkpoint of one uint8 array, `data`, cut into chunk files. One array with offsets
costs a few hundred bytes beside its content, an array a leaf as much for each leaf. Orbax's own metadata file
carries the description: sizes and checksums of all other files, and a seal over itself. Chunks are decoded
from the very bytes whose checksum was compared: a store replaced meanwhile is never read half and half.

The first schema keeps one array a leaf; it is read here, and written by `scale.assembly` for what memory does
not hold.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from hydraopt_jax.errors import HydraOptError

SCHEMA = 2
DESCRIPTION = "_CHECKPOINT_METADATA"
ARRAY = "data"
# bytes of a chunk, and the most chunks: what a task's restore may read in excess, against a file a chunk
CHUNK = 1 << 16
MAX_CHUNKS = 256
# what an array may claim to hold: so many bytes, and so many for each on disk (zstd of zeros)
ROOM, EXPANSION = 1 << 26, 1000
# deflate cannot expand further
DEFLATE = 1040
SEAL = "0" * 16


class Container(NamedTuple):
    """An opened container; nothing but its description has been read.

    Attributes:
      path: the folder.
      meta: the description, seal checked.
      array: folder of the chunk files, relative.
      total: bytes of the array.
      chunk: bytes of a chunk.
      header: the array's own metadata file.
    """

    path: Path
    meta: Mapping[str, Any]
    array: str
    total: int
    chunk: int
    header: bytes


def digest(data: bytes | np.ndarray) -> str:
    """Checksum: the first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(bytes(data)).hexdigest()[:16]


def damaged(path: str | os.PathLike, what: str) -> HydraOptError:
    """The error for a store that is not what was written."""
    return HydraOptError(f"{path}: damaged store: {what}: restore it from a copy or compress again")


def chunks_of(size: int) -> int:
    """How many chunks so many bytes are cut into."""
    return min(max(round(size / CHUNK), 1), MAX_CHUNKS)


def write(folder: Path, index: Mapping[str, Any], leaves: Sequence[bytes], compress: bool) -> None:
    """Write a new folder: the index, deflated, then the leaves; no bytes of it depend on time or place."""
    text = json.dumps(index, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()
    head = zlib.compress(text, 9)
    data = b"".join([head, *leaves])
    count = chunks_of(len(data))
    chunk = -(-len(data) // count)
    array = np.zeros(chunk * count, np.uint8)
    array[: len(data)] = np.frombuffer(data, np.uint8)
    context = ocp.Context()
    context.array.saving.use_compression = compress
    # plain zarr: one array needs no database, whose own files cost more and vary in size
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = False
    context.array.saving.storage_options = ocp.options.ArrayOptions.Saving.StorageOptions(
        chunk_byte_size=chunk
    )
    with context, quiet_orbax():
        ocp.save(folder, {ARRAY: array}, custom_metadata={})
    marker = folder / "commit_success.txt"
    if marker.exists():
        # Orbax names the temporary folder in it, which is wrong after the rename and varies in length
        marker.write_text("committed\n")
    handlers = json.loads((folder / DESCRIPTION).read_bytes())["item_handlers"]
    home = f"{next(iter(handlers))}/{ARRAY}"
    pieces = [(folder / home / str(k)).read_bytes() for k in range(count)]
    names = sorted(x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file())
    meta = {
        "format": "hydraopt",
        "schema": SCHEMA,
        "index": [len(head), len(text)],
        "chunks": [[len(x), digest(x)] for x in pieces],
        "files": {
            x: digest((folder / x).read_bytes())
            for x in names
            if x != DESCRIPTION and x not in {f"{home}/{k}" for k in range(count)}
        },
        "seal": SEAL,
    }
    blank = json.dumps({"item_handlers": handlers, "custom_metadata": meta}, separators=(",", ":"))
    sealed = blank.replace(f'"seal":"{SEAL}"', f'"seal":"{digest(blank.encode())}"')
    (folder / DESCRIPTION).write_text(sealed)


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keep Orbax's remarks on a format without a database from the user."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_file(path: Path, name: str) -> bytes:
    """A file of a store."""
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise damaged(path, f"{name} is missing or cannot be read ({error.strerror})") from None


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
        content = json.loads(text)
        meta, item = content["custom_metadata"], next(iter(content["item_handlers"]))
        schema = meta["schema"] if meta["format"] == "hydraopt" else None
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):
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
    if schema > 1:
        seal = str(meta.get("seal")).encode()
        if digest(text.replace(b'"seal":"' + seal, b'"seal":"' + SEAL.encode())) != seal.decode():
            raise damaged(path, f"{DESCRIPTION} does not match its checksum")
    return meta, item


def open_container(path: Path, meta: Mapping[str, Any], item: str) -> Container:
    """Open a store of the present schema: all its files are there in their sizes, the small ones as written.

    Raises:
      HydraOptError: a file that is missing, of another size, or not as written.
    """
    array = f"{item}/{ARRAY}"
    small = {name: read_file(path, name) for name in meta["files"]}
    for name, checksum in meta["files"].items():
        if digest(small[name]) != checksum:
            raise damaged(path, f"{name} does not match its checksum")
    for k, (size, _) in enumerate(meta["chunks"]):
        file = path / array / str(k)
        if not file.is_file():
            raise damaged(path, f"{array}/{k} is missing")
        if file.stat().st_size != size:
            raise damaged(path, f"{array}/{k} has {file.stat().st_size} bytes instead of {size}")
    header = small[f"{array}/.zarray"]
    stored = sum(size for size, _ in meta["chunks"])
    total, chunk = array_shape(path, array, header, stored)
    if total != chunk * len(meta["chunks"]):
        raise damaged(path, f"{array}/.zarray has {total} bytes in chunks of {chunk}")
    return Container(path, meta, array, total, chunk, header)


def array_shape(path: Path, array: str, header: bytes, stored: int) -> tuple[int, int]:
    """Bytes of an array and of a chunk from its header; refused where they cannot be true."""
    try:
        fields = json.loads(header)
        (total,), (chunk,), kind = fields["shape"], fields["chunks"], fields["dtype"]
        sane = kind == "|u1" and 0 < chunk <= total <= ROOM + EXPANSION * stored
    except (ValueError, KeyError, TypeError, RecursionError):
        sane = False
    if not sane:
        raise damaged(path, f"{array}/.zarray claims what its files cannot hold")
    return total, chunk


def read_span(container: Container, start: int, stop: int, cache: dict[int, bytes]) -> np.ndarray:
    """Bytes `start` to `stop` of the array, from the chunks that hold them, each against its checksum."""
    path, array = container.path, container.array
    if not 0 <= start < stop <= container.total:
        raise damaged(path, f"its index points at bytes {start} to {stop} of {container.total}")
    store = {".zarray": container.header}
    for k in range(start // container.chunk, (stop - 1) // container.chunk + 1):
        if k not in cache:
            cache[k] = read_file(path, f"{array}/{k}")
            if digest(cache[k]) != container.meta["chunks"][k][1]:
                raise damaged(path, f"{array}/{k} does not match its checksum")
        store[str(k)] = cache[k]
    return decode(path, array, store, start, stop)


def decode(path: Path, array: str, files: Mapping[str, bytes], start: int, stop: int) -> np.ndarray:
    """Bytes `start` to `stop` of a zarr array whose files are in memory."""
    context = tensorstore.Context()
    try:
        memory = tensorstore.KvStore.open({"driver": "memory"}, context=context).result()
        for name, value in files.items():
            memory.write(name, value).result()
        spec = {"driver": "zarr", "kvstore": {"driver": "memory"}}
        opened = tensorstore.open(spec, context=context, open=True).result()
        return np.array(opened[start:stop].read().result())
    except Exception as error:
        raise damaged(path, f"{array} cannot be decoded ({' '.join(str(error).split())[:120]})") from None


def verify(path: Path) -> int:
    """Compare every file with its checksum, which the first schema has not; returns how many there are."""
    meta, item = read_description(path)
    if meta["schema"] == 1:
        return sum(x.is_file() for x in path.rglob("*"))
    opened = open_container(path, meta, item)
    for k, (_, checksum) in enumerate(meta["chunks"]):
        if digest(read_file(path, f"{opened.array}/{k}")) != checksum:
            raise damaged(path, f"{opened.array}/{k} does not match its checksum")
    return 1 + len(meta["files"]) + len(meta["chunks"])


def stamp(path: Path) -> tuple[int, int, bytes]:
    """What tells one state of a store from another, be they of equal content."""
    file = path / DESCRIPTION
    try:
        return path.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()
    except OSError:
        return 0, 0, b""


def is_compressed(path: Path) -> bool:
    """Whether a store's chunks are compressed by Orbax."""
    meta, item = read_description(path)
    header = read_file(path, f"{item}/{'index' if meta['schema'] == 1 else ARRAY}/.zarray")
    return json.loads(header).get("compressor") is not None


def read_index(container: Container, cache: dict[int, bytes]) -> dict[str, Any]:
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
        index = json.loads(text)
    except (ValueError, RecursionError):
        raise damaged(path, "its index is no JSON") from None
    return index


def read_first_schema(path: Path, item: str, name: str, size: Any) -> np.ndarray:
    """A leaf of a store of the first schema, compared with the size and the checksum that it should have."""
    array = f"{item}/{name}"
    header, data = read_file(path, f"{array}/.zarray"), read_file(path, f"{array}/0")
    total, _ = array_shape(path, array, header, len(data))
    leaf = decode(path, array, {".zarray": header, "0": data}, 0, total)
    if [len(leaf), digest(leaf)] != list(size):
        raise damaged(path, f"leaf {name!r} does not match its checksum")
    return leaf
