"""Collections of LoRA adapters as arrays: stacking, padding, buckets of equal shape.

Letters used throughout the package: T tasks, M modules of one shape, I inputs, O outputs, R adapter
rank, S stored rank, K heads. A module's kernel is `[I, O]` (`y = x @ kernel`), so that task t adds
`delta[t] = a[t] @ b[t]` with `a[t]: [I, R]`, `b[t]: [R, O]` and the LoRA scale folded into `b`.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax import strict_json
from hydraopt_jax.errors import HydraOptError, one_line
from hydraopt_jax.static import Static

# allowed range of the norms of factors and deltas; zero is allowed too
NORMS = (1e-15, 1e15)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """One task's LoRA adapter, in host memory; a pytree whose leaves are its arrays.

    Attributes:
      task: the task's name; any characters.
      a: module name -> input-side factor `[I, R]`.
      b: module name -> output-side factor `[R, O]`, the LoRA scale folded in.
      dtype: numpy name of the dtype the factors had on disk, such as "bfloat16".
      extras: full tensors that belong to the task (classifier heads, biases), by their original name.
      config: what the adapter's format needs to write it again (for PEFT: adapter_config.json).
      layout: module name -> how its format names and shapes the factors (empty for a linear layer).
      source: path or id it came from.
      digest: SHA-256 of the source's weights, hexadecimal; "" when it has no file.
      raw: module name -> `(a, b, scale)` as the format had them, where a store kept the adapter as it came,
        or where folding the scale into `b` has rounded it: its writer then writes them as they were, and a
        lossless store keeps them, unless `a` or `b` has been replaced since.
    """

    task: str
    a: Mapping[str, np.ndarray]
    b: Mapping[str, np.ndarray]
    dtype: str = "float32"
    extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = Static()
    layout: Mapping[str, Any] = Static()
    source: str = ""
    digest: str = ""
    raw: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        # static data of a pytree
        for name in ("config", "layout"):
            object.__setattr__(self, name, Static(getattr(self, name)))

    def replace(self, **changes: Any) -> "Adapter":
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)


class Bucket(NamedTuple):
    """All modules of one shape, stacked.

    Attributes:
      modules: the M module names.
      a: `[M, T, I, R]` float32; columns beyond a task's own rank are zero.
      b: `[M, T, R, O]` float32; rows beyond a task's own rank are zero.
      ranks: `[M, T]` int; 0 where the task lacks the module.
    """

    modules: tuple[str, ...]
    a: np.ndarray
    b: np.ndarray
    ranks: np.ndarray


class Adapters(NamedTuple):
    """A collection of adapters of one base model: task names and buckets."""

    tasks: tuple[str, ...]
    buckets: tuple[Bucket, ...]

    @property
    def size(self) -> int:
        """Count of factor entries, padding left out: sum over tasks and modules of R (I + O)."""
        return sum(int(x.ranks.sum()) * (x.a.shape[2] + x.b.shape[3]) for x in self.buckets)


def module_shapes(adapter: Adapter) -> dict[str, tuple[int, int]]:
    """Module name -> (I, O) of one adapter."""
    return {name: (a.shape[0], adapter.b[name].shape[1]) for name, a in adapter.a.items()}


def check(collection: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    """Check that adapters can be stored together; return module name -> (I, O).

    Raises:
      HydraOptError: no sequence of adapters, or an empty one, duplicate task names, factors that do not
        belong together, shapes that disagree, NaN or infinite values.
    """
    check_types(collection)
    for adapter in collection:
        check_factors(adapter)
    shapes = check_headers((x.task, x.source, x.config, module_shapes(x)) for x in collection)
    for adapter in collection:
        if not adapter.a:
            raise HydraOptError(f"{adapter.source or adapter.task}: holds no LoRA factor: leave it out")
        for name in adapter.a:
            for side, factor in (("input", adapter.a[name]), ("output", adapter.b[name])):
                if not np.isfinite(factor.astype(np.float32, copy=False)).all():
                    raise HydraOptError(
                        f"{adapter.source or adapter.task}: {name} has NaN or infinite values in its "
                        f"{side}-side factor: leave this adapter out or retrain it"
                    )
            check_size(adapter, name)
    return shapes


def check_types(collection: Sequence[Adapter]) -> None:
    """Raise for anything that is no sequence of adapters: one adapter, paths, a mapping of tasks."""
    if isinstance(collection, Adapter):
        raise HydraOptError(f"{collection.task}: one adapter, not a sequence: give [adapter]")
    if isinstance(collection, Mapping | Iterator):
        way = "list(adapters.values())" if isinstance(collection, Mapping) else "list(adapters)"
        raise HydraOptError(f"adapters: {type(collection).__name__}, not a sequence: give {way}")
    one = not isinstance(collection, Iterable) or isinstance(collection, str | os.PathLike)
    for x in [collection] if one else collection:
        if not isinstance(x, Adapter):
            said = one_line(repr(x), 60)
            raise HydraOptError(f"adapters: {said} is not an Adapter: hydraopt_jax.read reads folders")


def check_factors(adapter: Adapter) -> None:
    """Raise unless every module has two factors of real numbers, `[I, R]` and `[R, O]`, of one rank."""
    owner = adapter.source or adapter.task
    for name in sorted(adapter.a.keys() ^ adapter.b.keys()):
        raise HydraOptError(f"{owner}: {name} has one factor: give both a and b, or leave the module out")
    for name, a in adapter.a.items():
        one, two = np.shape(a), np.shape(adapter.b[name])
        if len(one) != 2 or len(two) != 2 or one[1] != two[0]:
            raise HydraOptError(
                f"{owner}: {name} has factors of shapes {list(one)} and {list(two)}: give a [in, rank] and "
                "b [rank, out]"
            )
        for factor in (a, adapter.b[name]):
            if np.iscomplexobj(factor):
                raise HydraOptError(f"{owner}: {name} has factors of {factor.dtype}: give real numbers")


# task, source, configuration, and module -> (I, O) of an adapter
Header = tuple[str, str, Mapping[str, Any], Mapping[str, tuple[int, int]]]


def check_headers(headers: Iterable[Header]) -> dict[str, tuple[int, int]]:
    """Check that adapters can be stored together by what is known without their factors; module -> (I, O).

    Raises:
      HydraOptError: no adapter, equal names, or shapes that disagree.
    """
    seen: dict[str, str] = {}
    owner: dict[str, str] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for task, source, config, own in headers:
        # a store keeps both as JSON
        if strict_json.fault(task):
            raise HydraOptError(f"task name {task!a} is not valid UTF-8: rename it with NAME=ADAPTER")
        if fault := strict_json.fault(dict(config)):
            raise HydraOptError(f"{source or task}: its configuration is not JSON: {fault}")
        if not task:
            raise HydraOptError(f"{source or 'an adapter'}: its task has no name: give one with NAME=ADAPTER")
        if task in seen:
            raise HydraOptError(
                f"task name {task!r} is used by both {seen[task]} and {source}: rename one with NAME=ADAPTER"
            )
        seen[task] = source or task
        for name, shape in own.items():
            if shapes.setdefault(name, shape) != shape:
                raise HydraOptError(
                    f"{name}: {task!r} has [in, out] = {list(shape)}, {owner[name]!r} has "
                    f"{list(shapes[name])}: adapters of one store must adapt one base model"
                )
            owner.setdefault(name, task)
    if not seen:
        raise HydraOptError("no adapter given: name at least one")
    return shapes


def check_size(adapter: Adapter, name: str) -> None:
    """Raise if float32 cannot hold the squares of the factors: errors are sums of squares."""
    norms = [norm(x[name]) for x in (adapter.a, adapter.b)]
    if any(x and not NORMS[0] < x < NORMS[1] for x in (*norms, norms[0] * norms[1])):
        raise HydraOptError(
            f"{adapter.source or adapter.task}: {name} has factors of norms {norms[0]:.0e} and {norms[1]:.0e}"
            ", beyond what float32 can square: set them to zero, or leave the module or the adapter out"
        )


def norm(x: np.ndarray) -> float:
    """Frobenius norm, computed in float64 only if float32 cannot hold its square."""
    flat = np.asarray(x, np.float32).ravel()
    square = float(np.vdot(flat, flat))
    if NORMS[0] ** 2 < square < NORMS[1] ** 2:
        return float(np.sqrt(square))
    return float(np.linalg.norm(flat.astype(np.float64)))


def module_ranks(collection: Sequence[Adapter], name: str) -> list[int]:
    """The T ranks of one module, 0 where a task lacks it."""
    return [x.a[name].shape[1] if name in x.a else 0 for x in collection]


def fill(collection: Sequence[Adapter], name: str, a: np.ndarray, b: np.ndarray) -> None:
    """Write one module's factors into zeroed `a: [T, I, R]`, `b: [T, R, O]`."""
    for t, (adapter, rank) in enumerate(zip(collection, module_ranks(collection, name), strict=True)):
        if rank:
            a[t, :, :rank] = adapter.a[name]
            b[t, :rank] = adapter.b[name]


def stack(collection: Sequence[Adapter]) -> Adapters:
    """Stack adapters into buckets of equal shape, padding mixed ranks with zeros (exact).

    Args:
      collection: adapters of one base model; tasks may lack modules and differ in rank.

    Returns:
      Adapters whose buckets hold `a: [M, T, I, R]` and `b: [M, T, R, O]`, with R the largest rank in the
      bucket; modules keep the order in which they first appear.

    Raises:
      HydraOptError: see `check`.

    >>> one = Adapter("one", {"q": np.ones((4, 2))}, {"q": np.ones((2, 3))})
    >>> two = Adapter("two", {"q": np.ones((4, 1))}, {"q": np.ones((1, 3))})
    >>> [x.a.shape for x in stack([one, two]).buckets]
    [(1, 2, 4, 2)]
    """
    shapes = check(collection)
    groups: dict[tuple[int, int], list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault(shape, []).append(name)
    buckets = []
    for (inputs, outputs), names in groups.items():
        ranks = np.array([module_ranks(collection, n) for n in names])
        width = max(int(ranks.max()), 1)
        a = np.zeros((len(names), len(collection), inputs, width), np.float32)
        b = np.zeros((len(names), len(collection), width, outputs), np.float32)
        for m, name in enumerate(names):
            fill(collection, name, a[m], b[m])
        buckets.append(Bucket(tuple(names), a, b, ranks))
    return Adapters(tuple(x.task for x in collection), tuple(buckets))


def layer_kind(module: str) -> str:
    """The kind of a module: the last part of its name that is not only digits, without digits.

    >>> layer_kind("model.layers.3.self_attn.q_proj"), layer_kind("encoder.blocks.fc1"), layer_kind("heads.2")
    ('q_proj', 'fc', 'heads')
    """
    parts = [re.sub(r"\d+", "", x) for x in module.split(".")]
    return next((x for x in reversed(parts) if x), module)
