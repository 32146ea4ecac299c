"""Analysis for the mode decision: energies of directions, alone and in shared coordinates."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hydraopt_jax.linalg import decompose
from hydraopt_jax.linalg.decompose import HostSvd, Svd, matmul

# number of tasks tried as reference
REFERENCES = 8
# share of the energy of all deltas by whose directions references are chosen
MOST = 0.9
# maximum width of a joint basis, as a multiple of the adapters' rank
SHARED_WIDTH = 4


class Joint(NamedTuple):
    """A joint basis of the vectors of all tasks, for one module and side, as in joint diagonalization.

    Attributes:
      basis: `[I, S]` orthonormal, the leading eigenvectors of `sum_t w_t x_t x_t.T`, x the vectors as coded.
      part: `[T, R, S]` share of each vector's energy along each basis vector.
    """

    basis: Array
    part: Array


class Spectrum(NamedTuple):
    """Inputs of the mode decision for the M modules of one shape.

    Attributes:
      modules: names.
      deltas: decompositions, `s` relative to the task's norm and times the root of its weight, `[M, T, ...]`.
      norms: `[M, T]` Frobenius norms, zero for an absent task.
      scales: `[M, T]` factors from relative deltas to true ones.
      cosines: squared cosines, as coded, of every singular vector with those of the candidate references
        (made orthogonal in order), input side and output side, `[M, T, R, C, R]`.
      references: the C candidate tasks.
      joint: joint bases of the input side and of the output side; None for a single task, or if they were not
        computed.
    """

    modules: tuple[str, ...]
    deltas: HostSvd
    norms: np.ndarray
    scales: np.ndarray
    cosines: tuple[np.ndarray, np.ndarray]
    references: tuple[int, ...]
    joint: tuple[Joint, Joint] | None


@functools.partial(jax.jit, static_argnames="width")
def joint_basis(vectors: Array, s: Array, width: int) -> Joint:
    """`Joint` of one side of a module: vectors `[T, I, R]`, singular values `[T, R]`."""
    q, reduced = decompose.reduce(vectors * s[:, None, :])
    flat = decompose.wide(reduced)
    basis, _ = decompose.top_eigenvectors(matmul(flat, flat.T), width)
    along = matmul(basis.T, reduced) ** 2
    energy = jnp.sum(reduced**2, 1)[:, :, None]
    return Joint(matmul(q, basis), along.mT / jnp.where(energy > 0, energy, 1.0))


@jax.jit
def squared_cosines(x: Array, references: Array) -> Array:
    """Squared cosines `[T, R, C, R]` of a module's `[T, I, R]` with those of tasks, `[C]`.

    The references' vectors are made orthogonal in order.
    """
    length = jnp.linalg.norm(x, axis=-2, keepdims=True)
    unit = x / jnp.where(length > 0, length, 1.0)
    basis = decompose.qr(x[references])[0]
    return jnp.einsum("tir,cis->trcs", unit, basis, precision="highest") ** 2


@jax.jit
def inner_products(deltas: Svd | HostSvd) -> Array:
    """Of every two tasks' deltas, module by module: `[M, T, T]` from `u: [M, T, I, R]`."""
    return jax.vmap(lambda x: decompose.gram(x.u * x.s[:, None, :], x.v))(deltas)


def spectrum(
    modules: Sequence[str],
    deltas: Svd,
    weights: np.ndarray,
    coded: tuple[np.ndarray, np.ndarray],
    *,
    share: bool = True,
    deep: bool = True,
) -> Spectrum:
    """The `Spectrum` of the modules of one shape.

    Args:
      modules: M names.
      deltas: decompositions of the true deltas, `u: [M, T, I, R]`.
      weights: `[M, T]` of the relative errors.
      coded: unit singular vectors in the coordinates they are coded in, `[M, T, I, R]` and `[M, T, O, R]`.
      share: whether tasks may share anything.
      deep: whether to compute joint bases as well as references; their cost grows with the cube of T R.
    """
    host = HostSvd(*(np.asarray(x) for x in deltas))
    norms = np.sqrt((host.s**2).sum(-1))
    root = np.sqrt(weights)
    scales = norms / root
    s = host.s * np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 0)[..., None]
    # directions at round-off are none
    s = np.where(s > 1e-6 * s[..., :1], s, 0.0).astype(np.float32)
    host = host._replace(s=s)
    tasks = norms.shape[1]
    if not share or tasks == 1:
        empty = np.zeros((*s.shape, 0, s.shape[-1]), np.float32)
        return Spectrum(tuple(modules), host, norms, scales, (empty, empty), (), None)
    most = leading(s)
    strongest = HostSvd(host.u[..., :most], s[..., :most], host.v[..., :most, :])
    gram = np.asarray(inner_products(strongest))
    central = np.argsort(-(gram**2).sum((0, 2)), kind="stable")[:REFERENCES]
    # module by module: a program per size in place of one per size and number of modules
    left, right = (
        np.stack(jax.device_get([squared_cosines(x, central) for x in vectors])) for vectors in coded
    )
    joint = []
    for vectors in coded if deep else ():
        rank = s.shape[-1]
        width = min(tasks * rank, vectors.shape[-2], SHARED_WIDTH * rank)
        each = jax.device_get([joint_basis(x, y, width) for x, y in zip(vectors, s, strict=True)])
        joint.append(jax.tree.map(lambda *x: np.stack(x), *each))
    return Spectrum(
        tuple(modules),
        host,
        norms,
        scales,
        (left, right),
        tuple(central.tolist()),
        (joint[0], joint[1]) if deep else None,
    )


def leading(s: np.ndarray) -> int:
    """Number of leading directions, a power of two, with most of the deltas' energy: they tell which tasks
    are like others, and inner products take quadratic time in them.

    >>> leading(np.array([4.0, 1.0, 0.5, 0.5])), leading(np.ones(3))
    (1, 3)
    """
    along = (s**2).reshape(-1, s.shape[-1]).sum(0)
    known = np.cumsum(along) >= MOST * along.sum()
    return min(1 << int(np.argmax(known)).bit_length(), len(along))


def take_modules(x: Spectrum, chosen: Sequence[int]) -> Spectrum:
    """The spectrum of some of its modules."""
    at = list(chosen)
    joint = None
    if x.joint is not None:
        joint = Joint(*(y[at] for y in x.joint[0])), Joint(*(y[at] for y in x.joint[1]))
    return x._replace(
        modules=tuple(x.modules[m] for m in at),
        deltas=HostSvd(*(y[at] for y in x.deltas)),
        norms=x.norms[at],
        scales=x.scales[at],
        cosines=(x.cosines[0][at], x.cosines[1][at]),
        joint=joint,
    )
