"""Measured errors of decoded stores against the original adapters."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hydraopt_jax.adapters import Adapter, check, check_types
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.factors import Factors, task_pair
from hydraopt_jax.static import Static
from hydraopt_jax.store.decoding import decode_terms
from hydraopt_jax.store.store import Segment, Source, Store

# `a: [I, R]`, `b: [R, O]`
Product = tuple[np.ndarray, np.ndarray]

if TYPE_CHECKING:  # it needs JAX, which nothing here does
    from hydraopt_jax.rate_control.metrics import Metrics


def measure(
    store: Store, collection: Sequence[Adapter], metrics: "Mapping[str, Metrics] | None" = None
) -> dict[str, float]:
    """Task -> measured mean relative squared error of a stored task against the adapter of the same name.

    Errors are those of weights; with metrics (`metrics.metrics_of`) those of the modules' outputs.

    Raises:
      HydraOptError: an adapter whose task is not in the store, that changes other modules, or that no store
        could have, see `adapters.check`.
    """
    check_types(collection)
    out = {}
    for x in collection:
        check([x])
        terms = decode_terms(store, [x.task])
        unknown = {n for n in set(x.a) - set(store.shapes) if x.a[n].any() and x.b[n].any()}
        if unknown:
            raise HydraOptError(f"{x.task!r}: the store has no module {min(unknown)}")
        out[x.task] = float(np.mean(list(module_errors(terms, 0, x, metrics).values())))
    return out


def error_table(
    terms: Mapping[str, Sequence[Factors]],
    collection: Sequence[Adapter],
    modules: Sequence[str],
    metrics: "Mapping[str, Metrics] | None" = None,
) -> np.ndarray:
    """Measured relative squared errors `[M, T]` of decoded terms, with the tasks of the collection."""
    rows = [module_errors(terms, t, x, metrics) for t, x in enumerate(collection)]
    return np.array([[x.get(n, np.nan) for x in rows] for n in modules], np.float64)


def segment_terms(segment: Segment, before: Sequence[Segment] = ()) -> dict[str, tuple[Factors, ...]]:
    """The decoded terms of a segment for all its tasks, by module.

    Args:
      segment: in a store or not.
      before: the earlier segments of the store, if it refers to them.
    """
    nothing = Source("float32", Static(), Static(), "", "")
    alone = Store((*before, segment), segment.tasks, (nothing,) * len(segment.tasks), Static())
    return decode_terms(alone)


def with_errors(
    segment: Segment,
    collection: Sequence[Adapter],
    output_errors: np.ndarray | None = None,
    before: Sequence[Segment] = (),
) -> Segment:
    """The segment with its measured errors of weights, and with given errors of outputs."""
    return segment.with_errors(
        error_table(segment_terms(segment, before), collection, list(segment.modules)), output_errors
    )


def module_errors(
    terms: Mapping[str, Sequence[Factors]],
    task: int,
    adapter: Adapter,
    metrics: "Mapping[str, Metrics] | None" = None,
) -> dict[str, float]:
    """Measured relative squared error of each module of an adapter; see `measure`."""
    out = {}
    for name, a in adapter.a.items():
        b = adapter.b[name]
        pair = task_pair(terms.get(name, ()), task)
        a_hat, b_hat = (np.zeros_like(a), np.zeros_like(b)) if pair is None else pair
        if (a_hat.shape[0], b_hat.shape[1]) != (a.shape[0], b.shape[1]):
            raise HydraOptError(
                f"{adapter.task!r}: {name} has another shape in the store: it is of another base model"
            )
        found = (metrics or {}).get(name, (None, None))
        plain = all(x is None for x in found)
        out[name] = (
            relative_error(a, b, a_hat, b_hat) if plain else output_error(found, (a, b), (a_hat, b_hat))
        )
    return out


def output_error(metrics: "Metrics", true: Product, found: Product) -> float:
    """Relative squared error of `a b` in the metrics, by inner products of the factors of the difference."""
    rank = true[0].shape[1]
    left = np.concatenate([true[0], -found[0]], 1, dtype=np.float64)
    right = np.concatenate([true[1], found[1]], 0, dtype=np.float64).T
    one, two = (x.T @ x if y is None else y.gram(x) for x, y in zip((left, right), metrics, strict=True))
    product = one * two
    energy = float(product[:rank, :rank].sum())
    return float(relative(np.array(max(float(product.sum()), 0.0)), np.array(energy)))


def relative(error: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """`error / energy`; 0 for a zero delta that was decoded to zero. NaN is reserved for absent tasks."""
    return np.divide(error, energy, out=np.where(error > 0, np.inf, 0.0), where=energy > 0)


def relative_error(a: np.ndarray, b: np.ndarray, a_hat: np.ndarray, b_hat: np.ndarray) -> float:
    """`||a b - a_hat b_hat||^2 / ||a b||^2` in float64 on the host."""
    a, b, a_hat, b_hat = (np.asarray(x, np.float64) for x in (a, b, a_hat, b_hat))
    r = np.asarray(np.linalg.qr(np.concatenate([a, -a_hat], 1), mode="r"))
    error = float(np.sum((r @ np.concatenate([b, b_hat], 0)) ** 2))
    energy = float(np.sum((r[:, : a.shape[1]] @ b) ** 2))
    return float(relative(np.array(error), np.array(energy)))
