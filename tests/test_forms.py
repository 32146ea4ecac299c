"""Forms against dense NumPy, their bounds, and their invariances."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydraopt_jax import forms
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.explicit import fitting
from hydraopt_jax.linalg import clustering, decompose

pytestmark = pytest.mark.numeric

T, I, R, O = 5, 14, 3, 11


def factors(seed=0, tasks=T):
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(1, I, R))
    a = common + 0.5 * rng.normal(size=(tasks, I, R))
    b = rng.normal(size=(1, R, O)) + 0.8 * rng.normal(size=(tasks, R, O))
    return a.astype(np.float32), b.astype(np.float32)


def dense(f):
    a, b = forms.pair(f)
    return np.asarray(a @ b)


def solve(a, b, **form):
    return forms.hydra(decompose.svd(jnp.asarray(a), jnp.asarray(b)), **form)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_all_heads_reach_the_eigen_tail(side, rank):
    a, b = factors()
    got, info = solve(a, b, heads=T, rank=rank, side=side)
    deltas = a @ b
    energy = (deltas**2).sum((1, 2))
    relative = deltas / np.sqrt(energy)[:, None, None]
    stacked = np.concatenate(relative if side == "out" else relative.transpose(0, 2, 1), 0)
    tail = (np.linalg.svd(stacked, compute_uv=False)[rank:] ** 2).sum()
    error = ((dense(got) - deltas) ** 2).sum((1, 2))
    np.testing.assert_allclose(info.bound, tail, rtol=1e-4)
    np.testing.assert_allclose((error / energy).sum(), tail, rtol=1e-4)
    np.testing.assert_allclose(info.error, error, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("side", ["in", "out"])
def test_full_rank_is_lossless(side):
    a, b = factors()
    got, _ = solve(a, b, heads=T, rank=T * R, side=side)
    np.testing.assert_allclose(dense(got), a @ b, atol=2e-5)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize(("tasks", "heads"), [(T, 1), (T, 2), (T, T)])
def test_fewer_used_columns_are_a_lower_rank(side, tasks, heads):
    a, b = factors(3, tasks)
    got, info = solve(a, b, heads=heads, rank=4, side=side, used=jnp.array(2))
    want, known = solve(a, b, heads=heads, rank=2, side=side)
    np.testing.assert_allclose(dense(got), dense(want), atol=1e-4)
    np.testing.assert_allclose(info.bound, known.bound, rtol=1e-4)
    np.testing.assert_allclose(info.error, known.error, rtol=1e-3)
    assert not np.asarray(got.a)[..., 2:].any()
    assert not np.asarray(got.b)[..., 2:, :].any()


@pytest.mark.parametrize("heads", [2, 3, 4])
def test_exhaustive_search_finds_the_best_partition(heads):
    a, b = factors(3)
    _, info = solve(a, b, heads=heads, rank=2)
    deltas, losses = a @ b, []
    w = 1 / (deltas**2).sum((1, 2))
    for labels in itertools.product(range(heads), repeat=T):
        sets = [s for s in (np.flatnonzero(np.array(labels) == k) for k in range(heads)) if len(s)]
        means = [np.average(deltas[s], axis=0, weights=w[s]) for s in sets]
        scatter = sum(
            (w[s] * ((deltas[s] - m) ** 2).sum((1, 2))).sum() for s, m in zip(sets, means, strict=True)
        )
        between = np.concatenate([np.sqrt(w[s].sum()) * m for s, m in zip(sets, means, strict=True)], 1)
        losses.append(scatter + (np.linalg.svd(between, compute_uv=False)[2:] ** 2).sum())
    np.testing.assert_allclose(jnp.sum(info.weights * info.error), min(losses), rtol=1e-4)
    assert bool(info.converged)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("side", ["in", "out"])
def test_cores_never_raise_the_error(heads, side):
    a, b = factors(4)
    _, hard = solve(a, b, heads=heads, rank=3, side=side)
    got, soft = solve(a, b, heads=heads, rank=3, side=side, cores=True)
    weight = np.asarray(hard.weights)
    assert (weight * soft.error).sum() <= (weight * hard.error).sum() * (1 + 1e-5)
    assert (weight * soft.error).sum() >= soft.bound * (1 - 1e-5)
    np.testing.assert_allclose(((dense(got) - a @ b) ** 2).sum((1, 2)), soft.error, rtol=1e-3, atol=1e-4)
    assert np.all(np.diff(soft.trace) <= 1e-5)


def test_reduced_kmeans_never_rises_and_beats_its_start():
    a, b = factors(5, tasks=12)
    deltas = decompose.svd(jnp.asarray(a), jnp.asarray(b))
    _, info = forms.hydra(deltas, heads=4, rank=3)
    assert np.all(np.diff(info.trace) <= 1e-4)
    np.testing.assert_allclose(jnp.sum(info.weights * info.error), info.trace[-1], rtol=1e-3)


def test_separate_is_each_truncated_svd():
    a, b = factors()
    got, info = forms.separate(decompose.svd(jnp.asarray(a), jnp.asarray(b)), rank=2)
    tail = np.linalg.svd(a @ b, compute_uv=False)[:, 2:] ** 2
    np.testing.assert_allclose(info.error, tail.sum(1), rtol=1e-3)
    np.testing.assert_allclose(((dense(got) - a @ b) ** 2).sum((1, 2)), tail.sum(1), rtol=1e-3)


def test_gauge_changes_nothing():
    a, b = factors()
    g = np.random.default_rng(1).normal(size=(T, R, R)).astype(np.float32) + 2 * np.eye(R, dtype=np.float32)
    _, one = solve(a, b, heads=2, rank=3)
    _, two = solve(a @ g, np.linalg.solve(g, b), heads=2, rank=3)
    np.testing.assert_allclose(one.error, two.error, rtol=1e-2)


def test_permuting_tasks_permutes_results():
    a, b = factors()
    order = np.array([3, 0, 4, 1, 2])
    _, one = solve(a, b, heads=3, rank=3)
    _, two = solve(a[order], b[order], heads=3, rank=3)
    np.testing.assert_allclose(np.asarray(one.error)[order], two.error, rtol=1e-3)


def test_rows_of_a_batch_do_not_leak():
    batch = [factors(seed) for seed in (0, 1, 2)]
    a, b = (jnp.stack([x[k] for x in batch]) for k in (0, 1))
    _, together = jax.vmap(lambda a, b: solve(a, b, heads=2, rank=2))(a, b)
    alone = [solve(*x, heads=2, rank=2)[1].error for x in batch]
    np.testing.assert_allclose(together.error, jnp.stack(alone), rtol=1e-3)


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_a_zero_adapter_comes_back_as_zeros(heads):
    a, b = factors()
    b[2] = 0
    got, info = solve(a, b, heads=heads, rank=2)
    assert np.abs(dense(got)[2]).max() == 0
    assert info.error[2] == 0
    assert np.isfinite(info.error).all()


@pytest.mark.parametrize(
    ("form", "named"), [({"heads": 9}, "heads"), ({"rank": 0}, "rank"), ({"side": "x"}, "side")]
)
def test_bad_forms_name_the_option(form, named):
    a, b = factors()
    with pytest.raises(HydraOptError, match=named):
        solve(a, b, **({"heads": 2, "rank": 2} | form))


def test_one_trace_per_shape():
    traces = []

    @jax.jit
    def fit(a, b):
        traces.append(1)
        return solve(a, b, heads=2, rank=2)

    fit(*factors(0))
    fit(*factors(1))
    assert len(traces) == 1


@pytest.mark.parametrize(("tasks", "heads", "count"), [(5, 2, 15), (8, 4, 1701), (4, 4, 1)])
def test_partitions_are_stirling_many(tasks, heads, count):
    rows = clustering.partitions(tasks, heads)
    assert len({tuple(r) for r in rows.tolist()}) == count
    assert all(len(set(r)) == heads for r in rows.tolist())


def test_ward_separates_groups_and_is_nested():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(3, 20)) * 10
    points = np.repeat(centers, 4, 0) + rng.normal(size=(12, 20)) * 0.1
    gram = jnp.asarray(points @ points.T, jnp.float32)
    three = np.asarray(clustering.ward(gram, jnp.ones(12), 3))
    assert three.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    two = np.asarray(clustering.ward(gram, jnp.ones(12), 2))
    assert len({(x, y) for x, y in zip(three.tolist(), two.tolist(), strict=True)}) == 3


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize(("rank", "heads"), [(1, 2), (3, T), (T * R - 1, T), (T * R, T), (T * R, 3)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_no_fit_lies_below_its_bound(side, rank, heads, scale):
    """In float64, at any energy and up to full rank, where eigenvalues of float32 are all rounding."""
    a, b = factors(int(scale) + rank)
    a = a * np.float32(scale)
    got, info = solve(a, b, heads=heads, rank=rank, side=side)
    x, y = (np.asarray(z, np.float64) for z in forms.pair(got))
    exact = ((x @ y - a.astype(np.float64) @ b) ** 2).sum((1, 2))
    assert float(info.bound) <= (np.asarray(info.weights, np.float64) * exact).sum() * (1 + 1e-5)


def test_real_adapters_reach_the_bound(gpt2):
    from hydraopt_jax import compression
    from hydraopt_jax.rate_control.distortion import error_table
    from hydraopt_jax.store import decode_terms

    kept = compression.compress(gpt2, form=forms.Hydra(side="in"))
    bound = kept.report["bound"]
    lost = error_table(decode_terms(kept), gpt2, list(bound)).mean(1)
    bound = np.array(list(bound.values()))
    assert (bound <= lost).all()
    # what float32's eigenvalues may be off by
    np.testing.assert_allclose(lost, bound, rtol=1e-4, atol=5e-6)
    np.testing.assert_allclose(lost.mean(), 0.08259, rtol=1e-3)
    np.testing.assert_allclose(kept.errors.mean(), lost.mean(), rtol=1e-3)


@pytest.mark.parametrize("side", ["in", "out", "auto"])
@pytest.mark.parametrize("shape", [(90, 70), (18, 70), (18, 16)])
def test_reduced_deltas_have_the_fit_of_the_deltas_themselves(side, shape, monkeypatch):
    """Where tasks span less than a side has, and where they span all of it."""
    rng = np.random.default_rng(4)
    a, b = (jnp.asarray(rng.normal(size=(3, 5, *x)), jnp.float32) for x in ((shape[0], 4), (4, shape[1])))
    asked = forms.Hydra(heads=2, rank=4, side=side)
    whole = lambda deltas: fitting.Reduced(deltas, None, None)  # noqa: E731
    found = fitting.fit(a, b, asked, 2, 4)
    monkeypatch.setattr(fitting, "reduced", whole)
    for (factors, info), (other, same) in zip(found, fitting.fit(a, b, asked, 2, 4), strict=True):
        np.testing.assert_allclose(info.error, same.error, rtol=1e-4)
        np.testing.assert_array_equal(factors.b_of, other.b_of)
        np.testing.assert_array_equal(factors.a_of, other.a_of)
        for x, y in zip(
            zip(*fitting.stacked(factors), strict=True),
            zip(*fitting.stacked(other), strict=True),
            strict=True,
        ):
            np.testing.assert_allclose(x[0] @ x[1], y[0] @ y[1], atol=2e-4)
