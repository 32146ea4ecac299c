"""Arrays of bytes on disk or in a bucket, read with TensorStore, and a segment's run out of several."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hydraopt_jax import buckets
from hydraopt_jax.deferred import Deferred, joined
from hydraopt_jax.errors import HydraOptError, damaged, one_line
from hydraopt_jax.store.segment_data import SegmentEntry

# bytes of chunks that all readers together keep
CACHE_BYTES = 1 << 24


@functools.cache
def shared_context() -> Any:
    """The TensorStore context that all open arrays of this process share, with one cache of chunks."""
    import tensorstore

    return tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


def open_array(path: Any, name: str, place: Mapping[str, Any], size: int) -> Any:
    """An array of `size` bytes, opened with TensorStore; `path` and `name` are for messages."""
    import tensorstore

    spec = {"driver": "zarr", "kvstore": dict(place)}
    try:
        array = tensorstore.open(spec, context=shared_context(), open=True, read=True).result()
        (chunk,) = array.chunk_layout.read_chunk.shape or (0,)
        sane = array.shape == (size,) and array.dtype.name == "uint8" and 0 < (chunk or 0) <= size
    except (ValueError, OSError) as error:
        raise unreadable(path, f"{name} cannot be opened", error) from None
    if not sane:
        raise damaged(path, f"{name} is not the array that the manifest describes")
    return array


def run_reader(
    path: Any,
    entry: SegmentEntry,
    arrays: Sequence[Sequence[Any]],
    place: Callable[[str], Mapping[str, Any]],
    most: int,
) -> Callable[[int, int], np.ndarray]:
    """A function `(start, stop)` -> bytes of a segment's run.

    Args:
      path: of the store, for messages.
      entry: of the segment.
      arrays: name and size of each array.
      place: where the files of an array are, as TensorStore has it.
      most: bytes that the segment's files can hold.

    Raises:
      HydraOptError: the segment claims more, or its arrays do not fit it.
    """
    sizes = [n for _, n in arrays]
    if entry.bytes > most or not fit_run(entry.bytes, sizes):
        raise damaged(path, f"segment {entry.id} claims what its files cannot hold")

    def part(name: str, size: int) -> Deferred:
        @functools.cache
        def opened() -> Any:
            return open_array(path, f"{name} of segment {entry.id}", place(name), size)

        def read(start: int, stop: int) -> np.ndarray:
            array = opened()
            try:
                return np.asarray(array[start:stop].read().result())
            except (ValueError, OSError) as error:
                raise unreadable(path, f"segment {entry.id} cannot be read", error) from None

        return Deferred((size,), np.uint8, read)

    return joined([part(*x) for x in arrays]).read


def unreadable(path: Any, what: str, error: Exception) -> HydraOptError:
    """The error for an array that TensorStore cannot read: a damaged store or a failed service."""
    if isinstance(path, str) and (meant := buckets.meaning(error)):
        return HydraOptError(f"{path}: {what}: {meant}")
    return damaged(path, f"{what} ({one_line(error, 120)})")


def fit_run(total: int, sizes: Sequence[int]) -> bool:
    """Whether array sizes fit a run of so many bytes; the last array may be longer.

    >>> fit_run(10, [4, 8]), fit_run(10, [4, 4]), fit_run(3, [4, 4])
    (True, False, False)
    """
    return bool(sizes) and sum(sizes[:-1]) < total <= sum(sizes)
