"""Second moments of modules' inputs and output gradients: they turn weight errors into errors of the model.

A module's output error on inputs x is `E ||x @ (delta - hat)||^2 = tr(C @ D @ D.T)` with
`D = delta - hat` and `C = E[x x.T]`. With g the gradient, at the module's output, of the log-likelihood of
labels drawn from the model itself, and `G = E[g g.T]`, the divergence of the model's outputs is about
`tr(C @ D @ G @ D.T) / 2`, the Kronecker-factored Fisher information.

A calibration file is a safetensors file with one float32 tensor per module under the module's name: `[I, I]`,
or `[I]` if only the diagonal is kept. If gradients were gathered it also has one `NAME:output` per module,
`[O, O]` or `[O]`, in the same units for all modules.

Reference: Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, 2015,
arXiv 1503.05671.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hydraopt_jax.errors import HydraOptError, near, system_error
from hydraopt_jax.formats.families import Name
from hydraopt_jax.formats.tensor_files import write_tensors
from hydraopt_jax.linalg.decompose import matmul

# suffix of a module's name for the moment of the gradients at its outputs
OUTPUT = ":output"


class Moment(NamedTuple):
    """A running second moment.

    Attributes:
      total: `[I, I]` sum of `x x.T`.
      count: number of inputs, scalar.
    """

    total: Array
    count: Array  # type: ignore[assignment]


def start(inputs: int) -> Moment:
    """The moment of zero inputs."""
    return Moment(jnp.zeros((inputs, inputs)), jnp.zeros(()))


def accumulate(moment: Moment, x: Array, mask: Array | None = None) -> Moment:
    """The moment after one more batch of inputs: `total + sum x x.T`.

    Args:
      moment: what was accumulated before.
      x: `[..., I]` inputs of the module, or gradients at its outputs; any leading axes.
      mask: `[...]` bool, which of them count (padding left out); None for all.

    >>> m = accumulate(start(2), jnp.array([[1.0, 0.0], [0.0, 2.0]]))
    >>> print(mean(m))
    [[0.5 0. ]
     [0.  2. ]]
    """
    keep = jnp.ones(x.shape[:-1]) if mask is None else mask.astype(jnp.float32)
    return Moment(moment.total + second(x, keep, 2), moment.count + keep.sum())


def second(rows: Array, weights: Array, ndim: int) -> Array:
    """Sum of `x x.T` over rows `[..., n]`, or of its diagonal; rows of weight 0 may be no numbers."""
    keep = weights.reshape(-1, 1)
    flat = jnp.where(keep > 0, rows.reshape(-1, rows.shape[-1]).astype(jnp.float32), 0.0)
    return (flat * flat * keep).sum(0) if ndim == 1 else matmul(flat.T, flat * keep)


def mean(moment: Moment) -> Array:
    """`E[x x.T]`, `[I, I]`."""
    return moment.total / jnp.maximum(moment.count, 1.0)


class Seen(NamedTuple):
    """What a layer of a model has seen.

    Attributes:
      total: `[I, I]` sum of `x x.T` over its inputs, or the `[I]` diagonal.
      count: how many inputs.
      outputs: as `total`, of the gradients at its outputs; None where they were not gathered.
    """

    total: np.ndarray
    count: float  # type: ignore[assignment]
    outputs: np.ndarray | None = None


class Watch(NamedTuple):
    """What of a model is looked at, see `tap.collect`."""

    modules: tuple[str, ...] | None
    rename: Callable[[str], Name]
    diagonal: bool
    outputs: bool


def averaged(seen: Mapping[str, Seen], names: Mapping[str, Name], watch: Watch) -> dict[str, np.ndarray]:
    """Second moments by module's name, from what a model's layers have seen.

    Args:
      seen: path of a layer -> its sums.
      names: path of a layer -> the module's name, or those of modules that share its kernel, one after
        another along its outputs.
      watch: where it names modules, a layer that was never called is an error.

    Raises:
      HydraOptError: a named layer that was never called, no layer that was, or numbers that are not finite.
    """
    largest = max(x.count for x in seen.values())
    out: dict[str, np.ndarray] = {}
    for path, name in names.items():
        x, shared = seen[path], name if isinstance(name, tuple) else (name,)
        if not x.count:
            if watch.modules is not None:
                raise HydraOptError(f"{path}: forward never calls it: leave it out of modules")
            continue
        for n, one in enumerate(shared):
            out[one] = x.total / x.count
            if x.outputs is not None:
                width = len(x.outputs) // len(shared)
                part = (slice(n * width, (n + 1) * width),) * x.outputs.ndim
                # in the same units for all: per input of the batch
                out[one + OUTPUT] = x.outputs[part] / largest
            for key in (one, one + OUTPUT):
                if key in out and not np.isfinite(out[key]).all():
                    raise HydraOptError(f"{path}: the model's numbers there are not finite")
    if not out:
        raise HydraOptError("forward calls no layer that is tapped: nothing was collected")
    return out


def chosen(paths: Iterable[str], watch: Watch) -> dict[str, Name]:
    """Path -> module's name of the layers to look at.

    Raises:
      HydraOptError: a module without a layer (near paths are listed), or no layer.
    """
    names = {path: watch.rename(path) for path in paths}
    if watch.modules is not None:
        wanted = set(watch.modules)
        each = {path: {name} if isinstance(name, str) else set(name) for path, name in names.items()}
        for name in sorted(wanted.difference(*each.values())):
            raise HydraOptError(
                f"{name}: the model has no such layer (near paths are "
                f"{near(name, names)}): give rename, from the model's paths to the adapters' names"
            )
        names = {path: name for path, name in names.items() if each[path] & wanted}
    if not names:
        raise HydraOptError("the model has no layer of one kernel: there is nothing to collect")
    return names


def aligned(shape: tuple[int, ...], lead: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Shape in which a mask of a batch broadcasts to the leading axes of a layer's inputs.

    >>> aligned((2, 5), (2, 5, 3), "q"), aligned((2, 5), (10,), "q"), aligned((), (2, 5), "q")
    ((2, 5, 1), (10,), (1, 1))

    Raises:
      HydraOptError: the inputs are not laid out as the batch is.
    """
    if shape and math.prod(shape) == math.prod(lead):
        return lead
    if shape != lead[: len(shape)]:
        raise HydraOptError(
            f"{name}: the mask has shape {list(shape)}, the layer's inputs {list(lead)}: leave the "
            "layer out of modules, or give no mask"
        )
    return (*shape, *[1] * (len(lead) - len(shape)))


def write_moments(path: str | os.PathLike, moments: Mapping[str, np.ndarray]) -> None:
    """Write second moments, module name -> `[I, I]` or `[I]`.

    Raises:
      HydraOptError: the file cannot be written; there is then nothing of it.
    """
    try:
        write_tensors(Path(path), {k: np.ascontiguousarray(v, np.float32) for k, v in moments.items()})
    except (OSError, SafetensorError) as error:
        raise system_error(path, "written", error, ": give another file") from error


def digest(moments: Mapping[str, np.ndarray]) -> str:
    """A fingerprint of a calibration: 16 hexadecimal digits of a hash of its float32 numbers.

    >>> digest({"q": np.eye(2)}) == digest({"q": np.eye(2, dtype=np.float32)})
    True
    """
    out = hashlib.sha256()
    for name in sorted(moments):
        x = np.ascontiguousarray(moments[name], np.float32)
        out.update(json.dumps([name, x.shape]).encode())
        out.update(x.data)
    return out.hexdigest()[:16]


def read_moments(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Second moments from a file.

    Raises:
      HydraOptError: no such file, or not a safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, AttributeError, LookupError, TypeError) as error:
        # NumPy has no name for float8
        what = "no readable calibration file (safetensors)" if Path(path).exists() else "no such file"
        advice = "`hydraopt calibrate MODEL TEXT --out FILE` makes one"
        raise HydraOptError(f"{path}: {what}: {advice}") from error
