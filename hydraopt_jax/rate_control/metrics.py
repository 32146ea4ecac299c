"""Metrics: second moments as coordinates in which all errors have equal weight.

With second moments of the modules' inputs, `C = E[x x.T]`, the engine decomposes `C^(1/2) @ delta`, so that
choices, gains and errors refer to the modules' outputs. With second moments of the gradients at the outputs
too, `G = E[g g.T]`, it decomposes `C^(1/2) @ delta @ G^(1/2)`. The squared norm of this is twice the
Kronecker-factored estimate of the KL divergence of the model's outputs (Martens and Grosse, arXiv
1503.05671), so that modules are weighted by their effect on the outputs. Stored factors are in the original
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
        """The symmetric square root `[n, n]`, the map to coordinates of equal weight."""
        return (self.vectors * np.sqrt(self.values)) @ self.vectors.T


Metrics = tuple[Metric | None, Metric | None]


def unweigh(metric: Metric | None, a: np.ndarray) -> np.ndarray:
    """Vectors to code for given vectors in the metric's coordinates, both in steps.

    The plain inverse would spend bits on directions that inputs never have. The part along an eigenvector of
    value l costs bits in proportion to the energy `e / l` that it adds, and reduces the error by e. The
    factor `g = l / (l + r)` on this part, `r = multiplier / (2 ln 2 variance)`, minimizes error plus bits.

    Args:
      metric: of this side of the module; None for none.
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


# the ridge of `unweigh` at a few bits per coefficient, for choices before a step is known
USUAL_RIDGE = 0.07


def coordinates(metrics: Sequence[Metric | None], x: np.ndarray) -> np.ndarray:
    """Unit vectors `[M, T, I, R]` of M modules, approximately as `unweigh` will return them."""
    if metrics[0] is None:
        return x
    filters = [
        (y.vectors * (np.sqrt(y.values) / (y.values + USUAL_RIDGE))) @ y.vectors.T for y in metrics if y
    ]
    return np.einsum("mij,mtjr->mtir", np.stack(filters).astype(np.float32), x, optimize=True)


def metric(moment: np.ndarray, name: str, size: int) -> Metric:
    """The metric of a second moment, with a small ridge so that errors in unseen directions count too."""
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
    """The names of those modules, name -> (I, O), that lack a second moment in a calibration, in order.

    Raises:
      HydraOptError: the calibration has none of the modules; its names probably differ.

    >>> uncovered({"q": (2, 2), "k": (2, 2)}, {"q": np.eye(2)})
    ['k']
    """
    if shapes and not any(n in calibration for n in shapes):
        name = next(iter(shapes))
        near = [n.removesuffix(OUTPUT) for n in calibration if ends_alike(n.removesuffix(OUTPUT), name)]
        near = near[:1] or difflib.get_close_matches(name, calibration, 1, 0) or ["none at all"]
        raise HydraOptError(
            f"calibration: no tensor has the name of a module: it has {near[0]!r}, the adapters have "
            f"{name!r}: rename its tensors, or collect it with rename="
        )
    both = any(n.endswith(OUTPUT) for n in calibration)
    return [n for n in shapes if n not in calibration or (both and n + OUTPUT not in calibration)]


def ends_alike(one: str, two: str) -> bool:
    """Whether one dotted name is a suffix of the other.

    >>> ends_alike("layers.0.q", "model.layers.0.q"), ends_alike("layers.0.q", "layers.1.q")
    (True, False)
    """
    return f".{one}".endswith(f".{two}") or f".{two}".endswith(f".{one}")


def metrics_of(
    shapes: Mapping[str, tuple[int, int]], calibration: Mapping[str, np.ndarray]
) -> dict[str, Metrics]:
    """The metrics of modules, name -> (I, O), from second moments as in a calibration file.

    A missing second moment (see `uncovered`) is replaced by a multiple of the identity, as for errors of
    weights. The multiple is the geometric mean of the others' mean eigenvalues.

    Raises:
      HydraOptError: a second moment of a wrong shape, or no second moment at all.
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
    """Energy of each delta in units of the model's outputs, `[M, T]`; ones if unknown."""
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
