"""Arrays that are read when they are asked for: what a store is can be known without holding it.

Shapes and dtypes are in memory, numbers are not. `np.asarray` reads them, every time.
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
    """An array somewhere else.

    Args:
      shape, dtype: as of any array.
      read: `(start, stop)` -> those of its bytes, in C order.
      origin: what it is a whole leaf of, if anything: a container and a name.
      digest: what its bytes were compared with, whenever they are read; b"" where they are not.

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

    def part(self, start: int, shape: Sequence[int], dtype: Any) -> "Deferred":
        """What lies in it from a byte on, as an array of its own.

        Raises:
          ValueError: it does not lie in it.
        """
        out = Deferred(shape, dtype, lambda low, high: self.read(start + low, start + high))
        if start + out.nbytes > self.nbytes:
            raise ValueError(f"{out.nbytes} bytes from byte {start} on of {self.nbytes}")
        return out


def in_file(path: str, offset: int, shape: Sequence[int], dtype: Any) -> Deferred:
    """An array that lies in a file; one that has become shorter cannot be read."""

    def read(start: int, stop: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(offset + start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise HydraOptError(f"{path}: is not whole: delete {Path(path).parent} and start again")
        return data

    return Deferred(shape, dtype, read)


def size_of(part: Any) -> int:
    """Bytes of an array, deferred or not, or of bytes."""
    return len(part) if isinstance(part, bytes) else part.nbytes


def bytes_of(part: Any) -> Any:
    """The bytes of an array, deferred or not, or bytes; no copy of an array that is contiguous.

    >>> bytes(bytes_of(np.array([[1], [2]], np.uint8))), bytes_of(b"ab")
    (b'\\x01\\x02', b'ab')
    """
    if isinstance(part, bytes):
        return part
    if isinstance(part, Deferred):
        return part.read(0, part.nbytes)
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


def joined(parts: Sequence[Any]) -> Any:
    """The bytes of arrays one after another, `[n]` uint8; deferred where one of them is.

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
                span = span_of(part, low - begin, high - begin)
                out[low - start : high - start] = np.frombuffer(span, np.uint8)
        return out

    return Deferred((ends[-1],), np.uint8, read)


def span_of(part: Any, start: int, stop: int) -> Any:
    """Some of the bytes of an array, deferred or not, or of bytes."""
    return part.read(start, stop) if isinstance(part, Deferred) else bytes_of(part)[start:stop]


def part_of(leaf: Any, start: int, shape: Sequence[int], dtype: Any) -> Any:
    """What lies in a leaf, an array of bytes or a deferred one, from a byte on."""
    if isinstance(leaf, Deferred):
        return leaf.part(start, shape, dtype)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.asarray(leaf)[start : start + size].view(dtype).reshape(shape)
