"""Which step meets a target: found on a part of the collection, then corrected from pass to pass."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.jobs import segments
from hydraopt_jax.jobs.reading import Collection
from hydraopt_jax.rate_control import budget, encode_at_step, navigate
from hydraopt_jax.rate_control.navigate import Options

# share of a target that may stay unused, and passes over the collection until it is met
SLACK = 0.01
PASSES = 6
# two steps in this ratio tell how bytes and errors move with the step
NEARBY = 1.1


class Unmet(HydraOptError):
    """No pass met the target, and none will."""


class Target(NamedTuple):
    """What is to be met.

    Attributes:
      sign: -1 for bytes, which fall with the step; +1 for the mean error, which rises.
      limit: bytes on disk of all but the full tensors, or mean relative squared error.
      heads: bytes of the full tensors, which come on top.
    """

    sign: float
    limit: float
    heads: int = 0


class Pass(NamedTuple):
    """One pass over the collection: the step, and the log of what came out over the target."""

    step: float
    miss: float


def target_of(found: Collection, options: Options, heads: int) -> Target:
    """The target in bytes or in error; `heads` is what the full tensors take.

    Raises:
      HydraOptError: a budget that the adapters as they are would fit into.
    """
    if options.max_error is not None:
        return Target(1.0, options.max_error, heads)
    limit = navigate.budget_bytes(options, found.entries(), heads)
    if budget.keeps_all(options.budget):  # type: ignore[arg-type]
        return Target(-1.0, found.entries() * np.dtype(found.dtype).itemsize, heads)
    if limit - heads >= found.entries() * np.dtype(found.dtype).itemsize:
        raise HydraOptError(
            f"budget of {limit:,} bytes: the adapters' factors take no more as they are: give a budget of 1, "
            "which keeps them so, or fewer bytes"
        )
    return Target(-1.0, limit - heads, heads)


class Pilot(NamedTuple):
    """What a part of the collection tells of the whole.

    Attributes:
      step: meets the target about.
      slope: how the logarithm of what is to be met moves with the step's.
      frequencies: `[COUNT, 2, HIGH]`, what the quantizer is charged.
      deep: whether any module took a shared factor or a joint basis; where none did they are not looked for.
    """

    step: np.ndarray
    slope: np.ndarray
    frequencies: np.ndarray
    deep: np.ndarray


def pilot(found: Collection, options: Options, goal: Target, limit: int) -> Pilot:
    """Code a part of the collection, to begin with."""
    wanted = segments.pilot_of(found, limit)
    weights = navigate.task_weights(found.tasks, options)[list(wanted.tasks)]
    collection = segments.read(found, wanted)
    problem = segments.prepare(collection, weights, options.share)
    entries = sum(x.a[n].size + x.b[n].size for x in collection for n in x.a)
    if goal.sign < 0:
        room = max(goal.limit - navigate.LEAST_OVERHEAD, goal.limit / 2) * entries / found.entries()
        start = navigate.first_step(problem, room)
        miss = lambda x: float(np.log(x.bytes / room))  # noqa: E731
    else:
        start = float(np.sqrt(goal.limit)) * 0.2
        miss = lambda x: float(np.log(max(navigate.value(x, False), 1e-30) / goal.limit))  # noqa: E731
    problem = encode_at_step.bar(problem, start)
    best, last = navigate.search(problem, miss, goal.sign, start, lambda done: None)
    here = best or last
    frequencies = encode_at_step.train(problem, here.step)
    beside = encode_at_step.attempt(problem, here.step * NEARBY, frequencies)
    slope = (miss(beside) - miss(here)) / np.log(NEARBY)
    # the first pass aims at the middle of the slack, as the others do
    step = here.step * float(np.exp(-(SLACK / 2 + miss(here)) / slope)) if slope else here.step
    deep = any(x.form != "separate" for x in here.choices.values())
    return Pilot(np.array(np.clip(step, *navigate.STEPS)), np.array(slope), frequencies, np.array(deep))


def next_step(done: Sequence[Pass], slope: float, goal: Target) -> float:
    """The step of the next pass: a secant in logarithms that aims at the middle of the slack.

    Args:
      done: the passes so far.
      slope: of the pilot.
      goal: what is to be met.
    """
    if len(done) > 1 and done[-1].step != done[-2].step:
        slope = (done[-1].miss - done[-2].miss) / np.log(done[-1].step / done[-2].step)
    slope = goal.sign * float(np.clip(goal.sign * slope, 0.05, 5.0))
    aim = np.log(done[-1].step) - (done[-1].miss + SLACK / 2) / slope
    return float(np.exp(np.clip(aim, *navigate.STEPS_LOG)))


def met(done: Sequence[Pass]) -> int | None:
    """The pass that meets the target closely enough, or the best one that meets it when no more are made."""
    fits = [k for k, x in enumerate(done) if x.miss <= 0]
    close = [k for k in fits if done[k].miss > -SLACK or done[k].step <= navigate.STEPS[0] * 1.0001]
    if close:
        return close[-1]
    return max(fits, key=lambda k: done[k].miss) if fits and len(done) >= PASSES else None


def unmet(done: Sequence[Pass], goal: Target) -> Unmet:
    """The error where no pass meets the target: it says what can be met."""
    best = min(x.miss for x in done)
    value = goal.limit * float(np.exp(best))
    if goal.sign < 0:
        return Unmet(
            f"budget of {int(goal.limit) + goal.heads:,} bytes: the smallest store that was found takes "
            f"{int(value) + goal.heads:,}" + (f", {goal.heads:,} of them full tensors" if goal.heads else "")
        )
    return Unmet(f"error target {goal.limit:g} cannot be met: the least error that was found is {value:.3g}")
