"""Fit all tasks of a store again, with the options that made it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.changes.addition import need_calibration
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.explicit import group_loop
from hydraopt_jax.formats.memory_collection import in_memory
from hydraopt_jax.rate_control import engine
from hydraopt_jax.rate_control.options import Options
from hydraopt_jax.store import lossless, sizes
from hydraopt_jax.store.decoding import decode
from hydraopt_jax.store.store import Store, task_errors, task_index, tensors_of

# a refit is due if its mean error at the same bytes is lower by this factor
DUE = 1.1
# task -> original adapter, or None if it is not available
Original = Callable[[str], Adapter | None]


class Refit(NamedTuple):
    """Errors of a fit of all tasks at the present bytes of the store.

    Attributes:
      mean: mean relative squared error over modules and tasks.
      task: error of the task in question; NaN for none.
      due: whether the store's mean error is more than a tenth above this mean.
      stand_ins: tasks without an original, for which the decoded task was used.
    """

    mean: float
    task: float
    due: bool
    stand_ins: tuple[str, ...]


def options_of(store: Store) -> Options:
    """The options of a coded store, without its calibration."""
    asked = {k: v for k, v in store.report["options"].items() if k != "calibrated"}
    weights = {k: v for k, v in asked.get("weights", {}).items() if k in store.tasks}
    return Options(**{**asked, "weights": weights})


def refit(
    store: Store, collection: Sequence[Adapter], calibration: Mapping[str, np.ndarray] | None = None
) -> Store:
    """A store of all tasks fitted at once, at the store's quantizer step or in its explicit form.

    Args:
      store: its options are used.
      collection: adapters of its tasks.
      calibration: the second moments that the store was made with, if any.

    Raises:
      HydraOptError: the store was made with calibration, and none is given; or see `check_originals`.
    """
    need_calibration(store, calibration)
    check_originals(store, collection)
    found = in_memory(collection)
    asked = store.report["options"]
    if store.report["form"] == lossless.FORM:
        kept = Options(budget=1.0, extras_dtype=asked.get("extras_dtype"))
        return engine.compress_to_target(found, kept)
    if any(x.coded for x in store.segments):
        options = options_of(store)._replace(calibration=calibration)
        return engine.compress_at_step(found, options, store.report["step"])
    form = group_loop.form_of(asked)
    tasks = len(collection)
    # a head per task stays a head per task
    every = asked["heads"] >= max(len(x.tasks) for x in store.segments)
    heads = None if every else min(form.heads or tasks, tasks)
    cores = form.cores and heads is not None and heads < tasks
    form = form._replace(heads=heads, cores=cores)
    return group_loop.compress_in_form(
        found, form, dtype=asked["dtype"], extras_dtype=asked.get("extras_dtype")
    )


def check_originals(store: Store, given: Iterable[Adapter]) -> None:
    """Raise for an adapter that is not the one that the store has of its task, if both have a digest."""
    digests = {t: x.digest for t, x in zip(store.tasks, store.sources, strict=True)}
    for x in given:
        known = digests.get(x.task)
        if x.digest and known and x.digest != known:
            raise HydraOptError(
                f"{x.source}: is not the original of {x.task!r}, whose checksum is another: give what "
                f"{x.task!r} was read from, or remove {x.task!r} and add this one in its place"
            )


def at_hand(store: Store, tasks: Sequence[str], original: Original) -> tuple[list[Adapter], list[str]]:
    """Originals, or decoded tasks in their place; and the names of the decoded ones.

    Raises:
      HydraOptError: see `check_originals`.
    """
    found = {t: original(t) for t in tasks}
    check_originals(store, (x for x in found.values() if x is not None))
    absent = [t for t, x in found.items() if x is None]
    return [decode(store, t) if x is None else x for t, x in found.items()], absent


def estimate_refit(
    store: Store,
    given: Mapping[str, Adapter],
    task: str | None = None,
    calibration: Mapping[str, np.ndarray] | None = None,
) -> Refit:
    """Errors of a fit of all tasks at the present bytes of the store; the store is not changed.

    A coded store's tasks are compressed together to its bytes. A plain one's are fitted in its form.
    """
    collection, absent = at_hand(store, store.tasks, given.get)
    if any(x.coded for x in store.segments):
        bare = [x.replace(extras={}) for x in collection]
        heads = sum(tensors_of(store, t).nbytes for t in store.tasks)
        options = options_of(store)._replace(
            budget=sizes.measure_size(store) - heads,
            max_error=None,
            max_task_error=None,
            calibration=calibration,
        )
        fitted = engine.compress_to_target(in_memory(bare), options)
    else:
        fitted = refit(store, collection)
    mean = float(np.nanmean(fitted.errors))
    own = float("nan")
    if task is not None:
        own = float(task_errors(fitted.errors)[task_index(store.tasks, task)])
    return Refit(mean, own, float(np.nanmean(store.errors)) > DUE * mean + 1e-12, tuple(absent))
