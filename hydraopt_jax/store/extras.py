"""Full tensors that tasks carry beside their factors (classifier heads, biases), coded apart from these.

A tensor's bytes are sorted by significance and deflated: exponents are alike, mantissas are noise. What the
tensors take does not depend on the factors' budget, and is known before anything is fitted.
"""

import itertools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.deferred import Deferred, bytes_of, size_of
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.store.container import inflate

DTYPES = ("float32", "float16", "bfloat16")
# names of tensors in a message
SHOWN = 3


class Extras(Mapping[str, np.ndarray]):
    """Coded tensors by name; each is decoded when it is asked for.

    Args:
      table: `[name, dtype, shape, coded bytes]` of each tensor, JSON-able; `[name, dtype, shape]` of one that
        is not coded, as early stores have them.
      blob: their bytes one after another, which may be deferred.

    >>> x = coded({"score.weight": np.ones((2, 3), np.float16)})
    >>> x["score.weight"].tolist(), len(x), x.nbytes < 30
    ([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], 1, True)
    """

    def __init__(self, table: Sequence[Sequence[Any]], blob: Any) -> None:
        self.table, self.blob = [list(row) for row in table], blob
        starts = itertools.accumulate(map(stored_size, self.table), initial=0)
        self.place = {row[0]: (start, row) for start, row in zip(starts, self.table, strict=False)}

    def __getitem__(self, name: str) -> np.ndarray:
        start, row = self.place[name]
        if isinstance(self.blob, Deferred):
            part = self.blob.part(start, (stored_size(row),), np.uint8)
            return decode(row, bytes(bytes_of(part)))
        return decode(row, bytes(memoryview(self.blob)[start : start + stored_size(row)]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.place)

    def __len__(self) -> int:
        return len(self.place)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them as they are stored."""
        return size_of(self.blob)


def raw_size(row: Sequence[Any]) -> int:
    """Bytes of a tensor of a table, decoded."""
    return math.prod(row[2]) * np.dtype(row[1]).itemsize


def stored_size(row: Sequence[Any]) -> int:
    """Bytes of a tensor of a table, as they are stored."""
    return row[3] if len(row) > 3 else raw_size(row)


def coded(tensors: Mapping[str, np.ndarray], dtype: str | None = None) -> Extras:
    """Tensors, coded; floating-point ones wider than `dtype` are rounded to it, None keeps all as they came.

    Raises:
      HydraOptError: a value that overflows the dtype.
    """
    if isinstance(tensors, Extras) and not any(narrows(row[1], dtype) for row in tensors.table):
        return tensors
    table: list[list[Any]] = []
    parts = []
    for name, x in tensors.items():
        kept = rounded(name, np.asarray(x), dtype)
        parts.append(encode(kept))
        table.append([name, kept.dtype.name, list(kept.shape), len(parts[-1])])
    return Extras(table, b"".join(parts))


def narrows(kind: str, dtype: str | None) -> bool:
    """Whether tensors of a dtype are rounded to another one.

    >>> narrows("float32", "bfloat16"), narrows("float16", "bfloat16"), narrows("int64", "float16")
    (True, False, False)
    """
    if dtype is None or not np.issubdtype(np.dtype(kind), np.floating):
        return False
    return np.dtype(kind).itemsize > np.dtype(dtype).itemsize


def rounded(name: str, x: np.ndarray, dtype: str | None) -> np.ndarray:
    """A tensor in the dtype that it is stored in."""
    if dtype is None or not narrows(x.dtype.name, dtype):
        return x
    with np.errstate(over="ignore"):
        out = x.astype(dtype)
    if np.isfinite(x).all() and not np.isfinite(out.astype(np.float32)).all():
        raise HydraOptError(f"{name}: values overflow {dtype}; give --extras-dtype bfloat16 or float32")
    return out


def encode(x: np.ndarray) -> bytes:
    """A tensor's bytes by significance, Huffman-coded: what differs has no repeats to look for."""
    flat = np.ascontiguousarray(x).reshape(-1)
    planes = flat.view(np.uint8).reshape(-1, flat.itemsize).T.tobytes()
    coder = zlib.compressobj(6, strategy=zlib.Z_HUFFMAN_ONLY)
    return coder.compress(planes) + coder.flush()


def decode(row: Sequence[Any], data: bytes) -> np.ndarray:
    """The tensor of a row of a table.

    Raises:
      HydraOptError: what is there is not what the table says.
    """
    name, dtype, shape = row[:3]
    kind, size = np.dtype(dtype), raw_size(row)
    if len(row) > 3:
        data = inflate(data, size + 1)
    if len(data) != size:
        raise HydraOptError(f"{name}: its bytes in the store are not the tensor that its index describes")
    if len(row) > 3:
        data = np.frombuffer(data, np.uint8).reshape(kind.itemsize, -1).T.tobytes()
    return np.frombuffer(data, np.uint8).view(kind).reshape(shape).copy()


def blank(x: Extras) -> Extras:
    """The same table over zeros: its description takes what that of the tensors takes, and they nothing."""
    return Extras(x.table, bytes(x.nbytes))


def check_dtype(dtype: str | None) -> None:
    """Refuse what is no dtype of full tensors."""
    if dtype is not None and dtype not in DTYPES:
        raise HydraOptError(f"extras_dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")


def carried(
    collection: Sequence[Adapter], dtype: str | None = None, budget: int | float | None = None
) -> list[Adapter]:
    """Adapters whose full tensors are coded; see `coded` and `check_room` for what is refused."""
    out = [x._replace(extras=coded(x.extras, dtype)) for x in collection]
    check_room(budget, [x.extras for x in out], dtype)  # type: ignore[misc]
    return out


def check_room(budget: Any, collection: Sequence[Extras], dtype: str | None) -> None:
    """Refuse a budget in bytes that the tensors alone take, naming them.

    Args:
      budget: bytes, or a fraction, which counts the factors alone and is never refused here.
      collection: the tensors of each task.
      dtype: to which they were rounded.
    """
    size = sum(x.nbytes for x in collection)
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
