"""A task that lacks a module has no say in it, wherever it stands among the others."""

import jax.numpy as jnp
import numpy as np
import pytest

from hydraopt_jax import HydraOptError, forms, merging
from hydraopt_jax.merging import compressors, registry, sparse, spectral

I, R, O = 40, 4, 30


def factors(tasks=2, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(tasks, I, R)) / 6, rng.normal(size=(tasks, R, O))
    return a.astype(np.float32), b.astype(np.float32)


def delta(method, a, b, **options):
    x, y = method(jnp.asarray(a), jnp.asarray(b), jnp.ones(len(a)), rank=O, **options)
    return np.asarray(x @ y)


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("name", ["ties", "knots", "core-space", "tsv-m", "iso-c", "linear", "magnitude"])
def test_an_absent_task_changes_nothing_wherever_it_stands(name, density):
    method = registry.method_of(name)
    # the paper's share of directions depends on the number of tasks
    options = {k: v for k, v in {"density": density, "keep": R}.items() if k in method.options}
    a, b = factors()
    want = delta(method.function, a, b, **options)
    for at in range(3):
        x, y = (np.insert(v, at, 0, axis=0) for v in (a, b))
        np.testing.assert_allclose(
            delta(method.function, x, y, **options), want, atol=1e-4 * np.abs(want).max()
        )


@pytest.mark.parametrize("method", [sparse.ties, spectral.knots, spectral.core_space])
def test_tasks_with_outputs_of_their_own_are_added(method):
    a, b = factors()
    b[0, :, O // 2 :] = 0
    # of another size: singular values that are close mix their vectors
    b[1] *= 5
    b[1, :, : O // 2] = 0
    np.testing.assert_allclose(delta(method, a, b, density=1.0), (a @ b).sum(0), atol=1e-3)


def test_a_slot_is_the_mean_of_those_that_have_the_module():
    a, b = factors()
    a[1], b[1] = 0, 0
    alike = jnp.array([[1.0, 0.9], [0.9, 1.0]])
    found = compressors.k_merge(jnp.asarray(a), jnp.asarray(b), jnp.ones(2), rank=R, slots=1, gram=alike)
    x, y = forms.pair(found)
    np.testing.assert_allclose(x[0] @ y[0], a[0] @ b[0], atol=1e-4)
    assert found.a_of.tolist() == [0, -1]


@pytest.mark.parametrize("name", ["k-merge", "jd-full", "share"])
def test_negative_weights_are_refused_where_tasks_are_kept_apart(name, small):
    with pytest.raises(HydraOptError, match="negative"):
        merging.merge_modules(small, name, weights=[1, 1, -1, 1])


def test_diagonal_moments_are_as_good_as_their_matrices():
    a, b = factors()
    moments = np.random.default_rng(1).uniform(0.1, 2, (2, I)).astype(np.float32)
    lean = delta(merging.regmean, a, b, moments=list(moments))
    np.testing.assert_allclose(
        lean, delta(merging.regmean, a, b, moments=[np.diag(x) for x in moments]), atol=1e-4
    )
    np.testing.assert_allclose(
        lean, delta(merging.regmean, a, b, moments=[moments[0], np.diag(moments[1])]), atol=1e-4
    )


def test_breadcrumbs_keeps_as_many_entries_as_its_fractions_say():
    a, b = factors(tasks=1)
    kept = delta(sparse.breadcrumbs, a, b, density=0.8, outliers=0.02)
    assert (np.abs(kept) > 1e-4).sum() == int(0.8 * I * O)
