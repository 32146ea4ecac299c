"""Purge a store: remove all data of removed tasks.

Segments that were coded with such a task are coded again without it, at the store's step: from the originals
if available, else from the decoded store. In the latter case the stated error is an upper bound by the
triangle inequality, and the report lists the task under "bounded". All other segments stay bit for bit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.changes import addition, refitting
from hydraopt_jax.changes.refitting import Original
from hydraopt_jax.formats.memory_collection import in_memory
from hydraopt_jax.rate_control import engine
from hydraopt_jax.static import Static
from hydraopt_jax.store import removal
from hydraopt_jax.store.store import ERRORS, Segment, Store, cut_to, error_leaf, make_segment, tensors_at
from hydraopt_jax.store.tensors import Tensors

NONE = Tensors((), b"")


def purge(
    store: Store,
    original: Original = lambda task: None,
    calibration: Mapping[str, np.ndarray] | None = None,
) -> tuple[Store, tuple[str, ...]]:
    """The store without any data of removed tasks, and the tasks that were coded again.

    Args:
      store: its leaves may be on disk.
      original: task -> original adapter, or None if it is not available.
      calibration: the second moments that the store was made with, if any.

    Raises:
      HydraOptError: the store was made with calibration, and none is given.
    """
    left = removal.traces(store)
    if not left:
        return removal.forget_names(store), ()
    addition.need_calibration(store, calibration)
    if not any(x.coded for x in store.segments):
        return refit_plain(store, original)
    dirty = {n for n, _ in left}
    for n, x in enumerate(store.segments):
        # segments that are predicted from a segment, or use its tables, cannot stay without it
        if x.tables in dirty or any(r.segment in dirty for r in x.references):
            dirty.add(n)
    out = store.replace(segments=())
    number: dict[int, int] = {}
    again: dict[str, None] = {}
    standing: dict[str, None] = {}
    for n, x in enumerate(store.segments):
        if n not in dirty:
            references = tuple(r._replace(segment=number[r.segment]) for r in x.references)
            tables = number[x.tables] if x.tables >= 0 else -1
            number[n] = len(out.segments)
            kept = x.replace(references=references, tables=tables)
            out = out.replace(segments=(*out.segments, kept))
            continue
        if not x.live:
            continue
        names = [x.tasks[k] for k in x.live]
        given, absent = refitting.at_hand(store, names, original)
        part = [only(a, x) for a in given]
        # full tensors go with the first segment of their task
        carried = {t: tensors_at(x, x.tasks.index(t)) for t in names}
        made = [
            y.replace(leaves=claims(x, y, absent)).with_tensors([carried.pop(t, NONE) for t in y.tasks])
            for y in coded_again(store, out, x, part, calibration)
        ]
        if any(v.table for v in carried.values()):
            made.append(make_segment(tuple(carried), {}, {}, tensors=list(carried.values())))
        out = out.replace(segments=(*out.segments, *made))
        again |= dict.fromkeys(names)
        standing |= dict.fromkeys(absent)
    done = tuple(t for t in store.tasks if t in again)
    return removal.forget_names(bounded(out, done, list(standing))), done


def only(adapter: Adapter, segment: Segment) -> Adapter:
    """The modules of an adapter that a segment has."""
    here = [n for n in segment.modules if n in adapter.a]
    return adapter.replace(
        a={n: adapter.a[n] for n in here}, b={n: adapter.b[n] for n in here}, extras={}, raw={}
    )


def coded_again(
    store: Store,
    before: Store,
    segment: Segment,
    given: Sequence[Adapter],
    calibration: Mapping[str, np.ndarray] | None,
) -> tuple[Segment, ...]:
    """Segments of the same tasks, coded at the store's step; predicted from `before` if the old one was."""
    if segment.references and any(x.coded and x.tables < 0 for x in before.segments):
        return (addition.segment_at_step(before.replace(report=store.report), given[0], calibration),)
    options = refitting.options_of(store)._replace(calibration=calibration)
    names = {x.task for x in given}
    options = options._replace(weights={k: v for k, v in options.weights.items() if k in names})
    return engine.compress_at_step(in_memory(given), options, store.report["step"]).segments


def bound(before: np.ndarray, again: np.ndarray) -> np.ndarray:
    """Upper bound of a relative squared error after coding twice, with relative errors `before` and `again`.

    Let `e = sqrt(before)`. The first result has at most `1 + e` times the original's norm, hence
    `sqrt(error) <= e + (1 + e) sqrt(again)`.

    >>> float(bound(np.array(0.01), np.array(0.01)).round(4))
    0.0441
    """
    first = np.sqrt(before)
    return (first + (1 + first) * np.sqrt(again)) ** 2


def claims(old: Segment, new: Segment, standing: Sequence[str]) -> dict[str, Any]:
    """Leaves of a segment that was coded again, with its errors, or bounds of them for `standing` tasks."""
    leaves = dict(new.leaves)
    for name in ERRORS:
        before, again = old.error_table(name), new.error_table(name)
        if before is None or again is None:
            continue
        rows = [list(old.modules).index(n) for n in new.modules]
        columns = [old.tasks.index(t) for t in new.tasks]
        was = before[np.ix_(rows, columns)]
        # a delta that was lost completely stays lost
        again = np.where(np.isnan(again) & ~np.isnan(was), 0.0, again)
        leaves[name] = error_leaf(np.where(np.isin(new.tasks, list(standing)), bound(was, again), again))
    return leaves


def bounded(store: Store, again: Sequence[str], standing: Sequence[str]) -> Store:
    """The store with the list, in its report, of tasks whose errors are bounds."""
    was = store.report.get("bounded", [])
    parts = {t: sum(t in [x.tasks[k] for k in x.live] for x in store.segments) for t in again}
    # only some segments of a task may have been coded from its original
    kept = [t for t in store.tasks if t in standing or (t in was and (t not in again or parts[t] > 1))]
    rest = {k: v for k, v in store.report.items() if k != "bounded"}
    return store.replace(report=Static(rest | ({"bounded": kept} if kept else {})))


def refit_plain(store: Store, original: Original) -> tuple[Store, tuple[str, ...]]:
    """A plain store fitted again as a whole."""
    collection, standing = refitting.at_hand(store, store.tasks, original)
    fresh = refitting.refit(store, collection)
    # the errors of all segments in one table
    old = make_segment(store.tasks, dict.fromkeys(store.shapes, ()), {}, store.errors)
    segments = tuple(x.replace(leaves=claims(old, x, standing)) for x in fresh.segments)
    report = {**bounded(store, store.tasks, standing).report, **fresh.report}
    before = store.report if standing else fresh.report
    report = {k: v for k, v in report.items() if k not in removal.ENTRIES}
    report |= {k: before[k] for k in removal.ENTRIES if k in before}
    if standing:
        report |= {"bound": {}}
    done = fresh.replace(segments=segments, sources=store.sources, report=Static(report))
    return cut_to(done, store.tasks), store.tasks
