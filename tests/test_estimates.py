"""Rate-distortion estimates against closed forms and against each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from hydraopt_jax import adapters, synthetic
from hydraopt_jax.forms import estimates
from hydraopt_jax.linalg import decompose
from hydraopt_jax.rate_control import expected, problem
from hydraopt_jax.rate_control.metrics import metrics_of

pytestmark = pytest.mark.numeric


def test_water_filling_has_the_textbook_answer():
    """Variances 4, 1, 1/16 at 2 bits: level 1/2 on the first two, the third is left out."""
    variance = jnp.array([4.0, 1.0, 1 / 16])

    def curve(level):
        return jnp.minimum(variance, level).sum(), 0.5 * jnp.log2(jnp.maximum(variance / level, 1)).sum()

    np.testing.assert_allclose(estimates.water_fill(curve, jnp.array(2.0)), 0.5 + 0.5 + 1 / 16, rtol=1e-4)


def test_separate_estimate_of_one_direction_is_two_gaussian_vectors():
    """At a high rate the error is that of two Gaussian vectors at `2 rate / (I + O)` bits a sample."""
    side = estimates.white(jnp.full(1, 64.0))
    one = estimates.Directions(jnp.ones(1), jnp.ones(1), side, side)
    found = estimates.separate_estimate(one, jnp.array([512.0]))
    np.testing.assert_allclose(found, 1 - (1 - 2.0**-8) ** 2, rtol=1e-3)


def test_nothing_is_kept_at_no_bits():
    side = estimates.white(jnp.full(2, 8.0))
    one = estimates.Directions(jnp.array([0.7, 0.3]), jnp.ones(2), side, side)
    np.testing.assert_allclose(estimates.separate_estimate(one, jnp.zeros(1)), 1.0, rtol=1e-4)


@pytest.mark.parametrize("likeness", [0.0, 0.9])
def test_estimates_fall_with_bytes_and_with_sharing(likeness):
    many = synthetic.collection(tasks=["a", "b", "c"], modules={"q": (96, 64)}, rank=4, likeness=likeness)
    stacked = adapters.stack(many)
    (ready,) = problem.prepare(stacked, ["q"], np.ones(3), share=False).spectra
    found = estimates.errors_by_model([ready.deltas], np.array([0.1, 0.2, 0.4]) * 2 * stacked.size)
    for values in found.values():
        assert (np.diff(values) < 0).all()
    assert (found["joint"] <= found["separate"] * 1.1).all()


def test_alike_tasks_have_a_lower_joint_estimate():
    sizes = np.array([2000.0])
    ratios = []
    for likeness in (0.0, 0.95):
        many = synthetic.collection(tasks=3, modules={"q": (96, 64)}, rank=4, likeness=likeness)
        bucket = adapters.stack(many).buckets[0]
        deltas = decompose.batched_svd(jnp.asarray(bucket.a), jnp.asarray(bucket.b))
        scale = jnp.sqrt(decompose.task_weights(deltas.energy))
        found = estimates.errors_by_model([deltas._replace(s=deltas.s * scale[..., None])], sizes)
        ratios.append(found["joint"] / found["separate"])
    assert ratios[1] < 0.6 * ratios[0]


def test_separate_estimate_of_one_direction_with_two_variances_fills_water_on_each_side():
    """At a high rate: half the nats of an ideal transform coder on either side, at the levels it has."""
    side = estimates.Components(jnp.array([[16.0, 48.0]]), jnp.array([[3 / 64, 1 / 192]]))
    one = estimates.Directions(jnp.ones(1), jnp.ones(1), side, side)
    found = estimates.separate_estimate(one, jnp.array([512.0]))
    # 4 bits a sample: the geometric mean of the variances times 2^-8
    mean = np.exp(0.25 * np.log(3 / 64) + 0.75 * np.log(1 / 192))
    np.testing.assert_allclose(found, 1 - (1 - 64 * mean * 2.0**-8) ** 2, rtol=1e-3)
    white = estimates.white(jnp.full(1, 64.0))
    assert found < 0.7 * estimates.separate_estimate(
        one._replace(inputs=white, outputs=white), jnp.array([512.0])
    )


@pytest.mark.parametrize("weight", [1.0, 100.0])
def test_weights_allocate_bits_and_are_not_in_what_is_stated(weight):
    side = estimates.white(jnp.full(2, 16.0))
    weights = jnp.array([1.0, weight])
    found = estimates.separate_estimate(
        estimates.Directions(weights * 1.0, weights, side, side), jnp.zeros(1)
    )
    np.testing.assert_allclose(found, 2.0, rtol=1e-5)
    bits = jnp.array([400.0])
    uneven = estimates.separate_estimate(estimates.Directions(weights, weights, side, side), bits)
    even = estimates.separate_estimate(estimates.Directions(jnp.ones(2), jnp.ones(2), side, side), bits)
    assert (uneven > 1.05 * even) == (weight > 1)


def expected_under(moments, many, around=None):
    stacked = adapters.stack(many)
    (name,) = many[0].a
    shapes = {name: (many[0].a[name].shape[0], many[0].b[name].shape[1])}
    metrics = metrics_of(shapes, moments, around) if moments else {}
    ready = problem.prepare(stacked, [name], np.ones(len(many)), metrics, share=False)
    return expected.expected_errors(ready, 0.2 * 2 * stacked.size)


def test_moments_that_weigh_all_alike_change_no_estimate():
    many = synthetic.collection(tasks=["a", "b", "c"], modules={"q": (96, 64)}, rank=4, likeness=0.5)
    plain = expected_under({}, many)
    alike = expected_under({"q": 3.0 * np.eye(96), "q:output": 0.2 * np.eye(64)}, many)
    for model, value in plain.items():
        # the variances are those of a dozen vectors
        np.testing.assert_allclose(alike[model], value, rtol=0.15)


def test_moments_of_few_dimensions_lower_the_limit():
    many = synthetic.collection(tasks=["a", "b", "c"], modules={"q": (96, 64)}, rank=4, likeness=0.5)
    root = np.random.default_rng(0).normal(size=(96, 12))
    found = expected_under({"q": root @ root.T}, many)
    assert found["separate"] < 0.5 * expected_under({}, many)["separate"]


def test_outputs_without_moments_count_as_white():
    many = synthetic.collection(tasks=["a", "b", "c"], modules={"q": (96, 64)}, rank=4, likeness=0.5)
    root = np.random.default_rng(0).normal(size=(96, 12))
    inputs = {"q": root @ root.T}
    found = expected_under(inputs, many)
    for model, value in expected_under(inputs | {"q:output": 0.2 * np.eye(64)}, many).items():
        # the variances are those of a dozen vectors
        np.testing.assert_allclose(found[model], value, rtol=0.15)


@pytest.mark.parametrize("decay", [0.25, 0.75])
def test_a_krylov_space_expects_what_the_whole_moment_does(decay):
    many = synthetic.collection(tasks=["a", "b", "c"], modules={"q": (1200, 64)}, rank=4, likeness=0.5)
    root = np.random.default_rng(0).normal(size=(1200, 1200)) / np.arange(1, 1201) ** decay
    moment = {"q": root @ root.T}
    vectors = (np.concatenate([x.a["q"] for x in many], 1), np.concatenate([x.b["q"].T for x in many], 1))
    found, whole = expected_under(moment, many, {"q": vectors}), expected_under(moment, many)
    # with eigenvectors that all stand for as many dimensions, 1.9 and 8 times as much
    for model in whole:
        assert 1 / 1.3 < found[model] / whole[model] < 1.3


def test_a_task_without_deltas_changes_no_error_of_the_others():
    """The errors at no bytes are all there is, of those tasks that have any."""
    many = synthetic.collection(tasks=["a", "b", "c"], modules={"q": (96, 64)}, rank=4, likeness=0.5)
    zero = many[2].replace(b={"q": np.zeros_like(many[2].b["q"])})
    for moments in ({}, {"q": 3.0 * np.eye(96), "q:output": 0.2 * np.eye(64)}):
        two, three = expected_under(moments, many[:2]), expected_under(moments, [*many[:2], zero])
        for model, value in two.items():
            # three have half as many bytes again
            assert 0 < three[model] < value


def test_what_a_module_matters_is_not_in_the_stated_mean():
    """Bits go to the module that matters, and the mean is of relative errors."""
    modules = {"q": (96, 64), "k": (96, 64)}
    many = synthetic.collection(tasks=["a", "b", "c"], modules=modules, rank=4, likeness=0.5)
    stacked = adapters.stack(many)
    moments = {
        f"{n}{x}": s * np.eye(k) for n, s in (("q", 1.0), ("k", 30.0)) for x, k in (("", 96), (":output", 64))
    }
    ready = problem.prepare(stacked, list(modules), np.ones(3), metrics_of(modules, moments), share=False)
    alike = problem.prepare(stacked, list(modules), np.ones(3), {}, share=False)
    for model in ("separate", "joint"):
        np.testing.assert_allclose(expected.expected_errors(ready, 0)[model], 1.0, rtol=1e-3)
        size = 0.2 * 2 * stacked.size
        assert (
            expected.expected_errors(ready, size)[model] > 1.2 * expected.expected_errors(alike, size)[model]
        )
