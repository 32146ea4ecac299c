"""The errors that Gaussian models expect of a collection at a size, in the metric that is minimized."""

import numpy as np

from hydraopt_jax.forms import estimates
from hydraopt_jax.forms.estimates import Components
from hydraopt_jax.rate_control.analysis import Spectrum
from hydraopt_jax.rate_control.metrics import Metric, Metrics, importance
from hydraopt_jax.rate_control.problem import Problem

# variances that the samples of a module's vectors are told apart by: each is of as many samples as all with
# larger eigenvalues
VARIANCES = 8


def expected_errors(problem: Problem, size: float) -> dict[str, float]:
    """Mean relative squared error that each model of `forms.estimates` expects at `size` bytes: of weights,
    or of outputs with metrics."""
    components = weights = None
    if problem.metrics:
        components = [components_of(x, problem) for x in problem.spectra]
        weights = [importance(problem.metrics, x.modules, x.norms) / problem.unit for x in problem.spectra]
        weights = [np.where(x > 0, x, 1.0) for x in weights]
    deltas = [x.deltas for x in problem.spectra]
    found = estimates.errors_by_model(deltas, np.array([size]), components, weights)
    return {k: float(f"{v[0]:.6g}") for k, v in found.items()}


def components_of(x: Spectrum, problem: Problem) -> tuple[Components, Components]:
    """The components of the inputs and outputs of modules of one shape, `[M, C]`."""
    u, s, v = x.deltas
    metrics: list[Metrics] = [problem.metrics.get(n, (None, None)) for n in x.modules]
    found = []
    for side, vectors in zip(zip(*metrics, strict=True), (u, v.swapaxes(2, 3)), strict=True):
        each = [side_components(y, z) for y, z in zip(side, vectors * s[..., None, :], strict=True)]
        found.append(Components(*(np.stack(y).astype(np.float32) for y in zip(*each, strict=True))))
    return found[0], found[1]


def side_components(metric: Metric | None, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and variances `[C]` of the samples of vectors `[T, n, R]`, in a metric's coordinates.

    Samples are those along the metric's eigenvectors. Their variances are means over all vectors and over
    neighboring eigenvalues: those of single samples of a few vectors would be too uneven, and the estimate
    too low.

    >>> samples, variance = side_components(None, np.ones((1, 256, 1)))
    >>> samples.tolist(), float(samples @ variance)
    ([2.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0], 1.0)
    """
    size = vectors.shape[1]
    along = vectors if metric is None else metric.along(vectors)
    energy = np.square(along, dtype=np.float64).sum((0, 2))
    stands_for = None if metric is None else metric.stands_for
    each = np.ones(len(energy)) if stands_for is None else stands_for
    order = np.arange(len(energy)) if metric is None else np.argsort(-metric.values)
    upto = np.cumsum(each[order])
    ends = [np.searchsorted(upto, round(size / 2**k), side="right") for k in range(VARIANCES - 1, 0, -1)]
    parts = np.split(energy[order], ends)
    samples = np.array([x.sum() for x in np.split(each[order], ends)])
    total = energy.sum()
    if metric is None or not total > 0:
        return samples, np.full(VARIANCES, 1 / size)
    share = np.array([p.sum() for p in parts]) / total
    return samples, np.divide(share, samples, out=np.zeros(VARIANCES), where=samples > 0)
