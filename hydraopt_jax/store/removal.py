"""Some tasks of a store, all but one, and what is left of removed tasks.

Removing a task removes its own leaves, except for vectors that other tasks need: those that predict them, and
those that were fitted to several tasks including the removed one. The coder's tables are counts of symbols of
all tasks and do not count as vectors of a task.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax.codec.layout import pieces
from hydraopt_jax.deferred import size_of
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.static import Static
from hydraopt_jax.store import lossless, schema
from hydraopt_jax.store.decoding import named_tasks
from hydraopt_jax.store.store import SHARED, Segment, Store, closure, cut_to, task_index

# options of the command that name tasks
WEIGHING = ("weights", "protect")
# parts of a report that count the entries of the adapters before
ENTRIES = ("entries", "task_entries")
# what the name of a task follows in the labels of forms
PREDICTED = "separate, predicted from "


class Held(NamedTuple):
    """A removed task of which the store still has vectors.

    Attributes:
      task: its name.
      bytes: approximate size of its own vectors.
      needed_by: tasks of the store that are predicted from these vectors or share a leaf with them.
      fitted: whether vectors that tasks of the store share were also fitted to the removed task.
    """

    task: str
    bytes: int
    needed_by: tuple[str, ...]
    fitted: bool


class Remnant(NamedTuple):
    """What is left of a removed task in one segment.

    Attributes:
      own: bytes of its own leaf.
      among: approximate bytes of its vectors in leaves that other tasks also read.
      needed_by: places of the segment's tasks that need these vectors.
      fitted: see `Held`.
    """

    own: int
    among: int
    needed_by: frozenset[int]
    fitted: bool


def remove(store: Store, task: str) -> Store:
    """The store without one task; the data of the other tasks are not touched.

    Vectors that predict other tasks, or that other tasks share, stay. `held` lists them; `purging.purge`
    removes them.

    Raises:
      HydraOptError: no such task, or the only task.
    """
    task_index(store.tasks, task)
    if len(store.tasks) == 1:
        raise HydraOptError(f"{task!r} is the store's only task: delete the store instead")
    return select(store, [t for t in store.tasks if t != task])


def select(store: Store, tasks: Sequence[str]) -> Store:
    """The store with some of its tasks, in the order given, without leaves that none of them needs.

    Nothing is decoded. Vectors that predict these tasks, or that they share with others, stay under the names
    of the tasks that they were coded with.

    Raises:
      HydraOptError: an unknown task, one that is named twice, or none.
    """
    names = named_tasks(store, tasks)
    if not names:
        raise HydraOptError("select: name at least one task")
    if len(set(names)) < len(names):
        twice = next(t for n, t in enumerate(names) if t in names[:n])
        raise HydraOptError(f"select: {twice!r} is named twice")
    left = cut_to(store, names)
    gone = set(store.tasks) - set(names)
    if not gone:
        return left
    own = entries_of(store)
    report = changed_report(left, store.report.get("entries", 0) - round(sum(own[t] for t in gone)))
    return left.replace(report=report.replace(**unnamed(report, gone)))


def entries_of(store: Store) -> dict[str, float]:
    """Task -> number of entries of its adapter before; tasks that the report does not name share the rest."""
    known = {t: n for t, n in store.report.get("task_entries", {}).items() if t in store.tasks}
    rest = max(store.report.get("entries", 0) - sum(known.values()), 0)
    share = rest / max(len(store.tasks) - len(known), 1)
    return {t: known.get(t, share) for t in store.tasks}


def changed_report(store: Store, entries: int) -> Static:
    """The report of a store that was changed and has so many entries before, without statements about the
    collection as it was compressed."""
    kept = {k: v for k, v in store.report.items() if k not in ("estimate", "refinement")}
    if "factor_bytes" in kept:
        kept["factor_bytes"] = sum(lossless.factor_bytes(x.modules, x.live) for x in store.segments)
    return Static({**kept, "entries": entries, "bound": {}})


def unnamed(report: Mapping[str, Any], gone: Set[str]) -> dict[str, Any]:
    """The parts of a report that name tasks, without the removed ones."""
    out: dict[str, Any] = {}
    if "weights" in report.get("options", {}):
        weights = {k: v for k, v in report["options"]["weights"].items() if k not in gone}
        out["options"] = {**report["options"], "weights": weights}
    if "forms" in report:
        forms: dict[str, int] = {}
        for label, count in report["forms"].items():
            mine = label.removeprefix(PREDICTED)
            label = f"{PREDICTED}a removed task" if mine != label and mine in gone else label
            forms[label] = forms.get(label, 0) + count
        out["forms"] = forms
    made = report.get("provenance", {}).get("made")
    if made is not None:
        asked = {k: v for k, v in made["options"].items() if k in WEIGHING}
        rows = {k: [x for x in v if x.rpartition("=")[0] not in gone] for k, v in asked.items()}
        out["provenance"] = {**report["provenance"], "made": {**made, "options": made["options"] | rows}}
    if "task_entries" in report:
        out["task_entries"] = {k: v for k, v in report["task_entries"].items() if k not in gone}
    if "bounded" in report:
        out["bounded"] = [t for t in report["bounded"] if t not in gone]
    return out


def trace(segment: Segment, gone: int, live: Iterable[int]) -> Remnant:
    """What a segment has of the task at one place, if the tasks at `live` places must stay."""
    if schema.is_coded(segment.modules):
        return coded_trace(segment.modules, segment.leaves, gone, set(live))
    living = set(live)
    fitted = any(
        of[gone] >= 0 and any(of[t] == of[gone] for t in living)
        for terms in segment.modules.values()
        for x in terms
        for of in (x.a_of, x.b_of)
    )
    return Remnant(size_of(segment.leaves.get(f"task_{gone}", b"")), 0, frozenset(), fitted)


def coded_trace(
    modules: schema.CodedSchema, leaves: Mapping[str, Any], gone: int, living: set[int]
) -> Remnant:
    """The result of `trace` for a coded segment."""
    rows, _ = pieces(modules)
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
            # a basis of all tasks, which no task owns
            fitted = True
    own = size_of(leaves.get(f"task_{gone}", b""))
    return Remnant(own, int(np.ceil(among)), frozenset(needed), fitted)


def traces(store: Store) -> dict[tuple[int, int], Remnant]:
    """(segment, place) of every removed task that is still named -> its `Remnant` there."""
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
    """The removed tasks of which a store still has vectors."""
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
    """The store's tasks that are predicted from a place of a segment, directly or through other tasks.

    With `shared`, also those predicted from the shared leaf.
    """
    out = []
    for n, x in enumerate(store.segments):
        if n <= segment or not x.live:
            continue
        needed = closure(store.segments, {n: set(x.live)}).get(segment, set())
        vectors = {r.place for y in store.segments for r in y.references if r.segment == segment}
        if place in needed or (shared and SHARED in needed & vectors):
            out += [x.tasks[k] for k in x.live]
    return out


def forget_names(store: Store) -> Store:
    """The store without the names of removed tasks that left no vectors."""
    left = traces(store)
    segments = []
    for n, x in enumerate(store.segments):
        names = tuple(t if k not in x.removed or (n, k) in left else "" for k, t in enumerate(x.tasks))
        segments.append(x.replace(tasks=names) if names != x.tasks else x)
    return store.replace(segments=tuple(segments))
