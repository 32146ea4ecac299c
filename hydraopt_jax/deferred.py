"""Arrays that are read when they are asked for: what a store is can be known without holding it.

Shapes and dtypes are in memory, numbers are not. `np.asarray` reads them, every time.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 and float8 with numpy)
import numpy as np


class Deferred:
    """An array somewhere else.

    Args:
      shape, dtype: as of any array.
      read: `(start, stop)` -> those of its bytes, in C order.

    >>> numbers = np.arange(3, dtype=np.float32).tobytes()
    >>> x = Deferred((3,), "float32", lambda start, stop: numbers[start:stop])
    >>> x.nbytes, np.asarray(x).tolist(), np.asarray(x.part(4, (2,), "float32")).tolist()
    (12, [0.0, 1.0, 2.0], [1.0, 2.0])
    """

    __slots__ = ("dtype", "read", "shape")

    def __init__(self, shape: Sequence[int], dtype: Any, read: Callable[[int, int], Any]) -> None:
        self.shape, self.dtype, self.read = tuple(shape), np.dtype(dtype), read

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


def part_of(leaf: Any, start: int, shape: Sequence[int], dtype: Any) -> Any:
    """What lies in a leaf, an array of bytes or a deferred one, from a byte on."""
    if isinstance(leaf, Deferred):
        return leaf.part(start, shape, dtype)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.asarray(leaf)[start : start + size].view(dtype).reshape(shape)
