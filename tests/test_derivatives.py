"""Derivatives of every public pure function: against finite differences, plain `jnp.linalg`, and each other.

`derivative_cases` names them all: a function that is added to one of its modules without a case, or without a
reason to have none, fails `test_every_public_function_has_a_case`.
"""

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from derivative_cases import CASES, EXEMPT, GROUPED, MODULES
from derivative_inputs import A, B, Case, I, R, T

from hydraopt_jax import forms
from hydraopt_jax.forms import descent
from hydraopt_jax.linalg import decompose, factorizations
from hydraopt_jax.serving import grouped

PLAIN = {
    "qr": lambda x: tuple(jnp.linalg.qr(x)),
    "eigh": lambda x: tuple(jnp.linalg.eigh(x)),
    "eigvalsh": jnp.linalg.eigvalsh,
    "thin_svd": lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)),
    "svd": lambda a, b: decompose.Svd(
        *(x[..., : a.shape[-1]] for x in jnp.linalg.svd(a @ b, full_matrices=False)[:2]),
        jnp.linalg.svd(a @ b, full_matrices=False)[2][..., : a.shape[-1], :],
    ),
    "residual_energy": lambda a, b, x, y: jnp.sum((a @ b - x @ y) ** 2, (-2, -1)),
}


def scalar(function):
    """One number from all float outputs, each entry with its own weight."""

    def total(*args):
        leaves = [x for x in jax.tree.leaves(function(*args)) if jnp.issubdtype(x.dtype, jnp.floating)]
        draws = (np.random.default_rng(n).normal(size=x.shape) for n, x in enumerate(leaves))
        return sum(jnp.mean(x * w.astype(np.float32)) for x, w in zip(leaves, draws, strict=True))

    return total


def batch(case: Case) -> list[np.ndarray]:
    """Two places one beside the other, and a degenerate one: equal tasks, tasks without a delta, zeros."""
    rng = np.random.default_rng(0)
    out = []
    for x in map(np.asarray, case.args):
        near = x * (1 + 0.05 * rng.uniform(size=x.shape)).astype(np.float32)
        flat = 0 * x
        if x.ndim > 2:
            flat[:2] = x[:1]
        out.append(np.stack([x, near, flat]))
    return out


def length(arrays):
    """Norm at each place."""
    return np.sqrt(sum(np.square(x).reshape(len(x), -1).sum(-1) for x in arrays))


def spread(size, x):
    return size.reshape(-1, *[1] * (x.ndim - 1))


def test_every_public_function_has_a_case():
    public = {
        f"{name}.{key}"
        for name, module in MODULES.items()
        for key, value in vars(module).items()
        if not key.startswith("_")
        and callable(value)
        and not inspect.isclass(value)
        and getattr(value, "__module__", "") == module.__name__
    }
    assert public == {x for x in (*CASES, *EXEMPT) if " " not in x}


def differentiated(case: Case):
    """Jitted: gradients at places and the case's numbers there, by jit of grad of vmap of jit."""

    def every(*places):
        numbers = jax.vmap(jax.jit(scalar(case.function)))(*places)
        return jnp.sum(numbers), numbers

    return jax.jit(jax.grad(every, argnums=tuple(range(len(case.args))), has_aux=True))


UNFACTORED = ("estimates.", "losses.", "gradient.m", "descent.", "serving.")
# the first cases of both tests of a case: pytest runs the two of a case one after the other, in one process
FACTORED = [x for x, case in CASES.items() if case.plain and not x.startswith(UNFACTORED)]


@functools.cache
def own_gradients(name):
    """Gradients of a case at its places, and the function that found them: two tests need them."""
    function = differentiated(CASES[name])
    return [np.asarray(x) for x in function(*batch(CASES[name]))[0]], function


@pytest.mark.parametrize("name", [*FACTORED, *(x for x in CASES if x not in FACTORED)], scope="module")
def test_reverse_mode_is_the_slope_under_jit_and_vmap(name):
    """Along the gradient and along a random direction, at two places; finite at the degenerate one."""
    case = CASES[name]
    places = batch(case)
    found, function = own_gradients(name)
    assert all(np.isfinite(x).all() for x in found)
    grads, near = [x[:2] for x in found], [x[:2] for x in places]
    size = length(grads)
    assert (size > 0).all()
    noise = [np.random.default_rng(n).normal(size=x.shape).astype(np.float32) for n, x in enumerate(near)]
    steps = case.step * np.array([-2, -1, 1, 2], np.float32)
    points, slopes = [], []
    for along in (grads, noise):
        unit = [x / spread(length(along), x) for x in along]
        slopes.append(sum((x * y).reshape(2, -1).sum(-1) for x, y in zip(grads, unit, strict=True)))
        points += [[x + k * d for x, d in zip(near, unit, strict=True)] for k in steps]
    # three at a time, as the gradients were: the last two are there to fill
    flat = [np.concatenate([*x, x[0]]) for x in zip(*points, strict=True)]
    at = np.concatenate([function(*(x[n : n + 3] for x in flat))[1] for n in range(0, 18, 3)])[:16]
    at = at.reshape(2, 4, 2)
    differences = (8 * (at[:, 2] - at[:, 1]) - (at[:, 3] - at[:, 0])) / (12 * case.step)
    np.testing.assert_allclose(differences / size, slopes / size, atol=case.tolerance)


OWN_RULES = [
    "decompose.residual_energy",
    "decompose.svd",
    "descent.minimize",
    "factorizations.eigh",
    "factorizations.eigvalsh",
    "factorizations.pseudo_inverse",
    "factorizations.qr",
    "factorizations.qr of a wide matrix",
    "factorizations.thin_svd",
    "factorizations.thin_svd of a wide matrix",
]


@pytest.mark.parametrize("name", OWN_RULES)
def test_a_function_with_a_rule_of_its_own_has_the_same_value_beside_its_derivative(name):
    """Slopes are those of the values that come with gradients."""
    places = batch(CASES[name])
    alone = jax.jit(jax.vmap(scalar(CASES[name].function)))(*places)
    np.testing.assert_allclose(own_gradients(name)[1](*places)[1], alone, rtol=1e-5, atol=1e-6)


# what is traced with other factorizations is kept apart
swapped = jax.make_user_context(default_value=False)


@contextlib.contextmanager
def plain():
    """Swaps factorizations and their derivatives for those of `jnp.linalg`, in the whole package."""
    own = {getattr(decompose, name): other for name, other in PLAIN.items()}
    with pytest.MonkeyPatch.context() as patch, swapped(True):
        for module in MODULES.values():
            for key, value in list(vars(module).items()):
                if callable(value) and not inspect.isclass(value) and value in own:
                    patch.setattr(module, key, own[value])
        yield


@pytest.mark.parametrize("name", FACTORED, scope="module")
def test_derivatives_are_those_of_plain_linear_algebra(name):
    case = CASES[name]
    own = own_gradients(name)[0]
    with plain():
        other = [np.asarray(x)[:2] for x in differentiated(case)(*batch(case))[0]]
    for x, y in zip(own, other, strict=True):
        np.testing.assert_allclose(x[:2] / spread(length(other), y), y / spread(length(other), y), atol=1e-2)


def product_of_leading(a, b):
    found = decompose.svd(a, b)
    lead = (found.u[..., :1] * found.s[..., None, :1]) @ found.v[..., :1, :]
    return jnp.sum(lead**3) + jnp.sum(found.s**1.5)


slope_of = jax.grad(product_of_leading, argnums=(0, 1))
both = (0, 1)
# each gives the derivatives for all tasks of `product_of_leading`
ORDERS = {
    "grad of vmap of jit": jax.grad(
        lambda a, b: jnp.sum(jax.vmap(jax.jit(product_of_leading))(a, b)), argnums=both
    ),
    "vmap of grad of jit": jax.vmap(jax.grad(jax.jit(product_of_leading), argnums=both)),
    "jit of vmap of jacfwd": jax.jit(jax.vmap(jax.jacfwd(product_of_leading, argnums=both))),
    "jit of grad of a function of batches": jax.jit(
        jax.grad(lambda a, b: product_of_leading(a, b), argnums=both)
    ),
    "jacrev of vmap": lambda a, b: jax.tree.map(
        lambda x: jnp.einsum("tt...->t...", x),
        jax.jacrev(jax.vmap(product_of_leading), argnums=both)(a, b),
    ),
    "grad of a checkpointed function": jax.vmap(jax.grad(jax.checkpoint(product_of_leading), argnums=both)),
    "grad of map": jax.grad(
        lambda a, b: jnp.sum(jax.lax.map(lambda x: product_of_leading(*x), (a, b))), argnums=both
    ),
}


@pytest.mark.numeric
@pytest.mark.parametrize("order", ORDERS)
def test_transformations_compose_in_any_order(order):
    expected = [jnp.stack(x) for x in zip(*map(slope_of, A, B), strict=True)]
    for x, y in zip(ORDERS[order](jnp.asarray(A), jnp.asarray(B)), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * np.abs(y).max())


@pytest.mark.numeric
def test_second_derivatives_are_symmetric_and_right():
    """Forward over reverse and reverse over reverse, against differences of the gradient."""
    a, b, d = A[0], B[0], np.random.default_rng(0).normal(size=A[0].shape).astype(np.float32)
    one = jax.jit(lambda a: slope_of(a, b)[0])
    forward = jax.jvp(one, (a,), (d,))[1]
    reverse = jax.grad(lambda a: jnp.vdot(one(a), d))(a)
    np.testing.assert_allclose(forward, reverse, atol=2e-3 * np.abs(forward).max())
    found = (one(a + 5e-3 * d) - one(a - 5e-3 * d)) / 1e-2
    np.testing.assert_allclose(found, forward, atol=2e-2 * np.abs(forward).max())


@pytest.mark.numeric
def test_equal_singular_values_have_the_derivatives_of_what_does_not_tell_them_apart():
    """At the identity: the nuclear norm's is the identity, that of a projector on everything is zero."""
    eye = jnp.eye(4)
    nuclear = jax.grad(lambda a: jnp.sum(decompose.svd(a, eye).s))(eye)
    np.testing.assert_allclose(nuclear, eye, atol=1e-6)
    values = jax.grad(lambda x: jnp.sum(factorizations.eigvalsh(x) ** 3))(eye)
    np.testing.assert_allclose(values, 3 * eye, atol=1e-5)
    turn = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    turn = turn - turn.T
    for svd in (lambda a: decompose.svd(a, eye), lambda a: decompose.Svd(*factorizations.thin_svd(a))):
        spread = lambda a, f=svd: (f(a).u * f(a).s) @ f(a).v  # noqa: E731
        np.testing.assert_allclose(jax.jvp(spread, (eye,), (turn,))[1], turn, atol=1e-5)
        assert all(jnp.isfinite(x).all() for x in jax.jacrev(svd)(eye))


@pytest.mark.numeric
def test_padding_changes_no_derivative():
    """Zero columns of `a` meeting zero rows of `b`, and columns beyond the rank."""
    wide = np.concatenate([A, np.zeros_like(A)], -1), np.concatenate([B, np.zeros_like(B)], -2)

    def loss(a, b):
        deltas = decompose.svd(a, b)
        factors, info = forms.hydra(deltas, heads=2, rank=2)
        left, right = forms.pair(factors)
        return jnp.sum(info.error / info.energy) + jnp.sum(left[0] @ right[0])

    grads = jax.jit(jax.grad(loss, argnums=both))
    own, padded = grads(A, B), grads(*wide)
    np.testing.assert_allclose(padded[0][..., :R], own[0], atol=1e-3 * np.abs(own[0]).max())
    np.testing.assert_allclose(padded[1][:, :R], own[1], atol=1e-3 * np.abs(own[1]).max())


@pytest.mark.numeric
def test_a_residual_of_zero_has_gradient_zero_and_a_full_second_derivative():
    a, b = jnp.asarray(A[0]), jnp.asarray(B[0])
    loss = lambda x: decompose.residual_energy(a, b, x, b)  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(a), 0, atol=1e-5)
    d = jax.random.normal(jax.random.key(0), a.shape)
    curved = jax.jvp(jax.grad(loss), (a,), (d,))[1]
    np.testing.assert_allclose(curved, 2 * d @ b @ b.T, rtol=1e-4, atol=1e-4)


@pytest.mark.numeric
def test_qr_of_dependent_columns_keeps_the_tangents_of_inner_products():
    x = np.concatenate([A[0], A[0], 0 * A[0]], -1)
    d = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    (q, r), (dq, dr) = jax.jvp(factorizations.qr, (x,), (d,))
    np.testing.assert_allclose(dr.T @ r + r.T @ dr, d.T @ x + x.T @ d, atol=1e-4)
    np.testing.assert_allclose(dq.T @ q + q.T @ dq, 0, atol=1e-4)


@pytest.mark.numeric
def test_ragged_products_have_gradients():
    x, w = GROUPED
    group = jnp.array([2, 0, 1, 1, 0])
    loss = lambda x, w, way: jnp.sum(way(x, w, group, "highest") ** 3)  # noqa: E731
    slope = jax.grad(loss, argnums=both)
    for one, other in zip(slope(x, w, grouped.ragged), slope(x, w, grouped.masked), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.numeric
def test_transformations_compose_three_deep():
    """XLA failed on products of nested loops."""
    a, b = (jnp.asarray(np.stack([x, 2 * x]))[None] for x in (A, B))
    found = jax.jit(jax.vmap(jax.vmap(jax.vmap(slope_of))))(a, b)
    expected = jax.vmap(slope_of)(a.reshape(-1, *A.shape[1:]), b.reshape(-1, *B.shape[1:]))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x.reshape(y.shape), y, rtol=1e-3, atol=1e-3)


@pytest.mark.numeric
def test_task_weights_are_learned_through_the_closed_form():
    """Weights that lower the worst task's error of HydraOpt's form, by Optax through `forms.hydra`."""
    scale = jnp.array([1.0, 1.0, 0.7])[:, None, None]
    deltas = decompose.svd(A + scale * A[:1], jnp.asarray(B))
    unit = decompose.task_weights(deltas.energy)

    def errors(logits):
        info = forms.hydra(deltas, heads=T, rank=3, weights=unit * jax.nn.softmax(logits))[1]
        return info.error / info.energy

    loss = lambda logits: jax.nn.logsumexp(50 * errors(logits)) / 50  # noqa: E731
    fit = jax.jit(lambda start: descent.minimize(loss, start, optax.adam(0.1), steps=60))
    logits, _ = fit(jnp.zeros(T))
    before, after = errors(jnp.zeros(T)), errors(logits)
    assert after.max() < 0.9 * before.max()
    assert np.ptp(after) < 0.3 * np.ptp(before)


@pytest.mark.numeric
def test_a_rotation_is_learned_through_the_closed_form():
    """Two adapters, one rotated against the other: undone until one shared factor fits both."""
    turn = jax.scipy.linalg.expm(0.3 * (jnp.eye(I, k=1) - jnp.eye(I, k=-1)))
    a = jnp.stack([A[0], turn @ A[0]])

    def loss(angles):
        rotation = jax.scipy.linalg.expm(angles - angles.T)
        deltas = decompose.svd(a.at[1].set(rotation @ a[1]), jnp.asarray(B[:2]))
        info = forms.hydra(deltas, heads=2, rank=R)[1]
        return jnp.sum(info.weights * info.error)

    learn = jax.jit(lambda x: descent.minimize(loss, x, optax.adam(0.02), steps=150))
    trace = learn(jnp.zeros((I, I)))[1]
    assert trace.loss < 0.02 * trace.trace[0]
