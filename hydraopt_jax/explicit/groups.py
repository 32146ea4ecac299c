"""Groups: modules of one shape that are read and solved together, and reading them from files."""

import functools
import itertools
import math
import mmap
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from hydraopt_jax.collection import Collection, read_ahead, widest_dtype
from hydraopt_jax.devices import even
from hydraopt_jax.explicit.fitting import CHUNK
from hydraopt_jax.forms import Hydra

# bytes of factors, in their files' dtype, of the modules that are solved together
GROUP_BYTES = 1 << 26
READERS = 2


class Group(NamedTuple):
    """Modules of one shape that are solved together.

    Attributes:
      modules: names.
      room: number of modules in the arrays, equal for all groups of a shape, for one compilation.
      shape: (I, O).
      rank: the largest rank R of the shape.
      spans: consecutive tasks that are read together.
    """

    modules: tuple[str, ...]
    room: int
    shape: tuple[int, int]
    rank: int
    spans: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Tasks of the longest span."""
        return max(b - a for a, b in self.spans)


class GroupFactors(NamedTuple):
    """Factors of a group's modules for some tasks, in the files' layout.

    Attributes:
      a: `[M, T, R, I]`, zero beyond a task's own rank.
      b: `[M, T, O, R]`.
      scale: `[M, T]` float32, 0 where a task lacks the module.
      ranks: `[M, T]`.
    """

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray
    ranks: np.ndarray


def applied(tasks: int, rank: int, size: int) -> bool:
    """Whether a side's sum is applied through the factors of all tasks, which are smaller."""
    return tasks * rank < size


def is_streamed(form: Hydra, tasks: int) -> bool:
    """Whether a form is solved in passes over the tasks; other forms need all tasks at once."""
    return form.solver is None and form.heads in (None, tasks) and tasks > 1


def groups_of(found: Collection, form: Hydra, limit: int = GROUP_BYTES) -> list[Group]:
    """The modules of a collection in groups of about `limit` bytes."""
    tasks = len(found.cards)
    size = np.dtype(host_dtype(found)).itemsize
    shapes: dict[tuple[int, int], list[str]] = {}
    for name, shape in found.shapes.items():
        shapes.setdefault(shape, []).append(name)
    out = []
    for shape, names in shapes.items():
        rank = max(max(found.rank(m, t) for t in range(tasks)) for m in names)
        module = size * tasks * rank * sum(shape)
        room = min(max(limit // module, 1), CHUNK, len(names))
        room = even(len(names), room)
        whole = not is_streamed(form, tasks) or any(applied(tasks, rank, n) for n in shape)
        length = tasks if whole else min(tasks, max(limit * tasks // module, 1))
        spans = tuple((t, min(t + length, tasks)) for t in range(0, tasks, length))
        for at in range(0, len(names), room):
            out.append(Group(tuple(names[at : at + room]), room, shape, rank, spans))
    return out


def host_dtype(found: Collection) -> str:
    """Dtype of the arrays that factors are read into: the dtype of the files if they have only one.

    Adapters in memory have their scale folded in, which needs float32.
    """
    return widest_dtype(x.dtype if x.file else "float32" for x in found.cards)


def zeros(shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Zeros that begin on a page, so that JAX on a CPU uses contiguous parts without a copy."""
    dtype = np.dtype(kind)
    pages = mmap.mmap(-1, max(math.prod(shape) * dtype.itemsize, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # one page fault instead of five hundred
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype, math.prod(shape)).reshape(shape)


def read_block(
    found: Collection, group: Group, span: tuple[int, int], read: Callable[[int], None]
) -> GroupFactors:
    """Read a block."""
    tasks, (inputs, outputs) = range(*span), group.shape
    kind = host_dtype(found)
    a = zeros((group.room, len(tasks), group.rank, inputs), kind)
    b = zeros((group.room, len(tasks), outputs, group.rank), kind)
    scale = np.zeros((group.room, len(tasks)), np.float32)
    ranks = np.zeros((group.room, len(tasks)), int)

    def one(t: int) -> None:
        at = t - span[0]
        here = [m for m, name in enumerate(group.modules) if found.rank(name, t)]
        rows = found.read(t, [group.modules[m] for m in here])
        for m, (low, high, factor) in zip(here, rows, strict=True):
            rank = len(low)
            a[m, at, :rank], b[m, at, :, :rank] = low, high
            scale[m, at], ranks[m, at] = factor, rank
        read(sum(low.nbytes + high.nbytes for low, high, _ in rows))

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(one, tasks))
    return GroupFactors(a, b, scale, ranks)


def read_groups(
    found: Collection, groups: Sequence[Group], passes: int, read: Callable[[int], None]
) -> Generator[tuple[Group, Iterator[GroupFactors]]]:
    """Every group with its blocks, the next one always being read; spans are read again for each pass, a
    single one once."""
    requests = (
        functools.partial(read_block, found, group, span, read)
        for group in groups
        for span in group.spans * (passes if len(group.spans) > 1 else 1)
    )
    blocks = read_ahead(requests)
    for group in groups:
        if len(group.spans) == 1:
            block = next(blocks)
            yield group, iter([block] * passes)
            del block
        else:
            yield group, itertools.islice(blocks, passes * len(group.spans))
