"""Tasks that come and go: a store with one task more or less, the others bit for bit as they were.

To a coded store a task is added in codes of its own, at the store's quantizer step, predicted from the
store's vectors (`coding.addition`). To a plain one it joins module by module (`joining`), until it has had a
task's mean share of the store.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax import adapters, compression, forms
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.codec import encode
from hydraopt_jax.codec.layout import pieces
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import Factors
from hydraopt_jax.rate_control import addition, encode_at_step, navigate
from hydraopt_jax.store import (
    Payload,
    Segment,
    Source,
    Store,
    adapter,
    checkpoint,
    extras,
    joining,
    lossless,
    packing,
    task_index,
)

# a refit is due where its mean error, at the same bytes, is lower by this factor
DUE = 1.1
# how bytes fall with the step, and the error with the bytes, all in logarithms, about
BYTES_SLOPE, ERROR_SLOPE = 0.8, -2.5
# fits tried to come near a store's bytes, how near is near enough, and how far the step moves at once
ROUNDS, CLOSE, MOVE = 4, 0.01, 2.0


class Refit(NamedTuple):
    """What fitting all tasks at once would give at the bytes that the store has now.

    Attributes:
      mean: mean relative squared error over modules and tasks.
      task: error of the task in question; NaN for none.
      due: whether the store's own mean error is more than a tenth above.
      stand_ins: tasks whose originals were not at hand; what the store holds stood in for them.
    """

    mean: float
    task: float
    due: bool
    stand_ins: tuple[str, ...]


def add(store: Store, new: Adapter) -> Store:
    """A store with one task more; what it holds of the others is not touched.

    Raises:
      HydraOptError: a task of that name is there, shapes that disagree, or a store made with calibration.
    """
    if new.task in store.tasks:
        raise HydraOptError(f"task {new.task!r} is in the store: remove it first, or give NAME=ADAPTER")
    shapes = adapters.check([new])
    for name, terms in store.modules.items():
        for term in terms[:1] if name in shapes else ():
            have = (np.shape(term.a[0])[0], np.shape(term.b[0])[1])
            if shapes[name] != have:
                raise HydraOptError(
                    f"{name}: {new.task!r} has [in, out] = {list(shapes[name])}, the store has {list(have)}: "
                    "adapters of one store must adapt one base model"
                )
    need_no_calibration(store)
    carried = extras.coded(new.extras, store.report["options"].get("extras_dtype"))
    source = Source(new.dtype, new.config, new.layout, new.source, new.digest, carried)
    grown = store._replace(
        tasks=(*store.tasks, new.task),
        sources=(*store.sources, source),
        report=changed(store.report, sum(x.size for x in (*new.a.values(), *new.b.values()))),
    )
    return add_coded(grown, new) if store.payload is not None else add_plain(grown, new)


def is_calibrated(store: Store) -> bool:
    """Whether errors of outputs were made small, by second moments that the store does not hold."""
    return bool(store.report["options"].get("calibrated"))


def need_no_calibration(store: Store) -> None:
    """Refuse to code anything by weights for a store that was made for outputs."""
    if is_calibrated(store):
        raise HydraOptError("the store was made with --calibration, which it does not hold: compress again")


def changed(report: Mapping[str, Any], entries: int) -> dict[str, Any]:
    """The report after a change: what is said of the collection as it was compressed goes."""
    return {
        **{k: v for k, v in report.items() if k not in ("estimate", "refinement")},
        "entries": report["entries"] + entries,
        "bound": {},
    }


def with_errors(store: Store, modules: Mapping[str, Any], own: Mapping[str, float]) -> np.ndarray:
    """The errors with a column for the last task and rows for its new modules: `[M, T]`."""
    rows = dict(zip(store.modules, store.errors, strict=True))
    none = np.full(store.errors.shape[1], np.nan)
    return np.array([[*rows.get(n, none), own.get(n, np.nan)] for n in modules], np.float64)


def add_coded(store: Store, new: Adapter) -> Store:
    """See `coding.addition`."""
    payload = store.payload
    assert payload is not None
    if payload.segments:
        return add_segment(store, payload, new)
    found, errors, names = addition.add(new, store.report["step"], payload)
    together = len(store.tasks) - 1 if payload.slots is None else addition.tasks_of(payload.shapes)
    slot = max(together - 1, *payload.additions, *(payload.slots or ()), 0) + 1
    slots = (*(payload.slots if payload.slots is not None else range(together)), slot)
    payload = payload._replace(slots=slots, additions={**payload.additions, slot: found})
    modules = packing.coded_terms(payload, slots)
    table = with_errors(store, modules, dict(zip(names, errors, strict=True)))
    return store._replace(modules=modules, payload=payload, errors=table)


def add_segment(store: Store, payload: Payload, new: Adapter) -> Store:
    """A task in a segment of its own, compared with nobody and predicted from nobody."""
    problem = encode_at_step.prepare(adapters.stack([new]), tuple(new.a), np.ones(1), None, False)
    found = code(problem, store.report["step"])
    leaves = encode.serialize(found.coded, found.gains)
    one = Segment(leaves, found.coded.shapes, (len(store.tasks) - 1,))
    payload = payload._replace(segments=(*payload.segments, one))
    modules = packing.coded_terms(payload, range(len(store.tasks)))
    own = dict(zip(problem.order, found.errors[:, 0], strict=True))
    return store._replace(modules=modules, payload=payload, errors=with_errors(store, modules, own))


def add_plain(store: Store, new: Adapter) -> Store:
    """See `joining`."""
    tasks = len(store.tasks) - 1
    if store.report["form"] == lossless.FORM:
        return add_lossless(store, new)
    dtypes = [x.a[0].dtype.name for v in store.modules.values() for x in v]
    share = sum(forms.count(x) for v in store.modules.values() for x in v) / tasks
    ways = {n: joining.ways(store.modules.get(n, ()), a, new.b[n]) for n, a in new.a.items()}
    taken = joining.spend(ways, share)
    modules: dict[str, tuple[Factors, ...]] = {}
    errors = {}
    for name in dict.fromkeys((*store.modules, *new.a)):
        way = taken.get(name, joining.Way(0, 0.0))
        modules[name] = joining.join(name, store.modules.get(name, ()), way, tasks, dtypes[0])
    grown = store._replace(modules=modules)
    errors = compression.module_errors(grown, new)
    return grown._replace(errors=with_errors(store, modules, errors))


def add_lossless(store: Store, new: Adapter) -> Store:
    """A task as it came, in terms of its own."""
    last = len(store.tasks) - 1
    modules: dict[str, tuple[Factors, ...]] = {}
    for name in dict.fromkeys((*store.modules, *new.a)):
        before = []
        for term in store.modules.get(name, ()):
            of = [np.append(np.asarray(x), -1).astype(np.int32) for x in (term.a_of, term.b_of)]
            core = None if term.core is None else [*term.core, np.zeros_like(term.core[0])]
            before.append(Factors(term.a, term.b, of[0], of[1], core))  # type: ignore[arg-type]
        own = (
            lossless.terms([*[None] * last, lossless.raw_of(new, name)])
            if np.size(new.a.get(name, ()))
            else ()
        )
        modules[name] = (*before, *own)
    errors = with_errors(store, modules, dict.fromkeys(new.a, 0.0))
    return store._replace(modules=modules, errors=errors)


def remove(store: Store, task: str) -> Store:
    """A store with one task less; what it holds of the others is not touched.

    What others are predicted from, or share with the task, stays: `purging.held` says what, `purging.purge`
    is rid of it.

    Raises:
      HydraOptError: no such task, or it is the only one.
    """
    gone = task_index(store.tasks, task)
    if len(store.tasks) == 1:
        raise HydraOptError(f"{task!r} is the store's only task: delete the store instead")
    rest = [t for t in range(len(store.tasks)) if t != gone]
    payload, modules = store.payload, {}
    report = changed(store.report, -round(store.report["entries"] / len(store.tasks)))
    report |= unnamed(report, task)
    if payload is None:
        if shares(store.modules, gone):
            report["removed"] = [*report.get("removed", ()), task]
        for name, terms in store.modules.items():
            left = (packing.select(x, rest) for x in terms if (np.asarray(x.a_of)[rest] >= 0).any())
            modules[name] = tuple(left)
    elif payload.segments:
        payload = payload._replace(segments=tuple(without(x, gone, task) for x in payload.segments))
        modules = packing.coded_terms(payload, range(len(rest)))
    else:
        slots = payload.slots if payload.slots is not None else range(len(store.tasks))
        kept = tuple(slots[t] for t in rest)
        needed = addition.closure(payload.additions, kept)
        names = packing.payload_leaves(pieces(payload.shapes)[1], needed)
        payload = payload._replace(
            leaves={k: v for k, v in payload.leaves.items() if k in names},
            slots=kept,
            additions={k: v for k, v in payload.additions.items() if k in needed},
        )
        named = {**payload.removed, slots[gone]: task}
        # of a task that came later nothing is left when none is predicted from it
        together = addition.tasks_of(payload.shapes)
        payload = payload._replace(removed={k: v for k, v in named.items() if k in needed or k < together})
        modules = packing.coded_terms(payload, kept)
    rows = dict(zip(store.modules, store.errors, strict=True))
    outputs = store.output_errors
    if outputs is not None:
        by_name = dict(zip(store.modules, outputs, strict=True))
        outputs = np.stack([by_name[n][rest] for n in modules])
    return store._replace(
        tasks=tuple(store.tasks[t] for t in rest),
        modules=modules,
        sources=tuple(store.sources[t] for t in rest),
        # what a task came with is not recorded task by task
        report=report,
        errors=np.stack([rows[n][rest] for n in modules]),
        payload=payload,
        output_errors=outputs,
    )


def without(segment: Segment, gone: int, task: str) -> Segment:
    """A segment of a store that has lost a task: the others move up."""
    tasks = tuple(-1 if t == gone else t - (t > gone) for t in segment.tasks)
    kept = [k for k, t in enumerate(tasks) if t >= 0]
    names = packing.payload_leaves(pieces(segment.shapes)[1], kept) if kept else set()
    here = {segment.tasks.index(gone): task} if gone in segment.tasks else {}
    return segment._replace(
        leaves={k: v for k, v in segment.leaves.items() if k in names},
        tasks=tasks,
        removed={**segment.removed, **here} if kept else {},
    )


def shares(modules: Mapping[str, Sequence[Any]], task: int) -> bool:
    """Whether a task of a plain store reads a factor that another one reads, too."""
    return any(
        of[task] >= 0 and int((np.asarray(of) == of[task]).sum()) > 1
        for terms in modules.values()
        for x in terms
        for of in (x.a_of, x.b_of)
    )


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
    if "bounded" in report:
        out["bounded"] = [t for t in report["bounded"] if t != task]
    return out


def refit(collection: Sequence[Adapter], store: Store) -> Store:
    """All tasks fitted at once by the rule that made the store: its quantizer step, or its explicit form.

    Raises:
      HydraOptError: the store was made with calibration.
    """
    need_no_calibration(store)
    if store.payload is None and store.report["form"] != "lossless":
        asked = store.report["options"]
        heads = min(asked["heads"], len(collection))
        # one head a task stays one head a task
        every = all(len(np.unique(x.b_of)) == len(x.b_of) for v in store.modules.values() for x in v[:1])
        cores = asked["cores"] and not every and heads < len(collection)
        form = compression.Options(**{**asked, "heads": None if every else heads, "cores": cores})
        return compression.compress(collection, form)
    if store.payload is None:
        return navigate.compress(collection, navigate.Options(budget=1e6))
    options, problem, entries = prepared(collection, store)
    collection = extras.carried(collection, options.extras_dtype)
    return navigate.to_store(collection, problem, code(problem, store.report["step"]), options, entries)


def options_of(store: Store) -> navigate.Options:
    """What a coded store was asked for; its calibration is not in it."""
    asked = {k: v for k, v in store.report["options"].items() if k != "calibrated"}
    weights = {k: v for k, v in asked.get("weights", {}).items() if k in store.tasks}
    return navigate.Options(**{**asked, "weights": weights})


def prepared(
    collection: Sequence[Adapter], store: Store
) -> tuple[navigate.Options, encode_at_step.Problem, int]:
    """A collection made ready to be coded as a store was."""
    options = options_of(store)
    return options, navigate.setup(collection, options), adapters.stack(collection).size


def code(problem: encode_at_step.Problem, step: float) -> encode_at_step.Trial:
    """A collection coded at a step, tables trained for it."""
    return encode_at_step.attempt(problem, step, encode_at_step.train(problem, step))


def originals(store: Store, given: Mapping[str, Adapter]) -> tuple[list[Adapter], tuple[str, ...]]:
    """Each task's original where it is given; else what the store holds, and the names of those tasks."""
    absent = tuple(t for t in store.tasks if t not in given)
    return [given[t] if t in given else adapter(store, t) for t in store.tasks], absent


def estimate(store: Store, given: Mapping[str, Adapter], task: str | None = None) -> Refit:
    """What a fit of all tasks at once would give at the bytes that the store has now; nothing is changed.

    A coded store's tasks are coded together, at a step that is moved until they take about its bytes. A plain
    one's are fitted in its form.
    """
    collection, absent = originals(store, given)
    t = None if task is None else task_index(store.tasks, task)
    found: np.ndarray = np.zeros(0)
    miss = np.inf
    if store.payload is None:
        found, miss = refit(collection, store).errors, 0.0
    else:
        options, problem, entries = prepared(collection, store)
        step, size = store.report["step"], checkpoint.measure_size(store)
        for _ in range(ROUNDS):
            fitted = code(problem, step)
            whole = navigate.to_store(collection, problem, fitted, options, entries)
            over = float(np.log(checkpoint.measure_size(whole) / size))
            if abs(over) < abs(miss):
                found, miss = fitted.errors, over
            if abs(miss) < CLOSE:
                break
            step *= float(np.exp(np.clip(over / BYTES_SLOPE, -MOVE, MOVE)))
    scale = float(np.exp(ERROR_SLOPE * -miss))
    mean = scale * float(np.nanmean(found))
    own = float("nan") if t is None else scale * float(np.nanmean(found[:, t]))
    return Refit(mean, own, float(np.nanmean(store.errors)) > DUE * mean + 1e-12, absent)
