"""Navigate: a byte budget or an error target in, the best store that the collection allows out.

One number moves along the whole trade-off: the quantizer step. At a step every module takes the form that is
cheapest in squared steps (`coding.plan`), the codec quantizes and counts (`coding.codec`), and a secant
search moves the step until the real store meets the budget, or its measured error the target.
"""

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax import adapters, calibration, compression
from hydraopt_jax.adapters import Adapter, Adapters
from hydraopt_jax.codec import encode, syntax
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import estimates
from hydraopt_jax.rate_control import budget, mode_decision
from hydraopt_jax.rate_control.encode_at_step import Problem, Trial, attempt, bar, prepare, task_errors, train
from hydraopt_jax.rate_control.terms import terms_of
from hydraopt_jax.store import Payload, Store, checkpoint, extras, lossless, packing, sources_of

# share of a byte budget that may stay unused before the search stops
SLACK = 0.003
ROUNDS = 16
# about what the smallest store takes beside its codes, to start from
LEAST_OVERHEAD = 1600
# tables are trained again when the logarithm of the step has moved this far
RETRAIN = 0.4
# the finest and the coarsest step, relative to the norm of a delta
STEPS = (1e-6, 0.7)
STEPS_LOG = (float(np.log(STEPS[0])), float(np.log(STEPS[1])))


class Options(NamedTuple):
    """What to reach; exactly one of budget, max_error and max_task_error.

    Attributes:
      budget: bytes of everything on disk if an integer above 10 or text such as "3MB"; else a fraction of the
        factors' fp16 bytes, which factors and description may take: the coded full tensors beside the factors
        come on top (`extras`). A fraction of 1 or more keeps the adapters as they are, bit for bit in the
        dtype that they came in. See `budget` for the whole rule.
      max_error: largest mean relative squared error over modules and tasks.
      max_task_error: largest relative squared error of any task, the mean over its modules.
      weights: task name -> weight of its relative error, 1 where not named.
      calibration: module name -> second moment `[I, I]` of its inputs, or `[I]` for a diagonal one; errors
        are then those of the modules' outputs. With `NAME:output` -> second moment of the gradients at its
        outputs as well, what is made small is the divergence of the model's outputs (see `calibration`).
      share: whether tasks may share factors or be predicted from one another.
      extras_dtype: full tensors that are wider are rounded to it, one of `extras.DTYPES`; None keeps them.
    """

    budget: int | float | str | None = None
    max_error: float | None = None
    max_task_error: float | None = None
    weights: Mapping[str, float] = {}
    calibration: Mapping[str, np.ndarray] | None = None
    share: bool = True
    extras_dtype: str | None = None


def check_options(options: Options) -> Options:
    """The options with the budget read.

    Raises:
      HydraOptError: targets that contradict each other, that nothing can meet, or an option that would do
        nothing.
    """
    options = options._replace(budget=budget.read_budget(options.budget))
    given = {k: getattr(options, k) for k in ("budget", "max_error", "max_task_error")}
    named = [k for k, v in given.items() if v is not None]
    if len(named) != 1:
        raise HydraOptError(
            f"give exactly one of budget, max_error and max_task_error, not {', '.join(named) or 'none'}"
        )
    value: Any = given[named[0]]
    number = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
    if not number:
        raise HydraOptError(f"{named[0]} = {value!r}: give a number")
    if not np.isfinite(value) or value <= 0:
        way = (
            "give a positive number"
            if named[0] == "budget"
            else "an error of 0 is had with --budget 1 (lossless)"
        )
        raise HydraOptError(f"{named[0]} = {value}: must be positive; {way}")
    extras.check_dtype(options.extras_dtype)
    for task, weight in options.weights.items():
        if not np.isfinite(weight) or weight <= 0:
            raise HydraOptError(f"weight of {task!r} = {weight}: must be positive")
    if budget.keeps_all(value) and named == ["budget"]:
        idle = {
            "weights": options.weights,
            "calibration": options.calibration is not None,
            "alone": not options.share,
        }
        for name in (k for k, v in idle.items() if v):
            raise HydraOptError(
                f"{name}: does nothing under a budget of {value:g}, which keeps the adapters as they are: "
                "leave one of them out"
            )
    return options


def task_weights(tasks: Sequence[str], options: Options) -> np.ndarray:
    """Weights `[T]` with a mean of 1."""
    unknown = set(options.weights) - set(tasks)
    if unknown:
        raise HydraOptError(f"weights name {min(unknown)!r}, which is none of the tasks {', '.join(tasks)}")
    weights = np.array([float(options.weights.get(t, 1.0)) for t in tasks])
    return weights / weights.mean()


def search(
    problem: Problem,
    goal: Callable[[Trial], float],
    sign: float,
    start: float,
    progress: Callable[[int], None],
) -> tuple[Trial | None, Trial]:
    """Find the step whose trial has `goal(trial)` just at or below 0, by a bracketed secant in the
    logarithm of the step.

    Args:
      problem: the collection.
      goal: log of a quantity over its target: not above 0 where the target is met.
      sign: -1 where a larger step lowers the quantity (bytes), +1 where it raises it (error).
      start: first step.
      progress: called once a round.

    Returns:
      The best trial that meets the target, or None; and the last trial.
    """
    x, best = float(np.log(start)), None
    # the finest and the coarsest step still open, and how far each end missed, once it was tried
    open_ends: list[tuple[float, float | None]] = [(STEPS_LOG[0], None), (STEPS_LOG[1], None)]
    ends = list(open_ends)
    seen: tuple[float, float] | None = None
    trained = x
    frequencies = train(problem, float(np.exp(x)))
    for _ in range(ROUNDS):
        # tables stay as they are near a step, so that the search sees a smooth curve
        if abs(x - trained) > RETRAIN:
            trained, frequencies = x, train(problem, float(np.exp(x)))
            ends, seen = list(open_ends), None
        trial = attempt(problem, float(np.exp(x)), frequencies)
        progress(1)
        miss = goal(trial)
        if miss <= 0 and (best is None or miss >= goal(best)):
            best = trial
        if -SLACK < miss <= 0:
            break
        ends[int(miss * sign > 0)] = (x, miss)
        (low, miss_low), (high, miss_high) = ends
        if high - low < 1e-4:
            break
        slope = 0.8 * sign if sign < 0 else 1.5
        if seen and seen[0] != x:
            slope = sign * float(np.clip(sign * (miss - seen[1]) / (x - seen[0]), 0.05, 5.0))
        seen, x = (x, miss), x - (miss + SLACK / 2) / slope
        if not low < x < high and miss_low is not None and miss_high is not None:
            x = low + (high - low) * (miss_low + SLACK / 2) / (miss_low - miss_high)
        x = float(np.clip(x, low + 0.01 * (high - low), high - 0.01 * (high - low)))
    return best, trial


def first_step(problem: Problem, budget: float) -> float:
    """The step whose Gaussian estimate takes the budget."""
    low, high = STEPS_LOG
    for _ in range(14):
        middle = (low + high) / 2
        size = sum(float(mode_decision.plan(x, float(np.exp(middle))).bytes.sum()) for x in problem.spectra)
        low, high = (middle, high) if size > budget else (low, middle)
    return float(np.exp(high))


def to_store(
    collection: Sequence[Adapter], problem: Problem, trial: Trial, options: Options, entries: int
) -> Store:
    """The trial in bytes, as a store; its factors are what those bytes decode to."""
    leaves, decoded = encode.serialize_and_decode(trial.coded, trial.gains)
    shapes = trial.coded.shapes
    modules = terms_of(decoded, shapes, range(len(collection)))
    report = describe(collection, problem, trial, options, entries)
    if not problem.metrics:
        found = expected(problem, np.array([sum(map(len, leaves.values()))]))
        report["estimate"] = {k: float(f"{v[0]:.6g}") for k, v in found.items()}
    payload = Payload(leaves, shapes)
    tasks = tuple(x.task for x in collection)
    kept = Store(tasks, modules, sources_of(collection), report, trial.errors, payload)
    if not problem.metrics:
        return kept
    return kept._replace(errors=compression.error_table(kept, collection), output_errors=trial.errors)


def describe(
    collection: Sequence[Adapter], problem: Problem, trial: Trial, options: Options, entries: int
) -> dict[str, Any]:
    """The report of a coded store."""
    tasks = [x.task for x in collection]
    forms: dict[str, int] = {}
    for choice in trial.choices.values():
        forms[label(choice, tasks)] = forms.get(label(choice, tasks), 0) + 1
    step = float(f"{trial.step:.6g}")
    bound = {"eigen-tail": float(f"{eigen_tail(problem, trial):.6g}")}
    return account(options, entries) | {"form": "coded", "step": step, "forms": forms, "bound": bound}


def eigen_tail(problem: Problem, trial: Trial) -> float:
    """Mean relative energy beyond as many directions as each task keeps: no factors of these ranks lose less
    (Eckart and Young 1936)."""
    coded, tails = trial.coded, []
    for t in range(problem.weights.shape[1]):
        kept: dict[str, int] = {}
        for (name, _), live in syntax.live_directions(coded.shapes, coded.pieces, coded.contexts, t).items():
            kept[name] = kept.get(name, 0) + int(live.sum())
        for x in problem.spectra:
            for m in np.flatnonzero(x.norms[:, t] > 0):
                energy = np.asarray(x.deltas.s[m, t], np.float64) ** 2
                tails.append(energy[kept.get(x.modules[m], 0) :].sum() / energy.sum())
    return float(np.mean(tails)) if tails else 0.0


def expected(problem: Problem, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """`estimates.estimates` of the collection at numbers of bytes `[P]`: mean relative squared errors."""
    return estimates.estimates([x.deltas for x in problem.spectra], sizes)


def account(options: Options, entries: int) -> dict[str, Any]:
    """What was asked for, JSON-able."""
    asked = {k: v for k, v in options._asdict().items() if k not in ("weights", "calibration")}
    asked |= {"weights": dict(options.weights), "calibrated": options.calibration is not None}
    known = {} if options.calibration is None else {"calibration": calibration.digest(options.calibration)}
    return {"options": asked, "entries": entries, "bound": {}, **known}


def label(choice: mode_decision.Choice, tasks: Sequence[str]) -> str:
    """A form in words."""
    if choice.form == "separate":
        return "separate" if choice.reference < 0 else f"separate, predicted from {tasks[choice.reference]}"
    if choice.form == "joint":
        return "joint basis"
    return f"hydra, {choice.side} shared, {choice.heads} heads"


def budget_bytes(options: Options, entries: int, heads: int) -> int:
    """The budget in bytes on disk, of everything; `heads` is what the coded full tensors take."""
    given = budget.read_budget(options.budget)
    assert given is not None
    return given if isinstance(given, int) else int(given * 2 * entries) + heads


def heads_of(collection: Sequence[Adapter]) -> int:
    """Bytes of the full tensors beside the factors, coded."""
    return sum(extras.coded(x.extras).nbytes for x in collection)


def setup(collection: Sequence[Adapter], options: Options) -> Problem:
    """Decompose and compare a collection, once for many budgets."""
    inputs = adapters.stack(collection)
    order = tuple(adapters.check(collection))
    weights = task_weights(inputs.tasks, options)
    return prepare(inputs, order, weights, options.calibration, options.share)


def compress(
    collection: Sequence[Adapter],
    options: Options,
    *,
    problem: Problem | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Store:
    """Compress adapters to a byte budget or an error target.

    Args:
      collection: adapters of one base model.
      options: what to reach.
      problem: what `setup` made of the same collection and options; None to make it.
      progress: called with 1 after each round of the search; there are at most `ROUNDS`.

    Returns:
      Store whose size on disk, metadata included, meets the budget, or whose measured error the target.

    Raises:
      HydraOptError: bad adapters or options, or a target that cannot be met (it says what can).
    """
    options = check_options(options)
    collection = extras.carried(collection, options.extras_dtype, options.budget)  # type: ignore[arg-type]
    if budget.keeps_all(options.budget):  # type: ignore[arg-type]
        return as_they_are(collection, options)
    inputs = adapters.stack(collection)
    if options.budget is None:
        problem = problem or setup(collection, options)
        return to_error(collection, inputs, problem, options, progress)
    limit = budget_bytes(options, inputs.size, heads_of(collection))
    if least_lossless(collection) <= limit:
        kept = as_they_are(collection, options)
        if checkpoint.measure_size(kept) <= limit:
            return kept
    problem = problem or setup(collection, options)
    return to_budget(collection, problem, options, inputs.size, limit, progress)


def to_budget(
    collection: Sequence[Adapter],
    problem: Problem,
    options: Options,
    entries: int,
    limit: int,
    progress: Callable[[int], None],
) -> Store:
    """The best store of at most `limit` bytes on disk."""
    heads = heads_of(collection)
    room = limit - heads
    start = first_step(problem, max(room - LEAST_OVERHEAD, room // 2))
    problem = bar(problem, start)
    # the estimate of the coded bytes is good to a few in ten thousand
    spare = 16 + room // 4096
    beside = overhead(collection, problem, options, entries)
    for _ in range(6):
        goal = lambda x, spare=spare: float(  # noqa: E731
            np.log((x.bytes + beside(x)) / max(room - spare, 1))
        )
        best, _ = search(problem, goal, -1.0, start, progress)
        if best is None:
            break
        kept = to_store(collection, problem, best, options, entries)
        size = checkpoint.measure_size(kept)
        if size <= limit:
            return kept
        spare, start = spare + 2 * (size - limit) + room // 2048, best.step
    step = STEPS[1]
    least = to_store(collection, problem, attempt(problem, step, train(problem, step)), options, entries)
    size = checkpoint.measure_size(least)
    if size > limit:
        more = f" and {heads:,} bytes of full tensors" if heads else ""
        raise HydraOptError(
            f"budget of {limit:,} bytes: below the smallest store of this collection, {size:,} bytes "
            f"({(size - heads) / (2 * entries):.4f} of the factors' fp16 bytes{more}), of mean error "
            f"{np.nanmean(least.errors):.3f}"
        )
    return least


def overhead(
    collection: Sequence[Adapter], problem: Problem, options: Options, entries: int
) -> Callable[[Trial], int]:
    """Bytes on disk beside coded factors and full tensors: what a store of zeros in their place takes.

    Measured once, by writing one; later trials differ in the size of their index, which is counted.
    """
    collection = [x._replace(extras=extras.blank(extras.coded(x.extras))) for x in collection]
    known: list[int] = []

    def of(trial: Trial) -> int:
        leaves = dict.fromkeys({*trial.coded.leaves, *(f"task_{t}" for t in trial.gains)}, b"\x00")
        # zeros in place of the codes, which cost next to nothing: large stores have more files
        leaves["shared"] = bytes(int(trial.bytes))
        payload = Payload(leaves, trial.coded.shapes)
        report = describe(collection, problem, trial, options, entries)
        tasks = tuple(x.task for x in collection)
        outputs = trial.errors if problem.metrics else None
        empty = Store(tasks, {}, sources_of(collection), report, trial.errors, payload, outputs)
        index = packing.index_size(packing.pack(empty)[1])
        if not known:
            known.append(checkpoint.measure_size(empty) - len(leaves) - index)
        return known[0] + index

    return of


def as_they_are(collection: Sequence[Adapter], options: Options) -> Store:
    """The adapters as they came, see `lossless`."""
    modules, errors, said = lossless.keep(collection)
    report = account(options, entries_of(collection)) | said
    return Store(tuple(x.task for x in collection), modules, sources_of(collection), report, errors)


def entries_of(collection: Sequence[Adapter]) -> int:
    """How many numbers the factors hold."""
    return sum(x.a[n].size + x.b[n].size for x in collection for n in x.a)


def least_lossless(collection: Sequence[Adapter]) -> int:
    """Bytes that the factors have in the dtype of their adapters, at least."""
    return sum(np.dtype(x.dtype).itemsize * (x.a[n].size + x.b[n].size) for x in collection for n in x.a)


def to_error(
    collection: Sequence[Adapter],
    inputs: Adapters,
    problem: Problem,
    options: Options,
    progress: Callable[[int], None],
) -> Store:
    """The smallest store that meets an error target."""
    worst = options.max_task_error is not None
    target = float(options.max_task_error if worst else options.max_error)  # type: ignore[arg-type]
    weights = task_weights(inputs.tasks, options)
    start = float(np.sqrt(target)) * 0.2
    problem = bar(problem, start)
    for _ in range(3 if worst else 1):
        goal = lambda x: float(np.log(max(value(x, worst), 1e-30) / target))  # noqa: E731
        best, last = search(problem, goal, 1.0, start, progress)
        if best is None:
            raise HydraOptError(
                f"error target {target:g} cannot be met: the least error at the finest step is "
                f"{value(last, worst):.3g}; "
                "--budget 1 keeps the adapters as they are"
            )
        if not worst:
            break
        # spend less on tasks that are better than they need be
        spread = np.maximum(task_errors(best.errors), 1e-3 * target) / target
        change = np.clip(spread, 0.1, 10.0) ** 0.9
        weights = weights * change / np.mean(weights * change)
        again = prepare(inputs, problem.order, weights, options.calibration, options.share)
        problem = again._replace(barred=problem.barred)
    assert best is not None
    return to_store(collection, problem, best, options, inputs.size)


def value(trial: Trial, worst: bool) -> float:
    """Worst task's error, or the mean over modules and tasks."""
    return float(task_errors(trial.errors).max()) if worst else float(np.nanmean(trial.errors))
