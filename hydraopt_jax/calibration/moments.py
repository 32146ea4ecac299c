"""Second moments of modules' inputs and output gradients: they turn weight errors into errors of the model.

A module's output error on inputs x is `E ||x @ (delta - hat)||^2 = tr(C @ D @ D.T)` with
`D = delta - hat` and `C = E[x x.T]`. With g the gradient, at the module's output, of the log-likelihood of
labels drawn from the model itself, and `G = E[g g.T]`, the divergence of the model's outputs is about
`tr(C @ D @ G @ D.T) / 2`, the Kronecker-factored Fisher information.

A calibration file is a safetensors file with one float32 tensor per module under the module's name: `[I, I]`,
`[I, 1 + K]` for a diagonal plus a matrix of rank K (see `matrix_of`), or `[I]` for its diagonal. If gradients
were gathered it also has one `NAME:output` per module, `[O, O]`, `[O, 1 + K]` or `[O]`, in the same units for
all modules.

A moment of rank K is gathered without the whole one: its diagonal, and its products with 2 K random vectors,
of which its largest eigenvectors are made in the end (Nystrom approximation from a sketch).

References: Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature,
2015, arXiv 1503.05671; Tropp, Yurtsever, Udell and Cevher, Fixed-rank approximation of a
positive-semidefinite matrix from streaming data, 2017, arXiv 1706.05736.
"""

import functools
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
from hydraopt_jax.linalg import factorizations
from hydraopt_jax.linalg.decompose import matmul

# suffix of a module's name for the moment of the gradients at its outputs
OUTPUT = ":output"
# smallest eigenvalue that is told from rounding errors in float32, over the largest
ROUNDING = 1e-5
# share of a moment of mean eigenvalue 1 that a metric takes as the identity, as K-FAC's damping: inputs that
# few tokens have not shown count, too
DAMPING = 0.1


class Moment(NamedTuple):
    """A running second moment.

    Attributes:
      total: `[I, I]` sum of `x x.T`; for rank K `[I, 1 + 2 K]`, its diagonal and its products with `probes`.
      count: number of inputs, scalar.
    """

    total: Array
    count: Array  # type: ignore[assignment]


def start(inputs: int, rank: int | None = None) -> Moment:
    """The moment of zero inputs.

    Args:
      inputs: I.
      rank: K of the matrix that is kept beside the diagonal, 0 for the diagonal alone; None for the whole
        moment, which is kept, too, where it is not larger.
    """
    return Moment(jnp.zeros((inputs, width(inputs, rank))), jnp.zeros(()))


def width(size: int, rank: int | None) -> int:
    """Columns of the sum that a moment of n dimensions is made of.

    >>> width(576, None), width(576, 64), width(576, 0), width(96, 64)
    (576, 129, 1, 96)

    Raises:
      HydraOptError: a negative rank.
    """
    if rank is not None and rank < 0:
        raise HydraOptError(f"rank={rank}: must be 0, for variances only, or more")
    return size if rank is None else min(size, 1 + 2 * rank)


@functools.lru_cache(maxsize=16)
def probes(size: int, columns: int) -> np.ndarray | None:
    """The random vectors `[n, 2 K]` whose products are in a sum of so many columns; None for a whole moment.

    They are the same for all sums of a size, so that sums of several runs add up.
    """
    if columns == size:
        return None
    made = np.random.default_rng(size).standard_normal((size, columns - 1), np.float32)
    made.flags.writeable = False
    return made


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
    vectors = probes(*moment.total.shape)
    return Moment(moment.total + second(x, keep, vectors), moment.count + keep.sum())


def second(rows: Array, weights: Array, vectors: Array | np.ndarray | None) -> Array:
    """Sum of `x x.T` over rows `[..., n]`; with vectors `[n, P]`, see `probes`, its diagonal and its products
    with them, `[n, 1 + P]`. Rows of weight 0 may be no numbers."""
    keep = weights.reshape(-1, 1)
    flat = jnp.where(keep > 0, rows.reshape(-1, rows.shape[-1]).astype(jnp.float32), 0.0)
    weighted = flat * keep
    if vectors is None:
        return matmul(flat.T, weighted)
    squares = (flat * weighted).sum(0)[:, None]
    return jnp.concatenate([squares, matmul(weighted.T, matmul(flat, jnp.asarray(vectors)))], 1)


def mean(moment: Moment) -> Array:
    """`E[x x.T]`, `[I, I]`, or what stands for it: `[I, 1 + K]`, see `matrix_of`, or the diagonal `[I]`."""
    total = moment.total / jnp.maximum(moment.count, 1.0)
    vectors = probes(*total.shape)
    return total if vectors is None else low_rank(total, jnp.asarray(vectors))


def reduced(moment: Array | np.ndarray, rank: int) -> Array:
    """A whole moment `[I, I]` at a rank, as it is where it is gathered so, see `start`.

    >>> reduced(np.diag([1.0, 2.0]), 0).tolist()
    [1.0, 2.0]

    Raises:
      HydraOptError: a moment that is not whole, or a negative rank.
    """
    moment = jnp.asarray(moment, jnp.float32)
    if moment.shape != (len(moment),) * 2:
        raise HydraOptError(f"a moment of shape {list(moment.shape)} is not whole: it cannot be reduced")
    vectors = probes(len(moment), width(len(moment), rank))
    if vectors is None:
        return moment
    products = matmul(moment, jnp.asarray(vectors))
    sketch = jnp.concatenate([jnp.diagonal(moment)[:, None], products], 1)
    return low_rank(sketch, jnp.asarray(vectors))


def low_rank(sketch: Array, vectors: Array) -> Array:
    """A diagonal plus a matrix of rank K, from a moment's diagonal and its products with random vectors.

    With Y = C P, `Y (P.T Y)^+ Y.T` is at most C, and near it along its large eigenvectors; K of them are
    kept. The diagonal has what they lack, so that every input's variance is that of C.

    Args:
      sketch: `[n, 1 + 2 K]`.
      vectors: P, `[n, 2 K]`, see `probes`.

    Returns:
      `[n, 1 + K]`, see `matrix_of`; `[n]`, the diagonal, for K = 0.
    """
    diagonal, products = sketch[:, 0], sketch[:, 1:]
    rank = products.shape[1] // 2
    if not rank:
        return diagonal
    values, axes = factorizations.eigh(matmul(vectors.T, products))
    # below it are the rounding errors of the sums
    inverse = factorizations.safe_inverse(values, ROUNDING * jnp.maximum(values[-1], 0.0))
    scale = factorizations.safe_sqrt(inverse)
    u, s, _ = factorizations.thin_svd(matmul(products, axes * scale))
    root = (u * s)[:, :rank]
    rest = jnp.maximum(diagonal - (root * root).sum(1), 0.0)
    return jnp.concatenate([rest[:, None], root], 1)


def matrix_of(moment: np.ndarray) -> np.ndarray:
    """The matrix `[I, I]` that a moment stands for.

    Args:
      moment: `[I, I]`; or `[I]`, its diagonal; or `[I, 1 + K]`, for `diag(d) + F @ F.T` with d the first
        column and F the others.

    >>> print(matrix_of(np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])))
    [[5. 0. 2.]
     [0. 3. 0.]
     [2. 0. 1.]]
    """
    if not is_low_rank(moment):
        return np.diag(moment) if moment.ndim == 1 else moment
    return expanded(moment)


def expanded(moment: np.ndarray) -> np.ndarray:
    """`diag(d) + F @ F.T`, `[I, I]`, of `[I, 1 + K]`."""
    root = np.asarray(moment[:, 1:], np.promote_types(moment.dtype, np.float32))
    return np.diag(moment[:, 0]) + root @ root.T


def diagonal_of(moment: np.ndarray) -> np.ndarray:
    """The diagonal `[I]` of a moment in any form, see `matrix_of`, in float64.

    >>> diagonal_of(np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])).tolist()
    [5.0, 3.0, 1.0]
    """
    if is_low_rank(moment):
        return moment[:, 0] + np.square(moment[:, 1:], dtype=np.float64).sum(1)
    return np.asarray(np.diagonal(moment) if moment.ndim == 2 else moment, np.float64)


def is_low_rank(moment: np.ndarray) -> bool:
    """Whether a moment is a diagonal plus a matrix of low rank, `[I, 1 + K]`."""
    return moment.ndim == 2 and moment.shape[1] < moment.shape[0]


def part_of(moment: np.ndarray, at: slice) -> np.ndarray:
    """The moment of some of the dimensions, as a matrix where that is not larger."""
    if moment.ndim == 2 and not is_low_rank(moment):
        return moment[at, at]
    part = moment[at]
    if part.ndim == 1 or is_low_rank(part):
        return part
    return expanded(part)


class Seen(NamedTuple):
    """What a layer of a model has seen.

    Attributes:
      total: the sum over its inputs, see `Moment`.
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
    rank: int | None
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
        if not all(np.isfinite(y).all() for y in (x.total, x.outputs) if y is not None):
            raise HydraOptError(f"{path}: the model's numbers there are not finite")
        inputs = finished(x.total / x.count)
        out |= {one: inputs.copy() for one in shared}
        if x.outputs is not None:
            # in the same units for all: per input of the batch
            outputs = finished(x.outputs / largest)
            size = len(outputs) // len(shared)
            for n, one in enumerate(shared):
                out[one + OUTPUT] = part_of(outputs, slice(n * size, (n + 1) * size)).copy()
    if not out:
        raise HydraOptError("forward calls no layer that is tapped: nothing was collected")
    return out


def finished(total: np.ndarray) -> np.ndarray:
    """The moment of a sum over its count, see `mean`."""
    vectors = probes(*total.shape)
    return total if vectors is None else np.asarray(low_rank(jnp.asarray(total), jnp.asarray(vectors)))


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
    """Write second moments, module name -> `[I, I]`, `[I, 1 + K]` or `[I]`, see `matrix_of`.

    Raises:
      HydraOptError: the file cannot be written; there is then nothing of it.
    """
    try:
        write_tensors(Path(path), {k: np.ascontiguousarray(v, np.float32) for k, v in moments.items()})
    except (OSError, SafetensorError) as error:
        raise system_error(path, "written", error, ": give another file") from error


def digest(moments: Mapping[str, np.ndarray]) -> str:
    """A fingerprint of a calibration: 16 hexadecimal digits of a hash of its float32 numbers and the damping.

    >>> digest({"q": np.eye(2)}) == digest({"q": np.eye(2, dtype=np.float32)})
    True
    """
    out = hashlib.sha256(json.dumps(DAMPING).encode())
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
