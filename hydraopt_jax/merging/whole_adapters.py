"""Merge a collection into one adapter: host code around the methods for one module."""

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hydraopt_jax import adapters
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.factors import without_zeros
from hydraopt_jax.linalg import decompose
from hydraopt_jax.merging import registry
from hydraopt_jax.merging.registry import Method
from hydraopt_jax.rate_control.distortion import relative

# name, `a: [T, I, R]`, `b: [T, R, O]`, ranks `[T]`
Module = tuple[str, np.ndarray, np.ndarray, np.ndarray]

# what PEFT looks for further tensors for, which a merged adapter does not have: heads and trainable tokens
_NOT_MERGED = ("modules_to_save", "trainable_token_indices")
_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# fields of a PEFT configuration that select modules; they are wrong for the union of several adapters
_TARGETS = ("layers_to_transform", "layers_pattern", "exclude_modules")


def check_single(name: str) -> None:
    """Raise for a method that keeps factors of every task."""
    if not registry.method_of(name).single:
        raise HydraOptError(
            f"method {name!r} keeps a part for each task and makes no single adapter: see hydraopt "
            f"compress, or hydraopt frontier --baselines {name}"
        )


def check_weights(weights: Sequence[float] | None, method: Method, tasks: int) -> np.ndarray:
    """One weight per task; the method's default if None.

    Raises:
      HydraOptError: the number of weights is not that of adapters, a weight is not a finite number, or it is
        negative and the method keeps something of every task: it counts errors or members then.
    """
    if weights is None:
        return np.full(tasks, 1.0 / tasks if method.mean and method.single else 1.0, np.float32)
    values = np.asarray(weights, np.float32)
    if values.shape != (tasks,):
        raise HydraOptError(f"{values.size} weights for {tasks} adapters: give one each")
    if not np.isfinite(values).all():
        raise HydraOptError(f"weights = {values.tolist()}: must be finite numbers")
    if not method.single and (values < 0).any():
        raise HydraOptError(f"weights = {values.tolist()}: must not be negative where tasks are kept apart")
    return values


@functools.lru_cache(maxsize=256)
def _jitted(function: Callable[..., Any], static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(functools.partial(function, **dict(static)))


def merge_module(
    method: Method, module: str, a: jax.Array, b: jax.Array, weights: jax.Array, options: Mapping[str, Any]
) -> Any:
    """The result of a method for one module, jitted if possible; masks depend on the module's name."""
    known = method.options
    traced: dict[str, Any] = {k: v for k, v in options.items() if k in ("key", "gram", "moments")}
    static = tuple(sorted((k, v) for k, v in options.items() if k in known and k not in traced))
    if "key" in known:
        traced["key"] = jax.random.fold_in(options["key"], zlib.crc32(module.encode()))
    if "moments" in traced:
        # one moment at a time on the device
        rows = [x[module] for x in traced.pop("moments")]
        return method.function(a, b, weights, moments=rows, **dict(static))
    return _jitted(method.function, static)(a, b, weights, **{k: v for k, v in traced.items() if k in known})


def stream(collection: Sequence[Adapter]) -> Iterator[Module]:
    """The modules of a collection, stacked one at a time; modules of one shape have one R."""
    shapes = {name: shape for x in collection for name, shape in adapters.module_shapes(x).items()}
    ranks = {name: np.array(adapters.module_ranks(collection, name)) for name in shapes}
    width: dict[tuple[int, int], int] = {}
    for name, shape in shapes.items():
        width[shape] = max(width.get(shape, 1), int(ranks[name].max()))
    for name, (inputs, outputs) in shapes.items():
        kept = width[inputs, outputs]
        a = np.zeros((len(collection), inputs, kept), np.float32)
        b = np.zeros((len(collection), kept, outputs), np.float32)
        adapters.fill(collection, name, a, b)
        yield name, a, b, ranks[name]


@jax.jit
def squared_errors(a: jax.Array, b: jax.Array, left: jax.Array, right: jax.Array) -> tuple[Any, Any]:
    """`||delta_t - left @ right||^2` and `||delta_t||^2`, `[T]` each, of one adapter for all tasks."""
    tasks = a.shape[0]
    left, right = (jnp.broadcast_to(x, (tasks, *x.shape)) for x in (left, right))
    return decompose.residual_energy(a, b, left, right), decompose.inner(a, b, a, b)


def relative_errors(
    collection: Sequence[Adapter], measure: Callable[[str, np.ndarray, np.ndarray], tuple[Any, Any]]
) -> dict[str, np.ndarray]:
    """Module name -> relative squared errors `[T]`, NaN where a task lacks it or its delta is zero.

    Args:
      collection: the adapters.
      measure: name, `a`, `b` -> squared errors and energies, `[T]` each.
    """
    rows = {}
    for module, a, b, ranks in stream(collection):
        lost, energy = (np.asarray(x) for x in measure(module, a, b))
        # an error is relative to a delta that is not zero
        rows[module] = np.where((ranks > 0) & (energy > 0), relative(lost, energy), np.nan)
    return rows


def merge_modules(
    collection: Sequence[Adapter],
    method: str,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    key: jax.Array | None = None,
    progress: Callable[[], Any] = lambda: None,
    **options: Any,
) -> dict[str, Any]:
    """Module name -> merged NumPy `(a, b)`, or Factors for methods that keep them; see `merge_adapters`."""
    shapes, chosen = adapters.check(collection), registry.method_of(method)
    given = {k: v for k, v in options.items() if v is not None}
    registry.check_options(method, given | ({} if rank is None else {"rank": rank}))
    w = jnp.asarray(check_weights(weights, chosen, len(collection)))
    moments = given.get("moments", ())
    if "moments" in given and len(moments) != len(collection):
        raise HydraOptError(f"{len(moments)} files of second moments for {len(collection)} adapters")
    for adapter, rows in zip(collection, moments, strict=False):
        for module in (x for x in shapes if x not in rows):
            raise HydraOptError(f"{module}: the second moments of {adapter.task!r} do not have it")
    if "gram" in chosen.options:
        # inner products of whole adapters
        gram = jax.jit(decompose.gram)
        given["gram"] = jnp.asarray(np.sum([gram(a, b) for _, a, b, _ in stream(collection)], 0))
    given["key"] = jax.random.key(0) if key is None else key
    out = {}
    for module, a, b, ranks in stream(collection):
        if "rank" in chosen.options:
            given["rank"] = max(int(ranks.max()), 1) if rank is None else rank
        found = merge_module(chosen, module, jnp.asarray(a), jnp.asarray(b), w, given)
        out[module] = jax.device_get(found)
        progress()
    return out


def merge_adapters(
    collection: Sequence[Adapter],
    method: str,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    scale: float = 1.0,
    key: jax.Array | None = None,
    progress: Callable[[], Any] = lambda: None,
    **options: Any,
) -> Adapter:
    """One adapter merged from several of one base model; memory is that of one module's deltas.

    Ranks may differ. A task without a module has delta zero there. Classifier heads and other full tensors
    are left out, because a mean of heads is of no use. "linear-factors" averages factors instead of deltas,
    see `sums.linear_factors`.

    Args:
      collection: the adapters.
      method: a name in `METHODS` that makes a single adapter.
      weights: one per task; None for 1 / T with methods that add and 1 with those that average.
      rank: S; None for the largest rank of the adapters in the module.
      scale: factor of the merged delta, such as the lambda of task arithmetic and TIES; see `best_scale`.
      key: PRNG key of random masks; None for seed 0.
      progress: called after each module.
      **options: of the method, such as density; None means the default. "regmean" needs moments: one mapping
        per task, module -> second moment.

    Returns:
      Adapter of the task "merged", with the configuration of the first adapter and the common dtype.

    Raises:
      HydraOptError: bad weights, options or method, or adapters that do not fit together.

    >>> from hydraopt_jax import synthetic
    >>> merged = merge_adapters(synthetic.collection(tasks=3), "linear", rank=2)
    >>> {x.shape for x in merged.a.values()}
    {(64, 2)}
    """
    check_single(method)
    if not math.isfinite(scale):
        raise HydraOptError(f"scale = {scale}: must be a finite number")
    found = merge_modules(
        collection, method, weights=weights, rank=rank, key=key, progress=progress, **options
    )
    a, b, layout = {}, {}, {}
    for module, (left, right) in found.items():
        low, high = without_zeros(left, right)
        a[module], b[module] = low, high * np.float32(scale)
        owner = next(x for x in collection if module in x.a)
        if module in owner.layout:
            layout[module] = owner.layout[module]
    config = {k: v for k, v in collection[0].config.items() if k not in _NOT_MERGED}
    if config.get("task_type") in _WITH_HEAD:
        config["task_type"] = None
    if len(a) > len(collection[0].a):
        config = {k: v for k, v in config.items() if k not in _TARGETS} | {"target_modules": sorted(a)}
    dtypes = {x.dtype for x in collection}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    return Adapter("merged", a, b, dtype=dtype, config=config, layout=layout)


def merged_errors(collection: Sequence[Adapter], merged: Adapter) -> np.ndarray:
    """Relative squared errors `[M, T]` of one adapter for all tasks, modules in the order of `merged.a`.

    NaN where a task lacks a module, or its delta is zero.
    """
    adapters.check(collection)
    rows = relative_errors(collection, lambda m, a, b: squared_errors(a, b, merged.a[m], merged.b[m]))
    return np.stack([rows[module] for module in merged.a])


@jax.jit
def products(
    a: jax.Array, b: jax.Array, left: jax.Array, right: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`<delta_t, merged>`, `||delta_t||^2`, both `[T]`, and `||merged||^2`."""
    return (
        decompose.inner(a, b, left, right),
        decompose.inner(a, b, a, b),
        decompose.inner(left, right, left, right),
    )


def least_error_scale(
    collection: Sequence[Adapter], found: Mapping[str, tuple[Any, Any]]
) -> tuple[float, float]:
    """The scale of a merged adapter with the least mean relative squared error, and that error.

    The papers tune this scale on data. For the error of weights it has a closed form. The error of a module
    of a task is `||delta - s M||^2 / ||delta||^2 = 1 - 2 s p + s^2 q`; its mean over modules and tasks is
    least at `s = mean(p) / mean(q)`.

    Args:
      collection: the adapters.
      found: module -> the merged adapter's `(a: [I, S], b: [S, O])`.
    """
    p = q = 0.0
    count = 0
    for module, a, b, _ in stream(collection):
        cross, energy, own = (np.asarray(x, np.float64) for x in products(a, b, *found[module]))
        inverse = np.divide(1.0, energy, out=np.zeros_like(energy), where=energy > 0)
        p += float((cross * inverse).sum())
        q += float((own * inverse).sum())
        count += int(np.count_nonzero(energy > 0))
    if not q > 0:
        return 1.0, 1.0
    return p / q, max(1.0 - p * p / (q * count), 0.0)


def best_scale(collection: Sequence[Adapter], merged: Adapter) -> tuple[float, float]:
    """The scale of a merged adapter with the least mean error over a collection, and that error.

    >>> from hydraopt_jax import synthetic
    >>> given = synthetic.collection(tasks=1)
    >>> scale, error = best_scale(given, merge_adapters(given, "linear", scale=4.0))
    >>> round(scale, 4), round(error, 4)
    (0.25, 0.0)
    """
    adapters.check(collection)
    return least_error_scale(collection, {m: (merged.a[m], merged.b[m]) for m in merged.a})
