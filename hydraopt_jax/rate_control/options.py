"""Options of a compression: target, weights, calibration, sharing."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax import calibration
from hydraopt_jax.collection import Collection
from hydraopt_jax.errors import HydraOptError, one_line, suggest
from hydraopt_jax.rate_control import budget
from hydraopt_jax.rate_control.metrics import uncovered
from hydraopt_jax.store import tensors

# least and largest weight of a task; beyond them a task is lossless or nothing
WEIGHTS = (1e-6, 1e6)


class Options(NamedTuple):
    """Options of a compression; exactly one of budget, max_error and max_task_error is given.

    Attributes:
      budget: bytes of everything on disk if an integer above 10 or text such as "3MB"; else a fraction of the
        factors' fp16 bytes for factors and description. Coded full tensors beside the factors are not counted
        in a fraction (`tensors`). A fraction of 1 or more keeps `a` and `b` bit for bit. See `budget` for
        the full rule.
      max_error: largest mean relative squared error over modules and tasks, whatever the weights are.
      max_task_error: largest relative squared error of any task, the mean over its modules; with weights, of
        the tasks of the least weight, and of one of n times this weight an n-th of it.
      weights: task name -> weight of its relative error, 1 where not named: the weighted mean is minimized.
      calibration: module name -> second moment `[I, I]` of its inputs, `[I, 1 + K]` for one of low rank, or
        `[I]` for a diagonal one; errors are then those of the modules' outputs. With `NAME:output` -> second
        moment of the gradients at its outputs, the error estimates the divergence of the model's outputs (see
        `calibration`).
      share: whether tasks may share factors or be predicted from one another.
      extras_dtype: wider full tensors are rounded to it, one of `tensors.DTYPES`; None keeps them.
    """

    budget: int | float | str | None = None
    max_error: float | None = None
    max_task_error: float | None = None
    weights: Mapping[str, float] = {}
    calibration: Mapping[str, np.ndarray] | None = None
    share: bool = True
    extras_dtype: str | None = None


def check_options(options: Options) -> Options:
    """The options with the budget read, and numbers and `share` of Python's own types, as a report has them.

    Raises:
      HydraOptError: contradicting targets, a target that cannot be met, or an option without effect.
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
    if not 0 < float(value) < np.inf:
        way = (
            "give a positive number"
            if named[0] == "budget"
            else "an error of 0 is had with --budget 1 (lossless)"
        )
        raise HydraOptError(f"{named[0]} = {value}: must be positive; {way}")
    tensors.check_dtype(options.extras_dtype, "extras_dtype")
    if not isinstance(options.weights, Mapping):
        raise HydraOptError(f"weights = {one_line(repr(options.weights), 60)}: give task name -> weight")
    weights = {k: check_weight(v, f"weight of {k!r}") for k, v in options.weights.items()}
    if not isinstance(options.share, bool | np.bool_):
        raise HydraOptError(f"share = {options.share!r}: give True or False")
    options = options._replace(
        max_error=None if options.max_error is None else float(options.max_error),
        max_task_error=None if options.max_task_error is None else float(options.max_task_error),
        weights=weights,
        share=bool(options.share),
    )
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


def check_weight(weight: Any, name: str) -> float:
    """The weight of a task.

    Raises:
      HydraOptError: no number within `WEIGHTS`.
    """
    number = isinstance(weight, numbers.Real) and not isinstance(weight, bool | np.bool_)
    if not number or not WEIGHTS[0] <= weight <= WEIGHTS[1]:
        raise HydraOptError(f"{name} = {weight!r}: must be positive, from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}")
    return float(weight)


def weights_of(tasks: Sequence[str], options: Options) -> np.ndarray:
    """Weights `[T]` of the tasks' errors.

    Raises:
      HydraOptError: a weight of a task that is none of these.
    """
    for task in sorted(set(options.weights) - set(tasks)):
        raise HydraOptError(f"weights: no task {task!r}: {suggest(task, tasks)}")
    return np.array([float(options.weights.get(t, 1.0)) for t in tasks])


def relative_weights(tasks: Sequence[str], options: Options) -> np.ndarray:
    """Weights `[T]` with a mean of 1."""
    weights = weights_of(tasks, options)
    return weights / weights.mean()


def unit_scale(tasks: Sequence[str], options: Options) -> float:
    """The quantizer step of a task of weight 1 over the step for `relative_weights`: a task's own step falls
    with the root of its weight."""
    return float(np.sqrt(weights_of(tasks, options).mean()))


def as_report(options: Options, found: Collection) -> dict[str, Any]:
    """The options as JSON: the first fields of a store's report."""
    asked = {k: v for k, v in options._asdict().items() if k not in ("weights", "calibration")}
    asked |= {
        "weights": {k: v for k, v in options.weights.items() if v != 1},
        "calibrated": options.calibration is not None,
    }
    known: dict[str, Any] = {}
    if options.calibration is not None:
        known["calibration"] = calibration.digest(options.calibration)
        # modules whose errors are those of weights
        without = uncovered(found.shapes, options.calibration)
        known |= {"uncalibrated": without} if without else {}
    return {"options": asked, **found.entries_report(), "bound": {}, **known}
