"""Search for the quantizer step that meets a target: first on a sample, then corrected after each pass."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hydraopt_jax.codec.encode import MULTIPLIER
from hydraopt_jax.collection import Collection
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.rate_control import budget, mode_decision
from hydraopt_jax.rate_control.coding import Trial, encode_at_step, fit_tables, fitted_tables
from hydraopt_jax.rate_control.metrics import have_filters
from hydraopt_jax.rate_control.options import Options, weights_of
from hydraopt_jax.rate_control.problem import Problem
from hydraopt_jax.store.store import task_errors

# fraction of a target that may stay unused: for up to FEW_PARTS parts, where noise is shaped, for more parts
SLACK, SHAPED_SLACK, WIDE_SLACK, FEW_PARTS = 0.002, 0.005, 0.01, 4
# bytes of a budget that may stay unused in any case: small stores grow in jumps
GRAIN = 16
# upper limit of passes over the collection, and of further passes where a store in bytes was larger than its
# draft
PASSES, FURTHER = 12, 6
# upper limit of trials on the sample, and their tolerance: the sample differs from the whole
TRIALS, NEAR = 8, 0.01
# log of the bytes that a pass with tables of the pass before saves over one with those of the sample, about
SETTLED_BYTES = 0.0012
# approximate bytes of the smallest store beside its codes, and of each segment
LEAST_OVERHEAD, SEGMENT_OVERHEAD = 700, 1200
# the finest and the coarsest step, relative to the norm of a delta
STEPS = (1e-6, 0.7)
STEPS_LOG = (float(np.log(STEPS[0])), float(np.log(STEPS[1])))
# slopes of log bytes (-1) and log error (+1) over the log of the step: limits of estimates; the change of the
# step for an estimate; limits of a secant between passes over the estimate
SLOPES = {-1.0: (0.05, 3.0), 1.0: (0.2, 4.0)}
CHANGE = 0.1
BELIEVED = (0.4, 1.6)
# estimates of the first step, and how near they are to come to the target, in logarithms
ESTIMATES, NEAR_ESTIMATE = 14, 0.002
# later passes keep the forms of a pass whose log miss is below CLOSE, or between which and a pass on the
# other side of the target the curve jumps; steps within NARROW (log) are taken for one
CLOSE, NARROW = 0.03, 0.02
# passes of an error target after which the slack doubles with each
PATIENT = 6
# limits of the next step between two passes; and the distance of two steps, over the slack, at which the
# curve is taken to jump between them
INSIDE, TIGHT = (0.15, 0.85), 1.0


class Unmet(HydraOptError):
    """The error for a target that no pass meets."""


class Target(NamedTuple):
    """The target of a search.

    Attributes:
      sign: -1 for bytes, which fall with the step; +1 for the error, which rises.
      limit: bytes on disk without the full tensors, or relative squared error.
      heads: bytes of the full tensors, not included in the limit.
      worst: what the tasks' errors are multiplied by before the largest is bounded; empty if the mean is.
      slack: fraction of the limit that may stay unused.
      settling: number of first passes that only provide tables.
      passes: number of passes after which the best one that meets the target is taken.
    """

    sign: float
    limit: float
    heads: int = 0
    worst: tuple[float, ...] = ()
    slack: float = SLACK
    settling: int = 1
    passes: int = PASSES


class Pass(NamedTuple):
    """Result of one pass over the collection.

    Attributes:
      step: the quantizer step.
      miss: log of result over target: bytes of the codes over the bytes left for them, or error over limit.
      value: the result: bytes without the full tensors, or the error.
      forms: the step that forms were chosen for; None for `step`.
      error: mean over modules and tasks.
      empty: whether nothing of any delta was kept, which meets no budget.
    """

    step: float
    miss: float
    value: float
    forms: float | None = None
    error: float = float("nan")
    empty: bool = False


def target_of(found: Collection, options: Options, heads: int, parts: int = 1) -> Target:
    """The target of the options, in bytes or in error; `heads` are the bytes of the full tensors.

    Raises:
      HydraOptError: a budget that suffices for lossless storage.
    """
    narrow = SHAPED_SLACK if have_filters(found.shapes, options.calibration) else SLACK
    slack, settling = (narrow, 1) if parts <= FEW_PARTS else (WIDE_SLACK, 0)
    if options.max_task_error is not None:
        weights = weights_of(found.tasks, options)
        worst = tuple((weights / weights.min()).tolist())
        return Target(1.0, options.max_task_error, heads, worst, slack, settling)
    if options.max_error is not None:
        return Target(1.0, options.max_error, heads, (), slack, settling)
    given = budget.read_budget(options.budget)
    assert given is not None
    limit = given if isinstance(given, int) else max(int(given * 2 * found.entries()), 1) + heads
    slack = max(slack, GRAIN / max(limit - heads, GRAIN))
    return Target(-1.0, limit - heads, heads, (), slack, settling)


def least_lossless(found: Collection) -> int:
    """A lower bound of the factors' bytes in the dtypes of the adapters."""
    return sum(
        np.dtype(x.dtype).itemsize * e.rank * (e.inputs + e.outputs)
        for x in found.cards
        for e in x.modules.values()
    )


def value(errors: np.ndarray, worst: Sequence[float]) -> float:
    """The largest of the tasks' errors times `worst`, see `Target`, or the mean over modules and tasks, of
    errors `[M, T]`."""
    if np.isnan(errors).all():
        # nothing can be lost of adapters that are zero
        return 0.0
    return float(np.nanmax(np.asarray(worst) * task_errors(errors))) if worst else float(np.nanmean(errors))


class Found(NamedTuple):
    """The result of a search on a sample.

    Attributes:
      step: approximately meets the target.
      slope: of the log of the bounded quantity over the log of the step.
      frequencies: `[COUNT, 2, SYMBOLS]`, the rate model of the quantizer.
      last: the last trial.
      forms: the step that forms were chosen for, if a trial was close; None for those of each trial's step.
    """

    step: float
    slope: float
    frequencies: np.ndarray
    last: Trial
    forms: float | None = None


class Estimate(NamedTuple):
    """Estimate for Gaussian coefficients at a step, with the modes decided for it.

    Attributes:
      bytes: bytes of the codes.
      error: relative squared error, summed over modules and tasks with their weights.
    """

    bytes: float
    error: float


def gaussian_estimate(problem: Problem, step: float) -> Estimate:
    """The estimate of bytes and error at a step; nothing is coded."""
    plans = [mode_decision.decide_modes(x, step) for x in problem.spectra]
    size = sum(float(x.bytes.sum()) for x in plans)
    cost = sum(float(x.cost.sum()) for x in plans)
    return Estimate(size, max(cost - 8 * MULTIPLIER * size, 0.0) * step**2)


def first_step(problem: Problem, goal: float, sign: float = -1.0) -> float:
    """The step whose Gaussian estimate has `goal` bytes (`sign` -1) or a summed error of `goal` (+1)."""
    low, high = STEPS_LOG
    at, before = (low + high) / 2, None
    for _ in range(ESTIMATES):
        found = gaussian_estimate(problem, float(np.exp(at)))
        quantity = found.bytes if sign < 0 else found.error
        # of the log of the step, rising
        miss = sign * float(np.log(max(quantity, 1e-30) / max(goal, 1e-30)))
        low, high = (at, high) if miss < 0 else (low, at)
        if abs(miss) < NEAR_ESTIMATE:
            break
        last, before = before, (at, miss)
        at = (low + high) / 2
        if last is not None and last[1] != miss:
            secant = before[0] - miss * (before[0] - last[0]) / (miss - last[1])
            at = secant if low < secant < high else at
    return float(np.exp(at))


def slope_at(problem: Problem, step: float, sign: float) -> float:
    """Slope of log bytes (`sign` -1) or of log error (+1) over the log of the step, by Gaussian estimates."""
    two = [gaussian_estimate(problem, float(step * np.exp(x))) for x in (-CHANGE, CHANGE)]
    fine, coarse = (max(x.bytes if sign < 0 else x.error, 1e-30) for x in two)
    return sign * float(np.clip(sign * np.log(coarse / fine) / (2 * CHANGE), *SLOPES[sign]))


def slope_of_codes(trial: Trial) -> float:
    """Slope of log bytes over the log of the step where forms stay: each code takes a bit for every octave.

    Gaussian estimates also have the directions that a coarser step leaves out.
    """
    codes = sum(len(x.magnitude) for x in trial.coded.symbols)
    return -float(np.clip(codes / (8 * np.log(2) * max(trial.bytes, 1.0)), *SLOPES[-1.0]))


def find_step(
    problem: Problem, miss: Callable[[Trial], float], sign: float, start: float, near: float = NEAR
) -> Found:
    """The step whose trial on a sample has `miss(trial)` near 0, by Newton's method in logarithms.

    Each trial is coded with tables fitted to the trial before, so that step and tables converge together.
    Slopes are estimates, not secants: differences between trials also contain changes of their tables.
    The forms of the first close trial are kept: with those of each step, bytes jump where many modules change
    their forms at once.

    Args:
      problem: the sample.
      miss: log of the quantity over its target.
      sign: -1 if a larger step lowers the quantity (bytes), +1 if it raises it (error).
      start: first step.
      near: limit of the last trial's miss, of which the step is corrected.
    """
    step, frequencies, forms = start, fit_tables(problem, start), None
    for _ in range(TRIALS):
        trial = encode_at_step(problem, step, frequencies, forms)
        frequencies = fitted_tables(trial.coded.counts)
        missed = miss(trial)
        if forms is None and is_close(missed, sign):
            forms = step
        kept = forms is not None and sign < 0
        slope = slope_of_codes(trial) if kept else slope_at(problem, step, sign)
        before, step = step, float(np.exp(np.clip(np.log(step) - missed / slope, *STEPS_LOG)))
        if abs(missed) < near or step == before:
            break
    return Found(step, slope, frequencies, trial, forms)


def is_close(miss: float, sign: float) -> bool:
    """Whether further passes keep the forms of one with this miss.

    It must be below an error target: the error of the directions that its forms leave out is not mended by a
    finer step.
    """
    return abs(miss) < CLOSE and (sign < 0 or miss <= 0)


def bytes_miss(trial: Trial, *, whole: Problem, problem: Problem, room: Callable[[Trial], float]) -> float:
    """Log of the estimated bytes of the whole over the available bytes `room`, from a trial of a part.

    Modules are assumed to differ in bytes as their Gaussian estimates do.
    """
    scale = 1.0
    if whole is not problem:
        few = max(gaussian_estimate(problem, trial.step).bytes, 1.0)
        scale = max(gaussian_estimate(whole, trial.step).bytes, 1.0) / few
    return float(np.log(trial.bytes * scale / room(trial)))


def error_miss(trial: Trial, *, goal: Target) -> float:
    """Log of a trial's error relative to the target."""
    return float(np.log(max(value(trial.errors, goal.worst), 1e-30) / goal.limit))


def forms_of(done: Sequence[Pass], goal: Target, pilot: float | None = None) -> float | None:
    """The step whose forms the following pass has; None for the forms of its own step.

    Bytes and errors are smooth in the step for fixed forms, and jump where a module changes its form. The
    kept forms are the pilot's if they are close and the pass that settles tables is, or those of the first
    close pass; without one, of the pass that meets the target next to a jump, see `jumps`.

    Args:
      done: the passes so far.
      goal: the target.
      pilot: the step of the pilot's forms; None if they are not to be kept.
    """
    known = done[goal.settling :]
    settled = not goal.settling or not done or abs(done[goal.settling - 1].miss) < CLOSE
    kept = not known or (known[0].forms == pilot and is_close(known[0].miss, goal.sign))
    if pilot is not None and settled and kept:
        return pilot
    own = [x for x in known if x.forms is None]
    close = [x for x in own if is_close(x.miss, goal.sign)]
    if close:
        return close[0].step
    ends = bracket(own)
    if ends is None or not jumps(*ends, goal.sign):
        return None
    return min(ends, key=lambda x: (x.empty, x.miss)).step


def jumps(one: Pass, two: Pass, sign: float) -> bool:
    """Whether forms change between two passes of adjacent steps: these are as good as equal, or what is
    bounded is steeper between them than it is for any forms.

    >>> near, far = Pass(1.0, -0.2, 0.0), Pass(1.2, 0.1, 0.0)
    >>> jumps(near, far._replace(step=1.05), 1.0), jumps(near, far, 1.0)
    (True, False)
    """
    apart = float(np.log(two.step / one.step))
    return apart < NARROW or abs(two.miss - one.miss) > SLOPES[sign][1] * apart


def bracket(done: Sequence[Pass]) -> tuple[Pass, Pass] | None:
    """The two passes of adjacent steps that enclose the target; None if there are none."""
    rows = sorted(done, key=lambda x: x.step)
    found = [(x, y) for x, y in itertools.pairwise(rows) if (x.miss > 0) != (y.miss > 0) and x.step < y.step]
    return min(found, key=lambda pair: pair[1].step / pair[0].step) if found else None


def next_step(done: Sequence[Pass], slope: float, goal: Target, forms: float | None) -> float:
    """The step of the next pass, which aims at the middle of the slack.

    It interpolates between passes that enclose the target (regula falsi; an end that stays counts half each
    time, as in the Illinois variant), or extrapolates by Newton's method in logarithms. `slope` is that of
    the sample, `forms` are those of the next pass, see `forms_of`.
    """
    # passes with other tables or forms are on another curve
    known = done[goal.settling :]
    known = [x for x in known if x.forms == forms or x.step == forms] or done[-1:]
    ends = bracket(known)
    if ends is not None:
        one, two = ends
        over = known[-1].miss > 0
        same = len(list(itertools.takewhile(lambda x: (x.miss > 0) == over, reversed(known))))
        low, high = (
            (x.miss + goal.slack / 2) * (1.0 if (x.miss > 0) == over else 0.5 ** (same - 1)) for x in ends
        )
        share = float(np.clip(low / (low - high), *INSIDE))
        return float(np.exp((1 - share) * np.log(one.step) + share * np.log(two.step)))
    last = known[-1]
    if len(known) > 1:
        (x0, m0), (x1, m1) = ((float(np.log(x.step)), x.miss) for x in known[-2:])
        secant = (m1 - m0) / (x1 - x0) if x1 != x0 else slope
        # an estimate that is far off shows in pass after pass on one side of the target
        slope *= float(np.clip(secant / slope, BELIEVED[0] ** (len(known) - 1), BELIEVED[1]))
    # tables of all modules take less than those of the sample
    gained = SETTLED_BYTES if goal.sign < 0 and len(done) == goal.settling else 0.0
    aim = np.log(last.step) - (last.miss - gained + goal.slack / 2) / slope
    return float(np.exp(np.clip(aim, *STEPS_LOG)))


def met(done: Sequence[Pass], goal: Target) -> int | None:
    """Index of the pass that meets the target within the slack; after the last pass, the best below it.

    The errors of small stores are not smooth in the step, so the slack of an error target grows.
    """
    slack = goal.slack * 2.0 ** (max(len(done) - PATIENT, 0) if goal.sign > 0 else 0)
    known = enumerate(done[goal.settling :], goal.settling)
    fits = [k for k, x in known if x.miss <= 0 and not (x.empty and goal.sign < 0)]
    # steps beyond STEPS are not tried
    edge = STEPS[0] * 1.0001 if goal.sign < 0 else STEPS[1] / 1.0001
    outside = (lambda step: step <= edge) if goal.sign < 0 else (lambda step: step >= edge)
    close = [k for k in fits if done[k].miss > -slack or outside(done[k].step)]
    if close:
        return close[-1]
    best = max(fits, key=lambda k: done[k].miss) if fits else None
    # passes with other forms are on another curve
    tight = best is not None and any(
        x.miss > 0
        and x.forms == done[best].forms
        and abs(np.log(x.step / done[best].step)) < TIGHT * goal.slack
        for x in done
    )
    return best if best is not None and (len(done) >= goal.passes or tight) else None


def hopeless(done: Sequence[Pass], goal: Target) -> bool:
    """Whether no further pass can meet the target."""
    if len(done) >= goal.passes:
        return True
    last = done[-1]
    edge = last.step >= STEPS[1] / 1.0001 if goal.sign < 0 else last.step <= STEPS[0] * 1.0001
    return last.miss > 0 and edge


def unmet(done: Sequence[Pass], goal: Target, entries: int, weighted: bool) -> Unmet:
    """The error for a target that no pass meets, with `weighted` tasks or not: it says what can be met."""
    least = min(done, key=lambda x: (x.empty, x.value))
    found = least.value
    if goal.sign < 0:
        has = "with nothing of the adapters: give more" if least.empty else f"of mean error {least.error:.3f}"
        more = f" and {goal.heads:,} bytes of full tensors" if goal.heads else ""
        # sizes of drafts are estimates, and the limit itself was not enough
        found = max(found, goal.limit) * (1 + goal.slack) + GRAIN
        return Unmet(
            f"budget of {int(goal.limit) + goal.heads:,} bytes: below the smallest store of this collection, "
            f"about {int(found) + goal.heads:,} bytes ({found / (2 * entries):.4f} of the factors' fp16 bytes"
            f"{more}), {has}"
        )
    finest = any(x.step <= STEPS[0] * 1.0001 for x in done)
    what = "the least error at the finest step is" if finest else f"the nearest of {len(done)} passes had"
    way = (
        "bring the weights nearer to each other" if weighted else "--budget 1 keeps the adapters as they are"
    )
    return Unmet(f"error target {goal.limit:g} cannot be met: {what} {found:.3g}; {way}")
