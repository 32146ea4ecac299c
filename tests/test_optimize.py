"""The Optax loop: it converges, stops early, keeps the best, and reaches the closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hydraopt_jax import compression, forms, synthetic
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import descent, gradient
from hydraopt_jax.linalg import decompose


def module(seed=0, tasks=5, i=16, r=3, o=12):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(1, i, r)) + 0.4 * rng.normal(size=(tasks, i, r))
    b = rng.normal(size=(1, r, o)) + 0.7 * rng.normal(size=(tasks, r, o))
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    return a, b, decompose.svd(a, b)


def loss(info):
    return float(jnp.sum(info.weights * info.error))


@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("cores", [False, True])
def test_from_the_closed_form_it_never_gets_worse(heads, side, cores):
    a, b, deltas = module()
    form = {"heads": heads, "rank": 2, "side": side, "cores": cores}
    _, closed = forms.hydra(deltas, **form)
    factors, info = gradient.hydra(a, b, deltas, **form, solver=forms.Gradient(steps=60))
    assert loss(info) <= loss(closed) * (1 + 1e-6)
    np.testing.assert_allclose(forms.squared_errors(deltas, factors), info.error, rtol=1e-4)


@pytest.mark.parametrize("side", ["in", "out"])
def test_from_the_mean_it_comes_within_a_percent(side):
    a, b, deltas = module()
    _, info = gradient.hydra(
        a, b, deltas, heads=5, rank=2, side=side, solver=forms.Gradient(None, "mean", 1000)
    )
    assert loss(info) <= float(info.bound) * 1.01


@pytest.mark.parametrize("optimizer", [optax.adam(1e-2), optax.sgd(1e-2), optax.lion(1e-3)])
def test_any_optimizer_descends_from_the_mean(optimizer):
    a, b, deltas = module()
    _, info = gradient.hydra(a, b, deltas, heads=3, rank=2, solver=forms.Gradient(optimizer, "mean", 100))
    assert np.nanmin(info.trace) < info.trace[0]


def test_any_loss():
    a, b, deltas = module()

    def worst(a, b, a_hat, b_hat, weights):
        from hydraopt_jax.forms.losses import squared_errors

        return jax.nn.logsumexp(200 * weights * squared_errors(a, b, a_hat, b_hat)) / 200

    _, plain = forms.hydra(deltas, heads=5, rank=2)
    _, info = gradient.hydra(
        a, b, deltas, heads=5, rank=2, solver=forms.Gradient(None, "mean", 1000), loss=worst
    )
    assert (info.weights * info.error).max() < (plain.weights * plain.error).max()


def test_it_stops_early_and_says_so():
    _, info = descent.minimize(
        lambda x: (x - 1.0) ** 2, jnp.array(1.0), optax.sgd(0.1), steps=500, patience=20
    )
    assert bool(info.converged)
    assert int(info.steps) < 50


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float32])
def test_the_loss_may_have_any_dtype(kind, wide):
    """Also where Python's numbers are of 64 bits."""
    with jax.enable_x64(wide):
        start = jnp.zeros(2, kind)
        found, info = descent.minimize(lambda x: jnp.sum((x - 1) ** 2), start, optax.sgd(0.25), steps=30)
        assert found.dtype == kind
        np.testing.assert_allclose(found.astype(jnp.float32), 1, atol=0.01)
        assert info.loss < 1e-3


def test_the_best_iterate_is_kept():
    best, info = descent.minimize(lambda x: x**2, jnp.array(1.0), optax.sgd(1.5), steps=5)
    assert float(best) == 1.0
    assert float(info.loss) == 1.0


def test_batches_a_key_and_auxiliary_state_reach_the_loss():
    """Stochastic descent to the mean of the batches; the auxiliary state counts, the key differs by step."""
    batches = {"x": jnp.arange(8.0)}

    def loss(params, batch, key, aux):
        noise = jax.random.normal(key)
        return (params - batch["x"] + 0.0 * noise) ** 2, (aux[0] + 1, aux[1].at[aux[0]].set(noise))

    fit = jax.jit(
        lambda key: descent.minimize(
            loss,
            jnp.array(0.0),
            optax.sgd(0.02),
            steps=400,
            batches=batches,
            key=key,
            aux=(jnp.array(0), jnp.zeros(400)),
            patience=5,
        )
    )
    found, info = fit(jax.random.key(3))
    assert abs(float(found) - 3.5) < 0.4
    assert int(info.steps) == int(info.aux[0]) == 400
    assert not bool(info.converged)
    assert len(np.unique(info.aux[1])) == 400
    again, other = fit(jax.random.key(3))[1].aux[1], fit(jax.random.key(4))[1].aux[1]
    np.testing.assert_array_equal(info.aux[1], again)
    assert not np.array_equal(info.aux[1], other)


def test_a_gradient_through_batches_and_a_key():
    """How the end depends on the start, by reverse mode and by differences."""

    def end(start):
        return descent.minimize(
            lambda x, y, key: jnp.sum((x - y - 0.1 * jax.random.normal(key, x.shape)) ** 2),
            start,
            optax.sgd(0.1),
            steps=6,
            batches=jnp.arange(6.0).reshape(3, 2),
            key=jax.random.key(0),
        )[0].sum()

    start = jnp.array([0.3, -0.2])
    slope = (end(start + 1e-2) - end(start - 1e-2)) / 2e-2
    np.testing.assert_allclose(jax.grad(end)(start).sum(), slope, rtol=1e-3)


def test_vmapped_over_modules_equals_one_by_one():
    parts = [module(seed) for seed in (0, 1)]
    a, b = (jnp.stack([p[k] for p in parts]) for k in (0, 1))
    fit = functools.partial(gradient.hydra, heads=2, rank=2, solver=forms.Gradient(None, "mean", 50))
    _, together = jax.jit(jax.vmap(fit))(a, b, decompose.svd(a, b))
    alone = jax.jit(fit)
    for m, part in enumerate(parts):
        np.testing.assert_allclose(together.error[m], alone(*part)[1].error, rtol=2e-2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"solver": forms.Gradient(start="x")}, "start"),
        ({"solver": forms.Gradient(None, "mean"), "rank": 9}, "rank"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(HydraOptError, match=named):
        gradient.hydra(*module(), **({"heads": 2, "rank": 2} | options))


def test_real_adapters_from_the_mean(gpt2):
    solved = compression.compress(
        gpt2, form=forms.Hydra(side="in", solver=forms.Gradient(None, "mean", 1000))
    )
    bound = np.mean(list(solved.report["bound"].values()))
    assert bound * (1 - 1e-4) <= solved.errors.mean() <= bound * 1.01


@pytest.mark.parametrize("cores", [False, True])
def test_the_start_from_the_mean_is_the_mean(cores):
    """The first loss is that of the mean of the factors, with or without cores, which begin as identities."""
    made = synthetic.collection(tasks=4, modules={"q": (24, 16)}, rank=3, likeness=0.5, dtype="float32")
    a, b = (jnp.stack([getattr(x, side)["q"] for x in made]) for side in "ab")
    deltas = decompose.svd(a, b)
    solver = forms.Gradient(None, "mean", 1)
    found, info = gradient.hydra(a, b, deltas, heads=2, rank=3, side="in", cores=cores, solver=solver)
    labels = np.asarray(found.b_of)
    start, heads = gradient.mean_start(a, b, jnp.asarray(labels), 2, 3)
    lost = [jnp.sum((a[t] @ b[t] - start @ heads[labels[t]]) ** 2) for t in range(4)]
    np.testing.assert_allclose(info.trace[0], sum(info.weights * jnp.stack(lost)), rtol=1e-4)
