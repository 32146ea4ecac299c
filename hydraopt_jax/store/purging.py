"""What a store still holds of tasks that were removed from it, and how to be rid of that.

A task's own leaves go with it, but for what others need: vectors that theirs are predicted from, and vectors
that were fitted to several tasks, it among them. Such a task is held, under its name, until the store is
purged: what was coded with it is coded again without it, from the originals where they are at hand, else from
what the store decodes to. The coder's tables, counts of the symbols of all tasks, are nobody's vectors: where
nothing else is shared, they stay.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax import adapters
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.codec import encode
from hydraopt_jax.codec.layout import Piece, TermShape, pieces
from hydraopt_jax.deferred import bytes_of, size_of
from hydraopt_jax.rate_control import addition, encode_at_step, navigate
from hydraopt_jax.store import Payload, Segment, Store, adapter, changes, packing

# a task's original, or None where it is not at hand
Original = Callable[[str], Adapter | None]


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
    """What is left of a removed task among those that were coded together.

    Attributes:
      own: bytes of its own leaf.
      among: bytes, about, of its vectors in leaves that others read, too.
      needed_by: places of the tasks that need those.
      fitted: as `Held`.
    """

    own: int
    among: int
    needed_by: frozenset[int]
    fitted: bool


def trace(
    shapes: Mapping[str, tuple[TermShape, ...]], leaves: Mapping[str, Any], gone: int, live: Iterable[int]
) -> Trace:
    """What is left of the task at a place, where those at `live` places are still there."""
    rows, _ = pieces(shapes)
    living = set(live)
    users = [readers(shapes, x) for x in rows]
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
        elif not users[i] and after and gone in present(shapes, x):
            # a basis of all, which none reads for itself
            fitted = True
    own = size_of(leaves.get(f"task_{gone}", b""))
    return Trace(own, int(np.ceil(among)), frozenset(needed), fitted)


def readers(shapes: Mapping[str, tuple[TermShape, ...]], x: Piece) -> set[int]:
    """Places of the tasks whose own factor a piece is."""
    term = shapes[x.module][x.term]
    of = term.b_of if x.side else term.a_of
    return {t for t, k in enumerate(of) if k == x.factor}


def present(shapes: Mapping[str, tuple[TermShape, ...]], x: Piece) -> set[int]:
    """Places of the tasks that have the term of a piece."""
    return {t for t, k in enumerate(shapes[x.module][x.term].a_of) if k >= 0}


def held(store: Store) -> tuple[Held, ...]:
    """The removed tasks of which a store still holds something."""
    payload = store.payload
    if payload is None:
        return tuple(Held(t, 0, (), True) for t in store.report.get("removed", ()))
    if payload.segments:
        return held_in_segments(store, payload.segments)
    if payload.slots is None:
        return ()
    name = dict(zip(payload.slots, store.tasks, strict=True))
    out = []
    for slot, task in payload.removed.items():
        after = {t for t in payload.slots if slot in addition.closure(payload.additions, [t])}
        if slot in payload.additions:
            x = payload.additions[slot]
            found = Trace(len(x.coefficients) + sum(map(len, x.leaves.values())), 0, frozenset(), False)
        else:
            found = trace(payload.shapes, payload.leaves, slot, payload.slots)
        if found.among:
            # the leaf that all read predicts tasks that came later
            after |= {t for t in payload.slots if -1 in addition.closure(payload.additions, [t])}
        needed = sorted(after | found.needed_by)
        if found.own + found.among or found.fitted:
            names = tuple(name[t] for t in needed if t in name)
            out.append(Held(task, found.own + found.among, names, found.fitted))
    return tuple(out)


def held_in_segments(store: Store, segments: Sequence[Segment]) -> tuple[Held, ...]:
    """As `held`: a task's traces in all segments together."""
    out: dict[str, Held] = {}
    for x in segments:
        live = [k for k, t in enumerate(x.tasks) if t >= 0]
        for place, task in x.removed.items():
            found = trace(x.shapes, x.leaves, place, live)
            before = out.get(task, Held(task, 0, (), False))
            needed = (*before.needed_by, *(store.tasks[x.tasks[k]] for k in sorted(found.needed_by)))
            size = before.bytes + found.own + found.among
            out[task] = Held(task, size, tuple(dict.fromkeys(needed)), before.fitted or found.fitted)
    return tuple(x for x in out.values() if x.bytes or x.fitted)


def purge(
    store: Store,
    original: Original = lambda task: None,
    calibration: Mapping[str, np.ndarray] | None = None,
) -> tuple[Store, tuple[str, ...]]:
    """A store without anything of the tasks that were removed from it.

    What was coded with them is coded again, at the store's step: from a task's original where it is at hand,
    else from what the store decodes to. The error that is then stated is an upper bound, by the triangle
    inequality, and the task is named in the report's "bounded". All else stays bit for bit.

    Args:
      store: as it was read; leaves of segments may be deferred.
      original: a task's original, or None.
      calibration: what the store was made with, if it was.

    Returns:
      The store, and the tasks that were coded again.

    Raises:
      HydraOptError: the store was made with calibration, and none is given.
    """
    if not held(store):
        payload = store.payload
        if payload is not None:
            clean = tuple(x._replace(removed={}) for x in payload.segments)
            payload = payload._replace(removed={}, segments=clean)
        return store._replace(payload=payload), ()
    if calibration is None:
        changes.need_no_calibration(store)
    payload = store.payload
    if payload is not None and payload.segments:
        return purge_segments(store, payload, original)
    if payload is not None and payload.slots is not None:
        live = payload.slots
        together = [s for s in payload.removed if s not in payload.additions]
        traces = [trace(payload.shapes, payload.leaves, s, live) for s in together]
        if not any(x.among or x.fitted for x in traces):
            return purge_additions(store, payload, original)
    return purge_whole(store, original, calibration)


def at_hand(store: Store, tasks: Iterable[str], original: Original) -> tuple[list[Adapter], list[str]]:
    """Originals, or what the store holds in their place; and the tasks where it is that."""
    out, standing = [], []
    for t in tasks:
        found = original(t)
        standing += [t] * (found is None)
        out.append(adapter(store, t) if found is None else found)
    return out, standing


def bound(before: np.ndarray, again: np.ndarray) -> np.ndarray:
    """Upper bound of a relative squared error: `before` of what was coded again, `again` relative to that.

    With `e` the norm of the first error over that of the original, what was coded again has at most `1 + e`
    times the original's norm, and `sqrt(error) <= e + (1 + e) sqrt(again)`.

    >>> float(bound(np.array(0.01), np.array(0.01)).round(4))
    0.0441
    """
    first = np.sqrt(before)
    return (first + (1 + first) * np.sqrt(again)) ** 2


def stated(
    store: Store, rows: Sequence[str], tasks: Sequence[str], errors: np.ndarray, standing: Sequence[str]
) -> np.ndarray:
    """Errors `[M, T]` of modules and tasks that were coded again, bounds for those without their original."""
    at = {n: m for m, n in enumerate(store.modules)}
    before = store.errors[[at[n] for n in rows]][:, [store.tasks.index(t) for t in tasks]]
    # a delta that was lost whole stays lost
    again = np.where(np.isnan(errors) & ~np.isnan(before), 0.0, errors)
    return np.where(np.isin(tasks, list(standing)), bound(before, again), errors)


def bounded(store: Store, again: Sequence[str], standing: Sequence[str], whole: bool) -> dict[str, Any]:
    """The report's list of tasks whose errors are bounds."""
    was = store.report.get("bounded", [])
    kept = [t for t in store.tasks if t in standing or (t in was and not (whole and t in again))]
    rest = {k: v for k, v in store.report.items() if k not in ("bounded", "removed")}
    return rest | ({"bounded": kept} if kept else {})


def purge_whole(
    store: Store, original: Original, calibration: Mapping[str, np.ndarray] | None
) -> tuple[Store, tuple[str, ...]]:
    """All tasks coded, or fitted, again together."""
    collection, standing = at_hand(store, store.tasks, original)
    if store.payload is None:
        fresh = changes.refit(collection, store)
    else:
        options = changes.options_of(store)._replace(calibration=calibration)
        problem = navigate.setup(collection, options)
        found = changes.code(problem, store.report["step"])
        entries = adapters.stack(collection).size
        fresh = navigate.to_store(collection, problem, found, options, entries)
    report = {**bounded(store, store.tasks, standing, True), **fresh.report}
    if standing:
        report |= {"entries": store.report["entries"], "bound": {}}
        report.pop("estimate", None)
    names = list(fresh.modules)
    errors = stated(store, names, store.tasks, fresh.errors, standing)
    outputs = fresh.output_errors
    if outputs is not None and store.output_errors is not None:
        claims = store._replace(errors=store.output_errors)
        outputs = stated(claims, names, store.tasks, outputs, standing)
    fresh = fresh._replace(sources=store.sources, report=report, errors=errors, output_errors=outputs)
    return fresh, store.tasks


def purge_additions(store: Store, payload: Payload, original: Original) -> tuple[Store, tuple[str, ...]]:
    """Tasks that came later and are predicted from removed ones, coded again from those that are there."""
    assert payload.slots is not None
    gone = set(payload.removed)
    slot_of = dict(zip(store.tasks, payload.slots, strict=True))
    dirty = sorted(
        (t for t in store.tasks if gone & set(addition.closure(payload.additions, [slot_of[t]]))),
        key=slot_of.__getitem__,
    )
    collection, standing = at_hand(store, dirty, original)
    clean = [s for t, s in slot_of.items() if t not in dirty]
    needed = set(addition.closure(payload.additions, clean))
    names = packing.payload_leaves(pieces(payload.shapes)[1], needed)
    top = max(*payload.slots, *payload.additions, *payload.removed)
    work = payload._replace(
        leaves={k: v for k, v in payload.leaves.items() if k in names},
        slots=tuple(clean),
        additions={k: v for k, v in payload.additions.items() if k in needed},
        removed={},
    )
    rows: dict[str, dict[str, float]] = {}
    for task, x in zip(dirty, collection, strict=True):
        found, errors, modules = addition.add(x, store.report["step"], work)
        top += 1
        slot_of[task] = top
        work = work._replace(slots=(*work.slots, top), additions={**work.additions, top: found})  # type: ignore[misc]
        table = stated(store, modules, [task], errors[:, None], standing)
        rows[task] = dict(zip(modules, table[:, 0], strict=True))
    work = work._replace(slots=tuple(slot_of[t] for t in store.tasks))
    kept = packing.coded_terms(work, work.slots or ())
    at = {n: m for m, n in enumerate(store.modules)}
    claims = np.array(
        [
            [
                rows[t].get(n, np.nan) if t in rows else store.errors[at[n], k]
                for k, t in enumerate(store.tasks)
            ]
            for n in kept
        ]
    )
    report = bounded(store, dirty, standing, True)
    return store._replace(modules=kept, payload=work, errors=claims, report=report), tuple(dirty)


def purge_segments(store: Store, payload: Payload, original: Original) -> tuple[Store, tuple[str, ...]]:
    """Segments with anything of a removed task coded again, one at a time."""
    errors = np.array(store.errors, np.float64)
    at = {n: m for m, n in enumerate(store.modules)}
    options = changes.options_of(store)
    weights = navigate.task_weights(store.tasks, options)
    again: dict[str, None] = {}
    standing: dict[str, None] = {}
    out = []
    for x in payload.segments:
        live = [k for k, t in enumerate(x.tasks) if t >= 0]
        traces = [trace(x.shapes, x.leaves, place, live) for place in x.removed]
        if not any(y.own or y.among or y.fitted for y in traces):
            out.append(x._replace(removed={}))
            continue
        places = tuple(x.tasks[k] for k in live)
        names = [store.tasks[t] for t in places]
        few, absent = parts_at_hand(store, x, places, original)
        problem = encode_at_step.prepare(
            adapters.stack(few), tuple(adapters.check(few)), weights[list(places)], None, options.share
        )
        found = changes.code(problem, store.report["step"])
        leaves = encode.serialize(found.coded, found.gains)
        out.append(Segment(leaves, found.coded.shapes, places))
        table = stated(store, problem.order, names, found.errors, absent)
        errors[np.ix_([at[n] for n in problem.order], list(places))] = table
        again |= dict.fromkeys(names)
        standing |= dict.fromkeys(absent)
    payload = payload._replace(segments=tuple(out))
    modules = packing.coded_terms(payload, range(len(store.tasks)))
    errors = errors[[at[n] for n in modules]]
    report = bounded(store, list(again), list(standing), False)
    done = tuple(t for t in store.tasks if t in again)
    return store._replace(modules=modules, payload=payload, errors=errors, report=report), done


def parts_at_hand(
    store: Store, segment: Segment, places: Sequence[int], original: Original
) -> tuple[list[Adapter], list[str]]:
    """As `at_hand`, of the tasks and modules of a segment."""
    leaves = {k: bytes(bytes_of(v)) for k, v in segment.leaves.items()}
    tasks = tuple(store.tasks[t] for t in places)
    modules = packing.segmented_terms([segment._replace(leaves=leaves)], places)
    part = Store(tasks, modules, tuple(store.sources[t] for t in places), store.report, store.errors)
    collection, standing = at_hand(part, tasks, original)
    out = []
    for x in collection:
        here = [n for n in segment.shapes if n in x.a]
        out.append(x._replace(a={n: x.a[n] for n in here}, b={n: x.b[n] for n in here}, extras={}))
    return out, standing
