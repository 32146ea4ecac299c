"""Navigate: a byte budget or an error target in, the best store that the collection allows out.

One number moves along the whole trade-off: the quantiser step. At a step every module takes the form that is
cheapest in squared steps (`coding.plan`), the codec quantises and counts (`coding.codec`), and a secant search moves
the step until the real store meets the budget, or its measured error the target.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from hydraopt_jax import adapters, algebra, checkpoint
from hydraopt_jax.adapters import Adapter, Adapters
from hydraopt_jax.coding import classes, codec, plan
from hydraopt_jax.coding.codec import Coded
from hydraopt_jax.coding.plan import Spectrum
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import Factors
from hydraopt_jax.store import Payload, Source, Store

# share of a byte budget that may stay unused before the search stops
SLACK = 0.003
ROUNDS = 7
# the finest and the coarsest step, relative to the norm of a delta
STEPS = (1e-6, 0.7)
# below this mean error the store is called lossless: it is the rounding of float32 factors
LOSSLESS = 1e-12


class Options(NamedTuple):
    """What to reach; exactly one of budget, max_error and max_task_error.

    Attributes:
      budget: bytes on disk if an int, a fraction of the factors' fp16 bytes if a float (full tensors that
        tasks carry beside their factors are kept verbatim and come on top of a fraction).
      max_error: largest mean relative squared error over modules and tasks.
      max_task_error: largest relative squared error of any task, the mean over its modules.
      weights: task name -> weight of its relative error, 1 where not named.
      calibration: module name -> second moment `[I, I]` of its inputs, or `[I]` for a diagonal one; errors
        are then those of the modules' outputs.
      share: whether tasks may share factors or be predicted from one another.
    """

    budget: int | float | None = None
    max_error: float | None = None
    max_task_error: float | None = None
    weights: Mapping[str, float] = {}
    calibration: Mapping[str, np.ndarray] | None = None
    share: bool = True


def check_options(options: Options) -> None:
    """Refuse targets that contradict each other or that nothing can meet."""
    given = {k: getattr(options, k) for k in ("budget", "max_error", "max_task_error")}
    named = [k for k, v in given.items() if v is not None]
    if len(named) != 1:
        raise HydraOptError(
            f"give exactly one of budget, max_error and max_task_error, not {', '.join(named) or 'none'}"
        )
    value = given[named[0]]
    if not np.isfinite(value) or value <= 0:
        way = (
            "give a positive number"
            if named[0] == "budget"
            else "an error of 0 is had with --budget 1 (lossless)"
        )
        raise HydraOptError(f"{named[0]} = {value}: must be positive; {way}")
    for task, weight in options.weights.items():
        if not np.isfinite(weight) or weight <= 0:
            raise HydraOptError(f"weight of {task!r} = {weight}: must be positive")


class Metric(NamedTuple):
    """The second moment of a module's inputs, `C = L @ L.T` scaled to a mean of 1, as two factors.

    Attributes:
      forward: `[I, I]`, `L.T`: what turns `a` into the coordinates where errors are those of the output.
      back: `[I, I]`, the inverse of `L.T`.
    """

    forward: np.ndarray
    back: np.ndarray


class Problem(NamedTuple):
    """A collection made ready to be coded at any step.

    Attributes:
      spectra: one a bucket.
      metrics: module -> its metric; empty without calibration.
      order: module names in the collection's order.
      weights: `[T]`.
    """

    spectra: tuple[Spectrum, ...]
    metrics: Mapping[str, Metric]
    order: tuple[str, ...]
    weights: np.ndarray


class Trial(NamedTuple):
    """The collection coded at one step.

    Attributes:
      step: the quantiser step.
      coded: its codes.
      gains: task -> gains in the codec's order, as they will be read.
      errors: `[M, T]` relative squared errors, NaN where absent.
      bytes: estimate of its payload.
      choices: form of each module.
    """

    step: float
    coded: Coded
    gains: dict[int, list[np.ndarray]]
    errors: np.ndarray
    bytes: float
    choices: dict[str, plan.Choice]


def metric(moment: np.ndarray, name: str, inputs: int) -> Metric:
    """The metric of a second moment; a small ridge keeps directions never seen from being free."""
    moment = np.asarray(moment, np.float64)
    moment = np.diag(moment) if moment.ndim == 1 else moment
    if moment.shape != (inputs, inputs):
        raise HydraOptError(
            f"calibration: {name} has shape {list(moment.shape)}, its module needs {[inputs, inputs]}"
        )
    if not np.isfinite(moment).all() or not np.trace(moment) > 0:
        raise HydraOptError(f"calibration: {name} is not a second moment (NaN, infinite or zero)")
    values, vectors = np.linalg.eigh((moment + moment.T) / 2 * inputs / np.trace(moment))
    root = np.sqrt(np.maximum(values, 0) + 1e-3)
    return Metric(((vectors * root) @ vectors.T).T, (vectors / root) @ vectors.T)


def task_weights(tasks: Sequence[str], options: Options) -> np.ndarray:
    """Weights `[T]` with a mean of 1."""
    unknown = set(options.weights) - set(tasks)
    if unknown:
        raise HydraOptError(f"weights name {min(unknown)!r}, which is none of the tasks {', '.join(tasks)}")
    weights = np.array([float(options.weights.get(t, 1.0)) for t in tasks])
    return weights / weights.mean()


def prepare(inputs: Adapters, order: Sequence[str], options: Options, weights: np.ndarray) -> Problem:
    """Decompose and compare a collection once, for any step."""
    metrics: dict[str, Metric] = {}
    if options.calibration is not None:
        missing = [n for n in order if n not in options.calibration]
        if missing:
            raise HydraOptError(f"calibration: {missing[0]} is missing (and {len(missing) - 1} more modules)")
        for bucket in inputs.buckets:
            for n in bucket.modules:
                metrics[n] = metric(options.calibration[n], n, bucket.a.shape[2])
    spectra = []
    for bucket in inputs.buckets:
        a = bucket.a
        if metrics:
            forward = np.stack([metrics[n].forward for n in bucket.modules]).astype(np.float32)
            a = np.einsum("mij,mtjr->mtir", forward, a)
        deltas = algebra.batched_svd(jnp.asarray(a), jnp.asarray(bucket.b))
        spectra.append(plan.spectrum(bucket.modules, deltas, weights, share=options.share))
    return Problem(tuple(spectra), metrics, tuple(order), weights)


def solve_gains(
    terms: Sequence[Factors], live: np.ndarray, deltas: algebra.Svd, forward: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gains of least error for given decoded factors of one module, all tasks, all terms jointly.

    Args:
      terms: decoded factors in steps.
      live: `[T, S]` directions that each task has, terms side by side.
      deltas: relative decompositions, `u: [T, I, R]`.
      forward: metric of the inputs, or None.

    Returns:
      Gains `[T, S]`, and the quadratic form of the error, `gram: [T, S, S]` and `cross: [T, S]`.
    """
    a = np.concatenate([np.asarray(x.a, np.float64)[np.maximum(x.a_of, 0)] for x in terms], 2)
    b = np.concatenate([np.asarray(x.b, np.float64)[np.maximum(x.b_of, 0)] for x in terms], 1)
    if forward is not None:
        a = forward @ a
    a, b = a * live[:, None, :], b * live[:, :, None]
    gram = (a.swapaxes(1, 2) @ a) * (b @ b.swapaxes(1, 2))
    left = a.swapaxes(1, 2) @ (deltas.u * deltas.s[:, None, :])
    cross = np.einsum("tsr,trs->ts", left, deltas.v @ b.swapaxes(1, 2))
    diagonal = np.einsum("tss->ts", gram)
    ridge = np.where(live, 1e-9 * diagonal, 1.0) + np.where(diagonal > 0, 0.0, 1.0)
    system = gram + ridge[:, :, None] * np.eye(gram.shape[1])
    return np.linalg.solve(system, cross[..., None])[..., 0] * live, gram, cross


def attempt(problem: Problem, step: float, frequencies: np.ndarray) -> Trial:
    """Code the collection at one step and measure it."""
    goals: dict[str, Any] = {}
    choices: dict[str, plan.Choice] = {}
    for x in problem.spectra:
        chosen = plan.plan(x, step)
        for name, terms in plan.targets(x, chosen, step).items():
            goals[name] = tuple(
                t._replace(a=(problem.metrics[name].back @ t.a).astype(np.float32)) if problem.metrics else t
                for t in terms
            )
        choices |= dict(zip(x.modules, chosen.choices, strict=True))
    coded = codec.quantise({n: goals[n] for n in problem.order}, frequencies)
    gains, errors = measure(problem, coded)
    size = codec.sizes(coded, gains)
    return Trial(step, coded, gains, errors, size, choices)


def measure(problem: Problem, coded: Coded) -> tuple[dict[int, list[np.ndarray]], np.ndarray]:
    """Gains as they will be read, and the errors that they leave, `[M, T]`."""
    tasks = len(problem.weights)
    decoded = codec.factors(coded)
    live = [codec.live_directions(coded.shapes, coded.pieces, coded.index, t) for t in range(tasks)]
    place = {n: (x, m) for x in problem.spectra for m, n in enumerate(x.modules)}
    solved: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = {}
    for name in problem.order:
        x, m = place[name]
        if not decoded[name]:
            continue
        mask = np.stack(
            [
                np.concatenate(
                    [live[t].get((name, k), np.zeros(y.rank, bool)) for k, y in enumerate(coded.shapes[name])]
                )
                for t in range(tasks)
            ]
        )
        deltas = algebra.Svd(*(np.asarray(y[m], np.float64) for y in x.deltas))  # type: ignore[arg-type]
        forward = problem.metrics[name].forward if problem.metrics else None
        solved[name] = (*solve_gains(decoded[name], mask, deltas, forward), mask)
    gains: dict[int, list[np.ndarray]] = {}
    for t in range(tasks):
        rows = []
        for name, k in live[t]:
            x, m = place[name]
            start = sum(y.rank for y in coded.shapes[name][:k])
            mine = solved[name][0][t, start : start + coded.shapes[name][k].rank]
            rows.append(mine[live[t][name, k]] * x.scales[m, t])
        gains[t] = codec.round_gains(rows)
    errors = np.full((len(problem.order), tasks), np.nan)
    readers = {t: iter(gains[t]) for t in range(tasks)}
    for row, name in enumerate(problem.order):
        x, m = place[name]
        for t in range(tasks):
            if x.norms[m, t] == 0:
                errors[row, t] = 0.0 if name in solved and (name, 0) in live[t] else np.nan
                continue
            energy = float((np.asarray(x.deltas.s[m, t], np.float64) ** 2).sum())
            if name in solved:
                _, gram, cross, mask = solved[name]
                g = np.zeros(mask.shape[1])
                g[mask[t]] = (
                    np.concatenate(
                        [next(readers[t]) for k in range(len(coded.shapes[name])) if (name, k) in live[t]]
                    )
                    / x.scales[m, t]
                )
                left = energy - 2 * g @ cross[t] + g @ gram[t] @ g
            else:
                left = energy
            errors[row, t] = max(left, 0.0) / problem.weights[t]
    return gains, errors


def task_errors(errors: np.ndarray) -> np.ndarray:
    """Mean over the modules that a task has, `[M, T] -> [T]`; 0 for a task with none."""
    present = ~np.isnan(errors)
    return np.where(present, errors, 0.0).sum(0) / np.maximum(present.sum(0), 1)


def learn(coded: Coded | None) -> np.ndarray:
    """Frequencies that the next quantisation decides with: counts over a weak Gaussian prior."""
    prior = classes.gaussian()
    prior = prior / prior.sum(-1, keepdims=True)
    return prior if coded is None else coded.counts + 8 * prior


def search(
    problem: Problem,
    goal: Callable[[Trial], float],
    sign: float,
    start: float,
    progress: Callable[[int], None],
) -> tuple[Trial | None, Trial]:
    """Find the step whose trial has `goal(trial)` just at or below 0, by a bracketed secant in the logarithm.

    Args:
      problem: the collection.
      goal: log of a quantity over its target: not above 0 where the target is met.
      sign: -1 where a larger step lowers the quantity (bytes), +1 where it raises it (error).
      start: first step.
      progress: called once a round.

    Returns:
      The best trial that meets the target, or None; and the last trial.
    """
    x, best, frequencies = np.log(start), None, learn(None)
    seen: list[tuple[float, float]] = []
    bounds = [np.log(STEPS[0]), np.log(STEPS[1])]
    trial = attempt(problem, float(np.exp(x)), frequencies)
    for _ in range(ROUNDS):
        # the first tables are a guess: the second pass at a step decides
        trial = attempt(problem, float(np.exp(x)), learn(trial.coded))
        progress(1)
        miss = goal(trial)
        if miss <= 0 and (best is None or miss >= goal(best)):
            best = trial
        if -SLACK < miss <= 0:
            break
        seen.append((x, miss))
        if miss * sign > 0:
            bounds[1] = min(bounds[1], x)
        else:
            bounds[0] = max(bounds[0], x)
        slope = 0.8 * sign if sign < 0 else 1.5
        if len(seen) > 1 and abs(seen[-1][0] - seen[-2][0]) > 1e-6:
            found = (seen[-1][1] - seen[-2][1]) / (seen[-1][0] - seen[-2][0])
            slope = sign * np.clip(sign * found, 0.3, 3.0)
        x = float(np.clip(x - (miss + SLACK / 2) / slope, *STEPS_LOG))
        if not bounds[0] < x < bounds[1]:
            x = (bounds[0] + bounds[1]) / 2
        if bounds[1] - bounds[0] < 1e-4:
            break
    return best, trial


STEPS_LOG = (float(np.log(STEPS[0])), float(np.log(STEPS[1])))


def first_step(problem: Problem, budget: float) -> float:
    """The step whose Gaussian estimate takes the budget."""
    low, high = STEPS_LOG
    for _ in range(14):
        middle = (low + high) / 2
        size = sum(float(plan.plan(x, float(np.exp(middle))).bytes.sum()) for x in problem.spectra)
        low, high = (middle, high) if size > budget else (low, middle)
    return float(np.exp(high))


def to_store(
    collection: Sequence[Adapter], problem: Problem, trial: Trial, options: Options, entries: int
) -> Store:
    """The trial in bytes, as a store; its factors are what those bytes decode to."""
    leaves = codec.serialise(trial.coded, trial.gains)
    shapes = trial.coded.shapes
    modules = codec.deserialise(leaves, shapes, range(len(collection)))
    forms: dict[str, list[str]] = {}
    for name in problem.order:
        forms.setdefault(label(trial.choices[name], [x.task for x in collection]), []).append(name)
    report = {
        "form": "coded",
        "options": {
            "budget": options.budget,
            "max_error": options.max_error,
            "max_task_error": options.max_task_error,
            "weights": dict(options.weights),
            "calibrated": options.calibration is not None,
            "share": options.share,
        },
        "entries": entries,
        "step": float(f"{trial.step:.6g}"),
        "forms": {k: len(v) for k, v in forms.items()},
        "bound": {},
    }
    sources = tuple(Source(x.dtype, x.config, x.layout, x.source, x.digest, x.extras) for x in collection)
    return Store(
        tuple(x.task for x in collection), modules, sources, report, trial.errors, Payload(leaves, shapes)
    )


def label(choice: plan.Choice, tasks: Sequence[str]) -> str:
    """A form in words."""
    if choice.form == "separate":
        return "separate" if choice.reference < 0 else f"separate, predicted from {tasks[choice.reference]}"
    return f"hydra, {choice.side} shared, {choice.heads} heads"


def budget_bytes(options: Options, entries: int, extras: int) -> int:
    """The budget in bytes on disk."""
    budget = options.budget
    assert budget is not None
    return int(budget) if isinstance(budget, int) else int(budget * 2 * entries) + extras


def compress(
    collection: Sequence[Adapter],
    options: Options,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Store:
    """Compress adapters to a byte budget or an error target.

    Args:
      collection: adapters of one base model.
      options: what to reach.
      progress: called with 1 after each round of the search; there are at most `ROUNDS`.

    Returns:
      Store whose size on disk, metadata included, meets the budget, or whose measured error the target.

    Raises:
      HydraOptError: bad adapters or options, or a target that cannot be met (it says what can).
    """
    check_options(options)
    inputs = adapters.stack(collection)
    order = tuple(adapters.check(collection))
    extras = sum(int(v.nbytes) for x in collection for v in x.extras.values())
    problem = prepare(inputs, order, options, task_weights(inputs.tasks, options))
    if options.budget is None:
        return to_error(collection, inputs, problem, options, progress)
    limit = budget_bytes(options, inputs.size, extras)
    overhead = 4000.0 + extras
    for _ in range(4):
        room = limit - overhead
        if room <= 0:
            raise_too_small(collection, problem, options, inputs.size, limit)
        goal = lambda x, room=room: float(np.log(x.bytes / room))  # noqa: E731
        best, last = search(problem, goal, -1.0, first_step(problem, room), progress)
        if best is None:
            raise_too_small(collection, problem, options, inputs.size, limit)
            raise AssertionError
        result = to_store(collection, problem, best, options, inputs.size)
        size = checkpoint.measure_size(result)
        if size <= limit:
            if size > (1 - 4 * SLACK) * limit or best.step <= STEPS[0] * 1.01:
                return result
        overhead = size - best.bytes + 0.0005 * limit
    return result


def raise_too_small(
    collection: Sequence[Adapter], problem: Problem, options: Options, entries: int, limit: int
) -> None:
    """Say what the smallest store takes."""
    least = attempt(problem, STEPS[1], learn(None))
    size = checkpoint.measure_size(to_store(collection, problem, least, options, entries))
    raise HydraOptError(
        f"budget of {limit:,} bytes: below the smallest store of this collection, {size:,} bytes "
        f"({size / (2 * entries):.4f} of the fp16 bytes) at a mean error of {np.nanmean(least.errors):.3f}"
    )


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
    for _ in range(3 if worst else 1):
        goal = lambda x: float(np.log(max(value(x, worst), 1e-30) / target))  # noqa: E731
        best, last = search(problem, goal, 1.0, float(np.sqrt(target)) * 0.2, progress)
        if best is None:
            raise HydraOptError(
                f"error target {target:g} cannot be met: the least error at the finest step is {value(last, worst):.3g}; "
                "--budget 1 keeps the adapters as they are"
            )
        if not worst:
            break
        # spend less on tasks that are better than they need be
        spread = np.maximum(task_errors(best.errors), 1e-3 * target) / target
        change = np.clip(spread, 0.1, 10.0) ** 0.9
        weights = problem.weights * change
        problem = prepare(inputs, problem.order, options, weights / weights.mean())
    assert best is not None
    return to_store(collection, problem, best, options, inputs.size)


def value(trial: Trial, worst: bool) -> float:
    """Worst task's error, or the mean over modules and tasks."""
    return float(task_errors(trial.errors).max()) if worst else float(np.nanmean(trial.errors))
