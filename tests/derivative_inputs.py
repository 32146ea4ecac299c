"""What the cases of `derivative_cases` have in common: arrays, and what of an output is determined."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hydraopt_jax import forms
from hydraopt_jax.forms import Factors
from hydraopt_jax.linalg.decompose import Svd, matmul

T, I, O, R = 3, 9, 8, 2
LABELS = jnp.array([0, 1, 0])
TASKS = jnp.array([2, 0, 1, 1, -1])


class Case(NamedTuple):
    """A function of arrays and where it is differentiated; `plain` where `jnp.linalg` has the derivative."""

    function: Callable[..., Any]
    args: tuple[np.ndarray, ...]
    step: float = 1e-2
    tolerance: float = 1e-2
    plain: bool = True


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


A, B = normal(1, T, I, R), normal(2, T, R, O)
WEIGHTS = np.array([0.9, 1.4, 0.6], np.float32)
X = normal(3, 5, I)
TALL, SQUARE = normal(4, 2, 7, 4), normal(5, 2, 5, 5)
VALUES = np.array([[3.0, 1.2, 0.4, 0.1], [2.0, 1.0, 0.3, 0.2]], np.float32)


def symmetric(x: jax.Array) -> jax.Array:
    return (x + x.mT) / 2


def turned(u: jax.Array, keep: int = 1) -> jax.Array:
    """The projector on the first columns: what does not depend on their signs."""
    return matmul(u[..., :keep], u[..., :keep].mT)


def seen(found: Svd) -> Any:
    """What a decomposition determines: values, the product of leading parts, projectors."""
    lead = matmul(found.u[..., :1] * found.s[..., None, :1], found.v[..., :1, :])
    return found.s, lead, turned(found.u), turned(found.v.mT)


def dense(factors: Factors) -> jax.Array:
    return matmul(*forms.pair(factors))


def fit(found: tuple[Factors, forms.Info]) -> Any:
    """Deltas of the fit, and the numbers of its Info."""
    factors, info = found
    return dense(factors), info.error, info.energy, info.bound, info.trace


FACTORS = (A, B, WEIGHTS)
