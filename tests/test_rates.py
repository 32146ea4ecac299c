"""The derivative of the bits in a refinement: against autodiff and coded bytes, and where there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hydraopt_jax as hydra
from hydraopt_jax import synthetic
from hydraopt_jax.codec import encode
from hydraopt_jax.refinement import rates, rounding

MODULES = ["k", "o", "q", "v"]


@pytest.fixture(scope="module")
def coded():
    shapes = dict.fromkeys(MODULES, (256, 48))
    return hydra.compress(synthetic.collection(tasks=3, modules=shapes, rank=4, likeness=0.5), max_error=0.05)


def test_slopes_are_the_derivative_of_the_stated_bits():
    rest = np.random.default_rng(0).laplace(size=(3, 40)).astype(np.float32) * np.array([[0.2], [1.0], [9.0]])

    def bits(x):
        half = jnp.abs(x).mean(1) / 2
        entropy = (1 + half) * jnp.log2(1 + half) - half * jnp.log2(half)
        return x.shape[1] * jnp.sum(entropy + half / (1 + half))

    wanted = np.asarray(jax.grad(bits)(jnp.asarray(rest)))
    far = np.abs(rest) > rates.NEAR_ZERO
    np.testing.assert_allclose(rates.slopes(rest)[far], wanted[far], rtol=1e-5)
    near = rates.slopes(rest)[~far]
    assert (near * rest[~far] > 0).all()
    assert (np.abs(near) <= np.abs(wanted[~far])).all()


def test_slopes_foretell_the_bytes_of_factors_that_shrink(coded):
    segment = coded.segments[0]
    kept = rounding.coded_terms(segment)
    tables = rounding.start_tables(kept, segment.modules)

    def at(size):
        scaled = {n: tuple(x._replace(a=size * x.a, b=size * x.b) for x in t) for n, t in kept.items()}
        return rounding.terms_in_steps(scaled, segment.modules)

    def bits(size):
        found = encode.quantize(at(size), tables.frequencies, float(tables.multiplier[0]))
        return found, 8 * encode.entropy_bytes(found.counts)

    found, _ = bits(1.0)
    slopes = rates.rate_slopes(found, at(1.0))
    # the derivative by the scale of all factors
    pairs = [(s, x) for n, t in slopes.items() for s, x in zip(t, kept[n], strict=True)]
    told = sum(float(np.sum(a * x.a) + np.sum(b * x.b)) for (a, b), x in pairs)
    seen = (bits(1.2)[1] - bits(1 / 1.2)[1]) / (1.2 - 1 / 1.2)
    assert 0.6 * seen < told < 1.6 * seen


def test_a_basis_that_no_task_reads_has_no_slopes():
    """The loss does not depend on it: it would vanish, and what is predicted from it with it."""
    many = synthetic.collection(tasks=6, modules=dict.fromkeys(MODULES, (384, 96)), rank=4, likeness=0.95)
    (segment,) = hydra.compress(many, max_error=0.05).segments
    kept = rounding.coded_terms(segment)
    unread = 0
    rounds = rounding.coded_rounding(segment, kept)
    for name, terms in rounds.round(kept, rounds.tables, False).slopes.items():
        for shape, slopes in zip(segment.modules[name], terms, strict=True):
            for of, side in zip((shape.a_of, shape.b_of), slopes, strict=False):
                for n, x in enumerate(side):
                    assert n in of or not np.any(x)
                    unread += n not in of
    assert unread
