"""Hyper-parameters of explicit forms; no arrays."""

import numbers
from typing import Any, NamedTuple

from hydraopt_jax.errors import HydraOptError

SIDES = ("in", "out", "auto")
STARTS = ("closed", "mean")


class Gradient(NamedTuple):
    """The Optax solver, see `gradient.hydra`.

    Attributes:
      optimizer: an `optax.GradientTransformation`; None for `gradient.default_optimizer`.
      start: "closed" for the closed form, "mean" for the mean of the `a`s (the published method).
      steps: maximum number of steps.
    """

    optimizer: Any = None
    start: str = "closed"
    steps: int = 1000


class Hydra(NamedTuple):
    """HydraOpt's form: one shared factor, K heads (Ceritli et al., arXiv 2507.17706).

    Attributes:
      heads: K, heads per module; None for T, one per task.
      rank: S, width of the shared factor; None for the adapters' largest rank.
      side: which factor is shared: "in", "out", or "auto": fit both sides with equal storage and keep the one
        with the lower error.
      cores: give each task an S x S core, with fewer heads than tasks.
      solver: `Gradient(...)`; None for the closed form.
    """

    heads: int | None = None
    rank: int | None = None
    side: str = "auto"
    cores: bool = False
    solver: Gradient | None = None


def check_form(form: Hydra, tasks: int) -> Hydra:
    """The form with whole numbers of Python's own type, as a report has them.

    Raises:
      HydraOptError: an unknown or impossible value, or one that has no effect together with the others; the
        message names it.
    """
    solver = form.solver or Gradient()
    counts: tuple[tuple[str, Any], ...]
    counts = (("heads", form.heads), ("rank", form.rank), ("steps", solver.steps))
    for name, count in counts:
        if not (isinstance(count, numbers.Integral) or (count is None and name != "steps")):
            raise HydraOptError(f"{name} = {count!r}: give a whole number")
    for name, value, known in (("side", form.side, SIDES), ("start", solver.start, STARTS)):
        if value not in known:
            raise HydraOptError(f"{name} = {value!r}: must be one of {', '.join(known)}")
    if form.heads is not None and not 1 <= form.heads <= tasks:
        raise HydraOptError(f"heads = {form.heads}: must lie between 1 and the {tasks} tasks")
    if form.rank is not None and form.rank < 1:
        raise HydraOptError(f"rank = {form.rank}: must be at least 1")
    if solver.steps < 1:
        raise HydraOptError(f"steps = {solver.steps}: must be at least 1")
    if form.cores and (form.heads or tasks) == tasks:
        raise HydraOptError(
            f"cores: do nothing with a head for each of the {tasks} tasks: give fewer heads, or no cores"
        )
    heads, rank = (None if x is None else int(x) for x in (form.heads, form.rank))
    given = None if form.solver is None else solver._replace(steps=int(solver.steps))
    return Hydra(heads, rank, form.side, bool(form.cores), given)
