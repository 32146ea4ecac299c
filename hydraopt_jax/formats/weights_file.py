"""Weights files: contents, a check of all values during the checksum, and reads of factors.

A file is first read from end to end. Later it is opened for the tensors of one group of modules, which are
read at their offsets without memory mapping. So neither open files nor mapped pages grow with the collection.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from hydraopt_jax import strict_json
from hydraopt_jax.collection import ModuleEntry
from hydraopt_jax.errors import HydraOptError, one_line, system_error
from hydraopt_jax.formats import peft
from hydraopt_jax.formats.peft_config import module_scale
from hydraopt_jax.formats.tensor_files import read_tensors

# bytes that are read, checked and hashed in one piece, small enough for a core's cache
PIECE = 1 << 20
DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}


class TensorPlace(NamedTuple):
    """Position of a tensor, or of several adjacent tensors, in a file."""

    begin: int
    end: int
    dtype: np.dtype
    shape: tuple[int, ...] = ()


class Contents(NamedTuple):
    """Contents of a weights file; equal files of a collection share one object.

    Attributes:
      modules: module -> entry.
      extras: table of the full tensors, `[name, dtype, shape]`.
      dtype, layout: see `adapters.Adapter`.
      places: key of a factor -> its position; empty for a pickle.
      runs: groups of adjacent factors in the file, and the largest scale of each group.
    """

    modules: Mapping[str, ModuleEntry]
    extras: Sequence[Any]
    dtype: str
    layout: Mapping[str, Any]
    places: Mapping[str, TensorPlace]
    runs: Sequence[tuple[TensorPlace, float]]


class _Shape(NamedTuple):
    """A tensor that was not read, with the attributes that `peft.check_pair` needs."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)


def _shapes(file: Path) -> list[tuple[str, Any]]:
    if file.suffix != ".safetensors":
        return list(read_tensors(file))
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
            kinds = {k: DTYPES.get(x.get_dtype()) for k, x in parts.items()}
            if None not in kinds.values():
                return [(k, _Shape(tuple(x.get_shape()), np.dtype(kinds[k]))) for k, x in parts.items()]
    except (safetensors.SafetensorError, OSError) as error:
        raise HydraOptError(
            f"{file}: is not a complete safetensors file ({one_line(error)}): copy it again"
        ) from None
    # rare dtypes have names that only reading reveals
    return list(read_tensors(file))


def header_of(file: Path) -> bytes:
    """Length and header of a safetensors file; empty for a pickle and for invalid files."""
    if file.suffix != ".safetensors":
        return b""
    with file.open("rb") as opened:
        length = opened.read(8)
        count = int.from_bytes(length, "little")
        return length + opened.read(count) if count < file.stat().st_size else b""


def contents_of(file: Path, header: bytes, config: Mapping[str, Any]) -> Contents:
    """The contents of a file with this header; no values are read.

    Raises:
      HydraOptError: no LoRA tensor, a factor without its counterpart, or shapes that disagree.
    """
    pairs, extras = peft.sorted_tensors(iter(_shapes(file)), config, str(file))
    if not pairs:
        raise HydraOptError(f"{file}: holds no LoRA tensor: was the right adapter saved?")
    modules, layouts = {}, {}
    for module, pair in pairs.items():
        layout = peft.check_pair(module, pair, config, str(file))
        (key_a, low), (key_b, high) = pair["A"], pair["B"]
        rank = low.shape[0]
        modules[module] = ModuleEntry(
            key_a,
            key_b,
            int(np.prod(low.shape)) // rank,
            high.shape[0],
            rank,
            float(module_scale(config, module)),
        )
        if layout:
            layouts[module] = layout
    dtypes = {x.dtype for pair in pairs.values() for _, x in pair.values()}
    table = [[k, x.dtype.name, list(x.shape)] for k, x in extras.items()]
    kind = dtypes.pop().name if len(dtypes) == 1 else "float32"
    places = {}
    if header:
        try:
            rows = strict_json.loads(header[8:])
        except ValueError as error:
            raise HydraOptError(
                f"{file}: the header is not JSON ({one_line(error)}): save it again"
            ) from None
        for key in (k for e in modules.values() for k in e[:2]):
            begin, end = (len(header) + x for x in rows[key]["data_offsets"])
            dtype = np.dtype(DTYPES[rows[key]["dtype"]])
            places[key] = TensorPlace(begin, end, dtype, tuple(rows[key]["shape"]))
    scales = {k: abs(e.scale) if s else 1.0 for e in modules.values() for s, k in enumerate(e[:2])}
    runs = [
        (
            TensorPlace(places[keys[0]].begin, places[keys[-1]].end, places[keys[0]].dtype),
            max(scales[k] for k in keys),
        )
        for keys in adjacent(list(places), places)
    ]
    return Contents(modules, table, kind, layouts, places, runs)


def adjacent(keys: Sequence[str], places: Mapping[str, TensorPlace]) -> list[list[str]]:
    """Groups of keys of adjacent tensors of one dtype, in order of the file."""
    out: list[list[str]] = []
    for key in sorted(keys, key=lambda k: places[k].begin):
        last = places[out[-1][-1]] if out else None
        if last is not None and (last.end, last.dtype) == (places[key].begin, places[key].dtype):
            out[-1].append(key)
        else:
            out.append([key])
    return out


def largest(values: np.ndarray) -> float:
    """The largest magnitude among floats, by comparing bits, which sort like magnitudes; NaN sorts last.

    >>> largest(np.array([1.0, -3.0], np.float16))
    3.0
    """
    width = values.dtype.itemsize
    plus, minus = int(values.view(f"i{width}").max()), int(values.view(f"u{width}").max())
    bits = max(plus, minus & ((1 << (8 * width - 1)) - 1))
    return float(np.array(bits, f"u{width}").view(values.dtype))


def check_file(source: str, file: Path, held: Contents, header: int) -> str:
    """Checksum of a file, after a check in the same pass that all values are finite.

    Raises:
      HydraOptError: NaN or infinite values, also after multiplication with the scale.
    """
    fine = bool(held.places) and all((x.begin - header) % x.dtype.itemsize == 0 for x, _ in held.runs)
    digest = hashlib.sha256()
    buffer = np.empty(PIECE, np.uint8)
    try:
        with file.open("rb") as opened:
            # the header separately, so that a piece never ends inside a number
            digest.update(opened.read(header))
            at = header
            while count := opened.readinto(buffer.data):
                digest.update(buffer[:count].data)
                for place, scale in held.runs if fine else ():
                    low, high = max(place.begin - at, 0), min(place.end - at, count)
                    if low < high:
                        with np.errstate(over="ignore"):
                            top = np.float32(largest(buffer[low:high].view(place.dtype))) * np.float32(scale)
                        fine = fine and bool(np.isfinite(top))
                at += count
    except OSError as error:
        raise system_error(file, "read", error) from None
    if not fine:
        # which one it is, or that the large value and the large scale belong to different modules
        check_values(source, file, held.modules)
    return digest.hexdigest()


def check_values(source: str, file: Path, modules: Mapping[str, ModuleEntry]) -> None:
    """Raise for NaN and infinite values, also after multiplication with the scale."""
    factors = {k: (m, e.scale if s else 1.0) for m, e in modules.items() for s, k in enumerate(e[:2])}
    for key, tensor in read_tensors(file):
        if key not in factors:
            continue
        module, scale = factors[key]
        with np.errstate(over="ignore"):
            finite = np.isfinite(tensor.astype(np.float32, copy=False) * np.float32(scale)).all()
        if not finite:
            side = "input" if key == modules[module].key_a else "output"
            raise HydraOptError(
                f"{source}: {module} has NaN or infinite values in its {side}-side factor: leave this "
                "adapter out or retrain it"
            )


def read_places(
    file: str, stamp: tuple[int, int], places: Mapping[str, TensorPlace], keys: Sequence[str]
) -> list[np.ndarray]:
    """Factors at their positions, adjacent ones with one call.

    `stamp` is the file's size and modification time of the first pass.

    Raises:
      OSError: the file cannot be read, or has changed since the first pass.
    """
    out: dict[str, np.ndarray] = {}
    opened = os.open(file, os.O_RDONLY)
    try:
        stat = os.fstat(opened)
        if (stat.st_size, stat.st_mtime_ns) != tuple(stamp):
            raise OSError("another size or time of change")
        for run in adjacent(keys, places):
            begin = places[run[0]].begin
            data = pread(opened, places[run[-1]].end - begin, begin)
            for place, key in ((places[k], k) for k in run):
                part = data[place.begin - begin : place.end - begin]
                out[key] = part.view(place.dtype).reshape(place.shape)
    finally:
        os.close(opened)
    return [out[k] for k in keys]


def pread(opened: int, count: int, at: int) -> np.ndarray:
    """A number of bytes at an offset of a file; one system call returns at most two gigabytes."""
    data = np.empty(count, np.uint8)
    done = 0
    while done < count:
        got = os.preadv(opened, [data.data[done:]], at + done)
        if not got:
            raise OSError("it ends too early")
        done += got
    return data
