"""LoRA factors in parameter trees: nested dicts, `nnx.State`, NNX modules, flat dicts of named arrays.

All dialects of `dialects` have one contract: a tree and a scale in, an `Adapter` out, and the inverse. The
layout of an adapter has its original keys and axes, so that a store exports it with the same ones.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from flax import nnx
from flax.core import meta

from hydraopt_jax.adapters import Adapter, module_shapes
from hydraopt_jax.errors import HydraOptError, near
from hydraopt_jax.factors import FLOATS
from hydraopt_jax.formats.dialects import Dialect, dialect
from hydraopt_jax.formats.tensor_files import disk_array, disk_dtype

Path = tuple[Any, ...]
Scale = float | Mapping[str, float]
# name of the level that Orbax adds below NNX variables
BOX = "value"
# levels of a train state that mirror the parameters
OPTIMIZER = {"opt_state", "mu", "nu"}


def flatten(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Leaves of a tree with their paths; boxes of Flax metadata are opened, None is not a leaf.

    >>> list(flatten({"q": {"lora_a": 1}, "layers": [None, 2]}))
    [(('q', 'lora_a'), 1), (('layers', 1), 2)]
    """
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree)
    if isinstance(tree, nnx.Variable):
        tree = tree.get_value()
    if isinstance(tree, meta.AxisMetadata):
        tree = tree.unbox()
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flatten(value, (*path, key))
    elif isinstance(tree, list | tuple):
        for key, value in enumerate(tree):
            yield from flatten(value, (*path, key))
    elif tree is not None:
        yield path, tree


def path_text(path: Path) -> str:
    """The key of a path, which dialects match."""
    return "/".join(map(str, path[:-1] if len(path) > 1 and path[-1] == BOX else path))


def is_factor(path: Path) -> bool:
    """Whether a leaf's name is that of LoRA parameters."""
    return any("lora" in str(key).lower() for key in path[-3:])


def pairs(tree: Any, style: Dialect, source: str) -> dict[str, dict[str, tuple[Path, Any]]]:
    """Factors by module and side; other leaves are skipped.

    Raises:
      HydraOptError: an unknown kind of LoRA leaf, or a factor without its counterpart.
    """
    out: dict[str, dict[str, tuple[Path, Any]]] = {}
    for path, leaf in flatten(tree):
        if not is_factor(path):
            continue
        if OPTIMIZER & set(map(str, path)):
            raise HydraOptError(
                f"{source}: {path_text(path)} is an optimizer's: read the parameters alone (of a checkpoint: "
                "within='params')"
            )
        match = style.key.fullmatch(path_text(path))
        if match is None:
            raise HydraOptError(
                f"{source}: {path_text(path)} is no LoRA factor as {style.library} names them: choose "
                "another dialect, or leave it out of the tree"
            )
        weight = match.groupdict().get("weight")
        module = match["module"].removeprefix("params/").replace("/", ".")
        module += f".{weight}" if weight not in (None, "kernel", "embeddings") else ""
        side = match["side"].lower()
        if side in out.setdefault(module, {}):
            raise HydraOptError(
                f"{source}: {path_text(path)} clashes with {path_text(out[module][side][0])}: leave one out"
            )
        out[module][side] = path, leaf
    if not out:
        raise HydraOptError(f"{source}: holds no LoRA factor as {style.library} names them")
    for sides in out.values():
        if len(sides) < 2:
            ((side, (path, _)),) = sides.items()
            raise HydraOptError(
                f"{source}: {path_text(path)} has no lora_{'b' if side == 'a' else 'a'} beside it"
            )
    return out


def read_tree(
    tree: Any,
    name: str,
    *,
    task: str,
    scale: Scale | None = None,
    stack: int | str | None = "ask",
    source: str = "tree",
) -> Adapter:
    """One task's adapter from the LoRA factors in a library's parameters.

    Args:
      tree: nested dicts, an `nnx.State`, an NNX module, or a flat dict of named arrays. Leaves of the base
        model are ignored.
      name: the library: a key of `dialects.DIALECTS`.
      task: the task's name.
      scale: the library's factor on `x @ a @ b`, or module -> scale. No library stores it in the tree.
      stack: axis of both factors that counts layers or experts (MaxText's scanned layers: 1; qwix's batched
        products: 0), or None if extra axes are those of an einsum. Required if both factors have extra axes.
      source: name of the tree in messages.

    Returns:
      The adapter: `a: [I, R]`, `b: [R, O]` with the scale folded in; I and O are products over all axes in
      the library's order. Layer n of a stacked module is called `module[n]`.

    Raises:
      HydraOptError: a missing scale, an unknown dialect, an unknown kind of LoRA leaf, shapes that disagree,
        or ambiguous axes.

    >>> tree = {"q": {"kernel_lora_a": np.ones((3, 4, 2)), "kernel_lora_b": np.ones((2, 5))}}
    >>> adapter = read_tree(tree, "qwix", task="one", scale=0.5)
    >>> adapter.a["q"].shape, float(adapter.b["q"][0, 0]), adapter.layout["q"]["in"]
    ((12, 2), 0.5, [3, 4])
    """
    style = dialect(name)
    if scale is None:
        raise HydraOptError(
            f"{source}: {style.library} stores no scale with its parameters: give scale ({style.scale})"
        )
    a, b = {}, {}
    layout: dict[str, dict[str, Any]] = {}
    dtypes = set()
    for module, sides in pairs(tree, style, source).items():
        (path_a, low), (path_b, high) = ((path, np.asarray(leaf)) for path, leaf in (sides["a"], sides["b"]))
        for path, factor in ((path_a, low), (path_b, high)):
            if factor.dtype not in FLOATS:
                raise HydraOptError(
                    f"{source}: {path_text(path)} is {factor.dtype}: a LoRA factor must be floating"
                )
        dtypes |= {low.dtype.name, high.dtype.name}
        if style.transposed:
            low, high = low.T, high.T
        where: dict[str, Any] = {"a": list(path_a), "b": list(path_b)}
        if path_text(path_a).endswith("lora_embeddings_a"):
            where["kind"] = "embedding"
        for index, layers, x, y in unstacked(module, low, high, stack, source):
            part = module if index is None else f"{module}[{index}]"
            if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[0]:
                raise HydraOptError(
                    f"{source}: {path_text(path_a)} has shape {list(low.shape)}, {path_text(path_b)} "
                    f"{list(high.shape)}: they must share a rank, [in..., rank] and [rank, out...]"
                )
            axes = {"in": list(x.shape[:-1]), "out": list(y.shape[1:])}
            layout[part] = where | {k: v for k, v in axes.items() if len(v) > 1}
            if index is not None:
                layout[part]["stack"] = [stack, index, layers]
            a[part] = x.reshape(-1, x.shape[-1])
            b[part] = y.reshape(y.shape[0], -1).astype(np.float32) * np.float32(
                scale_of(scale, module, source)
            )
    kind = dtypes.pop() if len(dtypes) == 1 else "float32"
    return Adapter(task, a, b, kind, layout=layout, source=source)


def scale_of(scale: Scale, module: str, source: str) -> float:
    """The scale of one module."""
    value = scale.get(module) if isinstance(scale, Mapping) else scale
    if value is None or not math.isfinite(value):
        raise HydraOptError(f"{source}: scale of {module} is {value}: give a finite number for every module")
    return value


def unstacked(
    module: str, low: np.ndarray, high: np.ndarray, stack: int | str | None, source: str
) -> Iterator[tuple[int | None, int, np.ndarray, np.ndarray]]:
    """The layers of a stacked pair, each with its index and their number, or the pair itself."""
    if stack is None or low.ndim < 3 or high.ndim < 3:
        yield None, 1, low, high
        return
    if stack == "ask":
        raise HydraOptError(
            f"{source}: both factors of {module} have extra axes, {list(low.shape)} and {list(high.shape)}: "
            "give stack=AXIS if one of them counts layers or experts, stack=None if all are of one einsum"
        )
    axis = int(stack)
    if not 0 <= axis < min(low.ndim, high.ndim) or low.shape[axis] != high.shape[axis]:
        raise HydraOptError(
            f"{source}: stack = {axis}: the factors of {module}, {list(low.shape)} and {list(high.shape)}, "
            "differ there"
        )
    layers = low.shape[axis]
    for index in range(layers):
        yield index, layers, low.take(index, axis), high.take(index, axis)


def write_tree(
    adapter: Adapter,
    name: str,
    *,
    scale: Scale | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    like: Any = None,
    rename: Callable[[str], str] = lambda module: module,
    stack: int | str | None = "ask",
) -> dict[Any, Any]:
    """A tree of a library's LoRA parameters for one adapter, to be merged into the model's parameters.

    Factors that came from a tree of the same dialect get their original keys and axes. Others, such as
    PEFT's, get the library's usual keys for the module's path, or those of `like`.

    Args:
      adapter: from `store.adapter` or any reader.
      name: the library: a key of `dialects.DIALECTS`.
      scale: the library's factor on the delta, or module -> scale; `b` is divided by it.
      rank: pad all factors with zeros to this rank; None for each module's own.
      dtype: of the arrays; None for the original dtype.
      like, rename, stack: see `fit_tree`; None for no such tree.

    Returns:
      A nested dict of NumPy arrays (flat for Keras and levanter). Positions in lists are integers.

    Raises:
      HydraOptError: a missing scale, tensors that a LoRA tree cannot have, a rank too small, values that
        overflow.

    >>> one = Adapter("one", {"layers.0.q": np.ones((3, 1))}, {"layers.0.q": np.ones((1, 2))})
    >>> write_tree(one, "gemma", scale=2.0)["layers"][0]["q"]["lora"]["b"]
    array([[0.5, 0.5]], dtype=float32)
    """
    tree: dict[Any, Any] = {}
    if like is not None:
        adapter = fit_tree(adapter, name, like, rename=rename, stack=stack)
    for path, value in leaves(adapter, name, scale, rank, dtype):
        whole = len(path) == 1
        keys = path[:-1] if not whole and path[-1] == BOX else path
        insert(tree, keys if whole else [int(k) if str(k).isdigit() else k for k in keys], value)
    return tree


def fit_tree(
    adapter: Adapter,
    name: str,
    like: Any,
    *,
    rename: Callable[[str], str] = lambda module: module,
    stack: int | str | None = "ask",
) -> Adapter:
    """The adapter with the names, axes and ranks of a model's LoRA parameters.

    Args:
      adapter: modules of any names.
      name: the library: a key of `dialects.DIALECTS`.
      like: the model, its parameters, or their shapes; interpreted as by `read_tree`.
      rename: module name of `read_tree` -> module name of the adapter.
      stack: see `read_tree`.

    Returns:
      All modules of `like`; modules that the adapter lacks are zero.

    Raises:
      HydraOptError: a module that `like` lacks, other sizes, a rank too small; see `read_tree`.
    """
    shapes: dict[Any, Any] = {}
    for path, leaf in flatten(like):
        if is_factor(path):
            insert(shapes, path, np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape))
    want = read_tree(shapes, name, task=adapter.task, scale=1.0, stack=stack, source="the model")
    names = {module: rename(module) for module in want.a}
    for module in adapter.a:
        if module not in names.values():
            raise HydraOptError(
                f"{module}: the model has no LoRA layer there (near: {near(module, names)}): give rename"
            )
    a: dict[str, np.ndarray] = {module: np.zeros(x.shape, np.float32) for module, x in want.a.items()}
    b: dict[str, np.ndarray] = {module: np.zeros(x.shape, np.float32) for module, x in want.b.items()}
    have, sizes = module_shapes(adapter), module_shapes(want)
    for module, own in names.items():
        if own not in have:
            continue
        if have[own] != sizes[module]:
            raise HydraOptError(
                f"{module}: the model's LoRA layer has [in, out] = {list(sizes[module])}, {own} of "
                f"{adapter.task!r} {list(have[own])}: it is of another base model"
            )
        rank, room = adapter.a[own].shape[1], a[module].shape[1]
        if rank > room:
            raise HydraOptError(
                f"{module}: the model's LoRA layer has rank {room}, {adapter.task!r} needs {rank}: make the "
                f"model with rank {rank}"
            )
        a[module][:, :rank], b[module][:rank] = adapter.a[own], adapter.b[own]
    return adapter.replace(a=a, b=b, dtype=want.dtype, layout=want.layout, config={}, raw={})


def insert(tree: dict[Any, Any], path: Any, value: np.ndarray) -> None:
    """Put a leaf into a nested dict."""
    *parents, last = path
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def leaves(
    adapter: Adapter, name: str, scale: Scale | None, rank: int | None, dtype: str | None
) -> Iterator[tuple[Path, np.ndarray]]:
    """Paths (as on disk) and arrays of an adapter in a dialect."""
    style = dialect(name)
    if scale is None:
        raise HydraOptError(
            f"{style.library} stores no scale with its parameters: give scale ({style.scale})"
        )
    if adapter.extras:
        raise HydraOptError(
            f"{next(iter(adapter.extras))}: a LoRA tree holds no full tensors: keep them apart and give the "
            "adapter without them (in Python adapter.replace(extras={}))"
        )
    kind = disk_dtype(dtype or adapter.dtype)
    stacks: dict[Path, list[Any]] = {}
    for module, a in adapter.a.items():
        layout = adapter.layout.get(module) or {}
        if layout.get("kind") == "convolution":
            raise HydraOptError(f"{module}: a convolution's factors have no place in {style.library}'s trees")
        value = scale_of(scale, module.split("[")[0], module)
        if value == 0:
            raise HydraOptError(f"{module}: scale is 0: a delta cannot be divided by it")
        width = rank if rank is not None else max(a.shape[1], 1)
        if a.shape[1] > width:
            raise HydraOptError(f"{module}: rank = {width}: its factors have rank {a.shape[1]}")
        spare = width - a.shape[1]
        low = np.pad(np.asarray(a, np.float32), ((0, 0), (0, spare)))
        high = np.pad(np.asarray(adapter.b[module], np.float32) / value, ((0, spare), (0, 0)))
        low, high = (
            low.reshape(*layout.get("in", low.shape[:1]), width),
            high.reshape(width, *layout.get("out", [-1])),
        )
        for side, array in (("a", low), ("b", high)):
            path = home(style, module, layout, side)
            if style.transposed:
                array = array.T
            if "stack" in layout and path == tuple(layout[side]):
                stacks.setdefault(path, []).append((layout["stack"], array, side))
            else:
                yield path, disk_array(path_text(path), array, kind)
    for path, parts in stacks.items():
        yield path, disk_array(path_text(path), restacked(parts), kind)


def restacked(parts: list[Any]) -> np.ndarray:
    """Layers stacked again; absent layers and ranks below the largest are filled with zeros."""
    axis, _, count = parts[0][0]
    side = -1 if parts[0][2] == "a" else 0
    width = max(x.shape[side] for _, x, _ in parts)
    shape = list(parts[0][1].shape)
    shape[side] = width
    whole = np.zeros((count, *shape), np.float32)
    for (_, index, _), x, _ in parts:
        room = [(0, 0)] * x.ndim
        room[side] = (0, width - x.shape[side])
        whole[index] = np.pad(x, room)
    return np.moveaxis(whole, 0, axis)


def home(style: Dialect, module: str, layout: Mapping[str, Any], side: str) -> Path:
    """Path of a factor: its original path if that is of this dialect, else the library's usual path."""
    if side in layout and style.key.fullmatch(path_text(tuple(layout[side]))):
        return tuple(layout[side])
    key = style.place.format(
        module=module.replace(".", style.join or "/"), side=side.upper() if style.transposed else side
    )
    if layout.get("kind") == "embedding":
        key = key.replace("lora_kernel_", "lora_embeddings_")
    return (key,) if style.join else (*key.split("/"), *((BOX,) if style.boxed else ()))
