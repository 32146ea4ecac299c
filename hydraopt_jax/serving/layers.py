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
import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from hydraopt_jax import store as stores
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import trees
from hydraopt_jax.formats.dialects import DIALECTS
from hydraopt_jax.formats.trees import near
from hydraopt_jax.serving.apply import Module, apply, shape
from hydraopt_jax.store import Store

Path = tuple[Any, ...]
# what libraries call the kernel of a layer
KERNELS = ("kernel", "w")


class Stored(nnx.Variable):
    """The factors of a module. Not an `nnx.Param`, so that optimizers do not update them by default."""


class TaskIds(nnx.Variable):
    """The task of each row of the batch, one variable for all layers of a model; -1 is the base model."""


class Served(nnx.Module):
    """A layer plus the delta of each row's task: `base(x) + x @ delta[task_ids]`.

    Attributes:
      base: the wrapped layer, see `wrap`; unknown attributes are looked up in it.
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
        delta = apply(rows, self.stored.get_value(), ids, method=self.method)
        return y + restore(delta).astype(y.dtype)


def kernel_of(base: Any) -> Any:
    """The variable of a layer's kernel; None if it has none."""
    found = (getattr(base, name, None) for name in KERNELS)
    return next((x for x in found if isinstance(x, nnx.Variable)), None)


def kernel_shape(base: Any) -> tuple[int, ...]:
    """Shape of a layer's kernel, without a stacking axis if the layer says so; () if it has no kernel."""
    kernel = kernel_of(base)
    return tuple(getattr(base, "kernel_shape", () if kernel is None else kernel.get_value().shape))


def is_layer(base: Any) -> bool:
    """Whether a module has a kernel and describes its product with it; see `wrap`."""
    sizes = getattr(base, "in_features", None), getattr(base, "out_features", None)
    if isinstance(getattr(base, "einsum_str", None), str) and kernel_shape(base):
        return True
    plain = kernel_shape(base)[-2:] == sizes and not hasattr(base, "kernel_size")
    return None not in sizes and (plain or hasattr(base, "axis"))


def contraction(base: Any, x: Array, equation: str | None = None) -> tuple[Array, Callable[[Array], Array]]:
    """`x` as rows `[..., I]` of a layer's matrix; and a function from rows `[..., O]` to the output."""
    equation = equation or getattr(base, "einsum_str", None)
    if equation:
        lhs, kernel, out = labels(equation, x.ndim)
        free, contracted, made = roles(lhs, kernel, out)
        rows = jnp.einsum(f"{lhs}->{free}{contracted}", x)
        size = dict(zip(kernel, kernel_shape(base), strict=True))
        lead, features = rows.shape[: len(free)], [size[c] for c in made]
        rows = rows.reshape(*lead, -1)
        return rows, lambda y: jnp.einsum(f"{free}{made}->{out}", y.reshape(*lead, *features))
    if hasattr(base, "axis"):
        axes = sorted(a % x.ndim for a in base.axis)  # Flax takes them in this order
        rows = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
        lead = rows.shape[: x.ndim - len(axes)]
        return rows.reshape(*lead, -1), lambda y: y.reshape(*lead, *base.out_features)
    return x, lambda y: y


def labels(equation: str, ndim: int) -> tuple[str, str, str]:
    """Labels of inputs, kernel and outputs, with an ellipsis expanded for an input of `ndim` axes.

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
            "that the layer is not a single matrix: leave it out of the patterns"
        )
    return free, contracted, made


def matrix(base: Any) -> tuple[int, int]:
    """I and O of a layer's kernel as a matrix.

    Raises:
      HydraOptError: the layer is not a single matrix.
    """
    if not is_layer(base):
        raise HydraOptError(f"a {type(base).__name__} does not say how it multiplies: see serving.wrap")
    if hasattr(base, "einsum_str"):
        inputs, kernel, outputs = labels(base.einsum_str, len(base.einsum_str.split(",")[0]))
        size = dict(zip(kernel, kernel_shape(base), strict=True))
        _, contracted, made = roles(inputs, kernel, outputs)
        return math.prod(size[c] for c in contracted), math.prod(size[c] for c in made)
    if getattr(base, "batch_axis", None):
        raise HydraOptError(
            f"a {type(base).__name__} with batch_axis is not a single matrix: leave it out of the patterns"
        )
    inputs, outputs = (np.atleast_1d(x).tolist() for x in (base.in_features, base.out_features))
    return math.prod(inputs), math.prod(outputs)


def check_shape(path: str, base: nnx.Module, module: Module) -> None:
    """Raise if a layer and a module have different shapes; the message has the path and both shapes."""
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
    """The dotted name of a module's path.

    >>> dotted(("layers", 0, "q_proj"))
    'layers.0.q_proj'
    """
    return ".".join(map(str, path))


def wrap(
    model: nnx.Module,
    modules: Mapping[str, Module],
    patterns: Sequence[str] | None = None,
    *,
    rename: Callable[[str], str] = lambda path: path,
    method: str | None = None,
) -> list[str]:
    """Replace a model's layers, in place, by layers that serve all tasks of a store; return their paths.

    Args:
      model: the model. A layer of any class can be wrapped if it has a parameter `kernel` or `w` and
        describes its product: by an `einsum_str` (`nnx.Einsum`, Tunix' layers), or by `in_features` and
        `out_features`, with an `axis` if these are several (`nnx.Linear`, `nnx.LinearGeneral`).
      modules: `serving.load(store)`, or the modules of the state of `serving.Slots`.
      patterns: shell patterns of dotted module paths, such as `"layers.*.q_proj"`; None for all modules of
        the store, each of which must then have a layer.
      rename: model path -> module name in the store, if they differ; `formats.hugging_face_name` returns this
        function for known model families.
      method: see `serving.apply`.

    Returns:
      Paths of the wrapped layers. All rows are of the base model until `set_task_ids` is called.

    Raises:
      HydraOptError: a pattern that matches no layer of the store, a module without a layer, or shapes that
        differ.
    """
    layers = {dotted(path): (path, x) for path, x in nnx.iter_modules(model) if is_layer(x)}
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
                    f"{name}: the model has no such layer (near paths are {near(name, layers)}): give "
                    "patterns or rename"
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
    """Replace the module at a path."""
    *parents, last = path
    parent: Any = model
    for key in parents:
        parent = parent[key] if isinstance(key, int) else getattr(parent, key)
    if isinstance(last, int):
        parent[last] = new
    else:
        setattr(parent, last, new)


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
        if layer.name not in modules:
            raise HydraOptError(f"{layer.name}: no such module: near names are {near(layer.name, modules)}")
        check_shape(layer.name, layer.base, modules[layer.name])
    for layer in served_layers(model):
        layer.stored.set_value(modules[layer.name])


def task_ids(tasks: Store | Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Ids of task names, `[N]` int32: positions among a store's tasks, or among given names.

    Raises:
      HydraOptError: an unknown name; similar names are listed.
    """
    known = tasks.tasks if isinstance(tasks, Store) else tasks
    return np.array([stores.task_index(known, name) for name in names], np.int32)


def load_task(
    model: nnx.Module,
    store: Store,
    task: str,
    *,
    rename: Callable[[str], str] = lambda path: path,
    convert: Callable[[Adapter], Adapter] = lambda adapter: adapter,
    scale: float = 1.0,
    stack: int | str | None = "ask",
) -> list[str]:
    """Load one task, in place, into a model's own LoRA parameters (Flax or qwix); return the layers' paths.

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
      scale: the model's factor on the delta: alpha / rank for qwix, 1 for Flax. `b` is divided by it.
      stack: see `formats.read_tree`.

    Returns:
      Paths of the loaded layers.

    Raises:
      HydraOptError: an unknown task, a model without LoRA parameters, a module without a LoRA layer, shapes
        that differ, a rank too small.
    """
    adapter = convert(stores.decode(store, task))
    variables = {keys: x for keys, x in nnx.iter_graph(model) if isinstance(x, nnx.LoRAParam)}
    if not variables:
        raise HydraOptError("the model has no LoRA parameters: make them with Flax or qwix first")
    names = ["flax_nnx", "qwix"]
    fits = (n for n in names if all(DIALECTS[n].key.fullmatch(trees.text(keys)) for keys in variables))
    name = next(fits, names[0])
    like: dict[Any, Any] = {}
    for keys, variable in variables.items():
        trees.place(like, keys, variable.get_value())
    fitted = trees.fit_tree(adapter, name, like, rename=rename, stack=stack)
    for keys, value in trees.leaves(fitted, name, scale, None, "float32"):
        variable = variables[keys]
        variable.set_value(jnp.asarray(value, variable.get_value().dtype))
    return [module for module in fitted.a if rename(module) in adapter.a]
