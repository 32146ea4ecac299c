"""Every method against its definition: dense float64 NumPy from the papers' equations, nothing reduced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydraopt_jax import HydraOptError, forms, merging
from hydraopt_jax.merging import registry, truncation

T, I, R, O = 4, 13, 3, 10
WEIGHTS = np.array([0.5, 1.5, 1.0, 0.7])
KEY = jax.random.key(7)


def factors(seed=0, tasks=T):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(1, I, R)) + 0.7 * rng.normal(size=(tasks, I, R))
    b = rng.normal(size=(1, R, O)) + 0.7 * rng.normal(size=(tasks, R, O))
    return a.astype(np.float32), b.astype(np.float32)


def moments(seed=3, tasks=T):
    x = np.random.default_rng(seed).normal(size=(tasks, 3 * I, I))
    return list(np.einsum("tni,tnj->tij", x, x).astype(np.float32) / (3 * I))


@functools.cache
def jitted(name, options):
    return jax.jit(functools.partial(registry.method_of(name).function, **dict(options)))


def call(name, a, b, weights=WEIGHTS, **options):
    """A method on one module, with what it needs beside the options."""
    known = registry.method_of(name).options
    traced = {"key": KEY, "moments": moments()} | options
    traced = {k: traced.pop(k) for k in ("key", "moments")}
    static = {"rank": T * R} | {k: v for k, v in options.items() if k not in traced}
    function = jitted(name, tuple((k, v) for k, v in static.items() if k in known))
    weights = jnp.asarray(weights, jnp.float32)
    return function(a, b, weights, **{k: v for k, v in traced.items() if k in known})


def merged(name, *arguments, **options):
    a, b = call(name, *arguments, **options)
    return np.asarray(a @ b)


def cut(x, rank):
    u, s, v = np.linalg.svd(x, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def trimmed(x, density):
    kept = np.argsort(-np.abs(x), axis=None)[: int(density * x.size)]
    out = np.zeros(x.size)
    out[kept] = x.ravel()[kept]
    return out.reshape(x.shape)


def elected(xs, weights, votes=lambda xs: xs):
    sign = np.where(votes(xs).sum(0) >= 0, 1, -1)
    agree = np.sign(xs) == sign
    return (weights[:, None, None] * xs * agree).sum(0) / np.maximum(agree.sum(0), 1)


def total(xs, weights):
    return np.einsum("t,tio->io", weights, xs)


def dare_masked(deltas, density):
    masks = [jax.random.bernoulli(jax.random.fold_in(KEY, t), density, (I, O)) for t in range(len(deltas))]
    return deltas * np.array(masks) / density


def della_masked(deltas, density, epsilon):
    out = []
    for t, x in enumerate(deltas):
        draw = np.asarray(jax.random.uniform(jax.random.fold_in(KEY, t), (I, O)))
        kept = np.zeros((I, O))
        for o in range(O):
            for r, i in enumerate(np.argsort(np.abs(x[:, o]))):
                p = density - epsilon / 2 + epsilon * r / (I - 1)
                kept[i, o] = (draw[i, o] < p) / p
        out.append(x * kept)
    return np.array(out)


def crumbs(x, density, outliers):
    order = np.argsort(-np.abs(x), axis=None)
    large = int(outliers * x.size)
    kept = order[large : large + int(density * x.size)]
    out = np.zeros(x.size)
    out[kept] = x.ravel()[kept]
    return out.reshape(x.shape)


def sum_of_roots(a, b, w):
    return np.einsum("t,tir->ir", np.sqrt(w), a) @ np.einsum("t,tro->ro", np.sqrt(w), b)


def knots(deltas, weights, density):
    """In the paper's orientation: weights [O, I], side by side."""
    side = np.concatenate([x.T for x in deltas], 1)
    u, s, v = np.linalg.svd(side, full_matrices=False)
    kept = s > 1e-6 * s[0]
    parts = np.stack(np.split(v[kept], len(deltas), 1))
    merged = elected(np.array([trimmed(x, density) for x in parts]), weights)
    return ((u[:, kept] * s[kept]) @ merged).T


def procrustes(x):
    p, _, q = np.linalg.svd(x, full_matrices=False)
    return p @ q


def tsv(deltas, weights, keep):
    u, s, v = np.linalg.svd(deltas, full_matrices=False)
    left = procrustes(np.concatenate(list(u[:, :, :keep]), 1))
    right = procrustes(np.concatenate(list(v[:, :keep]), 0))
    return left @ np.diag((s[:, :keep] * weights[:, None]).ravel()) @ right


def iso(deltas, weights):
    u, s, v = np.linalg.svd(total(deltas, weights), full_matrices=False)
    return s.mean() * u @ v


def core_space(deltas, weights, density):
    """In the paper's orientation, B [O, R] and A [R, I] the even split of each delta."""
    u, s, v = np.linalg.svd(deltas.transpose(0, 2, 1), full_matrices=False)
    root = np.sqrt(s[:, :R])
    b, a = u[..., :R] * root[:, None, :], root[..., None] * v[:, :R]
    left, size, _ = np.linalg.svd(np.concatenate(list(b), 1), full_matrices=False)
    _, size_a, right = np.linalg.svd(np.concatenate(list(a), 0), full_matrices=False)
    left, right = left[:, size > 1e-6 * size[0]], right[size_a > 1e-6 * size_a[0]]
    cores = np.array([left.T @ b[t] @ a[t] @ right.T for t in range(len(b))])
    return (left @ elected(np.array([trimmed(x, density) for x in cores]), weights) @ right).T


def regression(deltas, weights, off):
    c = [off * m.astype(float) + (1 - off) * np.diag(np.diag(m)) for m in moments()]
    left = sum(w * x for w, x in zip(weights, c, strict=True))
    return np.linalg.inv(left) @ sum(w * x @ d for w, x, d in zip(weights, c, deltas, strict=True))


DEFINITIONS = {
    "linear": ({}, lambda d, w: total(d, w)),
    "task-arithmetic": ({}, lambda d, w: total(d, w)),
    "concatenation": ({}, lambda d, w: total(d, w)),
    "magnitude": ({"density": 0.3}, lambda d, w: total(np.array([trimmed(x, 0.3) for x in d]), w)),
    "ties": ({"density": 0.3}, lambda d, w: elected(np.array([trimmed(x, 0.3) for x in d]), w)),
    "dare": ({"density": 0.6}, lambda d, w: total(dare_masked(d, 0.6), w)),
    "dare-ties": ({"density": 0.6}, lambda d, w: elected(dare_masked(d, 0.6), w)),
    "della": ({"density": 0.6, "epsilon": 0.4}, lambda d, w: elected(della_masked(d, 0.6, 0.4), w)),
    "breadcrumbs": (
        {"density": 0.4, "outliers": 0.1},
        lambda d, w: total(np.array([crumbs(x, 0.4, 0.1) for x in d]), w),
    ),
    "knots": ({"density": 0.4}, lambda d, w: knots(d, w, 0.4)),
    "tsv-m": ({}, lambda d, w: tsv(d, w, 2)),
    "iso-c": ({}, iso),
    "core-space": ({"density": 0.4}, lambda d, w: core_space(d, w, 0.4)),
    "regmean": ({"off_diagonal": 0.8}, lambda d, w: regression(d, w, 0.8)),
}
SINGLE = [k for k, v in registry.METHODS.items() if v.single]
KEPT = [k for k, v in registry.METHODS.items() if not v.single]


@pytest.mark.parametrize("name", DEFINITIONS)
def test_equals_its_definition(name):
    a, b = factors()
    options, definition = DEFINITIONS[name]
    want = definition(a.astype(float) @ b, WEIGHTS)
    np.testing.assert_allclose(merged(name, a, b, **options), want, atol=2e-4 * np.abs(want).max())


def test_every_single_method_has_a_definition_here():
    assert {*DEFINITIONS, "linear-factors"} == set(SINGLE)


def test_sum_of_factors_is_its_definition():
    a, b = factors()
    want = sum_of_roots(a.astype(float), b, WEIGHTS)
    np.testing.assert_allclose(merged("linear-factors", a, b), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ties", "dare-ties", "della"])
def test_signs_may_be_elected_by_count(name):
    a, b = factors(5)
    options, _ = DEFINITIONS[name]
    by_count = {
        "ties": lambda d: np.array([trimmed(x, 0.3) for x in d]),
        "dare-ties": lambda d: dare_masked(d, 0.6),
        "della": lambda d: della_masked(d, 0.6, 0.4),
    }[name](a.astype(float) @ b)
    want = elected(by_count, WEIGHTS, np.sign)
    got = merged(name, a, b, **options, elect="frequency")
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())
    assert np.abs(got - merged(name, a, b, **options)).max() > 0.1


@pytest.mark.parametrize("name", ["linear", "ties", "knots", "tsv-m", "regmean"])
def test_rank_cuts_to_the_best_approximation(name):
    a, b = factors()
    options, _ = DEFINITIONS[name]
    left, right = call(name, a, b, **options, rank=2)
    assert (left.shape, right.shape) == ((I, 2), (2, O))
    want = cut(merged(name, a, b, **options).astype(float), 2)
    np.testing.assert_allclose(left @ right, want, atol=1e-4 * np.abs(want).max())


def result(name, a, b, **options):
    """What a method makes of a collection, `[I, O]` or `[T, I, O]`, with the options of its definition."""
    known = DEFINITIONS[name][0] if name in DEFINITIONS else {} if name in SINGLE else {"rank": 3}
    found = call(name, a, b, **(known | options))
    a, b = forms.pair(found) if isinstance(found, forms.Factors) else found
    return np.asarray(a @ b)


@pytest.fixture(scope="module")
def turned():
    """Other factors of the same deltas."""
    a, b = factors()
    g = np.random.default_rng(1).normal(size=(T, R, R)).astype(np.float32) + 2 * np.eye(R, dtype=np.float32)
    return a @ g, np.linalg.solve(g, b)


@pytest.mark.parametrize("name", [x for x in registry.METHODS if x != "linear-factors"])
def test_other_factors_of_the_same_deltas_change_nothing(name, turned):
    want = result(name, *factors())
    np.testing.assert_allclose(result(name, *turned), want, atol=5e-3 * np.abs(want).max())


def test_the_sum_of_factors_depends_on_them(turned):
    want = result("linear-factors", *factors())
    assert np.abs(result("linear-factors", *turned) - want).max() > 0.1 * np.abs(want).max()


def padded(a, b):
    """Two more columns of zeros, and the last task with a direction less."""
    b = b.copy()
    b[-1, -1] = 0
    wide = np.pad(a, ((0, 0), (0, 0), (0, 2))), np.pad(b, ((0, 0), (0, 2), (0, 0)))
    return (a, b), wide


@pytest.mark.parametrize("name", registry.METHODS)
def test_padding_of_mixed_ranks_changes_nothing(name):
    one, two = padded(*factors())
    want = result(name, *one)
    np.testing.assert_allclose(result(name, *two), want, atol=5e-3 * np.abs(want).max())


@pytest.mark.parametrize("name", registry.METHODS)
def test_an_absent_task_brings_no_nan(name):
    a, b = factors()
    a[1], b[1] = 0, 0
    got = result(name, a, b)
    assert np.isfinite(got).all()
    assert np.abs(got).max() > 0


LOSSLESS = {"density": 1.0, "epsilon": 0.0, "outliers": 0.0}


@pytest.mark.parametrize("name", [x for x in registry.METHODS if x != "iso-c"])
def test_one_task_alone_comes_back(name):
    a, b = factors(tasks=1)
    given = {k: v for k, v in LOSSLESS.items() if k in registry.method_of(name).options}
    got = result(name, a, b, weights=np.ones(1), moments=moments(tasks=1), **given)
    np.testing.assert_allclose(got.reshape(I, O), (a @ b)[0], atol=1e-3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("k-merge", {"slots": T}),
        ("jd-diag", {"clusters": T}),
        ("jd-full", {"rank": T * R}),
        ("share", {"rank": T * R}),
        ("separate", {}),
    ],
)
def test_room_for_every_task_is_lossless(name, options):
    a, b = factors()
    np.testing.assert_allclose(result(name, a, b, **options), a @ b, atol=5e-3)


def arriving(deltas, slots, threshold):
    """K-Merge as it runs on a device: adapters arrive, slots hold running means."""
    kept, counts, labels = [], [], []
    for x in deltas:
        cosines = [(m * x).sum() / np.linalg.norm(m) / np.linalg.norm(x) for m in kept]
        fresh = len(kept) < slots and not any(c >= threshold for c in cosines)
        nearest = [len(kept)] * fresh or [int(np.argmax(cosines))]
        kept, counts = kept + [np.zeros_like(x)] * fresh, counts + [0] * fresh
        k = nearest[0]
        kept[k] = (counts[k] * kept[k] + x) / (counts[k] + 1)
        counts[k] += 1
        labels.append(k)
    return np.array(labels), np.array(kept)


@pytest.mark.parametrize(("slots", "threshold"), [(2, 1.0), (3, 0.8), (6, 0.75)])
def test_k_merge_is_the_stream_of_arrivals(slots, threshold):
    a, b = factors(2, tasks=9)
    labels, means = arriving(a.astype(float) @ b, slots, threshold)
    found = call("k-merge", a, b, np.ones(9), rank=10, slots=slots, threshold=threshold)
    np.testing.assert_array_equal(found.b_of, labels)
    np.testing.assert_allclose(
        result("k-merge", a, b, rank=10, weights=np.ones(9), slots=slots, threshold=threshold),
        means[labels],
        atol=1e-3,
    )


def test_share_projects_on_two_bases():
    a, b = factors()
    deltas = a.astype(float) @ b
    u, s, v = np.linalg.svd(deltas, full_matrices=False)
    root = np.sqrt(s[:, :R])
    x = np.linalg.svd(np.concatenate(list(u[..., :R] * root[:, None]), 1))[0][:, :4]
    y = np.linalg.svd(np.concatenate(list(v[:, :R] * root[..., None]), 0))[2][:4]
    want = x @ x.T @ deltas @ y.T @ y
    got = result("share", a, b, weights=np.ones(T), rank=4)
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_clusters_of_one_form_are_exact():
    """Tasks that are multiples of two deltas need two clusters."""
    a, b = factors()
    a, b = a[[0, 1, 0, 1]], b[[0, 1, 0, 1]] * np.array([1, 1, 2, 3], np.float32)[:, None, None]
    np.testing.assert_allclose(result("jd-full", a, b, clusters=2), a @ b, atol=5e-3)
    assert np.abs(result("jd-full", a, b, clusters=1) - a @ b).max() > 0.1


@pytest.mark.parametrize("name", ["dare", "dare-ties", "della"])
def test_masks_follow_the_key(name):
    a, b = factors()
    one, again, other = (result(name, a, b, key=jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("della", {"density": 0.9, "epsilon": 0.4}, "epsilon"),
        ("breadcrumbs", {"density": 0.9, "outliers": 0.2}, "outliers"),
        ("ties", {"elect": "loudest"}, "elect"),
        ("k-merge", {"slots": 0}, "slots"),
        ("jd-full", {"clusters": 9}, "clusters"),
        ("regmean", {"moments": moments()[:2]}, "2 second moments"),
        ("regmean", {"moments": [np.eye(3)] * T}, "inputs"),
    ],
)
def test_impossible_options_are_named(name, options, named):
    with pytest.raises(HydraOptError, match=named):
        call(name, *factors(), **options)


@pytest.mark.parametrize(("name", "options"), [("linear", {}), ("magnitude", {"density": 1.0})])
def test_large_matrices_are_cut_as_small_ones_are(name, options):
    """Beyond 128 directions by subspace iteration, in factors and dense."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(8, 160, 20)), rng.normal(size=(8, 20, 150))
    mean = (a @ b).mean(0)
    best = ((mean - cut(mean, 5)) ** 2).sum()
    got = merged(name, a.astype(np.float32), b.astype(np.float32), np.full(8, 1 / 8), rank=5, **options)
    lost = ((mean - got) ** 2).sum()
    assert best * (1 - 1e-5) <= lost <= best * (1 + 1e-3)


def test_a_product_by_halves_is_the_product():
    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    np.testing.assert_allclose(truncation.self_product(jnp.asarray(x)), x @ x.T, atol=1e-5)


def test_one_trace_a_shape():
    traces = []

    @jax.jit
    def ties(a, b, w):
        traces.append(1)
        return merging.ties(a, b, w, rank=2)

    ties(*factors(0), np.ones(T, np.float32))
    ties(*factors(1), np.ones(T, np.float32))
    assert len(traces) == 1
