"""A collection of adapters whose factors are read on demand, from memory or from files.

Names, shapes and sizes are known at once; factors are read module by module. The engine takes only this type,
so one adapter and ten thousand, in memory or on disk, take the same path.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax.adapters import Adapter, check_texts
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.static import Static
from hydraopt_jax.store.lossless import Raw
from hydraopt_jax.store.store import Source

# one module of one adapter in the files' layout: `a: [R, I]`, `b: [O, R]` and the scale of the delta
Pair = tuple[np.ndarray, np.ndarray, float]


class ModuleEntry(NamedTuple):
    """One module of an adapter: the keys of its tensors, their sizes, and the scale of `b @ a`."""

    key_a: str
    key_b: str
    inputs: int
    outputs: int
    rank: int
    scale: float


class Card(NamedTuple):
    """Everything about an adapter except its factors.

    Attributes:
      task: its name.
      modules: module -> entry; adapters of equal layout share one object.
      extras: table of its full tensors, `[name, dtype, shape]`.
      dtype, config, layout, source, digest: as in `Adapter`.
      file: its weights; "" in memory.
      stamp: bytes and time of the file's last change.
      places: key of a factor -> its position in the file.
    """

    task: str
    modules: Mapping[str, ModuleEntry]
    extras: Sequence[Any]
    dtype: str
    config: Mapping[str, Any]
    layout: Mapping[str, Any]
    source: str
    digest: str
    file: str = ""
    stamp: tuple[int, int] = (0, 0)
    places: Mapping[str, Any] = MappingProxyType({})


class Collection(NamedTuple):
    """Adapters of one base model, read one group of modules at a time.

    Attributes:
      cards: one per task.
      shapes: module -> (I, O), in order of appearance.
      read: `(task, modules)` -> one `Pair` per module; safe to call from several threads.
      read_extras: `task` -> its full tensors.
      raw: `(task, module)` -> the factors bit for bit as in the input.
      size: bytes of all input files; for adapters in memory, of their factors in half precision.
    """

    cards: tuple[Card, ...]
    shapes: Mapping[str, tuple[int, int]]
    read: Callable[[int, Sequence[str]], list[Pair]]
    read_extras: Callable[[int], Mapping[str, np.ndarray]]
    raw: Callable[[int, str], Raw]
    size: int

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the T tasks."""
        return tuple(x.task for x in self.cards)

    @property
    def sources(self) -> tuple[Source, ...]:
        """One `Source` per task."""
        return tuple(
            Source(x.dtype, Static(x.config), Static(x.layout), x.source, x.digest) for x in self.cards
        )

    @property
    def dtype(self) -> str:
        """The widest dtype among the adapters, of those that a store keeps."""
        return widest_dtype(x.dtype for x in self.cards)

    def rank(self, module: str, task: int) -> int:
        """Rank of a module of a task; 0 if the task lacks the module."""
        entry = self.cards[task].modules.get(module)
        return 0 if entry is None else entry.rank

    def entries(self) -> int:
        """Number of entries of all factors."""
        return sum(e.rank * (e.inputs + e.outputs) for x in self.cards for e in x.modules.values())

    def adapters(self, tasks: Iterable[int], modules: Sequence[str]) -> list[Adapter]:
        """Adapters with some modules of some tasks, read into memory as float32."""
        out = []
        for t in tasks:
            names = [m for m in modules if m in self.cards[t].modules]
            rows = self.read(t, names)
            a = {m: np.asarray(low, np.float32).T for m, (low, _, _) in zip(names, rows, strict=True)}
            b = {
                m: np.asarray(high, np.float32).T * np.float32(scale)
                for m, (_, high, scale) in zip(names, rows, strict=True)
            }
            out.append(Adapter(self.cards[t].task, a, b))
        return out


def widest_dtype(names: Iterable[str]) -> str:
    """float16 or bfloat16 if all adapters have it, else float32.

    >>> widest_dtype(["float16", "float16"]), widest_dtype(["float16", "bfloat16"])
    ('float16', 'float32')
    """
    kinds = set(names)
    return kinds.pop() if len(kinds) == 1 and kinds <= {"float16", "bfloat16"} else "float32"


def check_shapes(cards: Sequence[Card]) -> dict[str, tuple[int, int]]:
    """Module -> (I, O), checked as `adapters.check` does, from cards.

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
