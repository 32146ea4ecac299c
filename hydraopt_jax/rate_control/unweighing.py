"""What is coded of vectors in a metric's coordinates, and the filters of its errors."""

from collections.abc import Mapping, Sequence

import numpy as np

from hydraopt_jax.calibration import matrix_of
from hydraopt_jax.codec import encode, noise_shaping
from hydraopt_jax.rate_control.metrics import Metric, Metrics, damped

# filters are made for ridges that are so many octaves apart
OCTAVES = 3
# filters of a metric that are kept for the next pass
KEPT = 4


def unweigh(metric: Metric | None, a: np.ndarray) -> np.ndarray:
    """Vectors in the original coordinates for given vectors in the metric's, both in steps.

    The plain inverse would spend bits on directions that inputs never have. The part along an eigenvector of
    value l costs bits in proportion to the energy `e / l` that it adds, and reduces the error by e. The
    factor `g = l / (l + r)` on this part, `r = multiplier / (2 ln 2 variance)`, minimizes error plus bits.

    Args:
      metric: of this side of the module; None for none.
      a: `[A, n, S]`.
    """
    if metric is None:
        return a
    plain = metric.along(a) / np.sqrt(metric.values)[:, None]
    return filtered(metric, plain, ridges(plain, a.shape[-2]))


def ridges(plain: np.ndarray, size: int) -> np.ndarray:
    """The ridges `[A, 1, S]` that `unweigh` has for vectors of n entries, given as coefficients along the
    eigenvectors `[A, k, S]`."""
    variance = np.maximum((plain**2).sum(-2, keepdims=True) / size, 1e-9)
    return encode.MULTIPLIER / (2 * np.log(2) * variance)


def filtered(metric: Metric, plain: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """Vectors `[A, n, S]` of coefficients along the eigenvectors, with the factors of `unweigh`."""
    values = metric.values[:, None]
    return metric.back(plain * values / (values + ridge)).astype(np.float32)


def shapes_noise(metric: Metric | None) -> bool:
    """Whether errors have filters: those in a moment of at most `SHAPED` dimensions that is not diagonal."""
    return metric is not None and metric.filters is not None


def filters_at(metric: Metric, exponents: np.ndarray, live: np.ndarray) -> tuple[encode.Filters, np.ndarray]:
    """The filters of errors, and what vectors are multiplied by, `[A, 1, S]`.

    Error plus bits, as `unweigh` has them, are `e.T @ (M + r I) @ e` for an error e of what it returns.
    Vectors are multiplied by the root of what noise shaping leaves of this form, so that an error of a step
    counts as much as without it.

    Args:
      metric: see `shapes_noise`.
      exponents: `[A, S]` of the ridges r of the vectors, base 2.
      live: `[A, S]` bool, the vectors that have a filter; others are multiplied by 1.
    """
    wanted, of = np.unique(exponents[live], return_inverse=True)
    found = filters_of(metric, wanted.tolist())
    each, scale = np.full(live.shape, -1), np.ones(live.shape)
    each[live] = of
    scale[live] = np.sqrt([left for _, left in found])[of] if found else 1.0
    return encode.Filters(tuple(x for x, _ in found), each), scale[:, None]


def filters_of(metric: Metric, exponents: Sequence[float]) -> list[tuple[noise_shaping.Filter, float]]:
    """The filters of ridges `2^exponent`, and what each leaves of the form; `metric` keeps the latest."""
    known = metric.filters
    assert known is not None
    form = None
    found = []
    for k in exponents:
        # other threads may use the metric too
        one = known.pop(k, None)
        if one is None:
            form = whole_form(metric) if form is None else form
            one = noise_shaping.filter_of(form + 2.0**k * np.eye(len(form)))
        found.append(one)
        known[k] = one
    for k in list(known)[:-KEPT]:
        known.pop(k, None)
    return found


def forget_filters(metrics: Mapping[str, Metrics]) -> None:
    """Give back the memory of the filters that metrics keep."""
    for x in (x for sides in metrics.values() for x in sides):
        if x is not None and x.filters is not None:
            x.filters.clear()


def whole_form(metric: Metric) -> np.ndarray:
    """The moment `[n, n]` over its scale, damped; positive definite."""
    if metric.moment is None:
        assert metric.vectors is not None
        return (metric.vectors * metric.values) @ metric.vectors.T
    moment = matrix_of(metric.moment.astype(np.float64))
    form = (moment + moment.T) / (2 * metric.scale)
    identity = np.eye(len(form))
    try:
        # rounding may have made it indefinite
        np.linalg.cholesky(damped(form, identity / 2))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(form)
        form = (vectors * np.maximum(values, 0)) @ vectors.T
    return damped(form, identity)


def rounded(ridge: np.ndarray) -> np.ndarray:
    """Exponents `[A, S]` of ridges `[A, 1, S]`, so few different ones that few filters are made."""
    return np.rint(np.log2(ridge[:, 0]) / OCTAVES) * OCTAVES


def to_code(
    metric: Metric | None, a: np.ndarray, read: np.ndarray | None = None
) -> tuple[np.ndarray, encode.Filters | None]:
    """What is coded of vectors `[A, n, S]` in the metric's coordinates, both in steps, and the filters of its
    errors; `read` `[A]` are the factors that tasks read, None for all."""
    if metric is None or not shapes_noise(metric) or not a.size:
        return unweigh(metric, a), None
    plain = metric.along(a) / np.sqrt(metric.values)[:, None]
    exponents = rounded(ridges(plain, a.shape[-2]))
    out = filtered(metric, plain, 2.0 ** exponents[:, None])
    largest = np.abs(out).max(1)
    live = (largest > 0) & (largest < noise_shaping.LARGEST)
    if read is not None:
        live &= read[:, None]
    filters, scale = filters_at(metric, exponents, live)
    return (out * scale).astype(np.float32), filters


def before_rounding(metric: Metric | None, coded: np.ndarray, a: np.ndarray) -> np.ndarray:
    """What was rounded to coded vectors `[A, n, S]` of given ones in the metric's coordinates: `unweigh` of
    these, each entry less the errors before it as their filter has them."""
    if metric is None or not shapes_noise(metric) or not a.size:
        return unweigh(metric, a)
    plain = metric.along(a) / np.sqrt(metric.values)[:, None]
    live = np.asarray(a.any(1))
    # the ridges were those of vectors that had not been scaled
    _, scale = filters_at(metric, rounded(ridges(plain, a.shape[-2])), live)
    exponents = rounded(ridges(plain / scale, a.shape[-2]))
    filters, _ = filters_at(metric, exponents, live)
    out = filtered(metric, plain, 2.0 ** exponents[:, None]).swapaxes(1, 2)
    errors = coded.swapaxes(1, 2) - out
    for k, x in enumerate(filters.each):
        mine = filters.of == k
        out[mine] -= errors[mine].astype(np.float32) @ x.feedback.T
    return out.swapaxes(1, 2)
