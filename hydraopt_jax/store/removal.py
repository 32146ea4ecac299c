"""One task removed from a store, and what the store still holds of those that were.

A task's own leaves go with it, but for what others need: vectors that theirs are predicted from, and vectors
that were fitted to several tasks, it among them. The coder's tables, counts of the symbols of all tasks, are
nobody's vectors.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax.codec.layout import pieces
from hydraopt_jax.deferred import size_of
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.static import Static
from hydraopt_jax.store import schema
from hydraopt_jax.store.store import SHARED, Segment, Store, closure, select, task_index


class Held(NamedTuple):
    """A removed task of which something is left.

    Attributes:
      task: its name.
      bytes: about what vectors of its own take, which no task of the store reads for itself.
      needed_by: tasks of the store that are predicted from these vectors, or lie in one leaf with them.
      fitted: whether vectors that tasks of the store share were fitted to it, too.
    """

    task: str
    bytes: int
    needed_by: tuple[str, ...]
    fitted: bool


class Trace(NamedTuple):
    """What is left of a removed task in one segment.

    Attributes:
      own: bytes of its own leaf.
      among: bytes, about, of its vectors in leaves that others read, too.
      needed_by: places of the segment's tasks that need those.
      fitted: as `Held`.
    """

    own: int
    among: int
    needed_by: frozenset[int]
    fitted: bool


def remove(store: Store, task: str) -> Store:
    """A store with one task less; what it holds of the others is not touched.

    What others are predicted from, or share with the task, stays: `held` says what, `purging.purge` is rid of
    it.

    Raises:
      HydraOptError: no such task, or it is the only one.
    """
    task_index(store.tasks, task)
    if len(store.tasks) == 1:
        raise HydraOptError(f"{task!r} is the store's only task: delete the store instead")
    return keep(store, [t for t in store.tasks if t != task])


def keep(store: Store, tasks: Sequence[str]) -> Store:
    """A store of some tasks, in the order given; what it holds of them is not touched.

    Raises:
      HydraOptError: no such task.
    """
    left = select(store, tasks)
    gone = [t for t in store.tasks if t not in set(tasks)]
    report = changed(store.report, -round(len(gone) * store.report["entries"] / len(store.tasks)))
    for task in gone:
        report = report.replace(**unnamed(report, task))
    return left.replace(report=report)


def changed(report: Static, entries: int) -> Static:
    """The report after a change: what is said of the collection as it was compressed goes."""
    kept = {k: v for k, v in report.items() if k not in ("estimate", "refinement")}
    return Static({**kept, "entries": report["entries"] + entries, "bound": {}})


def unnamed(report: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Those parts of a report that name tasks, without a removed one."""
    out: dict[str, Any] = {}
    if "weights" in report["options"]:
        weights = {k: v for k, v in report["options"]["weights"].items() if k != task}
        out["options"] = {**report["options"], "weights": weights}
    if "forms" in report:
        forms: dict[str, int] = {}
        for label, count in report["forms"].items():
            mine = label == f"separate, predicted from {task}"
            label = "separate, predicted from a removed task" if mine else label
            forms[label] = forms.get(label, 0) + count
        out["forms"] = forms
    made = report.get("provenance", {}).get("made")
    if made is not None and "weights" in made["options"]:
        rows = [x for x in made["options"]["weights"] if x.rpartition("=")[0] != task]
        options = {**made["options"], "weights": rows}
        out["provenance"] = {**report["provenance"], "made": {**made, "options": options}}
    if "bounded" in report:
        out["bounded"] = [t for t in report["bounded"] if t != task]
    return out


def trace(segment: Segment, gone: int, live: Iterable[int]) -> Trace:
    """What is left of the task at a place of a segment, where those at `live` places are needed."""
    if segment.coded:
        return coded_trace(segment.modules, segment.leaves, gone, set(live))
    living = set(live)
    fitted = any(
        of[gone] >= 0 and any(of[t] == of[gone] for t in living)
        for terms in segment.modules.values()
        for x in terms
        for of in (x.a_of, x.b_of)
    )
    return Trace(size_of(segment.leaves.get(f"task_{gone}", b"")), 0, frozenset(), fitted)


def coded_trace(modules: schema.Schema, leaves: Mapping[str, Any], gone: int, living: set[int]) -> Trace:
    """As `trace`, of a coded segment."""
    rows, _ = pieces(modules)  # type: ignore[arg-type]
    users = [schema.readers(modules, x) for x in rows]
    whole: dict[str, int] = {}
    for x in rows:
        whole[x.leaf] = whole.get(x.leaf, 0) + x.length * x.rank
    dependents: dict[int, set[int]] = {}
    for x, mine in zip(rows, users, strict=True):
        dependents.setdefault(x.base, set()).update(mine & living)
    among, needed, fitted = 0.0, set(), False
    for i, x in enumerate(rows):
        if x.leaf not in leaves or x.leaf == f"task_{gone}":
            continue
        after = dependents.get(i, set())
        if gone in users[i] and not users[i] & living:
            among += size_of(leaves[x.leaf]) * x.length * x.rank / whole[x.leaf]
            needed |= after or living
        elif users[i] & living and gone in users[i]:
            fitted = True
        elif not users[i] and after and modules[x.module][x.term].a_of[gone] >= 0:
            # a basis of all, which none reads for itself
            fitted = True
    own = size_of(leaves.get(f"task_{gone}", b""))
    return Trace(own, int(np.ceil(among)), frozenset(needed), fitted)


def traces(store: Store) -> dict[tuple[int, int], Trace]:
    """(segment, place) of every removed task that is still named -> what is left of it there."""
    needed = closure(store.segments, {n: set(x.live) for n, x in enumerate(store.segments)})
    out = {}
    for n, x in enumerate(store.segments):
        for k in sorted(x.removed):
            if x.tasks[k]:
                wanted = {p for p in needed[n] if p != SHARED} | ({*x.live} if SHARED in needed[n] else set())
                found = trace(x, k, wanted - {k})
                if k in needed[n] or found.own + found.among or found.fitted:
                    out[n, k] = found
    return out


def held(store: Store) -> tuple[Held, ...]:
    """The removed tasks of which a store still holds something."""
    out: dict[str, Held] = {}
    for (n, k), found in traces(store).items():
        x = store.segments[n]
        names = [x.tasks[p] for p in sorted(found.needed_by) if p not in x.removed]
        names += followers(store, n, k, bool(found.among))
        before = out.get(x.tasks[k], Held(x.tasks[k], 0, (), False))
        out[x.tasks[k]] = Held(
            x.tasks[k],
            before.bytes + found.own + found.among,
            tuple(dict.fromkeys((*before.needed_by, *names))),
            before.fitted or found.fitted,
        )
    return tuple(out.values())


def followers(store: Store, segment: int, place: int, shared: bool) -> list[str]:
    """The store's tasks that are predicted from a place of a segment, by way of others too; `shared` where
    the leaf that all read has vectors of it."""
    out = []
    for n, x in enumerate(store.segments):
        if n <= segment or not x.live:
            continue
        needed = closure(store.segments, {n: set(x.live)}).get(segment, set())
        vectors = {r.place for y in store.segments for r in y.references if r.segment == segment}
        if place in needed or (shared and SHARED in needed & vectors):
            out += [x.tasks[k] for k in x.live]
    return out


def clean(store: Store) -> Store:
    """The store without the names of removed tasks of which nothing is left."""
    left = traces(store)
    segments = []
    for n, x in enumerate(store.segments):
        names = tuple(t if k not in x.removed or (n, k) in left else "" for k, t in enumerate(x.tasks))
        segments.append(x.replace(tasks=names) if names != x.tasks else x)
    return store.replace(segments=tuple(segments), report=Static(store.report))
