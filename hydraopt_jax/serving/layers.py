"""Flax NNX: layers that serve every task of a store, and one task into a model's own LoRA parameters.

A batch that mixes tasks::

    modules = serving.load(store)
    serving.wrap(model, modules)
    graph, state = nnx.split(model)

    @jax.jit
    def forward(state, ids, tokens):
        model = nnx.merge(graph, state)
        serving.set_task_ids(model, ids)
        return model(tokens)
"""

import difflib
import fnmatch
import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from hydraopt_jax import store as stores
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.serving.apply import Module, apply, shape
from hydraopt_jax.store import Store

WRAPPABLE = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
Path = tuple[Any, ...]


class Stored(nnx.Variable):
    """The factors of a module: no `nnx.Param`, so that optimizers leave them alone unless told."""


class TaskIds(nnx.Variable):
    """The task of each row of the batch, one variable for all layers of a model; -1 is the base model."""


class Served(nnx.Module):
    """A layer plus the delta of each row's task: `base(x) + x @ delta[task_ids]`.

    Attributes:
      base: an `nnx.Linear`, `nnx.LinearGeneral` or `nnx.Einsum`.
      stored: the factors, a `serving.Module`.
      name: of the module in the store.
      task_ids: integers that broadcast to the axes of `x` that are not contracted, see `serving.apply`.
    """

    def __init__(
        self,
        base: nnx.Module,
        module: Module,
        task_ids: TaskIds,
        *,
        name: str = "",
        method: str | None = None,
    ):
        check_shape(name or "layer", base, module)
        self.base, self.name = base, name
        self.stored = Stored(module)
        self.task_ids = task_ids
        self.method = method

    def __call__(self, x: Array, *args: Any, task_ids: Any = None, **options: Any) -> Array:
        """The base layer's output plus the tasks' deltas; `task_ids` given here go before the model's."""
        y = self.base(x, *args, **options)
        ids = self.task_ids.get_value() if task_ids is None else task_ids
        equation = next((a for a in (*args, options.get("einsum_str")) if isinstance(a, str)), None)
        rows, restore = contraction(self.base, x, equation)
        delta = apply(rows, self.stored.get_value(), ids, method=self.method)
        return y + restore(delta).astype(y.dtype)


def contraction(
    base: nnx.Module, x: Array, equation: str | None = None
) -> tuple[Array, Callable[[Array], Array]]:
    """`x` as rows `[..., I]` of a layer's matrix, and how rows `[..., O]` become the layer's output."""
    if isinstance(base, nnx.Einsum):
        lhs, kernel, out = labels(equation or base.einsum_str, x.ndim)
        free, contracted, made = roles(lhs, kernel, out)
        rows = jnp.einsum(f"{lhs}->{free}{contracted}", x)
        size = dict(zip(kernel, base.kernel_shape, strict=True))
        lead, features = rows.shape[: len(free)], [size[c] for c in made]
        rows = rows.reshape(*lead, -1)
        return rows, lambda y: jnp.einsum(f"{free}{made}->{out}", y.reshape(*lead, *features))
    if isinstance(base, nnx.LinearGeneral):
        axes = sorted(a % x.ndim for a in base.axis)  # Flax takes them in this order
        rows = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
        lead = rows.shape[: x.ndim - len(axes)]
        return rows.reshape(*lead, -1), lambda y: y.reshape(*lead, *base.out_features)
    return x, lambda y: y


def labels(equation: str, ndim: int) -> tuple[str, str, str]:
    """Labels of inputs, kernel and outputs, an ellipsis spelt out for an input of `ndim` axes.

    >>> labels("...D, DH -> ...H", 3)
    ('abD', 'DH', 'abH')
    """
    inputs, rest = equation.replace(" ", "").split(",")
    kernel, outputs = rest.split("->")
    unused = (c for c in string.ascii_letters if c not in equation)
    spelt = "".join(c for c, _ in zip(unused, range(ndim - len(inputs) + 3), strict=False))
    return inputs.replace("...", spelt), kernel, outputs.replace("...", spelt)


def roles(inputs: str, kernel: str, outputs: str) -> tuple[str, str, str]:
    """Labels of the rows, of the contracted axes and of the new axes, the latter two in the kernel's order.

    >>> roles("BTNH", "NHD", "BTD")
    ('BT', 'NH', 'D')
    """
    free = "".join(c for c in inputs if c not in kernel)
    contracted = "".join(c for c in kernel if c in inputs and c not in outputs)
    made = "".join(c for c in kernel if c in outputs and c not in inputs)
    if len(contracted) + len(made) != len(kernel):
        raise HydraOptError(
            f"einsum {inputs},{kernel}->{outputs}: a kernel axis is in inputs and outputs, or in neither, so "
            "that the layer is no single matrix: leave it out of the patterns"
        )
    return free, contracted, made


def matrix(base: nnx.Module) -> tuple[int, int]:
    """I and O of a layer's kernel as a matrix.

    Raises:
      HydraOptError: a layer that is no single matrix.
    """
    if isinstance(base, nnx.Einsum):
        inputs, kernel, outputs = labels(base.einsum_str, len(base.einsum_str.split(",")[0]))
        size = dict(zip(kernel, base.kernel_shape, strict=True))
        _, contracted, made = roles(inputs, kernel, outputs)
        return math.prod(size[c] for c in contracted), math.prod(size[c] for c in made)
    if isinstance(base, nnx.LinearGeneral):
        if base.batch_axis:
            raise HydraOptError(
                "a LinearGeneral with batch_axis is no single matrix: leave it out of the patterns"
            )
        return math.prod(base.in_features), math.prod(base.out_features)
    if isinstance(base, nnx.Linear):
        return base.in_features, base.out_features
    raise HydraOptError(f"a {type(base).__name__} is not served: wrap Linear, LinearGeneral or Einsum")


def check_shape(path: str, base: nnx.Module, module: Module) -> None:
    """Refuse a layer and a module of different shapes, naming the path and both."""
    try:
        want = matrix(base)
    except HydraOptError as error:
        raise HydraOptError(f"{path}: {error}") from None
    have = shape(module)[1:]
    if want != have:
        raise HydraOptError(
            f"{path}: the model's layer has [in, out] = {list(want)}, the store's module {list(have)}: "
            "the store is of another base model"
        )


def dotted(path: Path) -> str:
    """A module's path as its name.

    >>> dotted(("layers", 0, "q_proj"))
    'layers.0.q_proj'
    """
    return ".".join(map(str, path))


def near(name: str, known: Iterable[str]) -> str:
    """Names to offer in an error."""
    names = list(known)
    return ", ".join(map(repr, difflib.get_close_matches(name, names, 3, 0.3) or names[:3])) or "none"


def wrap(
    model: nnx.Module,
    modules: Mapping[str, Module],
    patterns: Sequence[str] | None = None,
    *,
    rename: Callable[[str], str] = lambda path: path,
    method: str | None = None,
) -> list[str]:
    """Replace a model's layers, in place, by ones that serve every task of a store.

    Args:
      model: the model; its `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Einsum` layers can be wrapped.
      modules: `serving.load(store)`, or those of a `serving.Slots`' state.
      patterns: shell patterns of dotted module paths, such as `"layers.*.q_proj"`; None for every module of
        the store, none of which may then be without a layer.
      rename: model path -> the store's module name, where they differ.
      method: see `serving.apply`.

    Returns:
      Paths of the layers wrapped. All tasks are the base model until `set_task_ids`.

    Raises:
      HydraOptError: a pattern that matches no layer of the store, a module without a layer, shapes that
        differ.
    """
    layers = {dotted(path): (path, x) for path, x in nnx.iter_modules(model) if isinstance(x, WRAPPABLE)}
    served = {path: rename(path) for path in layers if rename(path) in modules}
    matches = lambda path, pattern: fnmatch.fnmatchcase(path, pattern)  # noqa: E731
    for pattern in patterns or ():
        if not any(matches(path, pattern) for path in served):
            other = any(matches(path, pattern) for path in layers)
            reason = "only layers the store has no module for" if other else "no layer"
            raise HydraOptError(
                f"pattern {pattern!r} matches {reason}: near paths are {near(pattern, served or layers)}"
            )
    if patterns is None:
        for name in modules:
            if name not in served.values():
                raise HydraOptError(
                    f"{name}: the model has no such Linear, LinearGeneral or Einsum (near paths are "
                    f"{near(name, layers)}): give patterns or rename"
                )
    chosen = [p for p in served if patterns is None or any(matches(p, x) for x in patterns)]
    for path in chosen:
        check_shape(path, layers[path][1], modules[served[path]])
    ids = TaskIds(jnp.array(-1, jnp.int32))
    for path in chosen:
        keys, base = layers[path]
        name = served[path]
        replace(model, keys, Served(base, modules[name], ids, name=name, method=method))
    return chosen


def replace(model: nnx.Module, path: Path, new: nnx.Module) -> None:
    """Put a module in the place of another."""
    *parents, last = path
    parent: Any = model
    for key in parents:
        parent = parent[key] if isinstance(key, int) else getattr(parent, key)
    if isinstance(last, int):
        parent[last] = new
    else:
        setattr(parent, last, new)


def set_task_ids(model: nnx.Module, task_ids: Any) -> None:
    """Say which task each row of the next batch is of, for all layers that `wrap` made.

    Raises:
      HydraOptError: the model has no such layer.
    """
    for layer in served_layers(model):
        layer.task_ids.set_value(jnp.asarray(task_ids))


def served_layers(model: nnx.Module) -> list[Served]:
    """The layers that `wrap` made.

    Raises:
      HydraOptError: the model has none.
    """
    layers = [x for _, x in nnx.iter_modules(model) if isinstance(x, Served)]
    if not layers:
        raise HydraOptError("the model serves no store: call serving.wrap first")
    return layers


def set_modules(model: nnx.Module, modules: Mapping[str, Module]) -> None:
    """Give all layers that `wrap` made other factors, such as those of slots after a load; shapes stay.

    Raises:
      HydraOptError: the model has no such layer, a layer without a module, shapes that differ.
    """
    for layer in served_layers(model):
        if layer.name not in modules:
            raise HydraOptError(f"{layer.name}: no such module: near names are {near(layer.name, modules)}")
        check_shape(layer.name, layer.base, modules[layer.name])
    for layer in served_layers(model):
        layer.stored.set_value(modules[layer.name])


def task_ids(tasks: Store | Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Task names as ids, `[N]` int32: positions among a store's tasks, or among those that were loaded.

    Raises:
      HydraOptError: an unknown name; near names are listed.
    """
    known = tasks.tasks if isinstance(tasks, Store) else tasks
    return np.array([stores.task_index(known, name) for name in names], np.int32)


def load_task(
    model: nnx.Module, store: Store, task: str, *, rename: Callable[[str], str] = lambda path: path
) -> list[str]:
    """Load one task, in place, into a model's own `nnx.LoRA` and `nnx.LoRALinear` parameters.

    Flax has no LoRA scale: `b` holds it. A task of a lower rank than the model's is padded with zeros, and a
    LoRA layer that the task has no module for is set to a zero delta.

    Args:
      model: the model.
      store: the store.
      task: the task's name.
      rename: model path of the layer (without a last `lora`) -> the store's module name, where they differ.

    Returns:
      Paths of the layers loaded.

    Raises:
      HydraOptError: an unknown task, a module without a LoRA layer, shapes that differ, a rank too small.
    """
    factors = stores.decode(store, task)
    layers = {}
    for keys, x in nnx.iter_modules(model):
        if isinstance(x, nnx.LoRA):
            layers[dotted(keys[:-1] if keys and keys[-1] == "lora" else keys)] = x
    names = {path: rename(path) for path in layers}
    for name in factors.a:
        if name not in names.values():
            raise HydraOptError(
                f"{name}: the model has no nnx.LoRA or nnx.LoRALinear there; near paths are "
                f"{near(name, layers)}"
            )
    values = {}
    for path, layer in layers.items():
        a, b = (np.zeros(x.shape, np.float32) for x in (layer.lora_a, layer.lora_b))
        if names[path] in factors.a:
            left, right = factors.a[names[path]], factors.b[names[path]]
            want, have = [a.shape[0], b.shape[1]], [left.shape[0], right.shape[1]]
            rank = left.shape[1]
            if want != have:
                raise HydraOptError(
                    f"{path}: the model's LoRA layer has [in, out] = {want}, the store's module {have}: the "
                    "store is of another base model"
                )
            if rank > a.shape[1]:
                raise HydraOptError(
                    f"{path}: the model's LoRA layer has rank {a.shape[1]}, task {task!r} needs {rank}: make "
                    f"the model with lora_rank={rank}"
                )
            a[:, :rank], b[:rank] = left, right
        values[path] = a, b
    for path, layer in layers.items():
        for variable, value in zip((layer.lora_a, layer.lora_b), values[path], strict=True):
            variable.set_value(jnp.asarray(value, variable.dtype))
    return [path for path in layers if names[path] in factors.a]
