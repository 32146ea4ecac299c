"""Forms: approximations of the T deltas of one module, with their errors. Pure and differentiable.

`closed_form` has HydraOpt's form and each task's own SVD, `diagonalization` cores between shared sides,
`gradient` the joint Optax loop for any of the `losses`. `similarity` and `estimates` predict what sharing
and coding can reach.
"""

from hydraopt_jax.factors import Factors, count
from hydraopt_jax.forms.closed_form import (
    Info,
    add_cores,
    hydra,
    pair,
    partition,
    present,
    separate,
    squared_errors,
    sure_tail,
    transpose,
)
from hydraopt_jax.forms.hyperparameters import Gradient, Hydra

__all__ = [
    "Factors",
    "Gradient",
    "Hydra",
    "Info",
    "add_cores",
    "count",
    "hydra",
    "pair",
    "partition",
    "present",
    "separate",
    "squared_errors",
    "sure_tail",
    "transpose",
]
