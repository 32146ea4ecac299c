"""Linear algebra on low-rank factors. No function here forms a delta.

Functions take factors `a: [..., I, R]`, `b: [..., R, O]` of `delta = a @ b` and compute in float32 at the
highest matmul precision. They use `factorizations`, whose derivatives are defined for every input.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hydraopt_jax.linalg.factorizations import eigh, qr, safe_sqrt, svd_tangents, thin_svd
from hydraopt_jax.linalg.factorizations import eigvalsh as eigvalsh
from hydraopt_jax.linalg.factorizations import safe_inverse as safe_inverse


def matmul(*factors: Array) -> Array:
    """Left-to-right matrix product in float32 at the highest precision."""
    out = factors[0].astype(jnp.float32)
    for factor in factors[1:]:
        out = jnp.matmul(out, factor.astype(jnp.float32), precision="highest")
    return out


class Svd(NamedTuple):
    """Singular value decomposition of a product of factors, `delta = (u * s) @ v`.

    Attributes:
      u: `[..., I, R]`, orthonormal columns where `s` is positive.
      s: `[..., R]`, descending.
      v: `[..., R, O]`, orthonormal rows where `s` is positive.
    """

    u: Array
    s: Array
    v: Array

    @property
    def energy(self) -> Array:
        """Squared Frobenius norm of each delta, `[...]`."""
        return jnp.sum(self.s**2, -1)

    @property
    def mT(self) -> "Svd":
        """The decomposition of the transposed delta: input and output side are exchanged."""
        return Svd(self.v.mT, self.s, self.u.mT)


class HostSvd(NamedTuple):
    """An `Svd` whose arrays are on the host."""

    u: np.ndarray
    s: np.ndarray
    v: np.ndarray

    @property
    def energy(self) -> np.ndarray:
        """See `Svd`."""
        return np.sum(self.s**2, -1)


@jax.custom_jvp
def svd(a: Array, b: Array) -> Svd:
    """Singular value decomposition of `a @ b` at the cost of two thin QRs and one R x R SVD.

    `a = Qa Ra`, `(Ra b).T = Qb Rb`, `Rb.T = U s V.T`; then `a @ b = (Qa U) s (Qb V).T`.

    Args:
      a, b: `[..., I, R]`, `[..., R, O]`.

    Returns:
      Svd of rank `min(I, R, O)`. It depends on the product alone, not on how it is split (gauge-invariant),
      and so do its derivatives, which are finite at equal and at zero singular values, see `factorizations`.

    >>> print(svd(jnp.array([[3.0], [4.0]]), jnp.array([[2.0, 0.0]])).s)
    [10.]
    """
    qa, ra = qr(a.astype(jnp.float32))
    qb, rb = qr(matmul(ra, b).mT)
    u, s, vt = thin_svd(rb.mT)
    return Svd(matmul(qa, u), s, matmul(vt, qb.mT))


@svd.defjvp
def _svd_jvp(primals: Any, tangents: Any) -> tuple[Svd, Svd]:
    (a, b), (da, db) = primals, tangents
    found = svd(a, b)
    u, s, v = found
    across = matmul(da, matmul(b, v.mT)) + matmul(a, matmul(db, v.mT))
    along = matmul(b.mT, matmul(da.mT, u)) + matmul(db.mT, matmul(a.mT, u))
    return found, Svd(*svd_tangents(u, s, v, across, along))


def inner(a: Array, b: Array, a_other: Array, b_other: Array) -> Array:
    """`<a @ b, a_other @ b_other>` through R x R products: `sum((a.T @ a_other) * (b @ b_other.T))`."""
    return jnp.sum(matmul(a.mT, a_other) * matmul(b, b_other.mT), (-2, -1))


def gram(a: Array, b: Array) -> Array:
    """Gram matrix of deltas, `g[s, t] = <delta_s, delta_t>`.

    Args:
      a, b: `[T, I, R]`, `[T, R, O]`.

    Returns:
      `[T, T]`, symmetric positive semi-definite.
    """
    t, _, r = a.shape
    wide_a = jnp.moveaxis(a, 0, 1).reshape(a.shape[1], t * r)
    wide_b = b.reshape(t * r, b.shape[2])
    products = matmul(wide_a.T, wide_a) * matmul(wide_b, wide_b.T)
    return products.reshape(t, r, t, r).sum((1, 3))


def residual_energy(a: Array, b: Array, a_hat: Array, b_hat: Array) -> Array:
    """`||a @ b - a_hat @ b_hat||^2` without the cancellation of the expanded square.

    The residual is `[a, -a_hat] @ [b; b_hat]`; with `[a, -a_hat] = Q R` its norm is that of `R @ [b; b_hat]`.
    It is a polynomial in the factors, and all its derivatives are exact, for any ranks of the factors.

    Args:
      a, b: `[..., I, R]`, `[..., R, O]`.
      a_hat, b_hat: `[..., I, S]`, `[..., S, O]`.

    Returns:
      `[...]`, accurate to about 1e-13 of the energy.
    """
    left = jnp.concatenate([a.astype(jnp.float32), -a_hat.astype(jnp.float32)], -1)
    right = jnp.concatenate([b.astype(jnp.float32), b_hat.astype(jnp.float32)], -2)
    return _product_energy(left, right)


@jax.custom_jvp
def _product_energy(left: Array, right: Array) -> Array:
    """`||left @ right||^2`."""
    _, r = qr(left)
    return jnp.sum(matmul(r, right) ** 2, (-2, -1))


@_product_energy.defjvp
def _product_energy_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (left, right), (dleft, dright) = primals, tangents
    by_left, by_right = _half_gradients(left, right)
    slope = jnp.sum(by_left * dleft, (-2, -1)) + jnp.sum(by_right * dright, (-2, -1))
    return _product_energy(left, right), 2 * slope


@jax.custom_jvp
def _half_gradients(left: Array, right: Array) -> tuple[Array, Array]:
    """`left right right.T` and `left.T left right`, free of cancellation where `left @ right` is small."""
    q, r = qr(left)
    rest = matmul(r, right)
    return matmul(q, matmul(rest, right.mT)), matmul(r.mT, rest)


@_half_gradients.defjvp
def _half_gradients_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (left, right), (dleft, dright) = primals, tangents
    gram_l, gram_r = matmul(left.mT, left), matmul(right, right.mT)
    by_left = matmul(dleft, gram_r) + matmul(left, matmul(dright, right.mT) + matmul(right, dright.mT))
    by_right = matmul(gram_l, dright) + matmul(matmul(dleft.mT, left) + matmul(left.mT, dleft), right)
    return _half_gradients(left, right), (by_left, by_right)


def eigen_tail(eigenvalues: Array, rank: int | Array) -> Array:
    """`tau(G, rank)`: the sum of all but the `rank` largest eigenvalues (negative round-off counts as 0)."""
    ordered = jnp.sort(jnp.maximum(eigenvalues, 0.0), -1)
    count = ordered.shape[-1]
    return jnp.sum(jnp.where(jnp.arange(count) < count - rank, ordered, 0.0), -1)


def top_eigenvectors(matrix: Array, rank: int) -> tuple[Array, Array]:
    """The `rank` leading eigenvectors `[..., N, rank]` of a symmetric matrix; all eigenvalues, descending."""
    values, vectors = eigh(matrix)
    return vectors[..., ::-1][..., :rank], jnp.maximum(values[..., ::-1], 0.0)


def wide(u: Array) -> Array:
    """The factors of all tasks concatenated: `[T, I, R] -> [I, T * R]`."""
    return jnp.moveaxis(u, 0, 1).reshape(u.shape[1], -1)


def reduce(u: Array) -> tuple[Array, Array]:
    """Exact coordinates of a collection's input sides: `wide(u) = q @ coordinates`.

    Args:
      u: `[T, I, R]`.

    Returns:
      `q: [I, N]` with orthonormal columns and `coordinates: [T, N, R]`, N = min(T * R, I). Every inner
      product of columns of `u` is unchanged in the coordinates.
    """
    q, r = qr(wide(u.astype(jnp.float32)))
    return q, jnp.moveaxis(r.reshape(r.shape[0], u.shape[0], u.shape[2]), 1, 0)


def orthonormal(x: Array) -> Array:
    """An orthonormal basis `[..., N, S]` that spans the columns of `x: [..., N, S]`, S at most N."""
    return qr(x)[0]


def leading(x: Array, rank: int) -> Array:
    """The `rank` leading left singular vectors of `x: [N, L]`, by QR and a small eigenproblem."""
    q, r = qr(x)
    return matmul(q, top_eigenvectors(matmul(r, r.T), rank)[0])


def balance(a: Array, b: Array) -> tuple[Array, Array]:
    """Factors of the same product in which column j of `a` and row j of `b` have equal norms.

    Half-precision storage then neither overflows nor loses small directions to denormals.

    Args:
      a, b: `[..., I, S]`, `[..., S, O]`.
    """
    na, nb = safe_sqrt(jnp.sum(a**2, -2)), safe_sqrt(jnp.sum(b**2, -1))
    scale = jnp.where(na > 0, safe_sqrt(nb / jnp.where(na > 0, na, 1.0)), 1.0)
    scale = jnp.where(scale > 0, scale, 1.0)
    return a * scale[..., None, :], b / scale[..., :, None]


def task_weights(energy: Array) -> Array:
    """Default task weights `1 / ||delta||^2`, 0 for a task without a delta, so that errors are relative."""
    positive = energy > 0
    return jnp.where(positive, 1.0 / jnp.where(positive, energy, 1.0), 0.0)


batched_svd = jax.jit(jax.vmap(jax.vmap(svd)))
