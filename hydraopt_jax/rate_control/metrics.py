"""Metrics: second moments as the coordinates in which errors count alike.

With second moments of the modules' inputs, `C = E[x x.T]`, decompositions are those of `C^(1/2) @ delta`, so
that choices, gains and errors are those of the modules' outputs. With those of the gradients at their
outputs too, `G = E[g g.T]`, they are those of `C^(1/2) @ delta @ G^(1/2)`, whose squared norm is twice the
Kronecker-factored estimate of the KL divergence of the model's outputs (Martens and Grosse,
arXiv 1503.05671), and a module counts as much as it matters to them. What is stored is in the original
coordinates.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from hydraopt_jax.calibration import OUTPUT
from hydraopt_jax.codec import encode
from hydraopt_jax.errors import HydraOptError


class Metric(NamedTuple):
    """A second moment, scaled to a mean eigenvalue of 1.

    Attributes:
      values: `[n]` eigenvalues.
      vectors: `[n, n]` eigenvectors.
      scale: mean eigenvalue of the moment itself.
    """

    values: np.ndarray
    vectors: np.ndarray
    scale: float

    @property
    def root(self) -> np.ndarray:
        """The symmetric root `[n, n]`: in its coordinates errors count alike."""
        return (self.vectors * np.sqrt(self.values)) @ self.vectors.T


Metrics = tuple[Metric | None, Metric | None]


def unweigh(metric: Metric | None, a: np.ndarray) -> np.ndarray:
    """Vectors to be coded for given vectors in the metric's coordinates, both in steps.

    The plain inverse would spend bits on what inputs never excite. Keeping the part along an eigenvector of
    value l costs bits in proportion to the energy `e / l` that it adds, and is worth e: with the factor
    `g = l / (l + r)` on that part, `r = multiplier / (2 ln 2 variance)`, error plus bits are least.

    Args:
      metric: of that side of the module, None for none.
      a: `[A, n, S]`.
    """
    if metric is None:
        return a
    parts = metric.vectors.T @ a
    plain = parts / np.sqrt(metric.values)[:, None]
    variance = np.maximum((plain**2).mean(-2, keepdims=True), 1e-9)
    ridge = encode.MULTIPLIER / (2 * np.log(2) * variance)
    values = metric.values[:, None]
    return (metric.vectors @ (plain * values / (values + ridge))).astype(np.float32)


# the ridge of `unweigh` at a few bits a coefficient, for choices that are made before a step is known
USUAL_RIDGE = 0.07


def coordinates(metrics: Sequence[Metric | None], x: np.ndarray) -> np.ndarray:
    """Unit vectors `[M, T, I, R]` of M modules, about as `unweigh` will have them coded."""
    if metrics[0] is None:
        return x
    filters = [
        (y.vectors * (np.sqrt(y.values) / (y.values + USUAL_RIDGE))) @ y.vectors.T for y in metrics if y
    ]
    return np.einsum("mij,mtjr->mtir", np.stack(filters).astype(np.float32), x, optimize=True)


def metric(moment: np.ndarray, name: str, size: int) -> Metric:
    """The metric of a second moment; a small ridge keeps directions never seen from being free."""
    moment = np.asarray(moment, np.float64)
    moment = np.diag(moment) if moment.ndim == 1 else moment
    if moment.shape != (size, size):
        raise HydraOptError(
            f"calibration: {name} has shape {list(moment.shape)}, its module needs {[size, size]}"
        )
    if not np.isfinite(moment).all() or not np.trace(moment) > 0:
        raise HydraOptError(f"calibration: {name} is not a second moment (NaN, infinite or zero)")
    scale = float(np.trace(moment)) / size
    values, vectors = np.linalg.eigh((moment + moment.T) / (2 * scale))
    return Metric(np.maximum(values, 0) + 1e-4, vectors, scale)


def uncovered(shapes: Mapping[str, tuple[int, int]], calibration: Mapping[str, np.ndarray]) -> list[str]:
    """The modules, name -> (I, O), of which a calibration lacks a second moment, in order.

    Raises:
      HydraOptError: it has none of any module: its names are others.

    >>> uncovered({"q": (2, 2), "k": (2, 2)}, {"q": np.eye(2)})
    ['k']
    """
    if shapes and not any(n in calibration for n in shapes):
        name = next(iter(shapes))
        near = [n.removesuffix(OUTPUT) for n in calibration if ends_alike(n.removesuffix(OUTPUT), name)]
        near = near[:1] or difflib.get_close_matches(name, calibration, 1, 0) or ["none at all"]
        raise HydraOptError(
            f"calibration: no module is named as the adapters name theirs: it has {near[0]!r}, they have "
            f"{name!r}: rename its tensors, or collect it with rename="
        )
    both = any(n.endswith(OUTPUT) for n in calibration)
    return [n for n in shapes if n not in calibration or (both and n + OUTPUT not in calibration)]


def ends_alike(one: str, two: str) -> bool:
    """Whether one dotted name ends as the other.

    >>> ends_alike("layers.0.q", "model.layers.0.q"), ends_alike("layers.0.q", "layers.1.q")
    (True, False)
    """
    return f".{one}".endswith(f".{two}") or f".{two}".endswith(f".{one}")


def metrics_of(
    shapes: Mapping[str, tuple[int, int]], calibration: Mapping[str, np.ndarray]
) -> dict[str, Metrics]:
    """The metrics of modules, name -> (I, O), from second moments as in a calibration file.

    A second moment that is missing (see `uncovered`) is taken as the identity, as errors of weights have it,
    of the size that the others have on average (geometric mean of their mean eigenvalues).

    Raises:
      HydraOptError: a second moment of a wrong shape, or none.
    """
    both = any(n.endswith(OUTPUT) for n in calibration)

    def side(name: str, size: int) -> Metric:
        if name in calibration:
            return metric(calibration[name], name, size)
        return Metric(np.ones(size), np.eye(size), usual_scale(calibration, name.endswith(OUTPUT)))

    return {
        n: (side(n, inputs), side(n + OUTPUT, outputs) if both else None)
        for n, (inputs, outputs) in shapes.items()
    }


def usual_scale(calibration: Mapping[str, np.ndarray], outputs: bool) -> float:
    """Geometric mean of the mean eigenvalues of the second moments of inputs, or of output gradients.

    >>> usual_scale({"q": np.array([1.0, 1.0]), "k": np.diag([4.0, 4.0])}, False)
    2.0
    """
    known = [np.asarray(v) for n, v in calibration.items() if n.endswith(OUTPUT) == outputs]
    means = [float(np.mean(np.diag(v) if v.ndim == 2 else v)) for v in known]
    return float(np.exp(np.mean(np.log([x for x in means if np.isfinite(x) and x > 0] or [1.0]))))


def importance(metrics: Mapping[str, Metrics], modules: Sequence[str], norms: np.ndarray) -> np.ndarray:
    """Energy of each delta in the units of the model's outputs, `[M, T]`; ones where that is not known."""
    scales = np.zeros(len(modules))
    for i, n in enumerate(modules):
        left, right = metrics.get(n, (None, None))
        if left is None or right is None:
            return np.ones_like(norms)
        scales[i] = left.scale * right.scale
    return scales[:, None] * norms.astype(np.float64) ** 2


def weighed(
    metrics: Mapping[str, Metrics], modules: Sequence[str], a: np.ndarray, b: np.ndarray
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Factors `[M, T, I, R]` and `[M, T, R, O]` in the metrics' coordinates."""
    for side in (0, 1):
        chosen = [metrics[n][side] if n in metrics else None for n in modules]
        roots = [x.root.astype(np.float32) for x in chosen if x is not None]
        if roots and side == 0:
            a = np.einsum("mij,mtjr->mtir", np.stack(roots), a, optimize=True)
        elif roots:
            b = np.einsum("mtro,mop->mtrp", b, np.stack(roots), optimize=True)
    return jnp.asarray(a), jnp.asarray(b)
