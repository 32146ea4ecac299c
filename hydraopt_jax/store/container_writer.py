"""How a container is written: a run of bytes as arrays of chunk files, then the description of them all.

A run of more than `ARRAY_BYTES` is written array by array (Orbax's partial saving), so that the writer holds
one of them and not the store.
"""

import itertools
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as ocp

from hydraopt_jax import memory, strict_json
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.store import container

# bytes of a chunk, and the most chunks of an array: what a task's restore may read in excess, against a file
# a chunk
CHUNK = 1 << 16
MAX_CHUNKS = 256
# most bytes of an array, which a writer holds twice: its own and Orbax's copy
ARRAY_BYTES = 1 << 26


def write(folder: Path, index: Mapping[str, Any], leaves: Iterable[Any], compress: bool) -> None:
    """Write a new folder: the index, deflated, then the leaves; no bytes of it depend on time or place.

    Args:
      folder: to be made.
      index: JSON-able; its "leaves" are name -> bytes, in the order in which the leaves come.
      leaves: their bytes in pieces of any length, as bytes or contiguous arrays of bytes. A piece is asked
        for when there is room for it: what they come from need not fit in memory.
      compress: let Orbax compress the chunks with zstd.

    Raises:
      ValueError: the leaves have more or fewer bytes than the index says.
      HydraOptError: zstd makes less of the leaves than a reader believes.
    """
    try:
        text = json.dumps(index, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        what = strict_json.fault(index) or str(error)
        raise HydraOptError(f"{folder.name}: what the store says of itself is no JSON: {what}") from None
    head = zlib.compress(text, 9)
    total = len(head) + sum(index["leaves"].values())
    chunk, count = division(total)
    arrays = fill(itertools.chain([head], leaves), total, chunk, count)
    context = ocp.Context()
    context.array.saving.use_compression = compress
    # plain zarr: few arrays need no database, whose own files cost more and vary in size
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = False
    context.array.saving.storage_options = ocp.options.ArrayOptions.Saving.StorageOptions(
        chunk_byte_size=chunk
    )
    with context, quiet_orbax():
        if total <= ARRAY_BYTES:
            (array,) = arrays
            counts = [len(array) // chunk]
            ocp.save(folder, {container.ARRAY: array}, custom_metadata={})
        else:
            counts = []
            for array in arrays:
                ocp.partial.save(folder, {container.array_name(len(counts)): array})
                memory.give_back()
                counts.append(len(array) // chunk)
            ocp.partial.finalize(folder)
    marker = folder / "commit_success.txt"
    if marker.exists():
        # Orbax names the temporary folder in it, which is wrong after the rename and varies in length
        marker.write_text("committed\n")
    describe(folder, counts, chunk, [len(head), len(text)])


def describe(folder: Path, counts: Sequence[int], chunk: int, index: Sequence[int]) -> None:
    """Write the description of a folder: arrays of so many chunks, chunks and index of so many bytes."""
    handlers = json.loads((folder / container.DESCRIPTION).read_bytes())["item_handlers"]
    item = next(iter(handlers))
    names = [
        [f"{item}/{container.array_name(n)}/{k}" for k in range(count)] for n, count in enumerate(counts)
    ]
    # one file at a time: together they are the store
    chunks = [[summarize((folder / x).read_bytes()) for x in array] for array in names]
    stored = sum(size for array in chunks for size, _ in array)
    total = chunk * sum(counts)
    if total > container.ROOM + container.EXPANSION * stored:
        raise HydraOptError(f"a store of {total:,} bytes that are nearly all zeros: write it without zstd")
    apart = {container.DESCRIPTION, *itertools.chain(*names)}
    others = sorted(x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file())
    meta = {
        "format": "hydraopt",
        "schema": container.SCHEMA,
        "index": index,
        "chunks": chunks,
        "files": {x: container.digest((folder / x).read_bytes()) for x in others if x not in apart},
        "seal": container.SEAL,
    }
    blank = json.dumps({"item_handlers": handlers, "custom_metadata": meta}, separators=(",", ":"))
    sealed = blank.replace(f'"seal":"{container.SEAL}"', f'"seal":"{container.digest(blank.encode())}"')
    (folder / container.DESCRIPTION).write_text(sealed)


def summarize(data: bytes) -> list[Any]:
    """Size and checksum."""
    return [len(data), container.digest(data)]


def division(total: int) -> tuple[int, int]:
    """Bytes of a chunk, and the most chunks of an array, for a run of so many bytes."""
    count = min(max(round(min(total, ARRAY_BYTES) / CHUNK), 1), MAX_CHUNKS)
    return (-(-total // count) if total <= ARRAY_BYTES else ARRAY_BYTES // count), count


def fill(pieces: Iterable[Any], total: int, chunk: int, count: int) -> Iterator[np.ndarray]:
    """A run of `total` bytes as arrays of whole chunks, padded with zeros.

    One buffer is filled again and again: an array is gone when the next one is asked for.
    """
    buffer = np.zeros(chunk * count, np.uint8)
    done = at = 0
    for piece in pieces:
        rest = memoryview(piece).cast("B")
        done += len(rest)
        while rest:
            taken = min(len(rest), len(buffer) - at)
            buffer[at : at + taken] = rest[:taken]
            rest, at = rest[taken:], at + taken
            if at == len(buffer):
                yield buffer
                at = 0
    if done != total:
        raise ValueError(f"index and leaves have {done} bytes instead of {total}")
    if at:
        buffer[at:] = 0
        yield buffer[: chunk * -(-at // chunk)]


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
