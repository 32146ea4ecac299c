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
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hydraopt_jax.errors import HydraOptError
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
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    keep = jnp.ones(rows.shape[0]) if mask is None else mask.reshape(-1).astype(jnp.float32)
    return Moment(moment.total + matmul(rows.T, rows * keep[:, None]), moment.count + keep.sum())


def mean(moment: Moment) -> Array:
    """`E[x x.T]`, `[I, I]`."""
    return moment.total / jnp.maximum(moment.count, 1.0)


def save(path: str | os.PathLike, moments: Mapping[str, np.ndarray]) -> None:
    """Write second moments, module name -> `[I, I]` or `[I]`."""
    write_tensors(Path(path), {k: np.ascontiguousarray(v, np.float32) for k, v in moments.items()})


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


def load(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Second moments from a file.

    Raises:
      HydraOptError: no such file, or not a safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise HydraOptError(f"{path}: no readable calibration file (safetensors): {error}") from error
