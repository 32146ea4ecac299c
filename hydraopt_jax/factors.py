"""The factors of one module: the result of every form, and of decoding a store."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, Union

import ml_dtypes
import numpy as np

from hydraopt_jax.deferred import Deferred
from hydraopt_jax.errors import HydraOptError

if TYPE_CHECKING:  # stores are read without JAX
    import jax

# on the host or on a device
Array: TypeAlias = Union[np.ndarray, "jax.Array"]
# dtypes that factors may have on disk
FLOATS = tuple(np.dtype(x) for x in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))


class Factors(NamedTuple):
    """The factors of one module, `delta[t] = a[a_of[t]] @ core[t] @ b[b_of[t]]`.

    Attributes:
      a: `[A, I, S]` input-side factors.
      b: `[B, S, O]` output-side factors.
      a_of, b_of: `[T]` int, which factor task t uses; -1 where the task has no delta.
      core: None, `[T, S, S]`, or `[T, S]` for diagonal cores.
    """

    a: Array
    b: Array
    a_of: Array
    b_of: Array
    core: Array | None = None


class LazyFactors(NamedTuple):
    """Factors that are read one by one: lists in place of stacks, see `Factors`."""

    a: Sequence[np.ndarray | Deferred]
    b: Sequence[np.ndarray | Deferred]
    a_of: np.ndarray
    b_of: np.ndarray
    core: np.ndarray | None = None


def count(factors: Factors) -> int:
    """Number of entries of the factors: the rate of the form, in numbers."""
    return sum(int(np.size(x)) for x in (factors.a, factors.b, factors.core) if x is not None)


def parts_of_task(
    terms: Iterable[Factors], task: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """A task's part of each term that it has, on the host: `a: [I, S]`, `b: [S, O]`, and its core or None."""
    for x in terms:
        a, b = int(x.a_of[task]), int(x.b_of[task])
        if min(a, b) >= 0:
            yield np.asarray(x.a[a]), np.asarray(x.b[b]), None if x.core is None else np.asarray(x.core[task])


def task_pair(terms: Sequence[Factors], task: int) -> tuple[np.ndarray, np.ndarray] | None:
    """One task's `a: [I, S]`, `b: [S, O]` in float32 on the host: terms concatenated, cores folded in.

    None if the task has no delta. Directions that are zero on either side are left out; at least one stays.
    """
    left, right = [], []
    for a, b, core in parts_of_task(terms, task):
        left.append(a.astype(np.float32))
        right.append(b.astype(np.float32))
        if core is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                right[-1] = times(core.astype(np.float32), right[-1])
    if not left:
        return None
    a, b = np.concatenate(left, 1), np.concatenate(right, 0)
    return without_zeros(a, b)


def without_zeros(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`a: [I, S]` and `b: [S, O]` without directions that are zero on either side; at least one stays."""
    used = (np.abs(a).max(0) > 0) & (np.abs(b).max(1) > 0)
    used[0] |= not used.any()
    return a[:, used], b[used]


def times(core: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A core, diagonal `[S]` or full `[S, S]`, times `b: [S, O]`.

    >>> times(np.array([2.0, 3.0]), np.ones((2, 1))).tolist(), times(np.eye(2), np.ones((2, 1))).tolist()
    ([[2.0], [3.0]], [[1.0], [1.0]])
    """
    return core[:, None] * b if core.ndim == 1 else core @ b


def balanced(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the same product in which both vectors of every direction have equal norms.

    Entries that overflow become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        na, nb = np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1)
        scale = np.sqrt(np.divide(nb, na, out=np.ones_like(na), where=(na > 0) & (nb > 0)))
        return a * scale, b / scale[:, None]


def overflow(name: str, dtype: Any) -> HydraOptError:
    """The error for a module whose factors a dtype cannot hold."""
    return HydraOptError(f"{name}: values overflow {dtype}; choose bfloat16 or float32 (--dtype)")


def to_dtype(name: str, x: Any, dtype: Any) -> np.ndarray:
    """A factor of a module in a dtype.

    Raises:
      HydraOptError: a value overflows.
    """
    with np.errstate(over="ignore"):
        out = np.asarray(x).astype(dtype)
    if not np.isfinite(out.astype(np.float32)).all():
        raise overflow(name, out.dtype)
    return out


def svd(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin SVD of `a @ b` through the QR of the factors: `u: [I, R]`, `s: [R]`, `v: [R, O]`."""
    (qa, ra), (qb, rb) = np.linalg.qr(a.astype(np.float64)), np.linalg.qr(b.T.astype(np.float64))
    u, s, v = np.linalg.svd(ra @ rb.T, full_matrices=False)
    return qa @ u, s, v @ qb.T
