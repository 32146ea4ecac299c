"""A collection of adapters whose factors are read on demand, from memory or from files.

Names, shapes and sizes are known at once; factors are read module by module. The engine takes only this type,
so one adapter and ten thousand, in memory or on disk, take the same path.
"""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.static import Static
from hydraopt_jax.store.lossless import Raw
from hydraopt_jax.store.store import Source

Item = TypeVar("Item")

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


def card_entries(card: Card) -> int:
    """Number of entries of an adapter's factors."""
    return sum(e.rank * (e.inputs + e.outputs) for e in card.modules.values())


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
        return sum(map(card_entries, self.cards))

    def entries_report(self) -> dict[str, Any]:
        """The number of entries for a store's report, and those of tasks that have not the most usual one."""
        own = {x.task: card_entries(x) for x in self.cards}
        usual, _ = Counter(own.values()).most_common(1)[0]
        unusual = {t: n for t, n in own.items() if n != usual}
        return {"entries": sum(own.values())} | ({"task_entries": unusual} if unusual else {})

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


def read_ahead(reads: Iterable[Callable[[], Item]], depth: int = 1) -> Iterator[Item]:
    """The result of each call, in order, while the `depth` following calls run in the background.

    >>> [*read_ahead([lambda: 1, lambda: 2, lambda: 3])]
    [1, 2, 3]
    """
    coming = iter(reads)
    with ThreadPoolExecutor(depth) as pool:
        pending = deque(pool.submit(x) for x in itertools.islice(coming, depth))
        while pending:
            pending.extend(pool.submit(x) for x in itertools.islice(coming, 1))
            # no name holds a result that its reader has done with
            yield pending.popleft().result()


def widest_dtype(names: Iterable[str]) -> str:
    """float16 or bfloat16 if all adapters have it, else float32.

    >>> widest_dtype(["float16", "float16"]), widest_dtype(["float16", "bfloat16"])
    ('float16', 'float32')
    """
    kinds = set(names)
    return kinds.pop() if len(kinds) == 1 and kinds <= {"float16", "bfloat16"} else "float32"
