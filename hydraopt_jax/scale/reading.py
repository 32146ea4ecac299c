"""A collection that is read module by module: what an adapter holds is known, its factors stay in its file.

A file is read once from end to end when it is looked at: its checksum is taken and its values are checked
from the same bytes. Later it is opened for the tensors of one group of modules, which are read at their
places and not mapped, so that neither open files nor mapped pages grow with the collection. A pickle cannot
be read in parts and is held in memory.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.compression import stored_dtype
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import peft
from hydraopt_jax.formats.peft_config import CONFIG_FILE, module_scale, read_config
from hydraopt_jax.formats.tensor_files import one_line, read_tensors

# bytes that are read, checked and hashed while a core's cache has them
PIECE = 1 << 20
DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}

# one module of one adapter as its file has it: `a: [R, I]`, `b: [O, R]` and the scale of the delta
Pair = tuple[np.ndarray, np.ndarray, float]


class Entry(NamedTuple):
    """A module of an adapter: keys of its tensors, sizes, and the scale of `b @ a`."""

    key_a: str
    key_b: str
    inputs: int
    outputs: int
    rank: int
    scale: float


class Place(NamedTuple):
    """Where the bytes of a tensor, or of several that follow each other, lie in a file."""

    begin: int
    end: int
    dtype: np.dtype
    shape: tuple[int, ...] = ()


class Contents(NamedTuple):
    """What a weights file holds; equal files of a collection share one.

    Attributes:
      modules, extras, dtype, layout: as in `Card`.
      places: key of a factor -> where it lies; empty for a pickle.
      runs: factors that follow each other in the file, and the largest scale of those.
    """

    modules: Mapping[str, Entry]
    extras: Sequence[Any]
    dtype: str
    layout: Mapping[str, Any]
    places: Mapping[str, Place]
    runs: Sequence[tuple[Place, float]]


class Card(NamedTuple):
    """What is known of an adapter whose factors are not in memory.

    Attributes:
      task: its name.
      modules: module -> entry; one object for all adapters alike.
      extras: table of its full tensors, `[name, dtype, shape]`.
      dtype, config, layout, source, digest: as in `Adapter`.
      file: its weights.
      stamp: bytes and time of the file's last change.
      places: as in `Contents`.
    """

    task: str
    modules: Mapping[str, Entry]
    extras: Sequence[Any]
    dtype: str
    config: Mapping[str, Any]
    layout: Mapping[str, Any]
    source: str
    digest: str
    file: str
    stamp: tuple[int, int] = (0, 0)
    places: Mapping[str, Place] = MappingProxyType({})


class Collection(NamedTuple):
    """Adapters of one base model, to be read a group of modules at a time.

    Attributes:
      cards: one a task.
      shapes: module -> (I, O), in order of appearance.
      read: `(task, modules)` -> one `Pair` a module; safe to call from several threads.
      read_extras: `task` -> its full tensors.
      size: bytes of all files as they came.
    """

    cards: tuple[Card, ...]
    shapes: Mapping[str, tuple[int, int]]
    read: Callable[[int, Sequence[str]], list[Pair]]
    read_extras: Callable[[int], Mapping[str, np.ndarray]]
    size: int

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the T tasks."""
        return tuple(x.task for x in self.cards)

    @property
    def dtype(self) -> str:
        """The widest dtype among the adapters, of those that a store keeps."""
        return stored_dtype([Adapter(x.task, {}, {}, x.dtype) for x in self.cards])

    def rank(self, module: str, task: int) -> int:
        """Rank of a task's module; 0 where it lacks it."""
        entry = self.cards[task].modules.get(module)
        return 0 if entry is None else entry.rank

    def entries(self) -> int:
        """How many numbers the factors hold."""
        return sum(e.rank * (e.inputs + e.outputs) for x in self.cards for e in x.modules.values())


class _Shape(NamedTuple):
    """A tensor that was not read; what `peft.check_pair` asks of one."""

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
            out = []
            for key in opened.keys():  # noqa: SIM118 - no mapping
                part = opened.get_slice(key)
                kind = part.get_dtype()
                out.append((key, _Shape(tuple(part.get_shape()), np.dtype(DTYPES.get(kind, "V1")))))
            return out
    except (safetensors.SafetensorError, OSError) as error:
        raise HydraOptError(
            f"{file}: is not a whole safetensors file ({one_line(error)}): copy it again"
        ) from None


def _header(file: Path) -> bytes:
    """Length and header of a safetensors file; nothing of a pickle or of what cannot be one."""
    if file.suffix != ".safetensors":
        return b""
    with file.open("rb") as opened:
        length = opened.read(8)
        count = int.from_bytes(length, "little")
        return length + opened.read(count) if count < file.stat().st_size else b""


def _contents(file: Path, header: bytes, config: Mapping[str, Any]) -> Contents:
    pairs, extras = peft.sort_tensors(iter(_shapes(file)), str(file))
    if not pairs:
        raise HydraOptError(f"{file}: holds no LoRA tensor: was the right adapter saved?")
    modules, layouts = {}, {}
    for module, pair in pairs.items():
        layout = peft.check_pair(module, pair, config, str(file))
        (key_a, low), (key_b, high) = pair["A"], pair["B"]
        rank = low.shape[0]
        modules[module] = Entry(
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
    table = [[k, "" if x.dtype.kind == "V" else x.dtype.name, list(x.shape)] for k, x in extras.items()]
    if any(not kind for _, kind, _ in table):
        # rare dtypes have names that only reading tells
        table = [[k, x.dtype.name, list(x.shape)] for k, x in read_tensors(file) if k in extras]
    kind = dtypes.pop().name if len(dtypes) == 1 else "float32"
    places = {}
    if header:
        rows = json.loads(header[8:])
        for key in (k for e in modules.values() for k in e[:2]):
            begin, end = (len(header) + x for x in rows[key]["data_offsets"])
            dtype = np.dtype(DTYPES[rows[key]["dtype"]])
            places[key] = Place(begin, end, dtype, tuple(rows[key]["shape"]))
    scales = {k: abs(e.scale) if s else 1.0 for e in modules.values() for s, k in enumerate(e[:2])}
    runs = [
        (
            Place(places[keys[0]].begin, places[keys[-1]].end, places[keys[0]].dtype),
            max(scales[k] for k in keys),
        )
        for keys in adjacent(list(places), places)
    ]
    return Contents(modules, table, kind, layouts, places, runs)


def adjacent(keys: Sequence[str], places: Mapping[str, Place]) -> list[list[str]]:
    """Keys of tensors of one dtype that lie one behind another, together; in order of the file."""
    out: list[list[str]] = []
    for key in sorted(keys, key=lambda k: places[k].begin):
        last = places[out[-1][-1]] if out else None
        if last is not None and (last.end, last.dtype) == (places[key].begin, places[key].dtype):
            out[-1].append(key)
        else:
            out.append([key])
    return out


def open_adapter(
    source: str,
    task: str | None,
    known: Mapping[str, Sequence[Any]],
    seen: dict[Any, Contents] | None = None,
) -> Card:
    """Look at an adapter: read it once, check every value of it and take its checksum.

    Args:
      source: as `formats.read_adapter`.
      task: its name; None for the folder's.
      known: file -> its stamp and checksum at an earlier check, which holds while the stamp does; an empty
        checksum where values are not to be checked at all.
      seen: contents of files by header, size and config: what one file was found to hold is not looked up
        again for the next one alike.

    Raises:
      HydraOptError: as `formats.read_adapter`; or NaN or infinite values.
    """
    seen = {} if seen is None else seen
    folder, name = peft.locate(source)
    name = name if task is None else task
    config = read_config(folder / CONFIG_FILE)
    file = peft.weights_file(folder)
    stat = file.stat()
    stamp = (stat.st_size, stat.st_mtime_ns)
    try:
        header = _header(file)
    except OSError as error:
        raise HydraOptError(f"{file}: cannot be read: {one_line(error.strerror)}") from None
    key = (header, stat.st_size, json.dumps(config, sort_keys=True, default=str)) if header else None
    held = seen.get(key) or _contents(file, header, config)
    if key is not None:
        seen[key] = held
    before = known.get(str(file), (None, ""))
    digest = before[1] if tuple(before[0] or ()) == stamp else check(source, file, held, len(header))
    return Card(
        name,
        held.modules,
        held.extras,
        held.dtype,
        config,
        held.layout,
        source,
        digest,
        str(file),
        stamp,
        held.places,
    )


def largest(values: np.ndarray) -> float:
    """The largest magnitude among floats, by their bits, which sort as the magnitudes do; NaN sorts last.

    >>> largest(np.array([1.0, -3.0], np.float16))
    3.0
    """
    width = values.dtype.itemsize
    plus, minus = int(values.view(f"i{width}").max()), int(values.view(f"u{width}").max())
    bits = max(plus, minus & ((1 << (8 * width - 1)) - 1))
    return float(np.array(bits, f"u{width}").view(values.dtype))


def check(source: str, file: Path, held: Contents, header: int) -> str:
    """Checksum of a file whose values are finite, as the files' bytes pass by.

    Raises:
      HydraOptError: NaN or infinite values, also those that the scale would make.
    """
    fine = bool(held.places) and all((x.begin - header) % x.dtype.itemsize == 0 for x, _ in held.runs)
    digest = hashlib.sha256()
    buffer = np.empty(PIECE, np.uint8)
    try:
        with file.open("rb") as opened:
            # the header apart, so that a piece never ends inside a number
            digest.update(opened.read(header))
            at = header
            while count := opened.readinto(buffer):  # type: ignore[arg-type]
                digest.update(buffer[:count].data)
                for place, scale in held.runs if fine else ():
                    low, high = max(place.begin - at, 0), min(place.end - at, count)
                    if low < high:
                        with np.errstate(over="ignore"):
                            top = np.float32(largest(buffer[low:high].view(place.dtype))) * np.float32(scale)
                        fine = fine and bool(np.isfinite(top))
                at += count
    except OSError as error:
        raise HydraOptError(f"{file}: cannot be read: {one_line(error.strerror)}") from None
    if not fine:
        # which one it is, or that the large value and the large scale belong to different modules
        check_values(source, file, held.modules)
    return digest.hexdigest()


def check_values(source: str, file: Path, modules: Mapping[str, Entry]) -> None:
    """Refuse NaN and infinite values, also those that the scale would make."""
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


def check_shapes(cards: Sequence[Card]) -> dict[str, tuple[int, int]]:
    """As `adapters.check`, from cards: module -> (I, O).

    Raises:
      HydraOptError: no adapter, equal names, or shapes that disagree.
    """
    if not cards:
        raise HydraOptError("no adapter given: name at least one")
    seen: dict[str, str] = {}
    owner: dict[str, str] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for card in cards:
        if card.task in seen:
            raise HydraOptError(
                f"task name {card.task!r} is used by both {seen[card.task]} and {card.source}: "
                "rename one with NAME=ADAPTER"
            )
        seen[card.task] = card.source
        for name, entry in card.modules.items():
            shape = (entry.inputs, entry.outputs)
            if shapes.setdefault(name, shape) != shape:
                raise HydraOptError(
                    f"{name}: {card.task!r} has [in, out] = {list(shape)}, {owner[name]!r} has "
                    f"{list(shapes[name])}: adapters of one store must adapt one base model"
                )
            owner.setdefault(name, card.task)
    return shapes


def collection(cards: Sequence[Card]) -> Collection:
    """A collection of PEFT adapters, from their cards."""
    shapes = check_shapes(cards)
    held = {x.file: dict(read_tensors(Path(x.file))) for x in cards if not x.file.endswith(".safetensors")}
    # equal adapters share one table: a thousand of them must not hold a thousand
    tables: dict[Any, Mapping[str, Entry]] = {}
    shared = [x._replace(modules=tables.setdefault(tuple(x.modules.items()), x.modules)) for x in cards]

    def fetch(card: Card, keys: Sequence[str]) -> list[np.ndarray]:
        if card.file in held:
            return [held[card.file][k] for k in keys]
        try:
            return read_places(card, keys)
        except OSError as error:
            raise HydraOptError(
                f"{card.file}: cannot be read ({one_line(error)}), though it could be before: has it changed?"
            ) from None

    def read(task: int, modules: Sequence[str]) -> list[Pair]:
        entries = [shared[task].modules[m] for m in modules]
        tensors = fetch(shared[task], [k for e in entries for k in e[:2]])
        return [
            (a.reshape(e.rank, e.inputs), b.reshape(e.outputs, e.rank), e.scale)
            for e, a, b in zip(entries, tensors[::2], tensors[1::2], strict=True)
        ]

    def read_extras(task: int) -> Mapping[str, np.ndarray]:
        card, names = shared[task], {row[0] for row in shared[task].extras}
        rows = held[card.file].items() if card.file in held else read_tensors(Path(card.file))
        return {k: x for k, x in rows if k in names} if names else {}

    return Collection(tuple(shared), shapes, read, read_extras, folder_bytes(shared))


def read_places(card: Card, keys: Sequence[str]) -> list[np.ndarray]:
    """Factors of an adapter, those that lie one behind another by one call.

    Raises:
      OSError: the file cannot be read, or is not the one that was looked at.
    """
    out: dict[str, np.ndarray] = {}
    opened = os.open(card.file, os.O_RDONLY)
    try:
        stat = os.fstat(opened)
        if (stat.st_size, stat.st_mtime_ns) != tuple(card.stamp):
            raise OSError("another size or time of change")
        for run in adjacent(keys, card.places):
            begin = card.places[run[0]].begin
            data = pread(opened, card.places[run[-1]].end - begin, begin)
            for place, key in ((card.places[k], k) for k in run):
                part = data[place.begin - begin : place.end - begin]
                out[key] = part.view(place.dtype).reshape(place.shape)
    finally:
        os.close(opened)
    return [out[k] for k in keys]


def pread(opened: int, count: int, at: int) -> np.ndarray:
    """So many bytes of a file from there on; one call may bring no more than two gigabytes."""
    data = np.empty(count, np.uint8)
    done = 0
    while done < count:
        got = os.preadv(opened, [data.data[done:]], at + done)
        if not got:
            raise OSError("it ends too early")
        done += got
    return data


def folder_bytes(cards: Sequence[Card]) -> int:
    """Bytes of the adapters' folders, as a user counts them."""
    return sum(x.stat().st_size for c in cards for x in Path(c.file).parent.iterdir() if x.is_file())
