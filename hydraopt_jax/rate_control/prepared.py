"""The analysis of a run's parts; of a few parts it is kept from pass to pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hydraopt_jax import adapters
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.rate_control.metrics import Metrics, metrics_of
from hydraopt_jax.rate_control.parts import Part
from hydraopt_jax.rate_control.problem import Problem, prepare
from hydraopt_jax.rate_control.segments import Run

# parts whose analysis, and what was encoded last, are kept from pass to pass
CACHED = 4


def prepare_part(
    run: Run, part: Part, given: list[Adapter], weights: np.ndarray, deep: bool, unit: float | None
) -> Problem:
    """The `Problem` of a part: its decompositions and comparisons."""
    order = tuple(n for n in part.modules if any(n in x.a for x in given))
    metrics = (
        {n: module_metrics(run, n, given) for n in order} if run.options.calibration is not None else None
    )
    own = weights[list(part.tasks)]
    return prepare(adapters.stack(given), order, own, metrics, run.options.share, deep, unit)


def module_metrics(run: Run, name: str, given: Sequence[Adapter]) -> Metrics:
    """The metrics of a module, computed once for all parts with it unless they depend on a part's factors."""
    if name in run.metrics:
        return run.metrics[name]
    calibration = run.options.calibration
    assert calibration is not None
    mine = [x for x in given if name in x.a]
    around = np.concatenate([x.a[name] for x in mine], 1), np.concatenate([x.b[name] for x in mine]).T
    found = metrics_of({name: run.found.shapes[name]}, calibration, {name: around})
    if all(x is None or x.moment is None for x in found[name]):
        run.metrics.update(found)
    return found[name]


def problem_of(
    run: Run, n: int, weights: np.ndarray, known: Mapping[str, Any], given: list[Adapter]
) -> Problem:
    """The problem of a part; those of a few parts are cached."""
    if n in run.cache:
        return run.cache[n]
    one = len(run.parts) == 1
    deep, unit = (True, None) if one else (known["deep"], known["unit"])
    found = prepare_part(run, run.parts[n], given, weights, deep, unit)
    if len(run.parts) <= CACHED:
        run.cache[n] = found
    return found
