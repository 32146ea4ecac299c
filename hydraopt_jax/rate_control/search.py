"""Which step meets a target: found on a sample first, then corrected from pass to pass over the whole."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hydraopt_jax.collection import Collection
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.rate_control import budget, mode_decision
from hydraopt_jax.rate_control.coding import Trial, encode_at_step, fitted_tables, prior_tables
from hydraopt_jax.rate_control.options import Options
from hydraopt_jax.rate_control.problem import Problem
from hydraopt_jax.store.store import task_errors

# share of a target that may stay unused: of a collection in few parts, and where a pass takes long
SLACK, WIDE_SLACK, FEW_PARTS = 0.003, 0.01, 4
# passes over the collection until the target is met
PASSES = 12
# trials on the sample, at least so many, and how near it has to come: the sample is not the whole
TRIALS, SETTLED, NEAR = 8, 5, 0.01
# about what the smallest store takes beside its codes, and each of its segments, to start from
LEAST_OVERHEAD, SEGMENT_OVERHEAD = 700, 1200
# the finest and the coarsest step, relative to the norm of a delta
STEPS = (1e-6, 0.7)
STEPS_LOG = (float(np.log(STEPS[0])), float(np.log(STEPS[1])))
# how bytes and errors move with the step, all in logarithms, about; what is believed of a secant, times that:
# of one on the sample, whose tables change, and the least of one between passes with the same tables (at fine
# steps bytes fall as the logarithm of the step, by less than a tenth of it)
SLOPES = {-1.0: 0.8, 1.0: 1.5}
FLATTEST, STEEPEST = 0.4, 2.0
FLATTEST_PASS = 0.08


class Unmet(HydraOptError):
    """No pass met the target, and none will."""


class Target(NamedTuple):
    """What is to be met.

    Attributes:
      sign: -1 for bytes, which fall with the step; +1 for the error, which rises.
      limit: bytes on disk of all but the full tensors, or relative squared error.
      heads: bytes of the full tensors, which come on top.
      worst: whether the error is the worst task's, not the mean.
      slack: share that may stay unused.
      settling: passes whose counts become the tables of the next one, before any is taken.
    """

    sign: float
    limit: float
    heads: int = 0
    worst: bool = False
    slack: float = SLACK
    settling: int = 2


class Pass(NamedTuple):
    """One pass over the collection.

    Attributes:
      step: the quantizer step.
      miss: log of what came out over the target: of the codes, over the room that all else leaves for them,
        or of the error.
      value: what came out: bytes without the full tensors, or the error.
    """

    step: float
    miss: float
    value: float


def target_of(found: Collection, options: Options, heads: int, parts: int = 1) -> Target:
    """The target in bytes or in error; `heads` is what the full tensors take.

    Raises:
      HydraOptError: a budget that the adapters as they are would fit into.
    """
    slack, settling = (SLACK, 2) if parts <= FEW_PARTS else (WIDE_SLACK, 0)
    if options.max_task_error is not None:
        return Target(1.0, options.max_task_error, heads, True, slack, settling)
    if options.max_error is not None:
        return Target(1.0, options.max_error, heads, False, slack, settling)
    given = budget.read_budget(options.budget)
    assert given is not None
    limit = given if isinstance(given, int) else int(given * 2 * found.entries()) + heads
    return Target(-1.0, limit - heads, heads, False, slack, settling)


def least_lossless(found: Collection) -> int:
    """Bytes that the factors have in the dtype of their adapters, at least."""
    return sum(
        np.dtype(x.dtype).itemsize * e.rank * (e.inputs + e.outputs)
        for x in found.cards
        for e in x.modules.values()
    )


def value(errors: np.ndarray, worst: bool) -> float:
    """Worst task's error, or the mean over modules and tasks, of `[M, T]`."""
    return float(task_errors(errors).max()) if worst else float(np.nanmean(errors))


class Found(NamedTuple):
    """What a sample tells of the whole.

    Attributes:
      step: meets the target about.
      slope: how the logarithm of what is to be met moves with the step's.
      frequencies: `[COUNT, 2, SYMBOLS]`, what the quantizer is charged.
      last: the last trial.
    """

    step: float
    slope: float
    frequencies: np.ndarray
    last: Trial


def gaussian_bytes(problem: Problem, step: float) -> float:
    """Bytes that Gaussian coefficients would take at a step, by the modes decided for it."""
    return sum(float(mode_decision.decide_modes(x, step).bytes.sum()) for x in problem.spectra)


def first_step(problem: Problem, room: float) -> float:
    """The step whose Gaussian estimate takes so many bytes."""
    low, high = STEPS_LOG
    for _ in range(14):
        middle = (low + high) / 2
        size = gaussian_bytes(problem, float(np.exp(middle)))
        low, high = (middle, high) if size > room else (low, middle)
    return float(np.exp(high))


def find_step(problem: Problem, miss: Callable[[Trial], float], sign: float, start: float) -> Found:
    """Find the step whose trial on a sample has `miss(trial)` about 0, by a secant in logarithms.

    Every trial is coded with the tables that the one before has counted, so that both settle together.

    Args:
      problem: the sample.
      miss: log of a quantity over its target.
      sign: -1 where a larger step lowers the quantity (bytes), +1 where it raises it (error).
      start: first step.
    """
    x, frequencies, slope = float(np.log(start)), prior_tables(), sign * SLOPES[sign]
    done: list[tuple[float, float]] = []
    for _ in range(TRIALS):
        trial = encode_at_step(problem, float(np.exp(x)), frequencies)
        frequencies = fitted_tables(trial.coded.counts)
        done.append((x, miss(trial)))
        if len(done) > 2:
            slope = secant(done[-2], done[-1], sign)
        following = float(np.clip(x - done[-1][1] / slope, *STEPS_LOG))
        if len(done) >= SETTLED and (abs(done[-1][1]) < NEAR or following == x):
            break
        x = following
    return Found(float(np.exp(np.clip(x - done[-1][1] / slope, *STEPS_LOG))), slope, frequencies, trial)


def secant(
    one: tuple[float, float], two: tuple[float, float], sign: float, flattest: float = FLATTEST
) -> float:
    """Slope between two (log step, miss), as far as it can be believed."""
    (x0, m0), (x1, m1) = one, two
    found = sign * (m1 - m0) / (x1 - x0) if x1 != x0 else SLOPES[sign]
    return sign * float(np.clip(found, flattest * SLOPES[sign], STEEPEST * SLOPES[sign]))


def next_step(done: Sequence[Pass], slope: float, goal: Target) -> float:
    """The step of the next pass: a secant in logarithms that aims at the middle of the slack, inside what is
    known to be too fine and too coarse.

    Args:
      done: the passes so far.
      slope: of the sample.
      goal: what is to be met.
    """
    last = done[-1]
    if len(done) > goal.settling + 1:
        # earlier passes had other tables, and another curve
        one, two = ((float(np.log(x.step)), x.miss) for x in done[-2:])
        slope = secant(one, two, goal.sign, FLATTEST_PASS)
    aim = np.log(last.step) - (last.miss + goal.slack / 2) / slope
    known = done[goal.settling :] if len(done) > goal.settling else done[-1:]
    over = [np.log(x.step) for x in known if x.miss > 0]
    under = [np.log(x.step) for x in known if x.miss <= 0]
    low, high = STEPS_LOG
    if goal.sign < 0:
        low, high = max([low, *over]), min([high, *under])
    else:
        low, high = max([low, *under]), min([high, *over])
    if low < high and not low < aim < high:
        edge = 0.02 * (high - low)
        aim = np.clip(
            aim, low + (edge if low > STEPS_LOG[0] else 0), high - (edge if high < STEPS_LOG[1] else 0)
        )
    return float(np.exp(np.clip(aim, *STEPS_LOG)))


def met(done: Sequence[Pass], goal: Target) -> int | None:
    """The pass that meets the target closely enough, or the best one that meets it when no more are made."""
    fits = [k for k, x in enumerate(done) if x.miss <= 0 and k >= goal.settling]
    # no finer step than the finest, and none coarser than the coarsest
    edge = STEPS[0] * 1.0001 if goal.sign < 0 else STEPS[1] / 1.0001
    outside = (lambda step: step <= edge) if goal.sign < 0 else (lambda step: step >= edge)
    close = [k for k in fits if done[k].miss > -goal.slack or outside(done[k].step)]
    if close:
        return close[-1]
    best = max(fits, key=lambda k: done[k].miss) if fits else None
    tight = best is not None and any(
        x.miss > 0 and abs(np.log(x.step / done[best].step)) < 1e-4 for x in done
    )
    return best if best is not None and (len(done) >= PASSES or tight) else None


def hopeless(done: Sequence[Pass], goal: Target) -> bool:
    """Whether no further pass can meet the target."""
    if len(done) >= PASSES:
        return True
    last = done[-1]
    edge = last.step >= STEPS[1] / 1.0001 if goal.sign < 0 else last.step <= STEPS[0] * 1.0001
    return last.miss > 0 and edge


def unmet(done: Sequence[Pass], goal: Target, entries: int, error: float) -> Unmet:
    """The error where no pass meets the target: it says what can be met."""
    found = min(x.value for x in done)
    if goal.sign < 0:
        more = f" and {goal.heads:,} bytes of full tensors" if goal.heads else ""
        return Unmet(
            f"budget of {int(goal.limit) + goal.heads:,} bytes: below the smallest store of this collection, "
            f"{int(found) + goal.heads:,} bytes ({found / (2 * entries):.4f} of the factors' fp16 bytes"
            f"{more}), of mean error {error:.3f}"
        )
    return Unmet(
        f"error target {goal.limit:g} cannot be met: the least error at the finest step is {found:.3g}; "
        "--budget 1 keeps the adapters as they are"
    )
