"""Parts of a collection, each of which is read, analyzed and coded together, as one segment.

A part is some modules of some consecutive tasks, about `SEGMENT_BYTES` of factors. Parts are coded
independently, at
one common quantizer step: a common step allocates bits optimally over the whole collection. A small
collection is one part.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.collection import Collection, read_ahead

# half-precision bytes of a part's factors; coding takes some thirty times as much
SEGMENT_BYTES = 1 << 24
# maximum directions of a part's tasks together; the search for similar directions takes cubic time in them
DIRECTIONS = 512
# modules of a pilot, at least
LEAST_MODULES = 3
GOLDEN = (5**0.5 - 1) / 2


class Part(NamedTuple):
    """A part: names of modules, and positions of the tasks with any of them."""

    modules: tuple[str, ...]
    tasks: tuple[int, ...]


def parts_of(found: Collection, limit: int = SEGMENT_BYTES) -> list[Part]:
    """The parts of a collection, each of about `limit` bytes."""
    tasks = range(len(found.cards))
    widest = max(max(found.rank(m, t) for t in tasks) * sum(s) for m, s in found.shapes.items())
    length = min(max(limit // (2 * max(widest, 1)), 1), span(found))
    out = []
    for at in range(0, len(tasks), length):
        here = tasks[at : at + length]
        weigh = {m: 2 * sum(s) * sum(found.rank(m, t) for t in here) for m, s in found.shapes.items()}
        chosen: list[str] = []
        total = 0
        for name, size in weigh.items():
            if chosen and size + total > limit:
                out.append(part(found, chosen, here))
                chosen, total = [], 0
            if size:
                chosen.append(name)
                total += size
        out += [part(found, chosen, here)] * bool(chosen)
    return out


def span(found: Collection) -> int:
    """Number of tasks that are compared with each other."""
    rank = max(found.rank(m, t) for m in found.shapes for t in range(len(found.cards)))
    return max(DIRECTIONS // max(rank, 1), 1)


def part(found: Collection, modules: Sequence[str], tasks: Sequence[int]) -> Part:
    """The part with these modules, and with those tasks that have any of them."""
    return Part(tuple(modules), tuple(t for t in tasks if any(found.rank(m, t) for m in modules)))


def entries(found: Collection, of: Part) -> int:
    """Number of entries of a part's factors."""
    return sum(found.rank(m, t) * sum(found.shapes[m]) for m in of.modules for t in of.tasks)


def pilot_part(found: Collection, limit: int = SEGMENT_BYTES) -> Part:
    """The pilot: a part with modules and tasks from all over the collection."""
    tasks, names = len(found.cards), list(found.shapes)
    few = list(range(0, tasks, max(tasks // span(found), 1)))[: span(found)]
    modules = pick_names(names, LEAST_MODULES)
    while 2 * entries(found, Part(tuple(modules), tuple(few))) > limit and len(few) > 1:
        few = few[::2]
    return part(found, [m for m in modules if any(found.rank(m, t) for t in few)], few)


def pick_names(names: Sequence[str], count: int) -> list[str]:
    """About so many names from all over, in order: multiples of the golden ratio, as every n-th would be of
    one kind where kinds take turns.

    >>> pick_names("qkvoqkvo", 4), pick_names("qkvo", 4)
    (['q', 'v', 'q', 'k'], ['q', 'k', 'v', 'o'])
    """
    places = {int((0.5 + k * GOLDEN) % 1 * len(names)) for k in range(count)}
    return [names[i] for i in sorted(places)] if count < len(names) else list(names)


def read_part(
    found: Collection, wanted: Part, count: Callable[[int], None] = lambda size: None
) -> list[Adapter]:
    """The part's factors in float32."""
    out = found.adapters(wanted.tasks, wanted.modules)
    count(2 * sum(x.a[n].size + x.b[n].size for x in out for n in x.a))
    return out


def ahead(
    found: Collection, wanted: Sequence[Part], count: Callable[[int], None], depth: int = 1
) -> Iterator[list[Adapter]]:
    """The factors of each part, while the `depth` following parts are read in the background."""
    return read_ahead((functools.partial(read_part, found, x, count) for x in wanted), depth)
