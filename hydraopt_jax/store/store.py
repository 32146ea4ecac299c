"""The store in memory: what is kept of a collection, and how one task comes back."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax import forms
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.codec.layout import TermShape
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import Factors
from hydraopt_jax.store import lossless


class Source(NamedTuple):
    """What a task brought along and gets back on export.

    Attributes:
      dtype: dtype its factors had on disk.
      config: its format's configuration.
      layout: module -> how the format names and shapes the factors.
      origin: path or id.
      digest: SHA-256 of its weights.
      extras: full tensors of the task, as a rule coded (`extras.Extras`).
    """

    dtype: str
    config: Mapping[str, Any]
    layout: Mapping[str, Any]
    origin: str
    digest: str
    extras: Mapping[str, np.ndarray]


class Addition(NamedTuple):
    """A task added to a coded store: what earlier tasks' vectors do not predict of it, see `coding.addition`.

    Attributes:
      leaves: name -> bytes, of a collection of this one task, see `coding.codec`.
      shapes: module -> structure of its terms.
      references: slots whose vectors predict its own, `SHARED` for the leaf that all tasks read.
      coefficients: of the prediction.
    """

    leaves: Mapping[str, bytes]
    shapes: Mapping[str, tuple[TermShape, ...]]
    references: tuple[int, ...]
    coefficients: bytes


class Segment(NamedTuple):
    """Some modules of some tasks, coded by themselves as if there were no others.

    Attributes:
      leaves: name -> bytes, see `coding.codec`; those of removed tasks are gone.
      shapes: module -> structure of its terms.
      tasks: of each of its tasks the position in the store, -1 for a removed one.
      removed: place of each removed task -> its name, see `purging`.
    """

    leaves: Mapping[str, bytes]
    shapes: Mapping[str, tuple[TermShape, ...]]
    tasks: tuple[int, ...]
    removed: Mapping[int, str] = {}


class Payload(NamedTuple):
    """The coded form of a store's factors, what is written; the factors are what it decodes to.

    Attributes:
      leaves: name -> bytes, see `coding.codec`; those of removed tasks are gone.
      shapes: module -> structure of its terms, for the tasks that were compressed together.
      slots: of each of the store's tasks its place among those, or its key in `additions`; None where none
        was added or removed.
      additions: tasks that came later.
      segments: in place of all these, a collection that was coded in parts because it is large.
      removed: slot of each removed task that others were coded with -> its name, see `purging`.
    """

    leaves: Mapping[str, bytes]
    shapes: Mapping[str, tuple[TermShape, ...]]
    slots: tuple[int, ...] | None = None
    additions: Mapping[int, Addition] = {}
    segments: tuple[Segment, ...] = ()
    removed: Mapping[int, str] = {}


class Store(NamedTuple):
    """A compressed collection.

    Attributes:
      tasks: names of the T tasks.
      modules: module name -> its terms; a delta is the sum of the terms' `a @ core @ b`.
      sources: one `Source` a task.
      report: JSON-able account: the form asked for, bytes before, bounds, shapes.
      errors: `[M, T]` relative squared error of each module's delta for each task, of the weights; NaN where
        absent.
      payload: the entropy-coded factors; None where they are stored as they are.
      output_errors: `[M, T]` the same of each module's outputs, in the coordinates of the calibration that
        the store was made with; None without.
    """

    tasks: tuple[str, ...]
    modules: Mapping[str, tuple[Factors, ...]]
    sources: tuple[Source, ...]
    report: Mapping[str, Any]
    errors: np.ndarray
    payload: Payload | None = None
    output_errors: np.ndarray | None = None


def sources_of(collection: Sequence[Adapter]) -> tuple[Source, ...]:
    """What each task brought along."""
    return tuple(Source(x.dtype, x.config, x.layout, x.source, x.digest, x.extras) for x in collection)


def task_factors(store: Store, task: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """One task's factors, module -> `(a: [I, S], b: [S, O])` in float32, terms side by side, cores folded in.

    Raises:
      HydraOptError: the store has no such task (near names are listed).
    """
    t = task_index(store.tasks, task)
    out = {}
    for name, terms in store.modules.items():
        left, right = [], []
        for term in terms:
            if term.a_of[t] < 0 or term.b_of[t] < 0:
                continue
            a = np.asarray(term.a[int(term.a_of[t])]).astype(np.float32)
            b = np.asarray(term.b[int(term.b_of[t])]).astype(np.float32)
            if term.core is not None:
                b = times(np.asarray(term.core[t]).astype(np.float32), b)
            left.append(a)
            right.append(b)
        if left:
            a, b = np.concatenate(left, 1), np.concatenate(right, 0)
            used = (np.abs(a).max(0) > 0) & (np.abs(b).max(1) > 0)
            used[0] |= not used.any()
            out[name] = (a[:, used], b[used])
    return out


def times(core: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A core, diagonal `[S]` or full `[S, S]`, times `b: [S, O]`.

    >>> times(np.array([2.0, 3.0]), np.ones((2, 1))).tolist(), times(np.eye(2), np.ones((2, 1))).tolist()
    ([[2.0], [3.0]], [[1.0], [1.0]])
    """
    return core[:, None] * b if core.ndim == 1 else core @ b


def task_index(tasks: Sequence[str], task: str) -> int:
    """Position of a task by name, or an error that lists near names."""
    if task in tasks:
        return list(tasks).index(task)
    near = difflib.get_close_matches(task, tasks, 3) or list(tasks[:3])
    raise HydraOptError(f"no task {task!r} in the store: did you mean {', '.join(map(repr, near))}?")


def adapter(store: Store, task: str) -> Adapter:
    """One task back as an `Adapter`, ready for any writer in `formats`.

    Its factors are balanced, but for those of a lossless store, which are as they came.
    """
    t = task_index(store.tasks, task)
    source = store.sources[t]
    raw = lossless.raw_factors(store.modules, t) if store.report.get("form") == lossless.FORM else None
    if raw is not None:
        return Adapter(
            task,
            *lossless.folded(raw),
            source.dtype,
            source.extras,
            source.config,
            source.layout,
            source.origin,
            source.digest,
            raw,
        )
    a, b = {}, {}
    for name, (left, right) in task_factors(store, task).items():
        na, nb = np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1)
        scale = np.sqrt(np.divide(nb, na, out=np.ones_like(na), where=(na > 0) & (nb > 0)))
        a[name], b[name] = left * scale, right / scale[:, None]
    return Adapter(
        task, a, b, source.dtype, source.extras, source.config, source.layout, source.origin, source.digest
    )


def count(store: Store) -> int:
    """How many numbers the store's factors hold."""
    return sum(forms.count(term) for terms in store.modules.values() for term in terms)
