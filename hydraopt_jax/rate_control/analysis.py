"""What the choice of a form depends on: energies of directions, alone and in shared coordinates."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hydraopt_jax.linalg import clustering, decompose
from hydraopt_jax.linalg.decompose import Svd, matmul

# tasks tried as the one that others are predicted from
REFERENCES = 8
# width of a shared factor over the adapters' rank
SHARED_WIDTH = 4


class Shared(NamedTuple):
    """Spectrum of HydraOpt's form at every candidate number of heads, one module and side.

    Attributes:
      center: `[K, S]` energy of each shared vector.
      heads: `[K, T, S]` energy of each head's vectors, zero rows beyond K heads.
      missed: `[K]` energy that the form cannot reach: scatter and tail.
    """

    center: Array
    heads: Array
    missed: Array


class Joint(NamedTuple):
    """A basis that the vectors of all tasks are near, one module and side: joint diagonalization's.

    Attributes:
      basis: `[I, S]` orthonormal, the leading eigenvectors of `sum_t w_t x_t x_t.T`, x the vectors as coded.
      part: `[T, R, S]` share of each vector's energy along each of them.
    """

    basis: Array
    part: Array


class Spectrum(NamedTuple):
    """What the choice depends on, for the M modules of one shape.

    Attributes:
      modules: names.
      deltas: decompositions, `s` relative to the task's norm and times the root of its weight, `[M, T, ...]`.
      norms: `[M, T]` Frobenius norms, zero for an absent task.
      scales: `[M, T]` what a relative delta is multiplied with to give the true one.
      cosines: squared cosines, as coded, of every singular vector with those of the candidate references
        (made orthogonal in order), input side and output side, `[M, T, R, C, R]`.
      references: the C candidate tasks.
      cuts: numbers of heads tried.
      labels: `[M, K, T]` head of each task at each cut.
      shared: spectrum with the input side shared and with the output side shared; None where one task is all,
        or where they were not looked for.
      joint: joint bases of the input side and of the output side, likewise.
    """

    modules: tuple[str, ...]
    deltas: Svd
    norms: np.ndarray
    scales: np.ndarray
    cosines: tuple[np.ndarray, np.ndarray]
    references: tuple[int, ...]
    cuts: tuple[int, ...]
    labels: np.ndarray
    shared: tuple[Shared, Shared] | None
    joint: tuple[Joint, Joint] | None


def cuts(tasks: int) -> tuple[int, ...]:
    """Numbers of heads worth trying: all up to 8 tasks, powers of two and all tasks beyond."""
    if tasks <= 8:
        return tuple(range(1, tasks + 1))
    return (*(1 << k for k in range(tasks.bit_length()) if 1 << k < tasks), tasks)


def shared_factors(deltas: Svd, labels: Array, rank: int) -> tuple[Array, Array, Array]:
    """The best shared input factor and heads for given labels.

    Args:
      deltas: T decompositions, one module.
      labels: `[T]`.
      rank: S.

    Returns:
      Orthonormal `a: [I, S]`, heads `b: [T, S, O]` (zero beyond the last head), and head masses `[T]`.
    """
    tasks = deltas.s.shape[0]
    weights = (deltas.energy > 0).astype(jnp.float32)
    q, reduced = decompose.reduce(deltas.u * deltas.s[:, None, :])
    basis, _ = decompose.top_eigenvectors(clustering.between(reduced, deltas.v, labels, weights, tasks), rank)
    average, mass = clustering.membership(labels, weights, tasks)
    projected = matmul(basis.T, reduced)
    b = jnp.einsum("kt,tsr,tro->kso", average, projected, deltas.v, precision="highest")
    return matmul(q, basis), b, mass


@functools.partial(jax.jit, static_argnames="rank")
def shared_spectrum(deltas: Svd, labels: Array, rank: int) -> Shared:
    """`Shared` of modules of one shape: deltas `[M, T, ...]`, labels `[M, K, T]`."""

    def one(deltas: Svd, labels: Array) -> tuple[Array, Array, Array]:
        _, b, mass = shared_factors(deltas, labels, rank)
        heads = mass[:, None] * jnp.sum(b**2, -1)
        center = heads.sum(0)
        return center, heads, jnp.maximum(deltas.energy.sum() - center.sum(), 0.0)

    # one after another: each is large where there are many tasks
    module = lambda x: jax.lax.map(lambda cut: one(x[0], cut), x[1])  # noqa: E731
    return Shared(*jax.lax.map(module, (deltas, labels)))


@functools.partial(jax.jit, static_argnames="width")
def joint_bases(vectors: Array, s: Array, width: int) -> Joint:
    """`Joint` of one side of modules of one shape: vectors `[M, T, I, R]`, singular values `[M, T, R]`."""

    def one(x: tuple[Array, Array]) -> Joint:
        vectors, s = x
        q, reduced = decompose.reduce(vectors * s[:, None, :])
        flat = decompose.wide(reduced)
        basis, _ = decompose.top_eigenvectors(matmul(flat, flat.T), width)
        along = matmul(basis.T, reduced) ** 2
        energy = jnp.sum(reduced**2, 1)[:, :, None]
        return Joint(matmul(q, basis), along.mT / jnp.where(energy > 0, energy, 1.0))

    return jax.lax.map(one, (vectors, s))


@jax.jit
def hierarchies(deltas: Svd) -> Array:
    """Ward's cuts `[M, T, T]` of relative deltas."""

    def one(x: Svd) -> Array:
        return clustering.hierarchy(
            decompose.gram(x.u * x.s[:, None, :], x.v), (x.energy > 0).astype(jnp.float32)
        )

    return jax.vmap(one)(deltas)


@jax.jit
def squared_cosines(x: Array, references: Array) -> Array:
    """Squared cosines of `[M, T, I, R]` with the references' `[M, C, I, R]`, made orthogonal in order:
    `[M, T, R, C, R]`."""
    length = jnp.linalg.norm(x, axis=-2, keepdims=True)
    x = x / jnp.where(length > 0, length, 1.0)
    references = decompose.qr(references)[0]
    return jnp.einsum("mtir,mcis->mtrcs", x, references, precision="highest") ** 2


def spectrum(
    modules: Sequence[str],
    deltas: Svd,
    weights: np.ndarray,
    coded: tuple[np.ndarray, np.ndarray],
    *,
    share: bool = True,
    deep: bool = True,
) -> Spectrum:
    """Analyze the modules of one shape.

    Args:
      modules: M names.
      deltas: decompositions of the true deltas, `u: [M, T, I, R]`.
      weights: `[M, T]` of the relative errors.
      coded: unit singular vectors in the coordinates they are coded in, `[M, T, I, R]` and `[M, T, O, R]`.
      share: whether tasks may share anything.
      deep: whether shared factors and joint bases are looked for as well, or references only; their cost
        grows with the cube of T R.
    """
    norms = np.asarray(jnp.sqrt(deltas.energy))
    root = np.sqrt(weights)
    scales = norms / root
    s = deltas.s * jnp.asarray(np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 0))[..., None]
    # directions at round-off are none
    s = jnp.where(s > 1e-6 * s[..., :1], s, 0.0)
    relative = Svd(deltas.u, s, deltas.v)
    tasks = norms.shape[1]
    host = Svd(*(np.asarray(x) for x in relative))  # type: ignore[arg-type]
    if not share or tasks == 1:
        empty = np.zeros((*s.shape, 0, s.shape[-1]), np.float32)
        return Spectrum(
            tuple(modules), host, norms, scales, (empty, empty), (), (), np.zeros((0,)), None, None
        )
    gram = np.asarray(jax.vmap(lambda x: decompose.gram(x.u * x.s[:, None, :], x.v))(relative))
    central = np.argsort(-(gram**2).sum((0, 2)), kind="stable")[:REFERENCES]
    left, right = (squared_cosines(x, x[:, central]) for x in map(jnp.asarray, coded))
    tried = cuts(tasks) if deep else ()
    labels = hierarchies(relative)[:, np.array(tried) - 1] if deep else np.zeros((0,))
    sides, joint = [], []
    for x, vectors in zip((relative, relative.mT), coded, strict=True) if deep else ():
        width = min(tasks * x.s.shape[-1], x.u.shape[-2], SHARED_WIDTH * x.s.shape[-1])
        sides.append(jax.device_get(shared_spectrum(x, labels, width)))
        joint.append(jax.device_get(joint_bases(jnp.asarray(vectors), relative.s, width)))
    return Spectrum(
        tuple(modules),
        host,
        norms,
        scales,
        (np.asarray(left), np.asarray(right)),
        tuple(central.tolist()),
        tried,
        np.asarray(labels),
        (sides[0], sides[1]) if deep else None,
        (joint[0], joint[1]) if deep else None,
    )
