"""The trade-off of a collection: bytes and errors of several methods, and Gaussian estimates.

Bytes of budgets are all bytes on disk. Plain methods write nothing: their bytes are those of factors and
scales alone, which favors them.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hydraopt_jax import adapters, devices
from hydraopt_jax.adapters import Adapter, Adapters
from hydraopt_jax.codec import fixed_rate
from hydraopt_jax.compression import compress
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats.memory_collection import in_memory
from hydraopt_jax.forms import Hydra, estimates
from hydraopt_jax.linalg import decompose
from hydraopt_jax.linalg.decompose import HostSvd, Svd, matmul
from hydraopt_jax.rate_control import engine
from hydraopt_jax.rate_control.distortion import relative
from hydraopt_jax.rate_control.options import Options
from hydraopt_jax.store import count, sizes
from hydraopt_jax.store.store import task_errors

FRACTIONS = (0.5, 0.25, 0.125, 0.0625, 0.03)
HYDRAOPT = "HydraOpt, fp16"
"""Label of the paper's form."""
OURS, ALONE = "hydraopt_jax", "hydraopt_jax, nothing shared"
# bit widths of the plain per-adapter SVD
WIDTHS = (16, 8, 4)


class Point(NamedTuple):
    """Bytes and errors of one method at one setting.

    Attributes:
      setting: the setting, such as "K = 3".
      bytes: stored bytes.
      mean: mean relative squared error over tasks and modules.
      worst: relative squared error of the worst task, averaged over its modules.
    """

    setting: str
    bytes: float
    mean: float
    worst: float


class Curve(NamedTuple):
    """Points of one method."""

    label: str
    points: tuple[Point, ...]


class Frontier(NamedTuple):
    """All curves of a collection.

    Attributes:
      reference: the fp16 bytes of the factors.
      fractions: budgets as fractions of the reference, descending.
      curves: curves of methods; the first is that of budgets.
      estimates: curves of Gaussian models (`forms.estimates`), which are no bounds.
      delta_rate: label -> Bjontegaard-delta rate of the curve of budgets against that curve, per cent; None
        if they have no error in common.
    """

    reference: int
    fractions: tuple[float, ...]
    curves: tuple[Curve, ...]
    estimates: tuple[Curve, ...]
    delta_rate: dict[str, float | None]


def summary(setting: str, size: float, errors: np.ndarray) -> Point:
    """The point of errors `[M, T]`, which are NaN where a task lacks a module."""
    return Point(setting, float(size), float(np.nanmean(errors)), float(task_errors(errors).max()))


@functools.partial(jax.jit, static_argnames="bits")
def rounded_directions(deltas: Svd, bits: int) -> tuple[Array, Array]:
    """Dequantized vectors of every direction: `x: [..., I, R]`, `y: [..., R, O]`."""
    root = jnp.sqrt(deltas.s)
    x, y = deltas.u * root[..., None, :], deltas.v * root[..., None]
    if bits == 16:
        return x.astype(jnp.float16).astype(jnp.float32), y.astype(jnp.float16).astype(jnp.float32)
    return fixed_rate.rounded(x, bits, axis=-2), fixed_rate.rounded(y, bits)


@jax.jit
def prefix_errors(deltas: Svd, x: Array, y: Array) -> Array:
    """Squared errors of the first 1, 2, ..., R rounded directions, `[..., R]`, without cancellation.

    With `p = u sqrt(s)`, `q = sqrt(s) v` the error of a kept direction is `(p - x) q + x (q - y)`, that of an
    omitted direction `p q`.
    """
    root = decompose.safe_sqrt(deltas.s)
    p, q = deltas.u * root[..., None, :], deltas.v * root[..., None]
    left, right = jnp.concatenate([p - x, x, p], -1), jnp.concatenate([q, q - y, q], -2)
    products = matmul(left.mT, left) * matmul(right, right.mT)
    kept = jnp.tril(jnp.ones((x.shape[-1],) * 2))
    chosen = jnp.concatenate([kept, kept, 1 - kept], -1)
    return jnp.maximum(jnp.einsum("ki,...ij,kj->...k", chosen, products, chosen, precision="highest"), 0.0)


@functools.partial(jax.jit, static_argnames="widths")
def errors_at_widths(deltas: Svd, widths: tuple[int, ...]) -> list[Array]:
    """`prefix_errors` of directions rounded to each of the bit widths, in one program per shape."""
    return [prefix_errors(deltas, *rounded_directions(deltas, bits)) for bits in widths]


def separate_curves(
    collection: Adapters, deltas: Sequence[Svd], widths: tuple[int, ...] = WIDTHS
) -> list[Curve]:
    """Curves of truncated SVDs per adapter, one per bit width: ranks 1 to R, one scale per vector.

    Args:
      collection: the adapters.
      deltas: decompositions of its buckets, `u: [M, T, I, R]`.
      widths: bits of an entry.
    """
    rank = max(x.a.shape[3] for x in collection.buckets)
    errors: list[list[list[np.ndarray]]] = [[[] for _ in range(rank)] for _ in widths]
    taken = np.zeros((len(widths), rank))
    for bucket, x in zip(collection.buckets, deltas, strict=True):
        energy = (np.asarray(x.s) ** 2).sum(-1)
        lengths = bucket.a.shape[2], bucket.b.shape[3]
        for w, squared in enumerate(jax.device_get(errors_at_widths(x, widths))):
            for s in range(rank):
                kept = np.minimum(s + 1, squared.shape[-1])
                lost = relative(squared[..., kept - 1], energy)
                errors[w][s].append(np.where(bucket.ranks > 0, lost, np.nan))
                vectors = int(np.minimum(bucket.ranks, s + 1).sum())
                taken[w, s] += sum(fixed_rate.size(vectors, n, widths[w]) for n in lengths)
    return [
        Curve(
            f"separate SVD, {bits} bits",
            tuple(summary(f"rank {s + 1}", taken[w, s], np.concatenate(errors[w][s])) for s in range(rank)),
        )
        for w, bits in enumerate(widths)
    ]


def hydra_point(collection: Sequence[Adapter], heads: int) -> Point:
    """The point of HydraOpt with `heads` heads: closed form, fp16, the adapters' rank."""
    kept = compress(collection, form=Hydra(heads=heads), dtype="float16")
    return summary(f"K = {heads}", 2 * count(kept), kept.errors)


@jax.jit
def mean_delta_errors(a: Array, b: Array) -> tuple[Array, Array]:
    """Squared errors of the mean delta truncated to the adapters' rank, and the energies, `[M, T]` each."""

    def one(a: Array, b: Array) -> tuple[Array, Array]:
        tasks, _, rank = a.shape
        mean = decompose.svd(decompose.wide(a), b.reshape(tasks * rank, -1) / tasks)
        x, y = mean.u[:, :rank] * mean.s[:rank], mean.v[:rank]
        energy = jax.vmap(decompose.inner)(a, b, a, b)
        cross = jax.vmap(decompose.inner, (0, 0, None, None))(a, b, x, y)
        return jnp.maximum(energy - 2 * cross + decompose.inner(x, y, x, y), 0.0), energy

    return jax.vmap(one)(a, b)


def merged(collection: Adapters) -> Curve:
    """The curve of one adapter for all tasks: the mean delta truncated to the adapters' rank, in fp16."""
    errors, size = [], 0
    for bucket in collection.buckets:
        squared, energy = (
            np.asarray(x) for x in mean_delta_errors(jax.device_put(bucket.a), jax.device_put(bucket.b))
        )
        lost = relative(squared, energy)
        # the error of a delta that is zero is relative to nothing
        errors.append(np.where((bucket.ranks > 0) & np.isfinite(lost), lost, np.nan))
        size += 2 * len(bucket.modules) * bucket.a.shape[3] * (bucket.a.shape[2] + bucket.b.shape[3])
    return Curve("merged (mean delta)", (summary("one adapter", size, np.concatenate(errors)),))


def under_budget(
    collection: Sequence[Adapter], fraction: float, share: bool, cache: dict[int, Any]
) -> Point | None:
    """The point of a store within a byte budget, all bytes on disk counted; None below the smallest store."""
    options = Options(budget=float(fraction), share=share)
    try:
        kept = engine.compress_to_target(in_memory(collection), options, cache=cache)
    except HydraOptError:
        return None
    return summary(f"budget {fraction:g}", sizes.measure_size(kept), kept.errors)


def compressed(
    collection: Sequence[Adapter],
    fractions: Sequence[float],
    heads: Sequence[int],
    progress: Callable[[int], None],
    beside: Sequence[Callable[[], Any]],
) -> tuple[list[Curve], list[Any]]:
    """Curves of stores within budgets, then the curve of HydraOpt; and results of the calls `beside`."""
    turn = threading.Lock()
    labels = {True: OURS, **({False: ALONE} if len(collection) > 1 else {})}
    caches: dict[bool, dict[int, Any]] = {share: {} for share in labels}

    def point(share: bool, fraction: float) -> Point | None:
        found = under_budget(collection, fraction, share, caches[share])
        with turn:
            progress(1)
        return found

    # the other points of a curve reuse the analysis of its first point
    first = devices.together([functools.partial(point, x, fractions[0]) for x in labels])
    calls: list[Callable[[], Any]] = [functools.partial(point, x, f) for x in labels for f in fractions[1:]]
    calls += [functools.partial(hydra_point, collection, k) for k in heads]
    found = devices.together([*calls, *beside])
    curves, more = [], len(fractions) - 1
    for n, (label, start) in enumerate(zip(labels.values(), first, strict=True)):
        points = [start, *found[n * more : (n + 1) * more]]
        curves.append(Curve(label, tuple(x for x in points if x is not None)))
    curves.append(Curve(HYDRAOPT, tuple(found[len(labels) * more : len(calls)])))
    return curves, found[len(calls) :]


def at_errors_of(collection: Sequence[Adapter], other: Curve) -> list[Point]:
    """Points of stores at the lowest error of another curve and above its highest error below 1."""
    errors = [p.mean for p in lower_envelope(other.points) if 0 < p.mean < 1]
    points = []
    # a store may have a lower error than its target
    for error in (errors[0], 1.3 * errors[-1]) if errors else ():
        kept = engine.compress_to_target(in_memory(collection), Options(max_error=error))
        points.append(summary(f"error {error:.3g}", sizes.measure_size(kept), kept.errors))
    return points


def cuts(tasks: int) -> tuple[int, ...]:
    """Numbers of heads to measure: 1 to T for up to 8 tasks, else powers of two and T."""
    if tasks <= 8:
        return tuple(range(1, tasks + 1))
    return (*(1 << k for k in range(tasks.bit_length()) if 1 << k < tasks), tasks)


def bjontegaard(curve: Curve, other: Curve) -> float | None:
    """Bjontegaard-delta rate in per cent: mean difference of log bytes at equal errors.

    A rate of -50 is half the bytes at the same error. Log bytes over log error are interpolated by monotone
    piecewise cubics and integrated over the common range of errors. A point of error 0 is lossless: with its
    bytes a curve reaches every error below its lowest positive error. Curves with one common error are
    compared there. Without a common error the result is None.

    Reference: G. Bjontegaard, Calculation of average PSNR differences between RD-curves, VCEG-M33, 2001.

    >>> line = Curve("a", tuple(Point("", 2.0 ** -k, 4.0 ** k, 0.0) for k in range(5)))
    >>> half = Curve("b", tuple(p._replace(bytes=p.bytes / 2) for p in line.points))
    >>> round(bjontegaard(half, line), 6)
    -50.0
    """
    sides = [lower_envelope(x.points) for x in (curve, other)]
    exact = [rows[0].bytes if rows and rows[0].mean == 0 else None for rows in sides]
    lossy = [[p for p in rows if p.mean > 0] for rows in sides]
    least = [float(np.log(rows[0].mean)) if rows else np.inf for rows in lossy]
    high = min(float(np.log(rows[-1].mean)) if rows else -np.inf for rows in lossy)
    low = max((x for x, lossless in zip(least, exact, strict=True) if lossless is None), default=min(least))
    if low < high:
        mine, theirs = (
            log_bytes(rows, lossless, low, high) for rows, lossless in zip(lossy, exact, strict=True)
        )
        return float(100 * (np.exp((mine - theirs) / (high - low)) - 1))
    if low == high:
        return float(100 * (np.exp(log_bytes_at(lossy[0], low) - log_bytes_at(lossy[1], low)) - 1))
    if exact[0] is not None and exact[1] is not None:
        return float(100 * (exact[0] / exact[1] - 1))
    return None


def log_bytes_at(points: Sequence[Point], x: float) -> float:
    """Log bytes at the log error `x`, which must be within the points' range."""
    from scipy.interpolate import PchipInterpolator

    if len(points) == 1:
        return float(np.log(points[0].bytes))
    return float(PchipInterpolator(np.log([p.mean for p in points]), np.log([p.bytes for p in points]))(x))


def log_bytes(points: Sequence[Point], lossless: float | None, low: float, high: float) -> float:
    """Integral of log bytes over log error from `low` to `high`; `lossless` bytes below the first point."""
    from scipy.interpolate import PchipInterpolator

    x, y = np.log([p.mean for p in points]), np.log([p.bytes for p in points])
    first = min(max(low, float(x[0])), high)
    total = 0.0 if lossless is None else (first - low) * float(np.log(lossless))
    return total + (float(PchipInterpolator(x, y).integrate(first, high)) if first < high else 0.0)


def lower_envelope(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in both bytes and mean error, by ascending error."""
    kept: list[Point] = []
    for p in sorted(points, key=lambda p: (p.mean, p.bytes)):
        if not kept or (p.bytes < kept[-1].bytes and p.mean > kept[-1].mean):
            kept.append(p)
    return kept


def frontier(
    collection: Sequence[Adapter],
    fractions: Sequence[float] = FRACTIONS,
    *,
    heads: Sequence[int] | None = None,
    baselines: Sequence[Curve] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> Frontier:
    """All curves of a collection.

    Args:
      collection: adapters of one base model.
      fractions: budgets of the first curve, as fractions of the fp16 bytes.
      heads: values of K of the HydraOpt curve; None for those of `cuts`.
      baselines: curves of other methods to add, see `merging.curves`.
      progress: called with 1 after each store of a budget.

    Returns:
      Frontier.
    """
    if len(fractions) == 0 or min(fractions) <= 0:
        raise HydraOptError("budgets of the frontier must be positive fractions of the fp16 bytes")
    adapters.check_types(collection)
    collection = [x.replace(extras={}) for x in collection]
    stacked = adapters.stack(collection)
    reference = 2 * stacked.size

    def others() -> tuple[list[Curve], dict[str, np.ndarray]]:
        """Curves of plain methods, and errors that models predict."""
        deltas = [decompose.batched_svd(*jax.device_put((x.a, x.b))) for x in stacked.buckets]
        plain = [*separate_curves(stacked, deltas), merged(stacked)]
        scaled = [relative_deltas(x) for x in deltas]
        return plain, estimates.errors_by_model(scaled, np.asarray(fractions) * reference)

    curves, [(plain, found)] = compressed(
        collection,
        fractions,
        heads if heads is not None and len(heads) else cuts(len(collection)),
        progress,
        [others],
    )
    ours = curves[0]
    curves += [*plain, *baselines]
    expected = [
        Curve(
            f"Gaussian estimate, {name}",
            tuple(
                Point(f"{f:g}", f * reference, float(v), float("nan"))
                for f, v in zip(fractions, values, strict=True)
            ),
        )
        for name, values in found.items()
    ]
    rates = {x.label: bjontegaard(ours, x) for x in curves[1:]}
    if rates[HYDRAOPT] is None:
        # no budget has an error of HydraOpt's curve: compress to errors of that curve
        paper = next(x for x in curves if x.label == HYDRAOPT)
        extended = ours._replace(points=ours.points + tuple(at_errors_of(collection, paper)))
        rates[HYDRAOPT] = bjontegaard(extended, paper)
    ordered = tuple(sorted({float(x) for x in fractions}, reverse=True))
    return Frontier(reference, ordered, tuple(curves), tuple(expected), rates)


def relative_deltas(deltas: Svd) -> HostSvd:
    """Decompositions of the deltas scaled to norm 1; zero deltas stay zero."""
    u, s, v = (np.asarray(x) for x in deltas)
    norms = np.linalg.norm(s, axis=-1, keepdims=True)
    return HostSvd(u, s / np.where(norms > 0, norms, 1.0), v)


def as_dict(x: Frontier) -> dict[str, Any]:
    """A frontier as a JSON-able object; `worst` is None where only the mean is known."""

    def row(p: Point) -> dict[str, Any]:
        worst = p.worst if np.isfinite(p.worst) else None
        return p._asdict() | {"worst": worst, "fraction": p.bytes / x.reference}

    def rows(curves: Sequence[Curve]) -> dict[str, Any]:
        return {c.label: [row(p) for p in c.points] for c in curves}

    return {
        "fp16_bytes": x.reference,
        "fractions": list(x.fractions),
        "curves": rows(x.curves),
        "estimates": rows(x.estimates),
        "bjontegaard_delta_rate_percent": x.delta_rate,
    }
