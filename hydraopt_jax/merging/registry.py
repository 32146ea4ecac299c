"""Registry of merging methods: name, kind of result, options."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hydraopt_jax.errors import HydraOptError, suggest
from hydraopt_jax.merging import activations, compressors, sparse, spectral, sums


class Method(NamedTuple):
    """One method.

    Attributes:
      function: of one module, see `sums` and `compressors`.
      mean: whether default weights are 1 / T (the method adds) or 1 (it averages, or its paper sums).
      single: whether it returns one adapter for all tasks, or `forms.Factors`.
      needs: required arguments without a default, beside the rank and a key.
    """

    function: Callable[..., Any]
    mean: bool = False
    single: bool = True
    needs: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the function's keyword-only arguments."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(x.name for x in parameters if x.kind is x.KEYWORD_ONLY)


METHODS: Mapping[str, Method] = {
    "linear": Method(sums.linear, mean=True),
    "task-arithmetic": Method(sums.linear),
    "concatenation": Method(sums.concatenation),
    "linear-factors": Method(sums.linear_factors, mean=True),
    "magnitude": Method(sparse.magnitude, mean=True),
    "ties": Method(sparse.ties),
    "dare": Method(sparse.dare, mean=True),
    "dare-ties": Method(sparse.dare_ties),
    "della": Method(sparse.della),
    "breadcrumbs": Method(sparse.breadcrumbs, mean=True),
    "knots": Method(spectral.knots),
    "tsv-m": Method(spectral.tsv_m),
    "iso-c": Method(spectral.iso_c),
    "core-space": Method(spectral.core_space),
    "regmean": Method(activations.regmean, needs=("moments",)),
    "k-merge": Method(compressors.k_merge, single=False),
    "jd-full": Method(compressors.joint_diagonalization, single=False),
    "jd-diag": Method(functools.partial(compressors.joint_diagonalization, diagonal=True), single=False),
    "share": Method(compressors.share, single=False),
    "separate": Method(compressors.separate, single=False),
}
"""Name -> method."""

# options that are counts, and options that are fractions: (lowest, whether the lowest is allowed, highest)
COUNTS = ("rank", "keep", "slots", "clusters")
FRACTIONS = {"density": (0.0, False, 1.0), "outliers": (0.0, True, 1.0), "off_diagonal": (0.0, True, 1.0)}


def method_of(name: str) -> Method:
    """The method of a name.

    Raises:
      HydraOptError: an unknown name; the message lists similar names, or all.
    """
    if name not in METHODS:
        raise HydraOptError(f"method {name!r}: {suggest(name, METHODS)}")
    return METHODS[name]


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise for options that a method does not take, and for values out of range.

    Raises:
      HydraOptError: the message names the option.
    """
    method = method_of(name)
    for option, value in options.items():
        if option not in method.options:
            known = ", ".join(x for x in method.options if x not in ("key", "gram")) or "no option"
            raise HydraOptError(f"{option}: {name} takes {known}")
        if option in COUNTS and value < 1:
            raise HydraOptError(f"{option} = {value}: must be at least 1")
        if option in FRACTIONS:
            low, closed, high = FRACTIONS[option]
            if not (math.isfinite(value) and (low <= value if closed else low < value) and value <= high):
                left = "[" if closed else "("
                raise HydraOptError(f"{option} = {value:g}: must lie in {left}{low:g}, {high:g}]")
    for option in method.needs:
        if option not in options:
            raise HydraOptError(f"{name} needs {option}: give them, or choose another method")
