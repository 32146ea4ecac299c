"""Full tensors of tasks beside the factors (classifier heads, biases), stored as deflated byte planes.

The bytes of a tensor are sorted by significance and deflated: exponents are similar, mantissas are noise. The
size of the tensors does not depend on the budget of the factors, and is known before any fit.
"""

import itertools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

from hydraopt_jax.deferred import Deferred, bytes_of, size_of
from hydraopt_jax.errors import HydraOptError

DTYPES = ("float32", "float16", "bfloat16")
# deflate cannot expand further
DEFLATE = 1040
# maximum number of tensor names in a message
SHOWN = 3


class Tensors(Mapping[str, np.ndarray]):
    """Coded tensors by name; each is decoded on demand.

    Args:
      table: `(name, dtype, shape, coded bytes)` of each tensor.
      blob: their concatenated bytes, possibly deferred.

    >>> x = encode_tensors({"score.weight": np.ones((2, 3), np.float16)})
    >>> x["score.weight"].tolist(), len(x), x.nbytes < 30
    ([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], 1, True)
    """

    def __init__(self, table: Sequence[Sequence[Any]], blob: Any) -> None:
        self.table, self.blob = tuple((n, d, tuple(s), *size) for n, d, s, *size in table), blob
        starts = itertools.accumulate(map(stored_size, self.table), initial=0)
        self.place = {row[0]: (start, row) for start, row in zip(starts, self.table, strict=False)}

    def __getitem__(self, name: str) -> np.ndarray:
        start, row = self.place[name]
        if isinstance(self.blob, Deferred):
            part = self.blob.part(start, (stored_size(row),), np.uint8)
            return decode_tensor(row, bytes(bytes_of(part)))
        return decode_tensor(row, bytes(memoryview(self.blob)[start : start + stored_size(row)]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.place)

    def __len__(self) -> int:
        return len(self.place)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all tensors."""
        return size_of(self.blob)


def raw_size(row: Sequence[Any]) -> int:
    """Decoded bytes of a tensor of a table."""
    return math.prod(row[2]) * np.dtype(row[1]).itemsize


def stored_size(row: Sequence[Any]) -> int:
    """Stored bytes of a tensor of a table."""
    return row[3]


def encode_tensors(tensors: Mapping[str, np.ndarray], dtype: str | None = None) -> Tensors:
    """Coded tensors. Floating-point tensors wider than `dtype` are rounded to it; None rounds nothing.

    Raises:
      HydraOptError: a value that overflows the dtype.
    """
    if isinstance(tensors, Tensors) and not any(narrows(row[1], dtype) for row in tensors.table):
        return tensors
    table: list[list[Any]] = []
    parts = []
    for name, x in tensors.items():
        kept = round_tensor(name, np.asarray(x), dtype)
        parts.append(encode_tensor(kept))
        table.append([name, kept.dtype.name, list(kept.shape), len(parts[-1])])
    return Tensors(table, b"".join(parts))


def narrows(kind: str, dtype: str | None) -> bool:
    """Whether tensors of one dtype are rounded to another.

    >>> narrows("float32", "bfloat16"), narrows("float16", "bfloat16"), narrows("int64", "float16")
    (True, False, False)
    """
    if dtype is None or not np.issubdtype(np.dtype(kind), np.floating):
        return False
    return np.dtype(kind).itemsize > np.dtype(dtype).itemsize


def round_tensor(name: str, x: np.ndarray, dtype: str | None) -> np.ndarray:
    """A tensor in its stored dtype."""
    if dtype is None or not narrows(x.dtype.name, dtype):
        return x
    with np.errstate(over="ignore"):
        out = x.astype(dtype)
    if np.isfinite(x).all() and not np.isfinite(out.astype(np.float32)).all():
        raise HydraOptError(f"{name}: values overflow {dtype}; give --extras-dtype bfloat16 or float32")
    return out


def encode_tensor(x: np.ndarray) -> bytes:
    """A tensor's bytes sorted by significance, Huffman-coded only: there are no repeats to search for."""
    flat = np.ascontiguousarray(x).reshape(-1)
    planes = flat.view(np.uint8).reshape(-1, flat.itemsize).T.tobytes()
    coder = zlib.compressobj(6, strategy=zlib.Z_HUFFMAN_ONLY)
    return coder.compress(planes) + coder.flush()


def decode_tensor(row: Sequence[Any], data: bytes) -> np.ndarray:
    """The tensor of a row of a table.

    Raises:
      HydraOptError: the bytes do not match the table.
    """
    name, dtype, shape = row[:3]
    kind, size = np.dtype(dtype), raw_size(row)
    data = inflate_at_most(data, size + 1)
    if len(data) != size:
        raise HydraOptError(f"{name}: its bytes in the store are not the tensor that its table describes")
    data = np.frombuffer(data, np.uint8).reshape(kind.itemsize, -1).T.tobytes()
    return np.frombuffer(data, np.uint8).view(kind).reshape(shape).copy()


def inflate_at_most(data: bytes, limit: int) -> bytes:
    """Inflate at most `limit` bytes; return b"" for invalid input."""
    try:
        return zlib.decompressobj().decompress(data, limit)
    except zlib.error:
        return b""


def check_dtype(dtype: str | None, option: str = "dtype") -> None:
    """Raise if a name is not a dtype of stored numbers; the message names the option."""
    if dtype is not None and dtype not in DTYPES:
        raise HydraOptError(f"{option} = {dtype!r}: must be one of {', '.join(DTYPES)}")


def check_room(budget: Any, collection: Sequence[Tensors], dtype: str | None) -> None:
    """Raise if the tensors alone exceed a budget in bytes; the message names them.

    Args:
      budget: bytes, or a fraction, which counts the factors alone and is never refused here.
      collection: the tensors of each task.
      dtype: to which they were rounded.
    """
    size = sum(stored_size(row) for x in collection for row in x.table)
    if not isinstance(budget, int) or budget > size or not size:
        return
    names = list(dict.fromkeys(name for x in collection for name in x))
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    wide = any(narrows(row[1], "float16") for x in collection for row in x.table)
    way = "--extras-dtype float16, " if wide and dtype is None else ""
    raise HydraOptError(
        f"budget of {budget:,} bytes: the full tensors beside the factors ({shown}; "
        f"{sum(map(bool, collection))} tasks) take {size:,} alone: give more, {way}or a fraction, which is "
        "of the factors only"
    )
