"""Cases of `derivative_cases`: the merging methods."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from derivative_inputs import FACTORS, TALL, WEIGHTS, A, B, Case, I, R, T, dense, normal, seen

from hydraopt_jax.linalg import decompose
from hydraopt_jax.linalg.decompose import matmul
from hydraopt_jax.merging import activations, compressors, sparse, spectral, sums, truncation

KEY = jax.random.key(0)


def merged(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda a, b, w: matmul(*function(a, b, w, **options))


CASES = {
    "merging.activations.regmean": Case(
        lambda a, b, w, m: matmul(
            *activations.regmean(a, b, w, rank=2, moments=[x @ x.T + jnp.eye(I) for x in m])
        ),
        (*FACTORS, normal(15, T, I, I)),
    ),
    "merging.compressors.joint_diagonalization": Case(
        lambda a, b, w: dense(compressors.joint_diagonalization(a, b, w, rank=2, clusters=2)),
        FACTORS,
        tolerance=3e-2,
    ),
    "merging.compressors.k_merge": Case(lambda a, b, w: dense(compressors.k_merge(a, b, w, rank=2)), FACTORS),
    "merging.compressors.separate": Case(
        lambda a, b, w: dense(compressors.separate(a, b, w, rank=1)), FACTORS
    ),
    "merging.compressors.share": Case(lambda a, b, w: dense(compressors.share(a, b, w, rank=2)), FACTORS),
    "merging.sparse.breadcrumbs": Case(
        merged(sparse.breadcrumbs, rank=2, density=0.6, outliers=0.1), FACTORS, 2e-4, 5e-2
    ),
    "merging.sparse.combine": Case(
        lambda x, w: [sparse.combine(x, w, lambda y: y, lambda y, t: y, e) for e in (None, "total")],
        (normal(16, T, 4, 5), WEIGHTS),
        2e-4,
        5e-2,
    ),
    "merging.sparse.dare": Case(merged(sparse.dare, rank=2, key=KEY), FACTORS),
    "merging.sparse.dare_ties": Case(merged(sparse.dare_ties, rank=2, key=KEY), FACTORS, 2e-4, 5e-2),
    "merging.sparse.della": Case(merged(sparse.della, rank=2, key=KEY), FACTORS, 2e-4, 5e-2),
    "merging.sparse.magnitude": Case(merged(sparse.magnitude, rank=2, density=0.5), FACTORS, 2e-4, 5e-2),
    "merging.sparse.ties": Case(merged(sparse.ties, rank=2, density=0.5), FACTORS, 2e-4, 5e-2),
    "merging.sparse.trim": Case(lambda x: sparse.trim(x, 0.5), (TALL,), 2e-4, 5e-2),
    "merging.spectral.core_space": Case(
        merged(spectral.core_space, rank=2, density=1.0), FACTORS, 1e-3, 3e-2
    ),
    "merging.spectral.iso_c": Case(merged(spectral.iso_c, rank=3), FACTORS),
    "merging.spectral.knots": Case(merged(spectral.knots, rank=2, density=1.0), FACTORS, 1e-3, 3e-2),
    "merging.spectral.polar": Case(spectral.polar, (TALL[0],)),
    "merging.spectral.rows_svd": Case(lambda x: seen(spectral.rows_svd(x.T)), (TALL[0],)),
    "merging.spectral.tsv_m": Case(merged(spectral.tsv_m, rank=2), FACTORS),
    "merging.sums.concatenation": Case(merged(sums.concatenation), FACTORS),
    "merging.sums.linear": Case(merged(sums.linear, rank=2), FACTORS),
    "merging.sums.linear_factors": Case(merged(sums.linear_factors), FACTORS),
    "merging.sums.side_by_side": Case(sums.side_by_side, FACTORS),
    "merging.truncation.from_rows": Case(
        lambda x, y: matmul(*truncation.from_rows(x, decompose.orthonormal(y), 2)), (TALL[0], TALL[1])
    ),
    "merging.truncation.onto": Case(truncation.onto, (A, normal(17, R, 1))),
    "merging.truncation.self_product": Case(truncation.self_product, (TALL[0],)),
    "merging.truncation.split_values": Case(
        lambda a, b: matmul(*truncation.split_values(decompose.svd(a, b), 1)), (A[0], B[0])
    ),
    "merging.truncation.truncate": Case(lambda a, b: matmul(*truncation.truncate(a, b, 1)), (A[0], B[0])),
    "merging.truncation.truncate_dense": Case(lambda x: matmul(*truncation.truncate_dense(x, 2)), (TALL[0],)),
}
