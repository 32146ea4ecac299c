"""Segments and notes of encoded parts, and the store that is made of them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax import devices
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.codec import encode, syntax
from hydraopt_jax.collection import Collection
from hydraopt_jax.deferred import size_of
from hydraopt_jax.rate_control import search
from hydraopt_jax.rate_control.carried import kept_segment
from hydraopt_jax.rate_control.coding import Trial
from hydraopt_jax.rate_control.distortion import with_errors
from hydraopt_jax.rate_control.expected import expected_errors
from hydraopt_jax.rate_control.metrics import Metrics
from hydraopt_jax.rate_control.mode_decision import Choice
from hydraopt_jax.rate_control.options import Options, as_report, unit_scale
from hydraopt_jax.rate_control.parts import Part, entries
from hydraopt_jax.rate_control.problem import Problem
from hydraopt_jax.rate_control.search import Pass, Target
from hydraopt_jax.rate_control.work import Place, Processes, Progress
from hydraopt_jax.static import Static
from hydraopt_jax.store import sizes
from hydraopt_jax.store.removal import PREDICTED
from hydraopt_jax.store.store import Segment, Store, make_segment
from hydraopt_jax.store.tensors import Tensors

# maximum number of tasks for which labels of forms name the reference
NAMED = 16
FACTOR_LEAVES = ("shared", "task_", "head_")
# cap on codes over available bytes: if nothing is available, a much coarser step is tried
HOPELESS = 20
# relative squared error of a module of which nothing is kept: 1, less rounding
LOST = 0.9999


class Run(NamedTuple):
    """State of one compression.

    Attributes:
      found: the collection.
      options: target and other options.
      parts: the parts of the collection.
      place: where finished segments are kept.
      progress: callbacks for progress.
      processes: the processes of the job.
      cache: part -> its problem.
      metrics: module -> its metrics, made when they are first asked for.
      carried: full tensors of each task, where the collection is one part.
      drafts: where the parts are few, what was encoded and is not in bytes: only a pass that meets the target
        is; None else.
    """

    found: Collection
    options: Options
    parts: Sequence[Part]
    place: Place
    progress: Progress
    processes: Processes
    cache: dict[int, Problem]
    metrics: dict[str, Metrics]
    carried: Sequence[Tensors]
    drafts: "dict[str, Draft] | None" = None

    @property
    def mine(self) -> list[int]:
        """The parts of this process: as many of the first half of a pass, the even ones, as of the second."""
        return [n for n in range(len(self.parts)) if n // 2 % self.processes.size == self.processes.rank]


class Draft(NamedTuple):
    """An encoded part whose bytes have not been made yet."""

    problem: Problem
    trial: Trial
    given: list[Adapter]


def coded_segment(run: Run, n: int, problem: Problem, trial: Trial, given: Sequence[Adapter]) -> Segment:
    """The segment of a trial."""
    leaves = encode.serialize(trial.coded, trial.gains, side=trial.side)
    names = [run.found.cards[t].task for t in run.parts[n].tasks]
    carried = [run.carried[t] for t in run.parts[n].tasks] if run.carried else ()
    made = make_segment(names, trial.coded.shapes, leaves, trial.errors, tensors=carried)
    return with_errors(made, given, trial.errors) if problem.metrics else made


def sized_segment(run: Run, part: Part, problem: Problem, trial: Trial) -> Segment:
    """A segment of about the size of a trial's segment, without codes."""
    names = [run.found.cards[t].task for t in part.tasks]
    carried = [run.carried[t] for t in part.tasks] if run.carried else ()
    leaves = {*trial.coded.leaves, *(f"task_{t}" for t in trial.gains)}
    each = max(-(-int(trial.bytes) // len(leaves)), 1)
    bodies = {leaf: np.broadcast_to(np.uint8(0), (each,)) for leaf in sorted(leaves)}
    outputs = trial.errors if problem.metrics else None
    return make_segment(
        names, trial.coded.shapes, bodies, trial.errors, output_errors=outputs, tensors=carried
    )


def overhead(run: Run, part: Part, problem: Problem, trial: Trial) -> float:
    """Bytes that a store of all parts takes beside its codes, if each task of a part takes as much as in this
    one."""
    segment = sized_segment(run._replace(carried=()), part, problem, trial)
    every = run.found.sources
    one = Store((segment,), segment.tasks, tuple(every[t] for t in part.tasks), Static({}))
    beside = sizes.measure_size(one, run.place.path) - codes_of([segment]) - search.LEAST_OVERHEAD
    return search.LEAST_OVERHEAD + beside * sum(len(x.tasks) for x in run.parts) / len(part.tasks)


def codes_of(segments: Sequence[Segment]) -> int:
    """Bytes of the coded factors of segments."""
    return sum(size_of(v) for x in segments for k, v in x.leaves.items() if k.startswith(FACTOR_LEAVES))


def finished(run: Run, number: int, draft: Store, place: Place) -> Store:
    """The store of a pass of drafts, in bytes; with what Gaussian models expect if it is in one part."""
    assert run.drafts is not None
    segments, report = [], dict(draft.report)
    for n in range(len(run.parts)):
        name = f"pass-{number}-{n}"
        problem, trial, given = run.drafts.pop(name)
        calls: list[Callable[[], Any]] = [functools.partial(coded_segment, run, n, problem, trial, given)]
        if len(run.parts) == 1:
            calls.append(functools.partial(expected_errors, problem, trial.bytes))
        segment, *expected = devices.together(calls)
        place.keep(name, segment)
        segments.append(kept_segment(place, name))
        for each in expected:
            report["estimate"] = each
    return draft.replace(segments=(*segments, *draft.segments[len(segments) :]), report=Static(report))


def note_of(problem: Problem, trial: Trial, segment: Segment, tasks: Sequence[str]) -> dict[str, Any]:
    """The note of an encoded part: counts, errors and forms, beside its segment."""
    # one reference in each segment: names of all would tell nothing
    names = tasks if len(tasks) <= NAMED else ["another task"] * len(tasks)
    forms: dict[str, int] = {}
    for choice in trial.choices.values():
        forms[label(choice, names)] = forms.get(label(choice, names), 0) + 1
    note = {
        "no_joint": sorted(problem.no_joint),
        "alone": problem.alone,
        "forms": forms,
        "tail": mean_tail(problem, trial),
        "modules": int(np.count_nonzero(~np.isnan(trial.errors))),
        "bytes": codes_of([segment]),
        "error": float(np.nansum(trial.errors)),
        "counts": trial.coded.counts.tolist(),
    }
    return note


def label(choice: Choice, tasks: Sequence[str]) -> str:
    """The description of a form."""
    if choice.form == "separate":
        return "separate" if choice.reference < 0 else f"{PREDICTED}{tasks[choice.reference]}"
    return "joint basis"


def mean_tail(problem: Problem, trial: Trial) -> float:
    """Mean relative energy beyond the directions that each task keeps: the bound at these ranks."""
    coded, tails = trial.coded, []
    for t in range(problem.weights.shape[1]):
        kept: dict[str, int] = {}
        for (name, _), live in syntax.live_directions(coded.shapes, coded.contexts, t).items():
            kept[name] = kept.get(name, 0) + int(live.sum())
        for x in problem.spectra:
            for m in np.flatnonzero(x.norms[:, t] > 0):
                energy = np.asarray(x.deltas.s[m, t], np.float64) ** 2
                tails.append(energy[kept.get(x.modules[m], 0) :].sum() / energy.sum())
    return float(np.mean(tails)) if tails else 0.0


def put_together(
    run: Run, number: int, step: float, heads: Sequence[Segment], said: Mapping[str, Any]
) -> Store:
    """The store of a pass."""
    segments = [kept_segment(run.place, f"pass-{number}-{n}") for n in range(len(run.parts))]
    notes = [kept_note(run.place, f"pass-{number}-{n}") for n in range(len(run.parts))]
    forms: dict[str, int] = {}
    for x in notes:
        for form, count in x["forms"].items():
            forms[form] = forms.get(form, 0) + count
    weights = [max(x["modules"], 1) for x in notes]
    tail = float(np.average([x["tail"] for x in notes], weights=weights))
    report = as_report(run.options, run.found) | {
        "form": "coded",
        # of a task of weight 1, as which later tasks are coded
        "step": float(f"{step * unit_scale(run.found.tasks, run.options):.6g}"),
        "forms": forms,
        "bound": {"eigen-tail": float(f"{tail:.6g}")},
        **said,
    }
    return Store((*segments, *heads), run.found.tasks, run.found.sources, Static(report))


def pass_of(step: float, store: Store, goal: Target, place: Place) -> Pass:
    """The result of a pass."""
    error = search.value(store.errors, ())
    # of adapters that are zero nothing is lost
    empty = error > 0 and not np.any(store.errors < LOST)
    if goal.sign > 0:
        errors = store.errors if store.output_errors is None else store.output_errors
        found = search.value(errors, goal.worst)
        return Pass(step, float(np.log(max(found, 1e-30) / goal.limit)), found, None, error, empty)
    size = sizes.measure_size(store, place.path) - goal.heads
    codes = codes_of(store.segments)
    room = max(goal.limit - (size - codes), codes / HOPELESS)
    return Pass(step, float(np.log(codes / room)), size, None, error, empty)


def miss_of(run: Run, number: int, chosen: Sequence[int], goal: Target, beside: float) -> tuple[float, float]:
    """Log of what a pass will reach over the target, if all parts are as the chosen ones; and their share."""
    notes = [kept_note(run.place, f"pass-{number}-{n}") for n in chosen]
    sizes = [entries(run.found, x) for x in run.parts]
    share = sum(sizes[n] for n in chosen) / sum(sizes)
    if goal.sign > 0:
        error = sum(x["error"] for x in notes) / max(sum(x["modules"] for x in notes), 1)
        return float(np.log(max(error, 1e-30) / goal.limit)), share
    codes = sum(x["bytes"] for x in notes) / share
    return float(np.log(codes / max(goal.limit - beside, codes / HOPELESS))), share


def kept_note(place: Place, name: str) -> Mapping[str, Any]:
    """A note that a process has written; raises if it is missing."""
    found = place.note(name)
    if found is None:
        kept_segment(place, name)
        raise AssertionError(name)
    return found
