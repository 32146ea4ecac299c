"""The analysis of a collection or a part, computed once for all quantizer steps."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hydraopt_jax.adapters import Adapters
from hydraopt_jax.linalg import decompose
from hydraopt_jax.rate_control.analysis import Spectrum, spectrum, take_modules
from hydraopt_jax.rate_control.metrics import Metrics, coordinates, importance, weighed


class Problem(NamedTuple):
    """The analysis of a collection, for coding at any step.

    Attributes:
      spectra: one per bucket.
      metrics: module -> metrics of its inputs and of its outputs; empty without calibration.
      order: module names in the collection's order.
      weights: `[M, T]` of the relative errors, in that order.
      present: `[M, T]` whether a task has the module, be it that its delta is zero.
      unit: the mean importance of a delta, by which importance is divided.
      no_joint: modules whose cost was higher with a joint basis in a trial.
      alone: whether the cost of all was higher with anything shared in a trial.
    """

    spectra: tuple[Spectrum, ...]
    metrics: Mapping[str, Metrics]
    order: tuple[str, ...]
    weights: np.ndarray
    present: np.ndarray
    unit: float = 1.0
    no_joint: frozenset[str] = frozenset()
    alone: bool = False

    def take(self, modules: Collection[str]) -> "Problem":
        """The problem of some of its modules."""
        spectra = []
        for x in self.spectra:
            at = [m for m, n in enumerate(x.modules) if n in modules]
            spectra += [take_modules(x, at)] if at else []
        rows = [m for m, n in enumerate(self.order) if n in modules]
        order = tuple(self.order[m] for m in rows)
        return self._replace(
            spectra=tuple(spectra), order=order, weights=self.weights[rows], present=self.present[rows]
        )


def prepare(
    inputs: Adapters,
    order: Sequence[str],
    weights: np.ndarray,
    metrics: Mapping[str, Metrics] | None = None,
    share: bool = True,
    deep: bool = True,
    unit: float | None = None,
) -> Problem:
    """The `Problem` of a collection.

    Args:
      inputs: the collection.
      order: module names.
      weights: `[T]` of the tasks' errors.
      metrics: module -> metrics of its inputs and outputs; None for errors of the weights.
      share, deep: see `spectrum`.
      unit: the mean importance of a delta in the whole collection; None for the mean in this part.
    """
    metrics = metrics or {}
    decomposed: list[decompose.Svd] = []
    important: dict[str, np.ndarray] = {}
    for bucket in inputs.buckets:
        deltas = decompose.batched_svd(*weighed(metrics, bucket.modules, bucket.a, bucket.b))
        decomposed.append(deltas)
        norms = np.sqrt((np.asarray(deltas.s) ** 2).sum(-1))
        important |= dict(zip(bucket.modules, importance(metrics, bucket.modules, norms), strict=True))
    table = np.stack([important[n] for n in order])
    unit = unit or (float(table[table > 0].mean()) if (table > 0).any() else 1.0)
    table = np.where(table > 0, table / unit, 1.0) * weights
    rows = {n: table[i] for i, n in enumerate(order)}
    spectra = []
    for x, deltas in zip(inputs.buckets, decomposed, strict=True):
        left, right = zip(*(metrics.get(n, (None, None)) for n in x.modules), strict=True)
        coded = (
            coordinates(left, np.asarray(deltas.u)),
            coordinates(right, np.asarray(deltas.v).swapaxes(2, 3)),
        )
        weight = np.stack([rows[n] for n in x.modules])
        spectra.append(spectrum(x.modules, deltas, weight, coded, share=share, deep=deep))
    has = {n: row > 0 for x in inputs.buckets for n, row in zip(x.modules, x.ranks, strict=True)}
    return Problem(tuple(spectra), metrics, tuple(order), table, np.stack([has[n] for n in order]), unit)
