"""Rate-distortion estimates against closed forms and against each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from hydraopt_jax import adapters, synthetic
from hydraopt_jax.forms import estimates
from hydraopt_jax.linalg import decompose
from hydraopt_jax.rate_control import problem

pytestmark = pytest.mark.numeric


def test_water_filling_has_the_textbook_answer():
    """Variances 4, 1, 1/16 at 2 bits: level 1/2 on the first two, the third is left out."""
    variance = jnp.array([4.0, 1.0, 1 / 16])

    def curve(level):
        return jnp.minimum(variance, level).sum(), 0.5 * jnp.log2(jnp.maximum(variance / level, 1)).sum()

    np.testing.assert_allclose(estimates.water_fill(curve, jnp.array(2.0)), 0.5 + 0.5 + 1 / 16, rtol=1e-4)


def test_separate_estimate_of_one_direction_is_two_gaussian_vectors():
    """At a high rate the error is that of two Gaussian vectors at `2 rate / (I + O)` bits a sample."""
    one = estimates.Directions(jnp.ones(1), jnp.full(1, 64.0), jnp.full(1, 64.0))
    found = estimates.separate_estimate(one, jnp.array([512.0]))
    np.testing.assert_allclose(found, 1 - (1 - 2.0**-8) ** 2, rtol=1e-3)


def test_nothing_is_kept_at_no_bits():
    one = estimates.Directions(jnp.array([0.7, 0.3]), jnp.full(2, 8.0), jnp.full(2, 8.0))
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
