"""Add one task to a store as a new segment; other segments are not touched.

In a coded store the task is coded at the store's quantizer step, as in a fit of all tasks. Its vectors are
predicted by least squares from those of a few tasks, or from the shared leaf of a segment, unless the store's
tasks share nothing. In a plain store it joins module by module, until it has used the mean number of entries
per task of the store.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hydraopt_jax import adapters
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.changes import joining
from hydraopt_jax.codec import encode, prediction
from hydraopt_jax.codec.prediction import Prediction
from hydraopt_jax.deferred import bytes_of, joined
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.factors import LazyFactors
from hydraopt_jax.formats.memory_collection import raw_of
from hydraopt_jax.rate_control.coding import encode_at_step, fit_tables, gains_and_errors, terms_at_step
from hydraopt_jax.rate_control.distortion import with_errors
from hydraopt_jax.rate_control.metrics import metrics_of, uncovered
from hydraopt_jax.rate_control.options import check_weight
from hydraopt_jax.rate_control.problem import Problem, prepare
from hydraopt_jax.static import Static
from hydraopt_jax.store import lossless, plain, references, tensors
from hydraopt_jax.store.decoding import borrowing, decode_segment, decode_segments, terms_of
from hydraopt_jax.store.references import Vectors, base_of
from hydraopt_jax.store.removal import changed_report, entries_of
from hydraopt_jax.store.schema import PlainShape
from hydraopt_jax.store.store import SHARED, Reference, Segment, Source, Store, count, make_segment

# maximum references per task; reading the task reads their leaves too
MAX_REFERENCES = 4
# smallest share of the bits that a further reference must save
WORTH = 0.02
# entry, in steps, that keeps a vector nonzero if its prediction is exact
TRACE = 1e-3
# store size in entries up to which all tasks are decoded to search for references
SEARCHED = 1 << 26


def add(
    store: Store,
    new: Adapter,
    *,
    weight: float = 1.0,
    calibration: Mapping[str, np.ndarray] | None = None,
) -> Store:
    """The store with one more task; the data of the other tasks are not touched.

    Args:
      store: plain, coded or lossless.
      new: the adapter of the new task.
      weight: of the new task's error, beside the weights that the store was made with.
      calibration: the second moments that the store was made with, if any.

    Raises:
      HydraOptError: the store has a task of that name, shapes disagree, the calibration is missing, a weight
        for a store without a quantizer step, or a coded store in which nothing is coded.
    """
    adapters.check_types([new])
    if new.task in store.tasks:
        raise HydraOptError(f"task {new.task!r} is in the store: remove it first, or give NAME=ADAPTER")
    have = store.shapes
    for name, shape in adapters.check([new]).items():
        if have.get(name, shape) != shape:
            raise HydraOptError(
                f"{name}: {new.task!r} has [in, out] = {list(shape)}, the store has {list(have[name])}: "
                "adapters of one store must adapt one base model"
            )
    need_calibration(store, calibration)
    store = with_weight(store, new.task, weight)
    carried = tensors.encode_tensors(new.extras, store.report["options"].get("extras_dtype"))
    source = Source(new.dtype, Static(new.config), Static(new.layout), new.source, new.digest)
    if store.report["form"] == lossless.FORM:
        segment = as_it_came(new)
    elif any(x.coded for x in store.segments):
        if not any(max(t.a_of) >= 0 for x in store.segments for v in x.modules.values() for t in v):
            raise HydraOptError(
                "add: the adapters of the store are all untrained, which gives no quantizer step for "
                f"{new.task!r}: compress them again with it"
            )
        segment = segment_at_step(store, new, calibration)
    else:
        segment = joined_to(store, new)
    grown = store.replace(
        segments=(*store.segments, segment.with_tensors([carried])),
        tasks=(*store.tasks, new.task),
        sources=(*store.sources, source),
    )
    report = grown_report(store, grown, sum(x.size for x in (*new.a.values(), *new.b.values())))
    if calibration is not None and store.report["options"].get("calibrated"):
        # modules whose errors are those of weights, under the names that `compress` uses
        known = report.get("uncalibrated", ())
        own = adapters.module_shapes(new)
        lacking = uncovered({**store.shapes, **own}, calibration)
        without = [x for x in lacking if x in own and x not in known]
        report = report.replace(uncalibrated=[*known, *without]) if without else report
    return grown.replace(report=report)


def grown_report(store: Store, grown: Store, entries: int) -> Static:
    """The report of a store after a task of so many entries was added."""
    report = changed_report(grown, store.report.get("entries", 0) + entries)
    if entries_of(grown.replace(report=report))[grown.tasks[-1]] == entries:
        return report
    return report.replace(task_entries={**report.get("task_entries", {}), grown.tasks[-1]: entries})


def with_weight(store: Store, task: str, weight: float) -> Store:
    """The store with the weight of a task that it is to have, in its options.

    Raises:
      HydraOptError: not a weight, or it does nothing in this store.
    """
    check_weight(weight, f"weight of {task!r}")
    options = store.report["options"]
    known = options.get("weights", {})
    if known.get(task, 1) == weight:
        return store
    if not any(x.coded for x in store.segments):
        raise HydraOptError(
            f"weight of {task!r}: does nothing in a store of form {store.report['form']!r}, which has no "
            "quantizer step: leave it out"
        )
    weights = {k: v for k, v in known.items() if k != task} | ({task: float(weight)} if weight != 1 else {})
    return store.replace(report=Static({**store.report, "options": {**options, "weights": weights}}))


def need_calibration(store: Store, calibration: Mapping[str, np.ndarray] | None) -> None:
    """Raise if the store was made with calibration and none is given."""
    if store.report["options"].get("calibrated") and calibration is None:
        raise HydraOptError(
            "the store was made with --calibration, which it does not hold: give it again, or compress again"
        )


def as_it_came(new: Adapter) -> Segment:
    """The segment of a new task in a lossless store."""
    rows = {n: [raw_of(new, n)] for n, a in new.a.items() if a.shape[1]}
    modules, errors, _ = lossless.lossless_terms(rows)
    shapes, leaves = plain.to_leaves(modules)
    return make_segment([new.task], shapes, leaves, errors)


def segment_at_step(store: Store, new: Adapter, calibration: Mapping[str, np.ndarray] | None) -> Segment:
    """The segment of a task coded at the store's step, predicted from other tasks in small stores."""
    shapes = {n: (a.shape[0], new.b[n].shape[1]) for n, a in new.a.items()}
    around = {n: (a, new.b[n].T) for n, a in new.a.items()}
    metrics = metrics_of(shapes, calibration, around) if calibration is not None else {}
    weight = np.array([store.report["options"]["weights"].get(new.task, 1.0)])
    problem = prepare(adapters.stack([new]), tuple(new.a), weight, metrics, False)
    step = store.report["step"]
    if count(store) > SEARCHED:
        trial = encode_at_step(problem, step, fit_tables(problem, step))
        leaves = encode.serialize(trial.coded, trial.gains, side=trial.side)
        segment = make_segment([new.task], trial.coded.shapes, leaves, trial.errors)
        return with_errors(segment, [new], trial.errors) if metrics else segment
    return predicted_segment(store, new, problem, step)


def candidates(store: Store) -> tuple[dict[Reference, Vectors], int]:
    """The vectors of all tasks and shared leaves in coded segments; and the segment whose tables are used.

    There are none in a store of tasks that share nothing.
    """
    known: dict[Reference, Vectors] = {}
    tables = next(n for n, x in enumerate(store.segments) if x.coded and x.tables < 0)
    if not store.report["options"].get("share", True):
        return known, tables
    for n, x in enumerate(store.segments):
        if not x.coded or not x.live:
            continue
        if x.references or x.tables >= 0:
            terms = decode_segments(store, {n: x.live})[n]
            known |= {Reference(n, k): references.task_vectors(terms, i) for i, k in enumerate(x.live)}
            continue
        found = decode_segment(x, x.live)
        terms = terms_of(found, x.modules, x.live)
        known[Reference(n, SHARED)] = references.shared_vectors(found)
        known |= {Reference(n, k): references.task_vectors(terms, i) for i, k in enumerate(x.live)}
    return known, tables


def predicted_segment(store: Store, new: Adapter, problem: Problem, step: float) -> Segment:
    """The task's segment, predicted from the references that save the most bits."""
    known, tables = candidates(store)
    table = references.frequencies(bytes(bytes_of(store.segments[tables].leaves["shared"])))
    goals, _ = terms_at_step(problem, step)
    chosen = choose_references(goals, known)
    rest: dict[str, tuple[encode.TermInSteps, ...]] = {}
    found: list[Prediction] = []
    guesses: dict[tuple[str, int], np.ndarray] = {}
    for name, terms in goals.items():
        if not len(terms[0].a):
            rest[name] = terms
            continue
        left = []
        for side in (0, 1):
            target = (terms[0].b if side else terms[0].a)[0]
            base = base_of(known, chosen, (name, side))
            if base is not None:
                one, guesses[name, side], _ = prediction.predict(target, prediction.scaled(base))
                found.append(one or prediction.none(base.shape[1], target.shape[1]))
            remains = target - guesses.get((name, side), np.float32(0))
            # an exactly predicted vector must not look like a vector that is not coded
            remains[0] += TRACE * (target.any(0) & ~remains.any(0))
            left.append(np.where(target.any(0), remains, 0).astype(np.float32))
        rest[name] = (terms[0]._replace(a=left[0][None], b=left[1][None]), *terms[1:])
    quantized = encode.quantize(rest, table.astype(np.float64))
    whole = []
    for x, value in zip(quantized.pieces, quantized.values, strict=True):
        whole.append(value + guesses.get((x.module, x.side), np.float32(0)) if x.term == 0 else value)
    gains, errors = gains_and_errors(problem, quantized._replace(values=whole))
    leaves: dict[str, Any] = {
        **encode.serialize(quantized, gains, table),
        "prediction": references.to_leaf(found),
    }
    segment = make_segment([new.task], quantized.shapes, leaves, errors, references=chosen, tables=tables)
    return with_errors(segment, [new], errors, store.segments) if problem.metrics else segment


def choose_references(
    goals: Mapping[str, Sequence[encode.TermInSteps]], known: Mapping[Reference, Vectors]
) -> tuple[Reference, ...]:
    """The references that save the most bits, greedily."""
    coded = {n: v[0] for n, v in goals.items() if len(v[0].a)}
    targets = {(n, side): (x.b if side else x.a)[0] for n, x in coded.items() for side in (0, 1)}
    total = sum(
        float((len(x) / 2 * np.log2(np.maximum((x**2).mean(0) / encode.DISTORTION, 1))).sum())
        for x in targets.values()
    )
    chosen: tuple[Reference, ...] = ()
    best = 0.0
    while len(chosen) < MAX_REFERENCES:
        gains = {}
        for slot in known.keys() - set(chosen):
            tried = tuple(sorted((*chosen, slot)))
            bases = {k: base_of(known, tried, k) for k in targets}
            gains[slot] = sum(
                prediction.predict(targets[k], prediction.scaled(x))[2]
                for k, x in bases.items()
                if x is not None
            )
        following = max(gains, key=lambda s: (gains[s], -s[0], -s[1]), default=None)
        if following is None or gains[following] - best <= WORTH * total:
            break
        chosen, best = tuple(sorted((*chosen, following))), gains[following]
    return chosen


def joined_to(store: Store, new: Adapter) -> Segment:
    """The segment of a new task in a plain store, see `joining`."""
    every: dict[str, list[joining.Term]] = {}
    for n, there in enumerate(store.segments):
        # factors are read one by one, so that a large store is never in memory
        lend = borrowing(store, n)
        terms = plain.from_leaves(LazyFactors, there.modules, there.leaves, there.live, lend)
        for name, found in terms.items():
            every.setdefault(name, []).extend(joining.Term(x, n, k) for k, x in enumerate(found) if len(x.a))
    dtype = next(np.dtype(x.factors.a[0].dtype).name for v in every.values() for x in v)
    share = count(store) / max(len(store.tasks), 1)
    ways = {n: joining.ways(every.get(n, ()), a, new.b[n]) for n, a in new.a.items()}
    taken = joining.spend(ways, share)
    shapes: dict[str, tuple[PlainShape, ...]] = {}
    parts: list[Any] = []
    lenders: list[Reference] = []
    for name, way in taken.items():
        own, borrowed = joining.way_terms(every.get(name, ()), way, name, dtype)
        rows: list[PlainShape] = []
        for shape, new_arrays in borrowed:
            term = every[name][way.term]
            for side, what in (("a", way.a), ("b", way.b)):
                if isinstance(what, int):
                    lender = Reference(term.segment, lender_place(store, term, side, what))
                    if lender not in lenders:
                        lenders.append(lender)
                    at = lenders.index(lender)
                    shape = shape._replace(a_from=at) if side == "a" else shape._replace(b_from=at)
            rows.append(shape)
            parts += [new_arrays[k] for k in ("a", "b", "core") if k in new_arrays]
        for x in own:
            rows.append(plain.shape_of(x))
            parts += [x.a[0], x.b[0]]
        if not rows:
            # a term without factors: the module is present with delta zero
            size = new.a[name].shape[0], 1, new.b[name].shape[1]
            rows.append(PlainShape((-1,), (-1,), *size, dtype, dtype))
        shapes[name] = tuple(rows)
    # of one task all parts lie in one leaf, in canonical order
    leaves = {"task_0": joined(parts)} if parts else {}
    segment = make_segment([new.task], shapes, leaves, references=lenders)
    return with_errors(segment, [new], before=store.segments)


def lender_place(store: Store, term: joining.Term, side: str, index: int) -> int:
    """A place of the term's segment whose task uses a factor."""
    of = np.asarray(getattr(term.factors, f"{side}_of"))
    return store.segments[term.segment].live[int(np.flatnonzero(of == index)[0])]
