"""The engine: compress a collection of any size to a budget or an error target.

    plan parts -> find the step on a sample -> encode every part at it -> measure what was decoded -> correct
    the step until the target is met

A part depends only on its own factors, and on the step and the tables of its half of the pass. So devices
and processes can divide the parts, and a killed job resumes with the remaining parts and ends with the same
store.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hydraopt_jax import devices
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.collection import Collection
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.rate_control import budget, pilot, prepared, search
from hydraopt_jax.rate_control.carried import full_tensors
from hydraopt_jax.rate_control.coding import (
    Quantized,
    fit_tables,
    fitted_tables,
    measure,
    quantize_at_step,
    settle_forms,
)
from hydraopt_jax.rate_control.metrics import uncovered
from hydraopt_jax.rate_control.options import (
    Options,
    as_report,
    check_options,
    relative_weights,
    unit_scale,
)
from hydraopt_jax.rate_control.parts import SEGMENT_BYTES, ahead, parts_of, read_part
from hydraopt_jax.rate_control.problem import Problem
from hydraopt_jax.rate_control.search import Pass, Target
from hydraopt_jax.rate_control.segments import (
    Draft,
    Run,
    coded_segment,
    codes_of,
    finished,
    kept_note,
    miss_of,
    note_of,
    pass_of,
    put_together,
    sized_segment,
)
from hydraopt_jax.rate_control.unweighing import forget_filters
from hydraopt_jax.rate_control.work import IN_MEMORY, Job, Memory, Place, Processes, Progress
from hydraopt_jax.static import Static
from hydraopt_jax.store import lossless, plain, sizes, tensors
from hydraopt_jax.store.store import Segment, Store, make_segment, task_errors
from hydraopt_jax.store.tensors import Tensors

# bytes that stay free once a store was larger than its draft
SPARE = 4
# rounds in which weights of tasks below the error target are lowered; least and largest change, damping, and
# changes that are not worth a round
ROUNDS, LOWEST, HIGHEST, DAMPING, EVEN = 3, 0.1, 10.0, 0.9, 0.03


def compress_to_target(
    found: Collection,
    options: Options,
    job: Job = IN_MEMORY,
    *,
    segment_bytes: int = SEGMENT_BYTES,
    cache: dict[int, Problem] | None = None,
) -> Store:
    """A store of a collection that meets a budget or an error target.

    Args:
      found: the collection.
      options: the target.
      job: where segments are kept, and who takes part; existing segments are not made again.
      segment_bytes: half-precision bytes of the factors that are coded together.
      cache: analyses of a small collection, reusable for other targets with the same weights.

    Returns:
      Store whose size on disk (metadata included) meets the budget, or whose measured error meets the target.

    Raises:
      HydraOptError: bad options, or a target that cannot be met (the message says which can).
    """
    options = check_options(options)
    place, processes, said = job.place or Memory(), job.processes, job.said
    parts = parts_of(found, segment_bytes)
    relative_weights(found.tasks, options)
    if options.calibration is not None:
        uncovered(found.shapes, options.calibration)
    heads, carried = full_tensors(found, options.extras_dtype, place, processes, apart=len(parts) != 1)
    coded = [Tensors(row, b"") for x in heads for row in x.tensors] or list(carried)
    try:
        tensors.check_room(options.budget, coded, options.extras_dtype)
    except HydraOptError as error:
        # no other try will find more room
        raise search.Unmet(str(error)) from None
    size = sum(tensors.stored_size(row) for x in coded for row in x.table)
    keeps_all = budget.keeps_all(options.budget)
    goal = search.target_of(found, options, size, len(parts))
    if keeps_all or (goal.sign < 0 and search.least_lossless(found) <= goal.limit):
        kept = as_they_are(found, options, heads, carried, said)
        if keeps_all or sizes.measure_size(kept, place.path) <= goal.limit + size:
            return kept
    analyses = {} if cache is None else cache
    run = Run(found, options, parts, place, job.progress, processes, analyses, {}, carried)
    if len(parts) > prepared.CACHED or processes.size > 1:
        return passes(run, goal, heads, said)
    drafts = run._replace(place=Memory(place.path), drafts={})
    return passes(drafts, goal, heads, said, place)


def compress_at_step(found: Collection, options: Options, step: float) -> Store:
    """A store of a collection at a given quantizer step, relative to the norm of a delta, without a target.

    Args:
      found: the collection, of one part or few.
      options: all but the target.
      step: the step of a task of weight 1.
    """
    step /= unit_scale(found.tasks, options)
    place = Memory()
    parts = parts_of(found)
    heads, carried = full_tensors(found, options.extras_dtype, place, Processes(), apart=len(parts) != 1)
    run = Run(found, options, parts, place, Progress(), Processes(), {}, {}, carried)
    weights = relative_weights(found.tasks, options)
    known: dict[str, Any] = {"deep": True, "unit": None}
    first = prepared.problem_of(run, 0, weights, known, read_part(found, parts[0]))
    known["unit"] = first.unit
    encode_parts(run, 0, run.mine, step, fit_tables(first, step), weights, known)
    return put_together(run, 0, step, heads, {})


def as_they_are(
    found: Collection,
    options: Options,
    heads: Sequence[Segment],
    carried: Sequence[Tensors],
    said: Mapping[str, Any],
) -> Store:
    """A lossless store of the adapters, see `lossless`; factors are not read before they are written."""
    tasks = range(len(found.cards))
    rows = {m: [found.raw(t, m) if found.rank(m, t) else None for t in tasks] for m in found.shapes}
    modules, errors, facts = lossless.lossless_terms(rows)
    schema, leaves = plain.to_leaves(modules)
    segment = make_segment(found.tasks, schema, leaves, errors, tensors=carried)
    report = as_report(options, found) | facts | dict(said)
    return Store((segment, *heads), found.tasks, found.sources, Static(report))


def passes(
    run: Run,
    goal: Target,
    heads: Sequence[Segment],
    said: Mapping[str, Any],
    place: Place | None = None,
) -> Store:
    """The store that meets the target; of a target of single tasks' errors the smallest of some rounds, each
    of which spends less on the tasks that the round before left below it.

    Args:
      run: the compression.
      goal: the target.
      heads: segments of full tensors.
      said: further fields of the report.
      place: of the finished segment, for a run with drafts.
    """
    weights = relative_weights(run.found.tasks, run.options)
    known = pilot.run_pilot(run, goal, weights)
    state = State(known["step"], np.array(known["frequencies"]), 0)
    best: Store | None = None
    for _ in range(ROUNDS if goal.worst else 1):
        try:
            found, state = one_round(run, goal, weights, known, state, heads, said, place)
        except search.Unmet:
            if best is None:
                raise
            # other weights of the tasks would not meet what these have met
            return best
        if best is None or codes_of(found.segments) < codes_of(best.segments):
            best = found
        if goal.worst:
            # spend less on tasks that are better than they need be
            errors = task_errors(found.errors if found.output_errors is None else found.output_errors)
            errors = errors * np.asarray(goal.worst)
            change = np.clip(np.maximum(errors, 1e-3 * goal.limit) / goal.limit, LOWEST, HIGHEST) ** DAMPING
            if np.ptp(change) < EVEN * np.mean(change):
                break
            weights = weights * change / np.mean(weights * change)
            run, goal = run._replace(cache={}), goal._replace(settling=0)
    assert best is not None
    return best


class State(NamedTuple):
    """Where a search stands.

    Attributes:
      step, frequencies: of the next pass.
      number: of the next pass.
    """

    step: float
    frequencies: np.ndarray
    number: int


def one_round(
    run: Run,
    goal: Target,
    weights: np.ndarray,
    known: Mapping[str, Any],
    state: State,
    heads: Sequence[Segment],
    said: Mapping[str, Any],
    place: Place | None,
) -> tuple[Store, State]:
    """The store of the pass that meets the target, with given weights of the tasks; each pass encodes all
    parts. Arguments are those of `passes`.

    Raises:
      Unmet: no pass meets it.
    """
    step, frequencies, first = state
    # other weights than the first ones have other forms
    pilots = None if first else known["forms"]
    aim, done, made = goal, list[Pass](), list[Store | None]()
    while True:
        chosen = search.met(done, goal)
        if chosen is not None and place is not None and run.drafts is not None:
            draft = made[chosen]
            assert draft is not None
            made[chosen] = whole = finished(run, first + chosen, draft, place)
            drafted = done[chosen]
            done[chosen] = pass_of(drafted.step, whole, goal, place)._replace(forms=drafted.forms)
            if done[chosen].miss > 0 and goal.sign < 0:
                # the estimate was too low, and will be about as low again
                short = max(done[chosen].value - drafted.value, 0) + SPARE
                aim = goal._replace(limit=goal.limit - short)
                goal = goal._replace(passes=max(goal.passes, len(done) + search.FURTHER))
            if done[chosen].miss > 0:
                # perhaps another pass still meets it
                continue
        if chosen is not None:
            break
        if done and search.hopeless(done, goal):
            raise search.unmet(done, goal, run.found.entries(), bool(run.options.weights))
        # tables and forms stay as they are in the end, so that the search sees a smooth curve
        forms = search.forms_of(done, goal, pilots)
        if done:
            step = search.next_step(done, known["slope"], goal, forms)
        number = first + len(done)
        step = encode_pass(run, number, step, frequencies, weights, known, goal, forms)
        if number < goal.settling:
            frequencies = next_frequencies(run, number)
        store, passed = outcome(run, number, step, aim, heads, said)
        done.append(passed._replace(forms=forms))
        made.append(store)
    found = made[chosen]
    assert found is not None
    return found, State(done[chosen].step, frequencies, first + len(done))


def outcome(
    run: Run, number: int, step: float, goal: Target, heads: Sequence[Segment], said: Mapping[str, Any]
) -> tuple[Store | None, Pass]:
    """The store of a pass, and its result.

    A pass over the target is not used: its result stays as a note, its segments are removed, and there is no
    store.
    """
    before = run.place.note(f"missed-{number}")
    if before is None:
        store = put_together(run, number, step, heads, said)
        found = pass_of(step, store, goal, run.place)
        if found.miss <= 0:
            return store, found
        # nothing goes before all have measured it and the note is there for those that go on
        run.processes.wait(f"measured {number}")
        if run.processes.rank == 0:
            run.place.keep_note(f"missed-{number}", found._asdict())
        run.processes.wait(f"missed {number}")
        before = found._asdict()
    for n in run.mine:
        run.place.drop(f"pass-{number}-{n}")
        if run.drafts is not None:
            run.drafts.pop(f"pass-{number}-{n}", None)
    return None, Pass(**{**before, "step": step})


def encode_pass(
    run: Run,
    number: int,
    step: float,
    frequencies: np.ndarray,
    weights: np.ndarray,
    known: Mapping[str, Any],
    goal: Target,
    forms_at: float | None,
) -> float:
    """Encode all parts; in the first pass over many of them every other one comes first, and the step of the
    rest makes up for what these miss, as the rate control of video does.

    Returns:
      The step, or the mean of both.
    """
    if number or len(run.parts) <= search.FEW_PARTS or goal.worst:
        encode_parts(run, number, run.mine, step, frequencies, weights, known, forms_at)
        run.processes.wait(f"pass {number}")
        return step
    halves = [[n for n in run.mine if n % 2 == k] for k in (0, 1)]
    encode_parts(run, number, halves[0], step, frequencies, weights, known, forms_at)
    run.processes.wait(f"half of pass {number}")
    miss, share = miss_of(run, number, range(0, len(run.parts), 2), goal, known["beside"])
    other = step
    if abs(miss) < search.CLOSE:
        aim = np.log(step) - (miss + goal.slack / 2) / (1 - share) / known["slope"]
        other = float(np.exp(np.clip(aim, *search.STEPS_LOG)))
    encode_parts(run, number, halves[1], other, frequencies, weights, known, forms_at)
    run.processes.wait(f"pass {number}")
    return float(step**share * other ** (1 - share))


def next_frequencies(run: Run, number: int) -> np.ndarray:
    """Frequencies for the next pass, from the counts of all parts."""
    notes = (kept_note(run.place, f"pass-{number}-{n}") for n in range(len(run.parts)))
    return fitted_tables(sum((np.array(x["counts"]) for x in notes), np.zeros(())))


def encode_parts(
    run: Run,
    number: int,
    chosen: Sequence[int],
    step: float,
    frequencies: np.ndarray,
    weights: np.ndarray,
    known: Mapping[str, Any],
    forms_at: float | None = None,
) -> None:
    """Encode those of the chosen parts that are not done, as many at once as this process has devices, in the
    forms of the step `forms_at`; of a run with drafts their bytes are estimated."""
    parts = run.parts
    left = [n for n in run.mine if run.place.note(f"pass-{number}-{n}") is None]
    todo = [n for n in left if n in chosen]
    total = sum(len(parts[n].modules) for n in run.mine)
    run.progress.start(total, total - sum(len(parts[n].modules) for n in left))
    told = threading.Lock()

    def one(item: tuple[int, list[Adapter]]) -> Callable[[], None]:
        n, given = item
        name = f"pass-{number}-{n}"
        problem = prepared.problem_of(run, n, weights, known, given)
        before = run.place.note(f"pass-0-{n}")
        if before is None:
            problem = settle_forms(problem, step, frequencies)
        else:
            found = frozenset(before["no_joint"])
            problem = problem._replace(no_joint=found, alone=before["alone"])
        coded = quantize_at_step(problem, step, frequencies, forms_at)
        if n not in run.cache:
            forget_filters(problem.metrics)
        return functools.partial(finish, n, name, problem, coded, given)

    def finish(n: int, name: str, problem: Problem, coded: Quantized, given: list[Adapter]) -> None:
        """Keep the part; it is measured, and its bytes made, beside the next part."""
        trial = measure(problem, coded)
        if run.drafts is None:
            segment = coded_segment(run, n, problem, trial, given)
        else:
            run.drafts[name] = Draft(problem, trial, given)
            segment = sized_segment(run, parts[n], problem, trial)
        run.place.keep(name, segment)
        run.place.keep_note(name, note_of(problem, trial, segment, [x.task for x in given]))
        with told:
            run.progress.step(len(parts[n].modules))

    def count(size: int) -> None:
        with told:
            run.progress.read(size)

    cached = all(n in run.cache for n in todo) and run.options.calibration is None
    names = {n: [Adapter(run.found.cards[t].task, {}, {}) for t in parts[n].tasks] for n in todo}
    coming = (
        (names[n] for n in todo)
        if cached
        else ahead(run.found, [parts[n] for n in todo], count, len(jax.local_devices()))
    )
    devices.spread(one, zip(todo, coming, strict=True))
