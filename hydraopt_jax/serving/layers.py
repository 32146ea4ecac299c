"""Flax NNX: layers that serve all tasks of a store; and loading one task into a model's LoRA parameters.

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

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from hydraopt_jax import store as stores
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.errors import HydraOptError, near
from hydraopt_jax.formats import trees
from hydraopt_jax.formats.dialects import DIALECTS
from hydraopt_jax.formats.families import Name
from hydraopt_jax.nnx_layers import Path, contraction, dotted, is_layer, matrix, replace
from hydraopt_jax.serving.loading import check_base_of
from hydraopt_jax.serving.mixed_tasks import Module, apply, shape
from hydraopt_jax.store import Store


class Stored(nnx.Variable):
    """The factors of a module. Not an `nnx.Param`, so that optimizers do not update them by default."""


class TaskIds(nnx.Variable):
    """The task of each row of the batch, one variable for all layers of a model; -1 is the base model."""


class Served(nnx.Module):
    """A layer plus the delta of each row's task: `base(x) + x @ delta[task_ids]`.

    Attributes:
      base: the wrapped layer, see `wrap`; unknown attributes are looked up in it.
      stored: the factors, a `serving.Module` per name; None for a module that is not in the store.
      name: of the module in the store, or of the modules that share the layer's kernel.
      task_ids: integers that broadcast to the axes of `x` that are not contracted, see `serving.apply`.
    """

    def __init__(
        self,
        base: nnx.Module,
        parts: Sequence[Module | None],
        task_ids: TaskIds,
        *,
        name: Name = "",
        method: str | None = None,
    ):
        check_shape(names_of(name)[0] or "layer", base, parts)
        self.base, self.name, self.stored = base, name, Stored(tuple(parts))
        self.task_ids, self.method = task_ids, method

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "base" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)

    def __call__(self, x: Array, *args: Any, task_ids: Any = None, **options: Any) -> Array:
        """The base layer's output plus the tasks' deltas; `task_ids` given here override the model's."""
        y = self.base(x, *args, **options)
        ids = self.task_ids.get_value() if task_ids is None else task_ids
        equation = next((a for a in (*args, options.get("einsum_str")) if isinstance(a, str)), None)
        rows, restore = contraction(self.base, x, equation)
        parts = self.stored.get_value()
        deltas = [None if x is None else apply(rows, x, ids, method=self.method) for x in parts]
        found = next(x for x in deltas if x is not None)
        delta = jnp.concatenate([jnp.zeros_like(found) if x is None else x for x in deltas], -1)
        return y + restore(delta).astype(y.dtype)


def check_shape(path: str, base: nnx.Module, parts: Sequence[Module | None]) -> None:
    """Raise if a layer and its modules have different shapes; the message has the path and both shapes."""
    try:
        inputs, outputs = matrix(base)
    except HydraOptError as error:
        raise HydraOptError(f"{path}: {error}") from None
    for module in (x for x in parts if x is not None):
        have, (width, rest) = shape(module)[1:], divmod(outputs, len(parts))
        if rest or have != (inputs, width):
            shared = f" of {len(parts)} modules" if len(parts) > 1 else ""
            raise HydraOptError(
                f"{path}: the model's layer{shared} has [in, out] = {[inputs, outputs]}, the store's module "
                f"{list(have)}: the store is of another base model"
            )


def names_of(name: Name) -> tuple[str, ...]:
    """Names of the modules of a layer."""
    return name if isinstance(name, tuple) else (name,)


def factors_of(name: Name, modules: Mapping[str, Module]) -> tuple[Module | None, ...]:
    """Factors of the modules of a layer; None for a module that is missing."""
    return tuple(modules.get(x) for x in names_of(name))


def wrap(
    model: nnx.Module,
    modules: Mapping[str, Module],
    patterns: Sequence[str] | None = None,
    *,
    rename: Callable[[str], Name] = lambda path: path,
    method: str | None = None,
) -> list[str]:
    """Replace a model's layers, in place, by layers that serve all tasks of a store; return their paths.

    Args:
      model: the model. A layer of any class can be wrapped if it has a parameter `kernel` or `w` and
        describes its product: by an `einsum_str` (`nnx.Einsum`, Tunix' layers), or by `in_features` and
        `out_features`, with an `axis` if these are several (`nnx.Linear`, `nnx.LinearGeneral`).
      modules: `serving.load(store)`, or the modules of the state of `serving.Slots`.
      patterns: one or more shell patterns of dotted module paths, such as `"layers.*.q_proj"`; None for all
        modules of the store, each of which must then have a layer.
      rename: model path -> module name in the store, if they differ; a tuple of names if modules of equal
        width share the kernel, one after another along its outputs (keys and values of Gemma).
        `formats.hugging_face_name` returns this function for known model families.
      method: see `serving.apply`.

    Returns:
      Paths of the wrapped layers. All rows are of the base model until `set_task_ids` is called.

    Raises:
      HydraOptError: a pattern that matches no layer of the store, a module without a layer, a layer that
        serves a store, a model that is itself a layer, or shapes that differ.
    """
    layers = {dotted(path): (path, x) for path, x in layers_of(model).items()}
    served = {path: rename(path) for path in layers}
    served = {path: name for path, name in served.items() if any(factors_of(name, modules))}
    matches = lambda path, pattern: fnmatch.fnmatchcase(path, pattern)  # noqa: E731
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns or ():
        if not any(matches(path, pattern) for path in served):
            other = any(matches(path, pattern) for path in layers)
            reason = "only layers the store has no module for" if other else "no layer"
            raise HydraOptError(
                f"pattern {pattern!r} matches {reason}: near paths are {near(pattern, served or layers)}"
            )
    if patterns is None:
        known = {x for name in served.values() for x in names_of(name)}
        for name in modules:
            if name not in known:
                raise HydraOptError(
                    f"{name}: the model has no such layer (near paths are {near(name, layers)}): give "
                    "patterns or rename"
                )
    chosen = [p for p in served if patterns is None or any(matches(p, x) for x in patterns)]
    for path in chosen:
        keys, layer = layers[path]
        if not keys:
            raise HydraOptError("the model is itself a layer: wrap a module that has it as an attribute")
        if isinstance(layer, Served):
            raise HydraOptError(f"{path}: already serves a store: set_modules gives it other factors")
        check_shape(path, layer, factors_of(served[path], modules))
    ids = TaskIds(jnp.array(-1, jnp.int32))
    for path in chosen:
        keys, base = layers[path]
        parts = factors_of(served[path], modules)
        replace(model, keys, Served(base, parts, ids, name=served[path], method=method))
    return chosen


def layers_of(model: nnx.Module) -> dict[Path, nnx.Module]:
    """Layers by path, those that `wrap` made without their bases; a shared layer under each attribute."""
    found = dict(nnx.iter_modules(model))
    for path, parent in tuple(found.items()):
        # `iter_modules` has one path per object
        children = nnx.iter_children(parent)
        found |= {(*path, key): x for key, x in children if isinstance(x, nnx.Module)}
    bases = {(*path, "base") for path, x in found.items() if isinstance(x, Served)}
    return {path: x for path, x in found.items() if path not in bases and is_layer(x)}


def set_task_ids(model: nnx.Module, task_ids: Any) -> None:
    """Set the task of each row of the next batch, for all layers that `wrap` made.

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
    """Set the factors of all layers that `wrap` made, such as those of slots after a load.

    Shapes must not change.

    Raises:
      HydraOptError: the model has no such layer, a layer without a module, or shapes that differ.
    """
    for layer in served_layers(model):
        parts = factors_of(layer.name, modules)
        for name, old, new in zip(names_of(layer.name), layer.stored.get_value(), parts, strict=True):
            if old is not None and new is None:
                raise HydraOptError(f"{name}: no such module: near names are {near(name, modules)}")
        check_shape(names_of(layer.name)[0], layer.base, parts)
    for layer in served_layers(model):
        layer.stored.set_value(factors_of(layer.name, modules))


def task_ids(tasks: Store | Sequence[str], names: Sequence[str | None]) -> np.ndarray:
    """Ids of task names, `[N]` int32: positions among a store's tasks, or among given names.

    None is the base model, whose id is -1.

    Raises:
      HydraOptError: an unknown name; similar names are listed.
    """
    known = tasks.tasks if isinstance(tasks, Store) else tasks
    return np.array([-1 if x is None else stores.task_index(known, x) for x in names], np.int32)


def load_task(
    model: nnx.Module,
    store: Store,
    task: str,
    *,
    rename: Callable[[str], str] = lambda path: path,
    convert: Callable[[Adapter], Adapter] = lambda adapter: adapter,
    base: str | None = None,
    scale: float = 1.0,
    stack: int | str | None = "ask",
) -> list[str]:
    """Load one task, in place, into a model's own LoRA parameters (Flax or qwix); return the loaded layers.

    A task of a lower rank than the model's is padded with zeros. A LoRA layer without a module in the task
    gets a zero delta.

    Args:
      model: the model.
      store: the store.
      task: the task's name.
      rename: path of a layer's LoRA (without a final `lora` or `kernel`) -> module name in the store, if they
        differ.
      convert: applied to the decoded task first, such as `formats.to_library` for a library's names and
        shapes.
      base: name of the base model; a task of another one is refused. None: do not compare names.
      scale: the model's factor on the delta: alpha / rank for qwix, 1 for Flax. `b` is divided by it.
      stack: see `formats.read_tree`.

    Raises:
      HydraOptError: an unknown task, another base model, a model without LoRA parameters, a module without a
        LoRA layer, shapes that differ, a rank too small.
    """
    check_base_of(store, [task], base)
    adapter = convert(stores.decode(store, task))
    variables = {keys: x for keys, x in nnx.iter_graph(model) if isinstance(x, nnx.LoRAParam)}
    if not variables:
        raise HydraOptError("the model has no LoRA parameters: make them with Flax or qwix first")
    names = ["flax_nnx", "qwix"]
    fits = (n for n in names if all(DIALECTS[n].key.fullmatch(trees.path_text(keys)) for keys in variables))
    name = next(fits, names[0])
    like: dict[Any, Any] = {}
    for keys, variable in variables.items():
        trees.insert(like, keys, variable.get_value())
    fitted = trees.fit_tree(adapter, name, like, rename=rename, stack=stack)
    for keys, value in trees.leaves(fitted, name, scale, None, "float32"):
        variable = variables[keys]
        variable.set_value(jnp.asarray(value, variable.get_value().dtype))
    return [module for module in fitted.a if rename(module) in adapter.a]
