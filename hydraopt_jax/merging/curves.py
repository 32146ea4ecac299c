"""Curves of merging methods for the frontier: bytes of half-precision factors against errors of deltas."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from hydraopt_jax import forms
from hydraopt_jax.adapters import Adapter, module_ranks
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import Factors
from hydraopt_jax.linalg import decompose
from hydraopt_jax.merging import compressors, registry
from hydraopt_jax.merging.whole_adapters import (
    least_error_scale,
    merge_modules,
    relative_errors,
    squared_errors,
)
from hydraopt_jax.tradeoff import Curve, Point, cuts, summary

# "separate" is on every frontier already, at three bit widths; methods that need data are left out
BASELINES = tuple(k for k, v in registry.METHODS.items() if k != "separate" and not v.needs)
# widths of the shared bases, as multiples of the adapters' rank
WIDTHS = (1, 2, 4)


def parse_names(text: str) -> tuple[str, ...]:
    """Names of baselines from text: `all`, or names separated by commas.

    Raises:
      HydraOptError: an unknown method, or one that needs more than the adapters.

    >>> parse_names("ties, knots, ties")
    ('ties', 'knots')
    """
    names = BASELINES if text.strip() == "all" else tuple(dict.fromkeys(x.strip() for x in text.split(",")))
    for name in names:
        if name not in BASELINES:
            raise HydraOptError(f"baseline {name!r}: must be all, or some of {', '.join(BASELINES)}")
    return names


@jax.jit
def kept_errors(a: Array, b: Array, factors: Factors) -> tuple[Array, Array]:
    """Squared errors of factors that keep every task, and the energies of the deltas, `[T]` each."""
    return decompose.residual_energy(a, b, *forms.pair(factors)), decompose.inner(a, b, a, b)


def single(collection: Sequence[Adapter], name: str) -> Point:
    """The point of a method with one adapter for all tasks, at its best scale, see `least_error_scale`."""
    found = merge_modules(collection, name)
    scale, _ = least_error_scale(collection, found)
    scaled = {module: (left, right * np.float32(scale)) for module, (left, right) in found.items()}
    rows = relative_errors(collection, lambda m, a, b: squared_errors(a, b, *scaled[m]))
    size = sum(2 * (left.size + right.size) for left, right in found.values())
    return summary(f"one adapter, scale {scale:.3g}", size, np.stack(list(rows.values())))


def kept(collection: Sequence[Adapter], name: str, setting: str, **options: Any) -> Point:
    """The point of a method that keeps factors of every task, at one setting."""
    found = merge_modules(collection, name, **options)
    rows = relative_errors(collection, lambda m, a, b: kept_errors(a, b, found[m]))
    size = sum(compressors.entries(x, max(module_ranks(collection, m))) for m, x in found.items())
    return summary(setting, 2 * size, np.stack(list(rows.values())))


def settings(collection: Sequence[Adapter], name: str) -> dict[str, dict[str, Any]]:
    """Settings of a method that keeps factors of every task: name of the setting -> options."""
    tasks = len(collection)
    rank = max(x.shape[1] for adapter in collection for x in adapter.a.values())
    if name == "k-merge":
        return {f"K = {k}": {"slots": k} for k in cuts(tasks)}
    widths = [rank * k for k in WIDTHS if k == 1 or rank * k < rank * tasks]
    if name == "share":
        return {f"rank {s}": {"rank": s} for s in widths}
    groups = [1] + [max(2, tasks // 4)] * (tasks > 2)
    return {
        f"rank {s}" + f", {k} clusters" * (k > 1): {"rank": s, "clusters": k} for k in groups for s in widths
    }


def curves_of(
    collection: Sequence[Adapter], names: Sequence[str], progress: Callable[[int], None] = lambda done: None
) -> list[Curve]:
    """One curve per method: errors against each task's own delta; progress is called with 1 after each."""
    out = []
    for name in names:
        if registry.method_of(name).single:
            points = [single(collection, name)]
        else:
            points = [kept(collection, name, s, **x) for s, x in settings(collection, name).items()]
        out.append(Curve(name, tuple(points)))
        progress(1)
    return out
