"""The public pure functions and what each is differentiated for: functions of float arrays alone.

Where an output is arbitrary up to signs or a rotation (singular vectors, factors of a product), the case
returns what does not depend on that choice.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from derivative_inputs import (
    FACTORS,
    LABELS,
    SQUARE,
    TALL,
    TASKS,
    VALUES,
    WEIGHTS,
    A,
    B,
    Case,
    I,
    O,
    R,
    T,
    X,
    dense,
    fit,
    normal,
    seen,
    symmetric,
    turned,
)
from derivative_merging import CASES as MERGING

from hydraopt_jax import forms
from hydraopt_jax.forms import (
    Factors,
    closed_form,
    descent,
    diagonalization,
    estimates,
    gradient,
    losses,
    similarity,
)
from hydraopt_jax.linalg import clustering, decompose, factorizations, subspace
from hydraopt_jax.linalg.decompose import Svd, matmul
from hydraopt_jax.merging import activations, compressors, sparse, spectral, sums, truncation
from hydraopt_jax.serving import apply, grouped, mixed_tasks

MODULES = {
    "decompose": decompose,
    "estimates": estimates,
    "clustering": clustering,
    "diagonalization": diagonalization,
    "factorizations": factorizations,
    "forms": closed_form,
    "losses": losses,
    "descent": descent,
    "gradient": gradient,
    "similarity": similarity,
    "subspace": subspace,
    "serving.mixed_tasks": mixed_tasks,
    "serving.grouped": grouped,
    "merging.activations": activations,
    "merging.compressors": compressors,
    "merging.sparse": sparse,
    "merging.spectral": spectral,
    "merging.sums": sums,
    "merging.truncation": truncation,
}

EXEMPT = {
    "estimates.component_energies": "host code of estimates",
    "estimates.white": "of numbers of samples",
    "estimates.errors_by_model": "host code around separate_estimate and joint_estimate",
    "clustering.fill_empty": "labels",
    "clustering.hierarchy": "labels",
    "clustering.partitions": "labels",
    "clustering.ward": "labels",
    "forms.present": "indices",
    "merging.compressors.k_merge_slots": "labels",
    "merging.compressors.entries": "a count",
    "merging.sparse.column_ranks": "ranks",
    "merging.sparse.drop_at_random": "makes a function, which is a case of its own through dare",
    "merging.sparse.nth_largest": "a threshold to compare with, constant in derivatives",
    "merging.spectral.significant": "zeros and ones",
    "gradient.default_optimizer": "makes an optimizer",
    "serving.mixed_tasks.shape": "sizes",
    "serving.grouped.arrange": "places",
    "serving.grouped.check_method": "checks a name",
    "serving.grouped.choose_method": "chooses a name",
    "serving.grouped.common_dtype": "a dtype",
    "serving.grouped.ragged": "jax.lax.ragged_dot has no vmap; see test_ragged_products_have_gradients",
    "similarity.average": "host code",
    "similarity.cluster_order": "an order",
    "similarity.average_linkage": "a tree of the host",
    "similarity.groups": "indices",
    "similarity.nearest_pairs": "pairs of tasks",
    "similarity.numerical_rank": "a count",
    "similarity.summarize": "host code",
    "subspace.leading_eigenpairs": "a loop that its own result ends",
}


def on_deltas(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda a, b, w: fit(function(decompose.svd(a, b), weights=w, **options))


def reduced(a: jax.Array, b: jax.Array) -> tuple[Any, ...]:
    """What `cluster` works on: reduced coordinates, output sides and the Gram matrix of deltas."""
    x = decompose.svd(a, b)
    return decompose.reduce(x.u * x.s[:, None, :])[1], x.v, decompose.gram(a, b)


def exhaustive(a: jax.Array, b: jax.Array, w: jax.Array) -> Any:
    found = clustering.exhaustive(*reduced(a, b), w, 2, 2, 512)
    return found.loss, found.trace


def kmeans(a: jax.Array, b: jax.Array, w: jax.Array) -> Any:
    found = clustering.reduced_kmeans(*reduced(a, b), w, 2, 2, LABELS, 3)
    return found.loss, found.trace


def partition(a: jax.Array, b: jax.Array, w: jax.Array) -> Any:
    return forms.partition(reduced(a, b)[0], decompose.svd(a, b), w, 2, 2, 3).loss


def cores(a: jax.Array, b: jax.Array, w: jax.Array) -> Any:
    deltas = decompose.svd(a, b)
    factors, trace = forms.add_cores(deltas, forms.hydra(deltas, heads=1, rank=2)[0], w, 3)
    return dense(factors), trace


def full_cores(a: jax.Array, b: jax.Array, w: jax.Array) -> Any:
    deltas = decompose.svd(a, b)
    common = forms.hydra(deltas, heads=T, rank=2, weights=w)[0].a
    return fit(diagonalization.full_cores(deltas, common, w, 3))


def polyadic(a: jax.Array, b: jax.Array, w: jax.Array) -> Any:
    factors, trace = diagonalization.polyadic(decompose.svd(a, b), 2, w, 3)
    return dense(factors), trace


def descended(a: jax.Array, b: jax.Array, w: jax.Array) -> Any:
    # Adam's first steps are signs of gradients: no smooth function
    optimizer = optax.sgd(0.02, momentum=0.5)
    deltas = decompose.svd(a, b)
    return fit(
        gradient.hydra(a, b, deltas, heads=2, rank=2, weights=w, solver=forms.Gradient(optimizer, steps=6))
    )


def least(center: jax.Array, weight: jax.Array) -> Any:
    optimizer = optax.sgd(0.1, momentum=0.5)
    return descent.minimize(lambda x: jnp.sum(weight * (x - center) ** 2), center * 0, optimizer, steps=9)[0]


def stepped(params: jax.Array, batch: jax.Array) -> Any:
    optimizer = optax.sgd(0.1, momentum=0.5)
    loss = lambda x, y, aux: (jnp.sum((x - y) ** 2 * aux), aux + jnp.sum(y))  # noqa: E731
    state = descent.DescentState(params, optimizer.init(params), jnp.float32(0.7))
    return descent.step(loss, optimizer, state, batch)


def level_curve(values: jax.Array, level: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.minimum(values, level).sum(), 0.5 * jnp.log2(jnp.maximum(values / level, 1.0)).sum()


# counts and variances of the samples of a unit vector
MIXED = [10.0, 30.0], [0.06, 0.4 / 30]


def sides(left: jax.Array, right: jax.Array) -> estimates.Sides:
    modules = len(left)
    outputs = estimates.white(jnp.full(modules, 30.0))
    inputs = estimates.Components(*(jnp.tile(jnp.array(x), (modules, 1)) for x in MIXED))
    return estimates.Sides(left, right, jnp.linspace(0.5, 2.0, modules), inputs, outputs)


def directions(energy: jax.Array) -> estimates.Directions:
    count = len(energy)
    outputs = estimates.white(jnp.full(count, 30.0))
    inputs = estimates.Components(*(jnp.tile(jnp.array(x), (count, 1)) for x in MIXED))
    return estimates.Directions(energy, jnp.linspace(0.5, 2.0, count), inputs, outputs)


def served(x: jax.Array, a: jax.Array, b: jax.Array, core: jax.Array) -> Any:
    term = Factors(a[:2], b, LABELS, jnp.arange(T), core)
    ways = [apply(x, (term,), TASKS, method=m) for m in ("mask", "blocks")]
    return ways, apply(x, (term,), jnp.int32(1))


def modules_of(x: jax.Array, a: jax.Array, b: jax.Array) -> Any:
    from hydraopt_jax.serving import branches, dequantize

    term = (Factors(a, b, jnp.arange(T), jnp.arange(T)),)
    return branches({"m": dequantize(term)}, TASKS)["m"](x)


def by_blocks(x: jax.Array, w: jax.Array) -> Any:
    return grouped.by_blocks(x, TASKS % T, T, lambda rows, owner: rows @ w[owner])


GROUPED = (X, normal(6, T, I, 4))

CASES = {
    "decompose.balance": Case(decompose.balance, (A, B)),
    "decompose.batched_svd": Case(lambda a, b: seen(decompose.batched_svd(a[None], b[None])), (A, B)),
    "decompose.eigen_tail": Case(lambda x: decompose.eigen_tail(x, 2), (VALUES,)),
    "decompose.gram": Case(decompose.gram, (A, B)),
    "decompose.inner": Case(decompose.inner, (A, B, normal(7, T, I, R), normal(8, T, R, O))),
    "decompose.leading": Case(lambda x: turned(decompose.leading(x, 2), 2), (TALL[0],)),
    "decompose.matmul": Case(decompose.matmul, (A, B, normal(9, T, O, 4))),
    "decompose.orthonormal": Case(lambda x: turned(decompose.orthonormal(x), 2), (TALL,)),
    "decompose.reduce": Case(lambda a: matmul(decompose.reduce(a)[0], decompose.reduce(a)[1] ** 3), (A,)),
    "decompose.residual_energy": Case(decompose.residual_energy, (A, B, A + 0.2 * normal(7, T, I, R), B)),
    "decompose.svd": Case(lambda a, b: seen(decompose.svd(a, b)), (A, B)),
    "decompose.task_weights": Case(decompose.task_weights, (WEIGHTS,)),
    "decompose.top_eigenvectors": Case(
        lambda x: (turned(decompose.top_eigenvectors(symmetric(x), 2)[0], 2), decompose.eigvalsh(x)),
        (SQUARE,),
    ),
    "decompose.wide": Case(decompose.wide, (A,)),
    "estimates.separate_curve": Case(lambda e: estimates.separate_curve(directions(e), 2e-4), (VALUES[0],)),
    "estimates.joint_curve": Case(
        lambda l, r: estimates.joint_curve(sides(l, r), jnp.float32(2e-4)), (VALUES, VALUES[:, ::-1] + 0.5)
    ),
    "estimates.water_fill": Case(
        lambda v, bits: estimates.water_fill(functools.partial(level_curve, v), bits),
        (VALUES[0], np.float32(2.6)),
    ),
    "estimates.separate_estimate": Case(
        lambda e, bits: estimates.separate_estimate(directions(e), bits),
        (VALUES[0], np.array([900.0, 1500.0], np.float32)),
    ),
    "estimates.joint_estimate": Case(
        lambda l, r, bits: estimates.joint_estimate((sides(l, r),), bits),
        (VALUES, VALUES[:, ::-1] + 0.5, np.array([300.0, 900.0], np.float32)),
    ),
    "clustering.between": Case(
        lambda a, b, w: clustering.between(*reduced(a, b)[:2], LABELS, w, 2) ** 2 @ jnp.ones(T * R), FACTORS
    ),
    "clustering.exhaustive": Case(exhaustive, FACTORS),
    "clustering.membership": Case(lambda w: clustering.membership(LABELS, w, 2), (WEIGHTS,)),
    "clustering.reduced_kmeans": Case(kmeans, FACTORS),
    "clustering.scatter": Case(lambda a, b, w: clustering.scatter(reduced(a, b)[2], LABELS, w, 2), FACTORS),
    "diagonalization.full_cores": Case(full_cores, FACTORS),
    "diagonalization.joint_diagonal": Case(
        on_deltas(diagonalization.joint_diagonal, rank=2, steps=3), FACTORS
    ),
    "diagonalization.polyadic": Case(polyadic, FACTORS),
    "factorizations.eigh": Case(
        lambda x: (factorizations.eigh(symmetric(x))[0], turned(factorizations.eigh(x)[1], 2)), (SQUARE,)
    ),
    "factorizations.eigvalsh": Case(lambda x: factorizations.eigvalsh(symmetric(x)), (SQUARE,)),
    "factorizations.pseudo_inverse": Case(factorizations.pseudo_inverse, (TALL,)),
    "factorizations.qr": Case(factorizations.qr, (TALL,)),
    "factorizations.qr of a wide matrix": Case(lambda x: factorizations.qr(x.mT), (TALL,), plain=False),
    "factorizations.safe_inverse": Case(factorizations.safe_inverse, (WEIGHTS,)),
    "factorizations.safe_sqrt": Case(factorizations.safe_sqrt, (WEIGHTS,)),
    "factorizations.svd_tangents": Case(
        lambda s, p, q: factorizations.svd_tangents(
            jnp.eye(5, 4), s, jnp.eye(4, 6), p, jnp.pad(p[:, :4].mT, ((0, 0), (0, 2), (0, 0))) + q
        ),
        (VALUES, normal(11, 2, 5, 4), normal(12, 2, 6, 4)),
    ),
    "factorizations.thin_svd": Case(lambda x: seen(Svd(*factorizations.thin_svd(x))), (TALL,)),
    "factorizations.thin_svd of a wide matrix": Case(
        lambda x: seen(Svd(*factorizations.thin_svd(x.mT))), (TALL,)
    ),
    "forms.add_cores": Case(cores, FACTORS, 1e-3, 3e-2),
    "forms.squared_errors": Case(
        lambda a, b, x, y: forms.squared_errors(
            decompose.svd(a, b), Factors(x, y, jnp.zeros(T, int), jnp.arange(T))
        ),
        (A, B, normal(7, 1, I, R), normal(8, T, R, O)),
    ),
    "forms.hydra": Case(on_deltas(forms.hydra, heads=T, rank=2), FACTORS),
    "forms.hydra with one head": Case(on_deltas(forms.hydra, heads=1, rank=2), FACTORS),
    "forms.hydra with two heads, outputs shared": Case(
        on_deltas(forms.hydra, heads=2, rank=2, side="out"), FACTORS
    ),
    "forms.hydra with cores": Case(on_deltas(forms.hydra, heads=2, rank=2, cores=True, steps=3), FACTORS),
    "forms.hydra of many tasks": Case(
        on_deltas(forms.hydra, heads=3, rank=2, steps=4),
        (normal(13, 9, I, 1), normal(14, 9, 1, O), np.linspace(0.5, 1.5, 9, dtype=np.float32)),
    ),
    "forms.pair": Case(
        lambda a, b, c, d: [
            forms.pair(Factors(a[:1], b, jnp.zeros(T, int), jnp.array([0, 2, -1]), core)) for core in (c, d)
        ],
        (A, B, normal(7, T, R, R), normal(8, T, R)),
    ),
    "forms.partition": Case(partition, FACTORS),
    "forms.separate": Case(lambda a, b: fit(forms.separate(decompose.svd(a, b), rank=1)), (A, B)),
    "forms.sure_tail": Case(lambda x: forms.sure_tail(x, 2), (VALUES,)),
    "forms.transpose": Case(
        lambda a, b, c: forms.transpose(Factors(a, b, LABELS, LABELS, c))[:2], (A, B, normal(7, T, R, R))
    ),
    "losses.squared_errors": Case(losses.squared_errors, (A, B, normal(7, T, I, R), normal(8, T, R, O))),
    "losses.weighted_error": Case(
        losses.weighted_error, (A, B, normal(7, T, I, R), normal(8, T, R, O), WEIGHTS)
    ),
    "gradient.hydra": Case(descended, FACTORS, tolerance=3e-2),
    "gradient.mean_start": Case(lambda a, b: gradient.mean_start(a, b, LABELS, 2, 1), (A, B)),
    "descent.step": Case(stepped, (normal(19, 4), normal(20, 4))),
    "descent.minimize": Case(least, (normal(18, 4), np.linspace(0.5, 2, 4, dtype=np.float32))),
    "serving.mixed_tasks.apply": Case(served, (X, A, B, normal(7, T, R, R))),
    "serving.mixed_tasks.branches": Case(modules_of, (X, A, B)),
    "serving.mixed_tasks.dequantize": Case(modules_of, (X, A, B)),
    "serving.grouped.blocked": Case(lambda x, w: grouped.blocked(x, w, TASKS % T, "highest"), GROUPED),
    "serving.grouped.by_blocks": Case(by_blocks, GROUPED),
    "serving.grouped.dot": Case(lambda x, w: grouped.dot(x, w[0], "highest"), GROUPED),
    "serving.grouped.masked": Case(lambda x, w: grouped.masked(x, w, TASKS % T, "highest"), GROUPED),
    "serving.grouped.product": Case(lambda x, w: grouped.product(x, w, TASKS % T), GROUPED),
    "similarity.cosine": Case(lambda x: similarity.cosine(x @ x.mT), (0.5 * SQUARE,)),
    "similarity.delta_cosine": Case(similarity.delta_cosine, (A, B)),
    "similarity.factor_cosine": Case(similarity.factor_cosine, (A,)),
    "similarity.subspace_overlap": Case(
        lambda x: similarity.subspace_overlap(decompose.orthonormal(x), jnp.array([2, 3])), (TALL,)
    ),
    "subspace.iterate": Case(
        lambda a: subspace.iterate(lambda q: matmul(a[0], a[0].mT, q), I, 2, 2), (A,), 1e-3, 3e-2
    ),
    "similarity.compare": Case(lambda a, b: similarity.compare(a[None], b[None]), (A, B)),
    **MERGING,
}
