"""Layers of a Flax NNX model: which of them are one matrix, and inputs and outputs as rows of it."""

import math
import string
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from hydraopt_jax.errors import HydraOptError

Path = tuple[Any, ...]
# what libraries call the kernel of a layer
KERNELS = ("kernel", "w")


def kernel_of(base: Any) -> Any:
    """The variable of a layer's kernel; None if it has none."""
    found = (getattr(base, name, None) for name in KERNELS)
    return next((x for x in found if isinstance(x, nnx.Variable)), None)


def kernel_shape(base: Any) -> tuple[int, ...]:
    """Shape of a layer's kernel, without a stacking axis if the layer says so; () if it has no kernel."""
    kernel = kernel_of(base)
    return tuple(getattr(base, "kernel_shape", () if kernel is None else kernel.get_value().shape))


def is_layer(base: Any) -> bool:
    """Whether a module says how it multiplies by its kernel; see `serving.wrap`."""
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
      HydraOptError: a layer that is no single matrix.
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


def dotted(path: Path) -> str:
    """The dotted name of a module's path.

    >>> dotted(("layers", 0, "q_proj"))
    'layers.0.q_proj'
    """
    return ".".join(map(str, path))


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
