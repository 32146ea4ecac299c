"""Arrays that are read on demand, so that a store can be inspected without loading it.

Shapes and dtypes are in memory, numbers are not. Each `np.asarray` reads them again.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 and float8 with numpy)
import numpy as np

from hydraopt_jax.errors import HydraOptError


class Deferred:
    """An array outside of memory.

    Args:
      shape, dtype: of the array.
      read: `(start, stop)` -> bytes of the array in C order.
      origin: container and name, if the array is a whole leaf of a container.
      digest: the digest that its bytes are compared with at each read; b"" if they are not compared.

    >>> numbers = np.arange(3, dtype=np.float32).tobytes()
    >>> x = Deferred((3,), "float32", lambda start, stop: numbers[start:stop])
    >>> x.nbytes, np.asarray(x).tolist(), np.asarray(x.part(4, (2,), "float32")).tolist()
    (12, [0.0, 1.0, 2.0], [1.0, 2.0])
    """

    __slots__ = ("digest", "dtype", "origin", "read", "shape")

    def __init__(
        self,
        shape: Sequence[int],
        dtype: Any,
        read: Callable[[int, int], Any],
        origin: Any = None,
        digest: bytes = b"",
    ) -> None:
        self.shape, self.dtype, self.read = tuple(shape), np.dtype(dtype), read
        self.origin, self.digest = origin, digest

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        out = np.frombuffer(bytes_of(self), np.uint8).view(self.dtype).reshape(self.shape)
        return out if dtype is None else out.astype(dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        # what is read here cannot be read in another process: it gets the numbers
        return np.array, (np.asarray(self),)

    def part(self, start: int, shape: Sequence[int], dtype: Any) -> "Deferred":
        """A part of the array from a byte offset on, as an array of its own.

        Raises:
          ValueError: the part exceeds the array.
        """
        out = Deferred(shape, dtype, lambda low, high: self.read(start + low, start + high))
        if start + out.nbytes > self.nbytes:
            raise ValueError(f"{out.nbytes} bytes from byte {start} on of {self.nbytes}")
        return out


def in_file(path: str, offset: int, shape: Sequence[int], dtype: Any) -> Deferred:
    """An array in a file. Reading it fails if the file has become shorter."""

    def read(start: int, stop: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(offset + start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise HydraOptError(f"{path}: is incomplete: delete {Path(path).parent} and start again")
        return data

    return Deferred(shape, dtype, read)


def size_of(part: Any) -> int:
    """Size in bytes of an array, deferred or not, or of a bytes object."""
    return len(part) if isinstance(part, bytes) else part.nbytes


def bytes_of(part: Any) -> Any:
    """The bytes of an array, deferred or not, or of a bytes object; contiguous arrays are not copied.

    >>> bytes(bytes_of(np.array([[1], [2]], np.uint8))), bytes_of(b"ab")
    (b'\\x01\\x02', b'ab')
    """
    if isinstance(part, bytes):
        return part
    if isinstance(part, Deferred):
        return part.read(0, part.nbytes)
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


def joined(parts: Sequence[Any]) -> Any:
    """The concatenated bytes of arrays, `[n]` uint8; deferred if one of them is.

    >>> joined([np.array([1], np.uint8), np.array([[2, 3]], np.uint8)]).tolist()
    [1, 2, 3]
    """
    if not any(isinstance(x, Deferred) for x in parts):
        return np.concatenate([np.frombuffer(bytes_of(x), np.uint8) for x in parts])
    ends = list(itertools.accumulate(map(size_of, parts)))

    def read(start: int, stop: int) -> Any:
        out: np.ndarray = np.empty(stop - start, np.uint8)
        for part, end in zip(parts, ends, strict=True):
            begin = end - size_of(part)
            low, high = max(start, begin), min(stop, end)
            if low < high:
                span = np.frombuffer(span_of(part, low - begin, high - begin), np.uint8)
                if len(span) == len(out):
                    return span
                out[low - start : high - start] = span
        return out

    return Deferred((ends[-1],), np.uint8, read)


def span_of(part: Any, start: int, stop: int) -> Any:
    """A range of the bytes of an array, deferred or not, or of a bytes object."""
    return part.read(start, stop) if isinstance(part, Deferred) else bytes_of(part)[start:stop]


def part_of(leaf: Any, start: int, shape: Sequence[int], dtype: Any) -> Any:
    """The array in a leaf (bytes, deferred or not) from a byte offset on."""
    if isinstance(leaf, Deferred):
        return leaf.part(start, shape, dtype)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.asarray(leaf)[start : start + size].view(dtype).reshape(shape)
