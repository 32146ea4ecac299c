"""A collection that is read module by module: what an adapter holds is known, its factors stay in its file.

A file is opened for the tensors of one group of modules and closed again, so that neither open files nor
mapped pages grow with the collection. A pickle cannot be read in parts and is held in memory.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
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


class Card(NamedTuple):
    """What is known of an adapter whose factors are not in memory.

    Attributes:
      task: its name.
      modules: module -> entry; one object for all adapters alike.
      extras: table of its full tensors, `[name, dtype, shape]`.
      dtype, config, layout, source, digest: as in `Adapter`.
      file: its weights.
      stamp: bytes and time of the file's last change.
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


def open_adapter(source: str, task: str | None, known: Mapping[str, Sequence[Any]]) -> Card:
    """Look at an adapter, check every value of it, and take its checksum, a tensor at a time.

    Args:
      source: as `formats.read_adapter`.
      task: its name; None for the folder's.
      known: file -> its stamp and checksum at an earlier check, which holds while the stamp does; an empty
        checksum where values are not to be checked at all.

    Raises:
      HydraOptError: as `formats.read_adapter`; or NaN or infinite values.
    """
    folder, name = peft.locate(source)
    name = name if task is None else task
    config = read_config(folder / CONFIG_FILE)
    file = peft.weights_file(folder)
    stat = file.stat()
    stamp = (stat.st_size, stat.st_mtime_ns)
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
    before = known.get(str(file), (None, ""))
    if tuple(before[0] or ()) == stamp:
        digest = before[1]
    else:
        check_values(source, file, modules)
        digest = peft.file_digest(file)
    return Card(name, modules, table, kind, config, layouts, source, digest, str(file), stamp)


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
            with safetensors.safe_open(card.file, framework="np") as opened:
                return [opened.get_tensor(k) for k in keys]
        except (safetensors.SafetensorError, OSError) as error:
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
        names = [row[0] for row in shared[task].extras]
        return dict(zip(names, fetch(shared[task], names), strict=True)) if names else {}

    return Collection(tuple(shared), shapes, read, read_extras, folder_bytes(shared))


def folder_bytes(cards: Sequence[Card]) -> int:
    """Bytes of the adapters' folders, as a user counts them."""
    return sum(x.stat().st_size for c in cards for x in Path(c.file).parent.iterdir() if x.is_file())
