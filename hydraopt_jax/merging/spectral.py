"""Methods that align or equalize singular directions, in coordinates of size T * R instead of I and O.

Directions below `TOLERANCE` of the largest singular value (from padding, absent tasks or copies) are dropped:
they are zero in exact arithmetic, and their singular vectors are arbitrary. So are tasks' coordinates: what
is zero in exact arithmetic has no vote.
"""

import jax.numpy as jnp
from jax import Array

from hydraopt_jax.linalg import decompose
from hydraopt_jax.linalg.decompose import Svd, matmul
from hydraopt_jax.merging.sparse import combine, trim
from hydraopt_jax.merging.sums import side_by_side
from hydraopt_jax.merging.truncation import split_values, truncate

TOLERANCE = 1e-5


def significant(s: Array) -> Array:
    """1 where a singular value counts, 0 elsewhere; `[..., N]`."""
    return (s > TOLERANCE * s.max(-1, keepdims=True)).astype(jnp.float32)


def _without_round_off(u: Array, s: Array) -> Array:
    """Left singular vectors `[K, N]` with zeros where their coordinates `u * s` are round-off.

    >>> print(_without_round_off(jnp.array([[1.0, 1e-8], [0.1, 1.0]]), jnp.array([2.0, 1.0])))
    [[1.  0. ]
     [0.1 1. ]]
    """
    return jnp.where(jnp.abs(u) * s > TOLERANCE * s.max(), u, 0.0)


def rows_svd(x: Array) -> Svd:
    """Decomposition of a wide matrix `[N, O]` through a thin QR of its transpose."""
    q, r = decompose.qr(x.T)
    u, s, vt = decompose.thin_svd(r.T)
    return Svd(u, s, matmul(vt, q.T))


def knots(
    a: Array, b: Array, weights: Array, *, rank: int, density: float = 0.2, elect: str = "total"
) -> tuple[Array, Array]:
    """KnOTS-TIES: TIES in a basis that all deltas share.

    The stacked deltas have the decomposition `[delta_1; ...; delta_T] = [V_1; ...; V_T] S W`. The `V_t: [I,
    N]` are trimmed, elected and averaged as TIES does with deltas, and `merged = V S W`. The
    stack `[T * I, O]` is never formed: with `a[t] = q[t] r[t]` it is the block-diagonal of the `q[t]` times
    the stacked `r[t] b[t]: [T * R, O]`, whose decomposition `L S W` gives `V_t = q[t] L_t`. The merging of
    the `V_t` is elementwise and streams, as in `sparse`.

    In the paper's orientation (weights `[O, I]`) the deltas are concatenated along columns and W is its U.

    Args:
      a, b, weights: see `sums`.
      rank: S; `T * R` keeps all.
      density: fraction of the entries of each V_t kept.
      elect: as in `sparse.ties`.

    Reference: Stoica et al., Model merging with SVD to tie the KnOTS, 2024, arXiv 2410.19735.
    """
    q, r = decompose.qr(a.astype(jnp.float32))
    rows = matmul(r, b)
    found = rows_svd(rows.reshape(-1, rows.shape[-1]))
    counts = significant(found.s)
    own = (_without_round_off(found.u, found.s) * counts).reshape(*rows.shape[:2], -1)
    size = a.shape[1] * counts.sum()
    v = combine((q, own), weights, lambda part: matmul(*part), lambda x, t: trim(x, density, size), elect)
    return truncate(v * found.s, found.v, rank)


def polar(x: Array) -> Array:
    """The nearest matrix with orthonormal columns, `P Q.T` of `x = P D Q.T`, without null directions."""
    q, r = decompose.qr(x)
    u, s, vt = decompose.thin_svd(r)
    return matmul(q, u * significant(s), vt)


def tsv_m(a: Array, b: Array, weights: Array, *, rank: int, keep: int | None = None) -> tuple[Array, Array]:
    """TSV-Merge: each task's leading singular vectors, made orthogonal between tasks.

    `merged = U' S V'` with S the tasks' `keep` leading singular values (times `w_t`), U' and V' the matrices
    with orthonormal columns (rows) nearest to the tasks' concatenated singular vectors.

    Args:
      a, b, weights: see `sums`.
      rank: S; `T * keep` keeps all.
      keep: directions per task; None for the paper's share, min(I, O) / T, at least 1 and at most R.

    Returns:
      `(a: [I, S], b: [S, O])`; a single task gives its own truncated SVD.

    Reference: Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, 2024,
    arXiv 2412.00081.
    """
    tasks, inputs, outputs = a.shape[0], a.shape[1], b.shape[2]
    each = decompose.svd(a, b)
    keep = min(each.s.shape[-1], max(min(inputs, outputs) // tasks, 1) if keep is None else keep)
    counts = significant(each.s)[:, :keep]
    left = polar(decompose.wide(each.u[..., :keep] * counts[:, None, :]))
    right = polar((each.v[:, :keep] * counts[..., None]).reshape(tasks * keep, outputs).T).T
    return truncate(left * (each.s[:, :keep] * counts * weights[:, None]).reshape(-1), right, rank)


def iso_c(a: Array, b: Array, weights: Array, *, rank: int) -> tuple[Array, Array]:
    """Iso-C: the sum of deltas with all its singular values replaced by their mean.

    `merged = mean(s) U V` with `sum_t w_t delta_t = U diag(s) V`. A sum of adapters has at most T * R
    directions. The mean is over these, not over all min(I, O), because further singular vectors are
    arbitrary.

    Args:
      a, b, weights: see `sums`.
      rank: S; the sum's leading directions are kept, `T * R` keeps all.

    Reference: Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
    Subspaces, 2025, arXiv 2502.04959.
    """
    total = decompose.svd(*side_by_side(a, b, weights))
    counts = significant(total.s)
    mean = total.s.sum() / jnp.maximum(counts.sum(), 1.0)
    return split_values(total._replace(s=mean * counts), rank)


def core_space(
    a: Array, b: Array, weights: Array, *, rank: int, density: float = 0.2, elect: str = "total"
) -> tuple[Array, Array]:
    """TIES in Core Space: TIES on the cores of all deltas between two shared bases.

    The bases U `[I, N]`, V `[O, N]`, N = T * R, are the left singular vectors of the tasks' input-side
    factors (concatenated) and of their output-side factors. `core[t] = U.T a[t] b[t] V`, and
    `merged = U ties(core) V.T`. Linear merging and Iso-C give the same in Core Space as outside of it. The
    paper's bases depend on how each delta is split into factors. Here the SVD splits each delta evenly, so
    the result depends only on the deltas.

    Args:
      a, b, weights, rank: see `sums`.
      density: fraction of a core's entries kept.
      elect: as in `sparse.ties`.

    Reference: Panariello et al., Accurate and Efficient Low-Rank Model Merging in Core Space, 2025,
    arXiv 2509.17786.
    """
    each = decompose.svd(a, b)
    root = decompose.safe_sqrt(each.s)
    left = rows_svd(decompose.wide(each.u * root[:, None, :]).T)
    right = rows_svd((each.v * root[..., None]).reshape(-1, b.shape[-1]))
    counts = significant(left.s), significant(right.s)
    tasks, kept = each.s.shape
    # row block t of `u * s` holds task t's factor in the basis' coordinates
    x, y = (
        (_without_round_off(v.u, v.s) * v.s * count).reshape(tasks, kept, -1)
        for v, count in zip((left, right), counts, strict=True)
    )
    size = counts[0].sum() * counts[1].sum()
    core = combine(
        (x, y),
        weights,
        lambda part: matmul(part[0].T, part[1]),
        lambda z, t: trim(z, density, size),
        elect,
    )
    return truncate(matmul(left.v.T, core), right.v, rank)
