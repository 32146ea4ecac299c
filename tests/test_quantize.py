"""Fixed-rate codes: packing is exact, the scale is the best of its grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydraopt_jax import HydraOptError
from hydraopt_jax.codec import fixed_rate

pytestmark = pytest.mark.numeric

# error of the optimal uniform quantizer of a unit Gaussian with 2^bits levels (Max 1960, table II)
MAX_1960 = {2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.003495, 6: 0.001041}


@pytest.mark.parametrize("bits", fixed_rate.WIDTHS)
def test_packed_codes_come_back(bits):
    top = 2 ** (bits - 1) - 1
    codes = np.random.default_rng(0).integers(-top, top + 1, 37).astype(np.int8)
    data = fixed_rate.pack_codes(codes, bits)
    assert data.nbytes == -(-37 * bits // 8)
    held = fixed_rate.Packed(jnp.asarray(data), jnp.ones(1, jnp.float16), bits, 37)
    np.testing.assert_array_equal(fixed_rate.unpacked(held), codes)


@pytest.mark.parametrize("bits", list(MAX_1960))
def test_error_of_a_gaussian_is_near_the_optimal_uniform_quantizer(bits):
    """One level fewer than 2^bits (codes are symmetric) and a scale off a grid cost a little."""
    x = jax.random.normal(jax.random.key(0), (4, 20000))
    error = jnp.mean((x - fixed_rate.rounded(x, bits)) ** 2)
    lost = {2: 1.7, 3: 1.3}.get(bits, 1.15)
    assert MAX_1960[bits] * 0.95 < error < MAX_1960[bits] * lost


def test_scale_is_a_vector_s_own():
    x = jax.random.normal(jax.random.key(1), (3, 50))
    scaled = fixed_rate.quantize(x * jnp.array([[1.0], [64.0], [0.0]]), 4)
    np.testing.assert_array_equal(scaled.codes[:2], fixed_rate.quantize(x, 4).codes[:2])
    np.testing.assert_array_equal(fixed_rate.dequantize(scaled)[2], 0)


def test_unknown_width_is_named():
    with pytest.raises(HydraOptError, match="bits = 7: must be one of 8, 6"):
        fixed_rate.quantize(jnp.ones((1, 4)), 7)
