"""The pilot: a sample of the collection from all over it, coded to find the step of the first pass."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from hydraopt_jax.rate_control import search
from hydraopt_jax.rate_control.coding import Trial, sample
from hydraopt_jax.rate_control.parts import entries, pilot_part, read_part
from hydraopt_jax.rate_control.prepared import prepare_part, problem_of
from hydraopt_jax.rate_control.problem import Problem
from hydraopt_jax.rate_control.search import Found, Target
from hydraopt_jax.rate_control.segments import Run, overhead

# entries of the sample of a collection with one part
SAMPLE_CODES = 1 << 19


def run_pilot(run: Run, goal: Target, weights: np.ndarray) -> Mapping[str, Any]:
    """The note of the pilot: the result of a sample of the collection, which the first process computes."""
    if run.processes.rank == 0 and run.place.note("pilot") is None:
        one = len(run.parts) == 1
        part = run.parts[0] if one else pilot_part(run.found)
        given = read_part(run.found, part)
        if one:
            whole = problem_of(run, 0, weights, {}, given)
            problem = whole.take(sample(whole, SAMPLE_CODES))
        else:
            whole = problem = prepare_part(run, part, given, weights, deep=True, unit=None)
        # the last trial whose overhead was estimated
        known: list[tuple[Trial, float]] = []
        if goal.sign < 0:
            share = entries(run.found, part) / run.found.entries()
            # passes over few parts settle first; over many, the first one aims at the middle of the slack
            share *= 1.0 if goal.settling else float(np.exp(-goal.slack / 2))

            def room(trial: Trial | None) -> float:
                beside = float(search.LEAST_OVERHEAD + search.SEGMENT_OVERHEAD * len(run.parts))
                if trial is not None and not one:
                    beside = overhead(run, part, whole, trial)
                    known[:] = [(trial, beside)]
                return share * max(goal.limit - beside, goal.limit / 4)

            start = search.first_step(whole, room(None))
            miss = functools.partial(search.bytes_miss, whole=whole, problem=problem, room=room)
        else:
            present = sum(x.norms[x.norms > 0].size for x in problem.spectra)
            start = search.first_step(problem, goal.limit * present, goal.sign)
            mine = goal._replace(worst=tuple(goal.worst[t] for t in part.tasks if goal.worst))
            miss = functools.partial(search.error_miss, goal=mine)
        # where no pass is spent on settling, the first one should do
        near = search.NEAR if goal.settling else goal.slack / 4
        found = search.find_step(problem, miss, goal.sign, start, near)
        beside = 0.0
        if not one and goal.sign < 0:
            tried = next((x for trial, x in known if trial is found.last), None)
            beside = overhead(run, part, whole, found.last) if tried is None else tried
            if goal.settling and run.processes.size == 1:
                found = corrected(run, found, problem, share, weights)
        run.place.keep_note(
            "pilot",
            {
                "step": found.step,
                "slope": found.slope,
                "forms": found.forms,
                "frequencies": found.frequencies.tolist(),
                "beside": beside,
                "deep": any(x.form == "joint" for x in found.last.choices.values()),
                "unit": problem.unit,
            },
        )
    run.processes.wait("pilot")
    note = run.place.note("pilot")
    assert note is not None
    return note


def corrected(run: Run, found: Found, problem: Problem, share: float, weights: np.ndarray) -> Found:
    """The result of a pilot of few parts, whose analyses are kept in any case, for what all of them take by
    Gaussian estimates: the modules of the pilot may take more or less than others.

    Args:
      run: the compression.
      found: the result for the pilot.
      problem: the pilot's.
      share: of the entries that the pilot has.
      weights: `[T]` of the tasks' errors.
    """
    known = {"deep": any(x.form == "joint" for x in found.last.choices.values()), "unit": problem.unit}
    whole = 0.0
    for n, part in enumerate(run.parts):
        each = problem_of(run, n, weights, known, read_part(run.found, part))
        whole += search.gaussian_estimate(each, found.step).bytes
    expected = search.gaussian_estimate(problem, found.step).bytes / share
    if not min(whole, expected) > 0:
        return found
    slope = search.slope_at(problem, found.step, -1.0)
    step = float(np.exp(np.clip(np.log(found.step) - np.log(whole / expected) / slope, *search.STEPS_LOG)))
    return found._replace(step=step, forms=step)
