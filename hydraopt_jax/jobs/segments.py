"""Segments: the parts of a large collection that are read and coded by themselves, and how they are kept.

A segment is some modules of some consecutive tasks, about `SEGMENT_BYTES` of factors. It is coded as if there
were nothing else (`coding.trial`), at the quantizer step that all segments have in common: with one step bits
go where they are worth most in the whole collection, whoever codes it.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax import adapters
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.codec import encode
from hydraopt_jax.codec.layout import TermShape
from hydraopt_jax.jobs.job import read_json, write_json
from hydraopt_jax.jobs.reading import Collection
from hydraopt_jax.rate_control import encode_at_step, navigate
from hydraopt_jax.store import structure

# half-precision bytes of a segment's factors; coding takes some thirty times as much
SEGMENT_BYTES = 1 << 24
# directions of a segment's tasks together, at most: what is alike is looked for among so many, in the cube
# of the time
DIRECTIONS = 512
# tasks up to which forms name the one that others are predicted from
NAMED = 16


class Part(NamedTuple):
    """What a segment holds: names of modules, and positions of the tasks that have any of them."""

    modules: tuple[str, ...]
    tasks: tuple[int, ...]


class Coded(NamedTuple):
    """A coded segment on disk.

    Attributes:
      leaves: name -> where its bytes begin in the segment's file, and how many they are.
      skeleton: structure of its terms, see `structure.coded_skeleton`.
      errors: `[M, T]` relative squared errors of the segment's modules and tasks, None where absent.
      barred: modules that take no joint basis.
      forms: form in words -> count of modules.
      tail: mean relative energy beyond the ranks kept, see `navigate.eigen_tail`.
    """

    leaves: Mapping[str, tuple[int, int]]
    skeleton: Mapping[str, Any]
    errors: list[list[float | None]]
    barred: list[str]
    forms: Mapping[str, int]
    tail: float

    @property
    def shapes(self) -> dict[str, tuple[TermShape, ...]]:
        """Module -> structure of its terms."""
        return structure.coded_shapes(self.skeleton)

    @property
    def table(self) -> np.ndarray:
        """The errors as an array, NaN where absent."""
        return np.array([[np.nan if e is None else e for e in row] for row in self.errors], np.float64)


def parts_of(found: Collection, limit: int = SEGMENT_BYTES) -> list[Part]:
    """Divide a collection into parts of about `limit` bytes."""
    tasks = range(len(found.cards))
    widest = max(max(found.rank(m, t) for t in tasks) * sum(s) for m, s in found.shapes.items())
    length = min(max(limit // (2 * widest), 1), span(found))
    out = []
    for at in range(0, len(tasks), length):
        here = tasks[at : at + length]
        weigh = {m: 2 * sum(s) * sum(found.rank(m, t) for t in here) for m, s in found.shapes.items()}
        chosen: list[str] = []
        for name, size in weigh.items():
            if chosen and size + sum(weigh[m] for m in chosen) > limit:
                out.append(part(found, chosen, here))
                chosen = []
            chosen += [name] * (size > 0)
        out += [part(found, chosen, here)] * bool(chosen)
    return out


def span(found: Collection) -> int:
    """How many tasks are compared with each other."""
    rank = max(found.rank(m, t) for m in found.shapes for t in range(len(found.cards)))
    return max(DIRECTIONS // rank, 1)


def part(found: Collection, modules: Sequence[str], tasks: Sequence[int]) -> Part:
    """The part of these modules, with those of the tasks that have any."""
    return Part(tuple(modules), tuple(t for t in tasks if any(found.rank(m, t) for m in modules)))


def pilot_of(found: Collection, limit: int = SEGMENT_BYTES) -> Part:
    """A part to begin with: modules and tasks from all over the collection."""
    tasks, names = len(found.cards), list(found.shapes)
    few = list(range(0, tasks, max(tasks // span(found), 1)))[: span(found)]
    modules = names[:: max(len(names) // encode_at_step.TRAINING_MODULES, 1)]
    weigh = lambda: 2 * sum(found.rank(m, t) * sum(found.shapes[m]) for m in modules for t in few)  # noqa: E731
    while weigh() > limit and len(few) > 1:
        few = few[::2]
    return part(found, [m for m in modules if any(found.rank(m, t) for t in few)], few)


def read(found: Collection, wanted: Part, count: Callable[[int], None] = lambda size: None) -> list[Adapter]:
    """The part's factors in float32."""
    out = []
    for t in wanted.tasks:
        names = [m for m in wanted.modules if found.rank(m, t)]
        rows = found.read(t, names)
        count(sum(low.nbytes + high.nbytes for low, high, _ in rows))
        a = {m: np.asarray(low, np.float32).T for m, (low, _, _) in zip(names, rows, strict=True)}
        b = {
            m: np.asarray(high, np.float32).T * np.float32(scale)
            for m, (_, high, scale) in zip(names, rows, strict=True)
        }
        out.append(Adapter(found.cards[t].task, a, b))
    return out


def ahead(
    found: Collection, wanted: Sequence[Part], count: Callable[[int], None], depth: int = 1
) -> Iterator[list[Adapter]]:
    """The factors of part after part, `depth` following ones being read meanwhile."""
    with ThreadPoolExecutor(depth) as pool:
        coming = iter(wanted)
        pending = deque(pool.submit(read, found, x, count) for x in itertools.islice(coming, depth))
        while pending:
            now = pending.popleft().result()
            pending.extend(pool.submit(read, found, x, count) for x in itertools.islice(coming, 1))
            yield now


def prepare(
    collection: Sequence[Adapter], weights: np.ndarray, share: bool, deep: bool = True
) -> encode_at_step.Problem:
    """Decompose and compare a part; `weights: [T]` of its tasks' errors."""
    order = tuple(dict.fromkeys(name for x in collection for name in x.a))
    return encode_at_step.prepare(adapters.stack(collection), order, weights, None, share, deep)


def code(
    problem: encode_at_step.Problem, tasks: Sequence[str], step: float, frequencies: np.ndarray, file: Path
) -> Coded:
    """Code a part at a step and write its leaves to a file, which is flushed to disk."""
    found = encode_at_step.attempt(problem, step, frequencies)
    leaves = {}
    with file.open("wb") as sink:
        for name, data in encode.serialize(found.coded, found.gains).items():
            leaves[name] = (sink.tell(), len(data))
            sink.write(data)
        sink.flush()
        os.fsync(sink.fileno())
    forms: dict[str, int] = {}
    for choice in found.choices.values():
        # one reference in each segment: names of all would tell nothing
        label = navigate.label(choice, tasks if len(tasks) <= NAMED else ["another task"] * len(tasks))
        forms[label] = forms.get(label, 0) + 1
    return Coded(
        leaves,
        structure.coded_skeleton(found.coded.shapes),
        [[None if np.isnan(e) else float(e) for e in row] for row in found.errors],
        sorted(problem.barred),
        forms,
        navigate.eigen_tail(problem, found),
    )


def keep(path: Path, coded: Coded) -> None:
    """Say that a segment is done."""
    write_json(path, coded._asdict())


def kept(path: Path) -> Coded | None:
    """A segment that was done before."""
    if not path.exists():
        return None
    rows = read_json(path)
    return Coded(**{**rows, "leaves": {k: (at, size) for k, (at, size) in rows["leaves"].items()}})
