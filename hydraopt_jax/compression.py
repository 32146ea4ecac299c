"""Compress adapters into a store."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hydraopt_jax import pytrees  # noqa: F401  (what is made here may be traced)
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.collection import Collection
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.explicit import group_loop
from hydraopt_jax.formats.memory_collection import in_memory
from hydraopt_jax.forms import Hydra
from hydraopt_jax.rate_control import engine
from hydraopt_jax.rate_control.options import Options
from hydraopt_jax.rate_control.work import IN_MEMORY, Job
from hydraopt_jax.store.store import Store

# default target: a quarter of the bytes
DEFAULT_BUDGET = 0.25


def compress(
    adapters: Sequence[Adapter] | Collection,
    *,
    budget: int | float | str | None = None,
    max_error: float | None = None,
    max_task_error: float | None = None,
    form: Hydra | None = None,
    weights: Mapping[str, float] | None = None,
    calibration: Mapping[str, np.ndarray] | None = None,
    share: bool = True,
    dtype: str | None = None,
    extras_dtype: str | None = None,
    job: Job = IN_MEMORY,
) -> Store:
    """Compress adapters of one base model into a store.

    Give one of `budget`, `max_error`, `max_task_error` and `form`. Without any of them the store takes a
    quarter of the factors' half-precision bytes (`budget=0.25`).

    More than eight arguments: the options of the command, each with a default.

    Args:
      adapters: in memory, or a `Collection` that is read as it is needed.
      budget: bytes on disk of everything if an integer above 10 or text such as "3MB"; else a fraction of the
        factors' half-precision bytes. 1 keeps `a` and `b` of the adapters bit for bit, and of files (a
        `Collection`) every factor as it is there. See `rate_control.budget`.
      max_error: largest mean relative squared error over modules and tasks, whatever the weights are.
      max_task_error: largest relative squared error of any task, the mean over its modules; with weights, of
        the tasks of the least weight, and of one of n times this weight an n-th of it.
      form: an explicit form, stored as plain factors.
      weights: task -> weight of its relative error, 1 where not named. Errors come out in inverse proportion
        to weights: a task of weight 4 has about a quarter of the others' error.
      calibration: module -> second moment of its inputs, see `calibration`: errors are then the outputs'.
      share: whether tasks may be predicted from one another.
      dtype: of plain factors: "float32", "float16", "bfloat16"; None for the widest dtype of the input.
      extras_dtype: full tensors beside the factors are rounded to it if they are wider; None keeps them.
      job: progress, processes, and where finished segments are kept, see `rate_control.work`.

    Raises:
      HydraOptError: bad adapters or options, or a target that cannot be met (the message says which can).

    >>> from hydraopt_jax.synthetic import collection
    >>> store = compress(collection(tasks=2), budget=0.5)
    >>> len(store.tasks), float(store.errors.mean()) < 0.01
    (2, True)
    """
    found = adapters if isinstance(adapters, Collection) else in_memory(adapters)
    targets: dict[str, Any] = {"budget": budget, "max_error": max_error, "max_task_error": max_task_error}
    if form is not None:
        if not isinstance(form, Hydra):
            raise HydraOptError(f"form = {form!r}: give a form of hydraopt_jax.forms, such as Hydra(heads=2)")
        idle = targets | {"weights": weights, "calibration": calibration, "share=False": None if share else 1}
        for name in (k for k, v in idle.items() if v is not None):
            raise HydraOptError(f"{name}: a form excludes it: leave one of them out")
        return group_loop.compress_in_form(found, form, job, dtype=dtype, extras_dtype=extras_dtype)
    if dtype is not None:
        raise HydraOptError("dtype: only plain factors have one: give a form, or leave it out")
    if all(v is None for v in targets.values()):
        targets["budget"] = DEFAULT_BUDGET
    options = Options(
        **targets,
        weights=weights or {},
        calibration=calibration,
        share=share,
        extras_dtype=extras_dtype,
    )
    return engine.compress_to_target(found, options, job)
