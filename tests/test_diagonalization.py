"""Joint diagonalization: exact where it can be, above its bound elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydraopt_jax import forms
from hydraopt_jax.forms import diagonalization
from hydraopt_jax.linalg import decompose

pytestmark = pytest.mark.numeric

T, I, R, O = 4, 24, 3, 18


@pytest.fixture(scope="module")
def deltas():
    keys = jax.random.split(jax.random.key(0), 4)
    common = jax.random.normal(keys[0], (I, R)), jax.random.normal(keys[1], (R, O))
    a = common[0] + 0.5 * jax.random.normal(keys[2], (T, I, R))
    b = common[1] + 0.5 * jax.random.normal(keys[3], (T, R, O))
    return jax.vmap(decompose.svd)(a, b)


def loss(info):
    return float(jnp.sum(info.weights * info.error))


def measured(deltas, terms):
    true = np.asarray((deltas.u * deltas.s[:, None, :]) @ deltas.v)
    for term in terms:
        a, b = forms.pair(term)
        true = true - np.asarray(a) @ np.asarray(b)
    return (true**2).sum((1, 2))


@pytest.mark.parametrize("diagonal", [False, True])
def test_joint_diagonal_lies_between_its_bound_and_one_merged_adapter(deltas, diagonal):
    factors, info = diagonalization.joint_diagonal(deltas, rank=3, diagonal=diagonal)
    np.testing.assert_allclose(measured(deltas, [factors]), info.error, rtol=1e-3)
    merged = loss(forms.hydra(deltas, heads=1, rank=3)[1])
    assert float(info.bound) < loss(info) < merged
    assert (np.diff(info.trace) <= 1e-4 * info.trace[0]).all()


@pytest.mark.parametrize("tasks", [1, T])
@pytest.mark.parametrize("diagonal", [False, True])
def test_cores_are_of_32_bits_where_python_s_numbers_are_of_64(deltas, tasks, diagonal):
    few = jax.tree.map(lambda x: x[:tasks], deltas)
    with jax.enable_x64(True):
        factors, info = diagonalization.joint_diagonal(few, rank=3, diagonal=diagonal, steps=4)
    assert {x.dtype for x in (factors.a, factors.b, factors.core, info.error)} == {jnp.dtype("float32")}


def test_full_cores_are_no_worse_than_diagonal_ones(deltas):
    full, diagonal = (diagonalization.joint_diagonal(deltas, rank=4, diagonal=d)[1] for d in (False, True))
    assert loss(full) <= loss(diagonal) * 1.01


def test_full_cores_do_not_start_from_the_mean_of_unlike_tasks_alone():
    """Seen on real adapters too: from the mean, full cores ended above the diagonal ones."""
    keys = jax.random.split(jax.random.key(4), 2)
    sides = jax.random.normal(keys[0], (T, I, R)), jax.random.normal(keys[1], (T, R, O))
    unlike = jax.vmap(decompose.svd)(*sides)
    full, diagonal = (diagonalization.joint_diagonal(unlike, rank=3, diagonal=d)[1] for d in (False, True))
    assert loss(full) < loss(diagonal)


@pytest.mark.parametrize("diagonal", [False, True])
def test_deltas_of_the_form_come_back(diagonal):
    """Tasks that differ in a core only are exact."""
    keys = jax.random.split(jax.random.key(1), 3)
    a, b = jax.random.normal(keys[0], (I, R)), jax.random.normal(keys[1], (R, O))
    core = jax.vmap(jnp.diag)(1.0 + jax.random.uniform(keys[2], (T, R)))
    made = jax.vmap(lambda c: decompose.svd(a @ c, b))(core)
    _, info = diagonalization.joint_diagonal(made, rank=R, diagonal=diagonal, steps=200)
    assert loss(info) < 1e-4


def test_one_task_has_the_weight_that_it_is_given():
    deltas = decompose.svd(
        *(
            jnp.asarray(np.random.default_rng(s[1]).normal(size=s), jnp.float32)
            for s in ((1, 8, 3), (1, 3, 6))
        )
    )
    _, info = diagonalization.joint_diagonal(deltas, rank=2, weights=jnp.array([4.0]), diagonal=False)
    np.testing.assert_allclose(info.weights, [4.0])
    np.testing.assert_allclose(info.trace, 4 * info.error.sum(), rtol=1e-5)
    assert float(info.bound) <= float(info.trace[-1]) * (1 + 1e-5)
