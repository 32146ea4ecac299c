"""Metrics: second moments as coordinates in which all errors have equal weight.

With second moments of the modules' inputs, `C = E[x x.T]`, the engine decomposes `C^(1/2) @ delta`, so that
choices, gains and errors refer to the modules' outputs. With second moments of the gradients at the outputs
too, `G = E[g g.T]`, it decomposes `C^(1/2) @ delta @ G^(1/2)`. The squared norm of this is twice the
Kronecker-factored estimate of the KL divergence of the model's outputs (Martens and Grosse, arXiv
1503.05671), so that modules are weighted by their effect on the outputs. Stored factors are in the original
coordinates.

A large moment is not decomposed as a whole, which takes time cubic in its size, but within the Krylov space
of the factors that it weighs, `span(X, C X, ..., C^(m-1) X)` (block Lanczos: Golub and Underwood, 1977). In
it `C X` is exact, and filters of X converge in few steps; errors of decoded vectors, which lie outside of it,
are taken from the moment itself.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from hydraopt_jax.calibration import OUTPUT, matrix_of, moments
from hydraopt_jax.calibration.moments import diagonal_of, is_low_rank
from hydraopt_jax.codec import noise_shaping
from hydraopt_jax.errors import HydraOptError

# moments up to this size are decomposed as a whole; larger ones in a Krylov space of so many blocks, unless
# that has more than half of their dimensions
WHOLE, BLOCKS = 1024, 8
# an eigenvector of a Krylov space is one of the moment if C times it leaves it by less than this share
CONVERGED = 0.1
# errors have filters, three or four `[n, n]` in float32, for moments up to this size
SHAPED = 1536
# rows of a moment that are converted at a time
ROWS = 512


class Metric(NamedTuple):
    """A second moment, scaled to a mean eigenvalue of 1, of which `moments.DAMPING` is the identity.

    Attributes:
      values: `[k]` eigenvalues.
      vectors: `[n, k]` eigenvectors; None for a diagonal moment, whose eigenvectors are the axes.
      scale: mean eigenvalue of the moment itself.
      moment: `[n, n]` the moment itself, or `[n, 1 + K]` for it (see `calibration.matrix_of`), where the
        eigenvectors are those of a Krylov space, or where none are known and only inner products (`gram`) are
        taken; None else.
      stands_for: `[k]` how many of the n dimensions each eigenvector of a Krylov space stands for; None for
        one each.
      filters: exponent of the ridge -> filter, and what it leaves of the form: those used last, kept here
        by `filters_of`, as the next pass over the same part needs most of them again. None where errors have
        none, see `shapes_noise`.
    """

    values: np.ndarray
    vectors: np.ndarray | None
    scale: float
    moment: np.ndarray | None = None
    stands_for: np.ndarray | None = None
    filters: dict[float, tuple[noise_shaping.Filter, float]] | None = None

    def along(self, x: np.ndarray) -> np.ndarray:
        """Coefficients `[..., n, S]` of vectors along the eigenvectors."""
        return x if self.vectors is None else self.vectors.T @ x

    def back(self, x: np.ndarray) -> np.ndarray:
        """Vectors `[..., n, S]` with given coefficients along the eigenvectors."""
        return x if self.vectors is None else self.vectors @ x

    def weigh(self, x: np.ndarray) -> np.ndarray:
        """Vectors `[..., n, S]` in the coordinates of equal weight: the symmetric square root times `x`.

        In a Krylov space it is exact for the vectors that the space was made for, and so are inner products
        of these with others.
        """
        return self.back(np.sqrt(self.values)[:, None] * self.along(x))

    def weigh_rows(self, x: np.ndarray) -> np.ndarray:
        """`weigh` of row vectors `[..., S, n]`."""
        return self.weigh(x.swapaxes(-1, -2)).swapaxes(-1, -2)

    def gram(self, x: np.ndarray) -> np.ndarray:
        """Inner products `x.T @ C @ x`, `[..., S, S]`, of any vectors `[..., n, S]`."""
        if self.moment is None:
            weighed = self.weigh(x)
            return weighed.swapaxes(-1, -2) @ weighed
        return x.swapaxes(-1, -2) @ moment_product(self.moment, self.scale, x)


Metrics = tuple[Metric | None, Metric | None]


# the ridge of `unweigh` at a few bits per coefficient, for choices before a step is known
USUAL_RIDGE = 0.07


def coordinates(metrics: Sequence[Metric | None], x: np.ndarray) -> np.ndarray:
    """Unit vectors `[M, T, I, R]` of M modules, approximately as `unweigh` will return them."""
    if metrics[0] is None:
        return x
    gains = [(np.sqrt(y.values) / (y.values + USUAL_RIDGE))[:, None] for y in metrics if y]
    filtered = [y.back(g * y.along(z)) for y, g, z in zip(metrics, gains, x, strict=True) if y]
    return np.stack(filtered).astype(np.float32)


def moment_product(moment: np.ndarray, scale: float, x: np.ndarray) -> np.ndarray:
    """`C @ x` of a moment over its scale, damped; in float64, some rows of a moment at a time."""
    if is_low_rank(moment):
        root = moment[:, 1:].astype(np.float64)
        return damped((moment[:, :1].astype(np.float64) * x + root @ (root.T @ x)) / scale, x)
    parts = [moment[at : at + ROWS].astype(np.float64) @ x for at in range(0, len(moment), ROWS)]
    return damped(np.concatenate(parts, -2) / scale, x)


def damped(moment: np.ndarray, identity: np.ndarray | float) -> np.ndarray:
    """A moment of mean eigenvalue 1 with its share of the identity; or what both do to vectors.

    >>> damped(np.array([0.0, 1.0]), 1.0).tolist()
    [0.1, 1.0]
    """
    return (1 - moments.DAMPING) * moment + moments.DAMPING * identity


def metric(
    moment: np.ndarray, name: str, size: int, around: np.ndarray | None = None, inner: bool = False
) -> Metric:
    """The metric of a second moment.

    Args:
      moment: `[n]`, `[n, n]` or `[n, 1 + K]`.
      name, size: its name, for errors, and n.
      around: `[n, S]` vectors that it weighs; None for any.
      inner: only inner products will be taken: nothing is decomposed.
    """
    moment = np.asarray(moment)
    if moment.shape[:1] != (size,) or moment.ndim > 2 or moment.shape[-1] > size:
        raise HydraOptError(
            f"calibration: {name} has shape {list(moment.shape)}, its module needs {[size, size]}, "
            f"[{size}, 1 + K] with a smaller K, or {[size]}"
        )
    variances = diagonal_of(moment)
    if not beyond_diagonal(moment):
        moment = variances
    diagonal = moment.ndim == 1
    total = float(variances.sum())
    negative = is_low_rank(moment) and (moment[:, 0] < 0).any()
    if not np.isfinite(moment).all() or not 0 < total < np.inf or negative:
        raise HydraOptError(f"calibration: {name} is not a second moment (NaN, infinite, zero or negative)")
    scale = total / size
    if diagonal:
        return Metric(damped(np.maximum(moment.astype(np.float64) / scale, 0), 1.0), None, scale)
    if inner:
        return Metric(np.ones(size), None, scale, moment)
    filters: dict[float, tuple[noise_shaping.Filter, float]] | None = {} if has_filters(moment) else None
    if around is not None and size > WHOLE and 2 * BLOCKS * around.shape[1] <= size:
        basis, products = krylov_space(moment, scale, around)
        projected = basis.T @ products
        values, inside = np.linalg.eigh(projected)
        # C times the last block is all that leaves the space
        last = slice(-around.shape[1], None)
        beyond = products[:, last] - basis @ projected[:, last]
        residual = np.linalg.norm(np.linalg.qr(beyond)[1] @ inside[last], axis=0)
        energy = np.square(inside.T @ (basis.T @ around)).sum(1)
        stands_for = dimensions(energy, residual < CONVERGED * values, size)
        return Metric(np.maximum(values, moments.DAMPING), basis @ inside, scale, moment, stands_for, filters)
    moment = matrix_of(moment.astype(np.float64))
    values, vectors = np.linalg.eigh((moment + moment.T) / (2 * scale))
    return Metric(damped(np.maximum(values, 0), 1.0), vectors, scale, filters=filters)


def has_filters(moment: np.ndarray) -> bool:
    """Whether errors have filters: in a second moment of at most `SHAPED` dimensions that is not diagonal.

    >>> has_filters(np.ones((2, 2))), has_filters(np.eye(2))
    (True, False)
    """
    return np.ndim(moment) == 2 and len(moment) <= SHAPED and beyond_diagonal(moment)


def have_filters(modules: Iterable[str], calibration: Mapping[str, np.ndarray] | None) -> bool:
    """Whether errors of some of the modules have filters, on either side."""
    known = calibration or {}
    return any(has_filters(known[name]) for n in modules for name in (n, n + OUTPUT) if name in known)


def beyond_diagonal(moment: np.ndarray) -> bool:
    """Whether a moment has more than its diagonal."""
    if is_low_rank(moment):
        return bool(moment[:, 1:].any())
    return moment.ndim == 2 and bool(np.count_nonzero(moment) > np.count_nonzero(np.diagonal(moment)))


def krylov_space(moment: np.ndarray, scale: float, around: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An orthonormal basis `[n, BLOCKS * S]` of the Krylov space of vectors `[n, S]`, and `C` times it."""
    basis = np.zeros((len(around), 0))
    products = []
    block = around.astype(np.float64)
    for _ in range(BLOCKS):
        # once to remove what the basis has, and once again what remains of it after scaling, or all of it
        for _ in range(2):
            block = np.linalg.qr(block - basis @ (basis.T @ block))[0]
        basis = np.concatenate([basis, block], 1)
        block = moment_product(moment, scale, block)
        products.append(block)
    return basis, np.concatenate(products, 1)


def dimensions(energy: np.ndarray, converged: np.ndarray, size: int) -> np.ndarray:
    """How many of `size` dimensions each eigenvector of a Krylov space stands for, `[k]`.

    A converged one is an eigenvector of the moment itself. The others share the rest as the vectors that the
    space was made for do: the quadrature of Golub and Welsch (1969), which is that of the moment's spectrum
    for vectors that prefer none of its directions.

    Args:
      energy: `[k]` of those vectors along each eigenvector.
      converged: `[k]` bool.
      size: n.

    >>> dimensions(np.array([9.0, 1.0, 3.0]), np.array([True, False, False]), 5).tolist()
    [1.0, 1.0, 3.0]
    """
    rest = np.where(converged, 0, energy)
    left = size - np.count_nonzero(converged)
    return np.where(converged, 1.0, rest * (left / rest.sum() if rest.sum() > 0 else 0))


def uncovered(shapes: Mapping[str, tuple[int, int]], calibration: Mapping[str, np.ndarray]) -> list[str]:
    """The names of those modules, name -> (I, O), that lack a second moment in a calibration, in order.

    Raises:
      HydraOptError: the calibration has none of the modules; its names probably differ.

    >>> uncovered({"q": (2, 2), "k": (2, 2)}, {"q": np.eye(2)})
    ['k']
    """
    if shapes and not any(n in calibration for n in shapes):
        first, names = next(iter(shapes)), [n.removesuffix(OUTPUT) for n in calibration]
        alike = ((x, n) for x in shapes for n in names if ends_alike(n, x))
        near = difflib.get_close_matches(first, calibration, 1, 0) or ["none at all"]
        name, other = next(alike, (first, near[0]))
        raise HydraOptError(
            f"calibration: no tensor has the name of a module: it has {other!r}, the adapters have "
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
    shapes: Mapping[str, tuple[int, int]],
    calibration: Mapping[str, np.ndarray],
    around: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    inner: bool = False,
) -> dict[str, Metrics]:
    """The metrics of modules, name -> (I, O), from second moments as in a calibration file.

    A missing second moment (see `uncovered`) is replaced by a multiple of the identity, as for errors of
    weights. The multiple is the geometric mean of the others' mean eigenvalues.

    Args:
      shapes, calibration: the modules, and second moments by name.
      around: module -> the vectors `[I, S]` and `[O, S]` that its metrics weigh; None for any.
      inner: only inner products will be taken, as errors need: nothing is decomposed.

    Raises:
      HydraOptError: a second moment of a wrong shape, or no second moment at all.
    """
    both = any(n.endswith(OUTPUT) for n in calibration)

    def side(name: str, size: int, vectors: np.ndarray | None) -> Metric:
        if name in calibration:
            return metric(calibration[name], name, size, vectors, inner)
        return Metric(np.ones(size), None, usual_scale(calibration, name.endswith(OUTPUT)))

    given = around or {}
    return {
        n: (side(n, inputs, left), side(n + OUTPUT, outputs, right) if both else None)
        for n, (inputs, outputs) in shapes.items()
        for left, right in [given.get(n, (None, None))]
    }


def usual_scale(calibration: Mapping[str, np.ndarray], outputs: bool) -> float:
    """Geometric mean of the mean eigenvalues of the second moments of inputs, or of output gradients.

    >>> usual_scale({"q": np.array([1.0, 1.0]), "k": np.diag([4.0, 4.0])}, False)
    2.0
    """
    known = [np.asarray(v) for n, v in calibration.items() if n.endswith(OUTPUT) == outputs]
    means = [float(np.mean(diagonal_of(v))) for v in known]
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
) -> tuple[jax.Array, jax.Array]:
    """Factors `[M, T, I, R]` and `[M, T, R, O]` in the metrics' coordinates."""
    sides = [metrics.get(n, (None, None)) for n in modules]
    a = np.stack(
        [x if y is None else y.weigh(x).astype(np.float32) for x, (y, _) in zip(a, sides, strict=True)]
    )
    b = np.stack(
        [x if y is None else y.weigh_rows(x).astype(np.float32) for x, (_, y) in zip(b, sides, strict=True)]
    )
    return jax.device_put(a), jax.device_put(b)
