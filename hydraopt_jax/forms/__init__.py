"""Forms: what may stand in for T deltas of one module, and how near it comes. Pure, differentiable.

`closed_form` has HydraOpt's form and each task's own SVD, `compound` forms made of these, `gradient` the
joint Optax loop for any `losses`; `similarity` and `estimates` say what can be expected.
"""

from hydraopt_jax.factors import Factors, count
from hydraopt_jax.forms.asked import Gradient, Hydra
from hydraopt_jax.forms.closed_form import (
    Info,
    add_cores,
    errors,
    hydra,
    pair,
    partition,
    present,
    separate,
    sure_tail,
    transpose,
)

__all__ = [
    "Factors",
    "Gradient",
    "Hydra",
    "Info",
    "add_cores",
    "count",
    "errors",
    "hydra",
    "pair",
    "partition",
    "present",
    "separate",
    "sure_tail",
    "transpose",
]
