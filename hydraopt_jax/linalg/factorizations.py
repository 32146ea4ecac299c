"""Matrix factorizations that compose under jit, vmap, jvp and grad in any order.

Primals: LAPACK through `jnp.linalg`, on a CPU one matrix after another. Two concurrent batched LAPACK calls
can deadlock: each waits for the thread pool that the other one holds (seen with jax 0.10.2 on two cores).
Tangents: matrix products of the primal results, so that a backward pass factorizes nothing and reverse mode
is the transpose of a few products.

Where a factorization is not differentiable its tangents are finite by convention:

- Values (singular values, eigenvalues, columns of a QR) that agree to `TOLERANCE` of the largest count as
  equal. Tangents do not rotate vectors of equal values among each other. In this gauge any function of the
  space that they span is differentiated exactly. How a perturbation splits equal values is not represented.
- Singular values below `TOLERANCE` of the largest count as zero. Their vectors are arbitrary and move only
  within the span of the others; the values themselves have the one-sided tangent `u.T @ dx @ v`.
- A QR of dependent columns keeps the tangents of `q @ q.T` on independent ones and of `r.T @ r` on all.

Reference: Giles, Collected matrix derivative results for forward and reverse mode algorithmic
differentiation, 2008; Townsend, Differentiating the singular value decomposition, 2016.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# relative to the largest value; about eight units in the last place of float32
TOLERANCE = 1e-6

_product = partial(jnp.matmul, precision="highest")


def _looped_on_cpu(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """`function` of `[..., N, L]`: one loop over all matrices on a CPU, one batched call elsewhere."""

    def loop(x: Array) -> Any:
        if x.ndim == 2:
            return function(x)
        found = jax.lax.map(function, x.reshape(-1, *x.shape[-2:]))
        return jax.tree.map(lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]), found)

    @jax.custom_batching.custom_vmap
    def apply(x: Array) -> Any:
        return jax.lax.platform_dependent(x, cpu=loop, default=function)

    @apply.def_vmap
    def batched(axis_size: int, in_batched: Any, x: Array) -> tuple[Any, Any]:
        # one loop over all axes: nested ones are slow to compile, and XLA fails on products of three deep
        found = apply(x)
        return found, jax.tree.map(lambda _: True, found)

    return apply


_qr = _looped_on_cpu(lambda x: tuple(jnp.linalg.qr(x)))
_eigh = _looped_on_cpu(lambda x: tuple(jnp.linalg.eigh(x)))
_eigvalsh = _looped_on_cpu(lambda x: jnp.linalg.eigvalsh(x))
_thin_svd = _looped_on_cpu(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)))


def safe_inverse(x: Array, least: Array | float = 0.0) -> Array:
    """`1 / x`; 0 with derivative 0 where `|x|` is at most `least`.

    >>> print(safe_inverse(jnp.array([4.0, 0.0])))
    [0.25 0.  ]
    """
    nonzero = jnp.abs(x) > least
    return jnp.where(nonzero, 1.0 / jnp.where(nonzero, x, 1.0), 0.0)


def safe_sqrt(x: Array) -> Array:
    """`sqrt(max(x, 0))` whose derivative at 0 is 0 instead of infinite.

    >>> print(jax.grad(safe_sqrt)(0.0), jax.grad(safe_sqrt)(4.0))
    0.0 0.25
    """
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def _differences(values: Array) -> Array:
    """`values[j] - values[i]` at `[..., i, j]`."""
    return values[..., None, :] - values[..., :, None]


def _least(values: Array) -> Array:
    """The size `[..., 1]` up to which a value counts as zero."""
    return TOLERANCE * jnp.max(jnp.abs(values), -1, keepdims=True, initial=0.0)


def svd_tangents(u: Array, s: Array, v: Array, across: Array, along: Array) -> tuple[Array, Array, Array]:
    """Tangents of a thin singular value decomposition `x = (u * s) @ v` from the images of `dx`.

    With `p = u.T dx v.T`, its symmetric part `p+`, its antisymmetric part `p-`, and elementwise products:

        ds = diag(p),   k = p+ / (s_j - s_i) + p- / (s_j + s_i),   l = p+ / (s_j - s_i) - p- / (s_j + s_i)
        du = u k + (1 - u u.T) dx v.T / s,   dv.T = v.T l + (1 - v.T v) dx.T u / s

    Quotients are 0 where the divisor counts as zero, see the module docstring.

    Args:
      u, s, v: `[..., I, N]`, `[..., N]`, `[..., N, O]`.
      across: `dx @ v.T`, `[..., I, N]`.
      along: `dx.T @ u`, `[..., O, N]`.

    Returns:
      Tangents of u, s and v.
    """
    p = _product(u.mT, across)
    even, odd = (p + p.mT) / 2, (p - p.mT) / 2
    least = _least(s)
    even = even * safe_inverse(_differences(s), least[..., None])
    odd = odd * safe_inverse(s[..., None, :] + s[..., :, None], least[..., None])
    inverse = safe_inverse(s, least)[..., None, :]
    du = _product(u, even + odd) + (across - _product(u, p)) * inverse
    dv = _product(v.mT, even - odd) + (along - _product(v.mT, p.mT)) * inverse
    return du, jnp.diagonal(p, axis1=-2, axis2=-1), dv.mT


@jax.custom_jvp
def thin_svd(x: Array) -> tuple[Array, Array, Array]:
    """`(u: [..., N, K], s: [..., K], vt: [..., K, L])` of `x: [..., N, L]`, K = min(N, L)."""
    return _thin_svd(x)


@thin_svd.defjvp
def _thin_svd_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    u, s, v = thin_svd(x)
    return (u, s, v), svd_tangents(u, s, v, _product(dx, v.mT), _product(dx.mT, u))


@jax.custom_jvp
def eigh(x: Array) -> tuple[Array, Array]:
    """Ascending eigenvalues `[..., N]` and eigenvectors `[..., N, N]` of the symmetric part of `x`.

    `dw = diag(m)`, `dv = v (m / (w_j - w_i))` with `m = v.T dx v`.
    """
    return _eigh(x)


@eigh.defjvp
def _eigh_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    w, v = eigh(x)
    m = _product(_product(v.mT, (dx + dx.mT) / 2), v)
    turn = m * safe_inverse(_differences(w), _least(w)[..., None])
    return (w, v), (jnp.diagonal(m, axis1=-2, axis2=-1), _product(v, turn))


@jax.custom_jvp
def eigvalsh(x: Array) -> Array:
    """Ascending eigenvalues `[..., N]` of the symmetric part of `x`."""
    return _eigvalsh(x)


@eigvalsh.defjvp
def _eigvalsh_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (w, _), (dw, _) = jax.jvp(eigh, primals, tangents)
    return w, dw


@jax.custom_jvp
def pseudo_inverse(x: Array) -> Array:
    """Moore-Penrose inverse `[..., L, N]` of `x: [..., N, L]`; tangents are those at a fixed rank.

    Reference: Golub and Pereyra, The differentiation of pseudo-inverses and nonlinear least squares problems
    whose variables separate, 1973.
    """
    u, s, vt = thin_svd(x)
    return _product(vt.mT * safe_inverse(s, _least(s))[..., None, :], u.mT)


@pseudo_inverse.defjvp
def _pseudo_inverse_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    y = pseudo_inverse(x)
    # y dx.T (1 - x y) and its mirror image, in an order that multiplies small matrices first
    outer = _product(_product(y, y.mT), dx.mT)
    inner = _product(dx.mT, _product(y.mT, y))
    dy = outer - _product(_product(outer, x), y) + inner - _product(y, _product(x, inner))
    return y, dy - _product(_product(y, dx), y)


@jax.custom_jvp
def qr(x: Array) -> tuple[Array, Array]:
    """Thin QR of `x: [..., N, L]`: `q: [..., N, K]`, upper triangular `r: [..., K, L]`, K = min(N, L).

    With `x1`, `r1` the first K columns, `m = q.T dx1 r1^-1` and `w = tril(m, -1) - tril(m, -1).T`:
    `dq = q w + (1 - q q.T) dx1 r1^-1`, `dr = q.T dx - w r`. The inverse is taken with columns of norm 1,
    and is a pseudo-inverse where they are dependent.
    """
    return _qr(x)


@qr.defjvp
def _qr_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    q, r = qr(x)
    count = q.shape[-1]
    square = r[..., :count]
    scale = safe_inverse(safe_sqrt(jnp.sum(square**2, -2)))[..., None, :]
    inverse = scale.mT * pseudo_inverse(square * scale)
    inside = _product(q.mT, dx)
    moved = _product(dx[..., :count], inverse)
    m = _product(inside[..., :count], inverse)
    turn = jnp.tril(m, -1) - jnp.tril(m, -1).mT
    return (q, r), (_product(q, turn) + moved - _product(q, m), inside - _product(turn, r))
