"""A collection that is read module by module: what an adapter holds is known, its factors stay in its file.

A pickle cannot be read in parts and is held in memory.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax.adapters import Adapter, check_texts
from hydraopt_jax.compression import stored_dtype
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import peft
from hydraopt_jax.formats.peft_config import CONFIG_FILE, read_config
from hydraopt_jax.formats.tensor_files import one_line, read_tensors
from hydraopt_jax.jobs.weights import Contents, Entry, Place, check_file, contents_of, header_of, read_places

# one module of one adapter as its file has it: `a: [R, I]`, `b: [O, R]` and the scale of the delta
Pair = tuple[np.ndarray, np.ndarray, float]


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
        header = header_of(file)
    except OSError as error:
        raise HydraOptError(f"{file}: cannot be read: {one_line(error.strerror)}") from None
    key = (header, stat.st_size, json.dumps(config, sort_keys=True, default=str)) if header else None
    held = seen.get(key) or contents_of(file, header, config)
    if key is not None:
        seen[key] = held
    before = known.get(str(file), (None, ""))
    digest = before[1] if tuple(before[0] or ()) == stamp else check_file(source, file, held, len(header))
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
        check_texts(card.task, card.source, {})
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
            return read_places(card.file, card.stamp, card.places, keys)
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


def folder_bytes(cards: Sequence[Card]) -> int:
    """Bytes of the adapters' folders, as a user counts them."""
    return sum(x.stat().st_size for c in cards for x in Path(c.file).parent.iterdir() if x.is_file())
