"""The store: segments, task names, sources and a report. It holds no decoded factors."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from hydraopt_jax.deferred import Deferred, bytes_of, size_of
from hydraopt_jax.errors import HydraOptError, near
from hydraopt_jax.factors import Array, Factors
from hydraopt_jax.static import Static
from hydraopt_jax.store import schema
from hydraopt_jax.store.tensors import Tensors

# bytes of a segment, in memory or read when they are asked for
Leaf: TypeAlias = Array | Deferred
# leaves with tables of errors: of weights, and with calibration also of outputs
ERRORS = ("errors", "output_errors")
# the leaf that all tasks of a segment read, as a reference
SHARED = -1


class Source(NamedTuple):
    """Attributes of an input adapter that are restored on export.

    Attributes:
      dtype: dtype of the factors on disk.
      config: configuration in the adapter's format.
      layout: module -> how the format names and shapes the factors.
      origin: path or id of the adapter.
      digest: SHA-256 of its weights.
    """

    dtype: str
    config: Static
    layout: Static
    origin: str
    digest: str


class Reference(NamedTuple):
    """Vectors of an earlier segment that predict those of a later one.

    Attributes:
      segment: its position in the store.
      place: of the task in that segment, `SHARED` for the leaf that all its tasks read.
    """

    segment: int
    place: int


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """Some modules of some tasks; a pytree whose leaves are arrays of bytes.

    Attributes:
      leaves: name -> `[n]` uint8. Factors: `shared`, `task_k`, `head_k` (see `codec.layout`), coded or plain.
        `prediction`: coefficients along the references. `tensors_k`: full tensors of the task at place k.
        `errors`, `output_errors`: see `error_table`.
      tasks: name of the task at each place.
      removed: places of removed tasks.
      modules: module -> its terms (`schema`).
      tensors: table of the full tensors at each place, see `tensors.Tensors`.
      references: the vectors that predict those of this segment.
      tables: position of the segment whose coding tables it uses, -1 for its own.
    """

    leaves: Mapping[str, Leaf]
    tasks: tuple[str, ...]
    removed: frozenset[int]
    modules: Static
    tensors: tuple[tuple[Any, ...], ...]
    references: tuple[Reference, ...] = ()
    tables: int = -1

    @property
    def live(self) -> list[int]:
        """Places of the tasks that are in the store."""
        return [k for k in range(len(self.tasks)) if k not in self.removed]

    @property
    def coded(self) -> bool:
        """Whether the factors are entropy-coded."""
        return schema.is_coded(self.modules)

    def error_table(self, name: str = "errors") -> np.ndarray | None:
        """Relative squared errors `[M, T]` of modules and tasks, NaN for absent ones; None if unknown."""
        if name not in self.leaves:
            return None
        roots = np.frombuffer(bytes(bytes_of(self.leaves[name])), np.float16)
        return roots.reshape(len(self.modules), len(self.tasks)).astype(np.float32) ** 2

    def with_errors(self, errors: np.ndarray | None, output_errors: np.ndarray | None = None) -> "Segment":
        """A copy with other tables of errors `[M, T]`, of weights and of outputs; None if unknown."""
        leaves = {k: v for k, v in self.leaves.items() if k not in ERRORS}
        for name, table in zip(ERRORS, (errors, output_errors), strict=True):
            if table is not None and np.size(table):
                leaves[name] = error_leaf(table)
        return self.replace(leaves=leaves)

    def with_tensors(self, carried: Sequence[Tensors]) -> "Segment":
        """A copy with other full tensors, given for the task at each place."""
        leaves = {k: v for k, v in self.leaves.items() if not k.startswith("tensors_")}
        leaves |= {f"tensors_{k}": as_bytes(x.blob) for k, x in enumerate(carried) if x.nbytes}
        return self.replace(leaves=leaves, tensors=tuple(x.table for x in carried))

    def replace(self, **changes: Any) -> "Segment":
        """The same with some attributes changed."""
        return dataclasses.replace(self, **changes)


def error_leaf(errors: np.ndarray) -> np.ndarray:
    """The leaf of a table of errors: square roots in half precision, whose range suffices for them.

    They are rounded up, so that no error is above what its store says, nor above a limit that this meets,
    except by the rounding of its measurement: 1 stays 1.
    """
    roots = np.sqrt(np.asarray(errors, np.float64))
    half = roots.astype(np.float16)
    half = np.where(half < (1 - 1e-6) * roots, np.nextafter(half, np.float16(np.inf)), half)
    return half.reshape(-1).view(np.uint8)


def make_segment(
    tasks: Sequence[str],
    modules: schema.Schema,
    factors: Mapping[str, Any],
    errors: np.ndarray | None = None,
    *,
    output_errors: np.ndarray | None = None,
    tensors: Sequence[Tensors] = (),
    references: Sequence[Reference] = (),
    tables: int = -1,
) -> Segment:
    """A segment with the factors, errors and full tensors of its tasks.

    Args:
      tasks: names.
      modules: its schema.
      factors: leaves of the factors, as bytes or arrays of bytes.
      errors, output_errors: `[M, T]`; None if unknown.
      tensors: full tensors of each task; empty if no task has any.
      references, tables: see `Segment`.
    """
    leaves = {k: as_bytes(v) for k, v in factors.items() if size_of(v)}
    bare = Segment(leaves, tuple(tasks), frozenset(), Static(modules), (), tuple(references), tables)
    carried = list(tensors) or [Tensors((), b"")] * len(tasks)
    return bare.with_errors(errors, output_errors).with_tensors(carried)


def as_bytes(x: Any) -> Any:
    """A leaf from bytes; arrays, also deferred ones, are returned unchanged."""
    return np.frombuffer(x, np.uint8) if isinstance(x, bytes) else x


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """A compressed collection; a pytree whose leaves are arrays of bytes.

    Attributes:
      segments: contain the factors. A segment refers to earlier segments only.
      tasks: names of the T tasks.
      sources: one `Source` per task.
      report: JSON-able account: target, number of input entries, bounds, forms, provenance.
    """

    segments: tuple[Segment, ...]
    tasks: tuple[str, ...]
    sources: tuple[Source, ...]
    report: Static

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module -> (I, O), in order of appearance."""
        out: dict[str, tuple[int, int]] = {}
        for x in self.segments:
            for name, terms in x.modules.items():
                for term in terms if x.live else ():
                    out.setdefault(name, (term.inputs, term.outputs))
        return out

    @property
    def errors(self) -> np.ndarray:
        """`[M, T]` relative squared error of each module's delta for each task, NaN where absent."""
        found = self.error_table("errors")
        return np.full((len(self.shapes), len(self.tasks)), np.nan) if found is None else found

    @property
    def output_errors(self) -> np.ndarray | None:
        """`[M, T]` relative squared error of each module's outputs; None without calibration."""
        return self.error_table("output_errors")

    def error_table(self, name: str) -> np.ndarray | None:
        """A table of errors `[M, T]`, assembled from those of the segments; None if no segment has it."""
        row = {n: m for m, n in enumerate(self.shapes)}
        column = {t: k for k, t in enumerate(self.tasks)}
        out: np.ndarray = np.full((len(row), len(column)), np.nan, np.float32)
        known = False
        for x in self.segments:
            table = x.error_table(name) if x.live else None
            if table is None:
                continue
            known = True
            here = [m for m, n in enumerate(x.modules) if n in row]
            mine = table[np.ix_(here, x.live)]
            rows, columns = [row[n] for n in x.modules if n in row], [column[x.tasks[k]] for k in x.live]
            old = out[np.ix_(rows, columns)]
            out[np.ix_(rows, columns)] = np.where(np.isnan(mine), old, mine)
        return out if known else None

    def replace(self, **changes: Any) -> "Store":
        """The same with some attributes changed."""
        return dataclasses.replace(self, **changes)

    def load(self) -> "Store":
        """A copy with all leaves in memory."""
        return self.replace(
            segments=tuple(
                x.replace(leaves={k: np.asarray(v) for k, v in x.leaves.items()}) for x in self.segments
            )
        )

    def __repr__(self) -> str:
        size = sum(size_of(v) for x in self.segments for v in x.leaves.values())
        names = ", ".join(map(repr, self.tasks[:4])) + (", ..." if len(self.tasks) > 4 else "")
        lazy = any(isinstance(v, Deferred) for x in self.segments for v in x.leaves.values())
        errors = self.errors if self.segments else np.full((1, 1), np.nan)
        mean = "" if np.isnan(errors).all() else f", mean error {np.nanmean(errors):.3g}"
        return (
            f"Store({counted(len(self.tasks), 'task')}: {names}\n"
            f"      {counted(len(self.shapes), 'module')} in {counted(len(self.segments), 'segment')}, "
            f"{size:,} bytes{' on disk' * lazy}{mean})"
        )


def counted(n: int, noun: str) -> str:
    """A count with its noun, in singular or plural.

    >>> counted(1, "task"), counted(2, "task")
    ('1 task', '2 tasks')
    """
    return f"{n} {noun}{'' if n == 1 else 's'}"


def task_index(tasks: Sequence[str], task: str) -> int:
    """Position of a task by name; an unknown name raises an error that lists similar names."""
    if task in tasks:
        return list(tasks).index(task)
    raise HydraOptError(f"no task {task!r} in the store: did you mean {near(task, tasks)}?")


def count(store: Store) -> int:
    """Number of entries of all factors in the store."""
    total = 0
    for x in store.segments:
        for term in (term for terms in x.modules.values() for term in terms):
            a, b = max(term.a_of, default=-1) + 1, max(term.b_of, default=-1) + 1
            if isinstance(term, schema.PlainShape):
                a, b = a * (term.a_from < 0), b * (term.b_from < 0)
            total += term.rank * (a * term.inputs + b * term.outputs)
            if isinstance(term, schema.PlainShape):
                total += sum(f >= 0 for f in term.a_of) * int(np.prod(term.core_shape)) * bool(term.core)
            else:
                total += len(term.a_of) * term.rank
    return total


def cut_to(store: Store, tasks: Sequence[str]) -> Store:
    """The store with the segments of some of its tasks, in the order given; its report stays as it is.

    Raises:
      HydraOptError: an unknown task.
    """
    order = [task_index(store.tasks, t) for t in tasks]
    names = set(tasks)
    cut = [
        x.replace(removed=frozenset(k for k, t in enumerate(x.tasks) if k in x.removed or t not in names))
        for x in store.segments
    ]
    needed = closure(cut, {n: set(x.live) for n, x in enumerate(cut) if x.live})
    kept = sorted(needed)
    number = {n: i for i, n in enumerate(kept)}
    segments = []
    for n in kept:
        x = cut[n]
        wanted = schema.leaves_of(x.modules, [k for k in needed[n] if k >= 0])
        wanted |= {"prediction", *ERRORS, *(f"tensors_{k}" for k in x.live)}
        leaves = {k: v for k, v in x.leaves.items() if k in wanted}
        gone = list(x.removed - store.segments[n].removed)
        for name in ERRORS if gone else ():
            table = x.error_table(name)
            if table is not None:
                table[:, gone] = np.nan
                leaves[name] = error_leaf(table)
        segments.append(
            x.replace(
                leaves=leaves,
                tensors=tuple(() if k in x.removed else row for k, row in enumerate(x.tensors)),
                references=tuple(Reference(number[r.segment], r.place) for r in x.references),
                tables=number[x.tables] if x.tables >= 0 else -1,
            )
        )
    return store.replace(
        segments=tuple(segments), tasks=tuple(tasks), sources=tuple(store.sources[t] for t in order)
    )


def closure(segments: Sequence[Segment], wanted: Mapping[int, set[int]]) -> dict[int, set[int]]:
    """Segment -> places whose leaves are needed, directly or to predict others."""
    out = {n: set(places) for n, places in wanted.items()}
    for n in range(len(segments) - 1, -1, -1):
        if n not in out:
            continue
        x = segments[n]
        for r in x.references:
            out.setdefault(r.segment, set()).add(r.place)
        if x.tables >= 0:
            out.setdefault(x.tables, set()).add(SHARED)
    return out


def task_errors(errors: np.ndarray) -> np.ndarray:
    """Mean error over the modules of each task, `[M, T] -> [T]`; 0 for a task without modules."""
    present = ~np.isnan(errors)
    return np.where(present, errors, 0.0).sum(0) / np.maximum(present.sum(0), 1)


def given_weights(store: Store) -> list[float] | None:
    """The weights of the tasks that a store was made with; None if all are equal."""
    given = store.report["options"].get("weights")
    return [given.get(t, 1.0) for t in store.tasks] if given else None


def places_of(store: Store, tasks: Sequence[str]) -> dict[int, list[int]]:
    """Segment -> place of each of some tasks, -1 for absent tasks; segments without any are left out."""
    out = {}
    for n, x in enumerate(store.segments):
        place = {x.tasks[k]: k for k in x.live}
        found = [place.get(t, -1) for t in tasks]
        if any(k >= 0 for k in found):
            out[n] = found
    return out


def tensors_of(store: Store, task: str) -> Tensors:
    """A task's full tensors."""
    for n, (place,) in places_of(store, [task]).items():
        found = tensors_at(store.segments[n], place)
        if found.table:
            return found
    return Tensors((), b"")


def tensors_at(segment: Segment, place: int) -> Tensors:
    """The full tensors of the task at a place."""
    return Tensors(segment.tensors[place], segment.leaves.get(f"tensors_{place}", b""))


def select_term(term: Factors, chosen: Sequence[int]) -> Factors:
    """A term with the factors of the chosen tasks only, renumbered; -1 for a task that it lacks."""
    (a, a_of), (b, b_of) = (renumber(of, chosen) for of in (term.a_of, term.b_of))
    core = None if term.core is None else np.asarray(term.core)[list(chosen)]
    return Factors(np.asarray(term.a)[a], np.asarray(term.b)[b], a_of, b_of, core)


def renumber(of: Any, chosen: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The factors of a stack that the chosen tasks read, and the position of each task's factor among them.

    Args:
      of: `[T]` index of the factor that a task reads, -1 for none.
      chosen: tasks; -1 for an absent one.

    >>> [x.tolist() for x in renumber([5, 0, -1, 5], [3, 2, -1, 1])]
    [[0, 5], [1, -1, -1, 0]]
    """
    at = np.array(chosen, np.int64)
    mine = np.where(at >= 0, np.asarray(of)[at], -1)
    kept = np.unique(mine[mine >= 0])
    return kept, np.where(mine >= 0, np.searchsorted(kept, mine), -1).astype(np.int32)
