"""Noise shaping: the form of errors falls, and what is written is read as any other stream."""

import numpy as np
import pytest

from hydraopt_jax import synthetic
from hydraopt_jax.codec import contexts, decode, encode, noise_shaping, quantization, streams, trellis
from hydraopt_jax.codec.layout import TermShape
from hydraopt_jax.codec.noise_shaping import Vector
from hydraopt_jax.compression import compress
from hydraopt_jax.rate_control import metrics


def form(size, seed=0):
    """Positive definite, with eigenvalues from 1 to 1e-3 of the largest."""
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    return (q * np.geomspace(1.0, 1e-3, size)) @ q.T + 0.01 * np.eye(size)


def code(values, vectors, sigma=4.0):
    context = np.full(values.size, contexts.classify(np.array([sigma]), 0)[0], np.uint8)
    (found,) = quantization.quantize_streams(
        [values.ravel()], [context], contexts.gaussian(), encode.MULTIPLIER, vectors
    )
    return found, streams.values(found).reshape(values.shape)


def entropy(found):
    counts = np.unique(streams.signed_symbols(found), return_counts=True)[1]
    return -(counts / counts.sum() * np.log2(counts / counts.sum())).sum()


def test_a_filter_is_the_form_as_a_sum_of_squares():
    given = form(40)
    found, left = noise_shaping.filter_of(given)
    whole = np.eye(40) + found.feedback
    assert (np.triu(found.feedback) == 0).all()
    scale = left * np.trace(given) / 40
    np.testing.assert_allclose(whole.T @ np.diag(scale * found.weights) @ whole, given, atol=1e-6)


@pytest.mark.parametrize("size", [20, 96, 130])
def test_the_form_of_errors_falls_at_the_same_bits(size):
    given = form(size)
    filtered, left = noise_shaping.filter_of(given)
    values = 4 * np.random.default_rng(1).standard_normal((9000 // size, size)).astype(np.float32)
    plain, one = code(values, ())
    shaped, two = code(values, [[Vector(size, filtered)] * len(values)])

    def measured(x):
        return np.einsum("vi,ij,vj->", x - values, given, x - values)

    assert left < 0.5
    assert measured(two) < 0.6 * measured(one)
    assert entropy(shaped) < 1.02 * entropy(plain)
    assert (shaped.quantizer == streams.expected_quantizers(shaped)).all()


def test_without_feedback_it_is_the_trellis_but_for_what_is_settled_early():
    values = 4 * np.random.default_rng(1).standard_normal((90, 100)).astype(np.float32)
    none = noise_shaping.Filter(np.zeros((100, 100), np.float32), np.ones(100, np.float32))
    plain, one = code(values, ())
    shaped, two = code(values, [[Vector(100, none)] * 90])
    assert ((two - values) ** 2).mean() < 1.05 * ((one - values) ** 2).mean()
    assert entropy(shaped) < 1.02 * entropy(plain)


def test_vectors_without_a_filter_lie_between_those_with_one():
    """Also where chunks and blocks begin within a vector."""
    rng, size = np.random.default_rng(2), 50
    given, length = form(size), trellis.STATES
    filtered, _ = noise_shaping.filter_of(given)
    vectors = [Vector(size, filtered) if k % 3 else Vector(length, None) for k in range(600)]
    values = 4 * rng.standard_normal(sum(x.length for x in vectors)).astype(np.float32)
    shaped, codes = code(values, [vectors])
    assert len(values) > streams.rans.PERIOD
    ends = np.cumsum([x.length for x in vectors])
    errors = [e for e, x in zip(np.split(codes - values, ends[:-1]), vectors, strict=True) if x.filter]
    lost = np.mean([e @ given @ e / (e @ e) for e in errors])
    assert lost < 0.6 * np.trace(given) / size
    assert (shaped.quantizer == streams.expected_quantizers(shaped)).all()


def test_values_that_float32_cannot_hold_are_quantized_without_filters():
    filtered, _ = noise_shaping.filter_of(form(64))
    values = np.random.default_rng(1).uniform(-(2**25), 2**25, (8, 64)).astype(np.float32)
    found, codes = code(values, [[Vector(64, filtered)] * 8], sigma=2.0**24)
    assert (found.quantizer == streams.expected_quantizers(found)).all()
    assert np.abs(codes - values).max() <= 4


def test_a_term_with_filters_decodes_to_what_was_coded():
    rng = np.random.default_rng(3)
    a, b = (4 * rng.standard_normal((2, n, 3)).astype(np.float32) for n in (40, 25))
    filters = encode.Filters((noise_shaping.filter_of(form(40))[0],), np.array([[0, 0, -1], [0, -1, 0]]))
    term = encode.TermInSteps(TermShape((0, 1), (0, 1), 40, 3, 25, 0), a, b, (filters, None))
    coded = encode.quantize({"q": (term,)}, contexts.gaussian())
    gains = {t: [np.ones(3, np.float32)] for t in range(2)}
    leaves = encode.serialize(coded, gains)
    found = decode.decode_leaves(leaves, coded.shapes, range(2))
    for one, two in zip(found.values, coded.values, strict=True):
        np.testing.assert_array_equal(one, two)


def test_calibrated_stores_have_the_same_error_of_outputs_in_fewer_bytes(monkeypatch):
    shapes = {"q": (192, 128), "k": (192, 128)}
    made = synthetic.collection(4, tasks=["a", "b"], modules=shapes, rank=4, dtype="float32")
    moments = {n: form(192, seed) for seed, n in enumerate(shapes)}
    moments |= {f"{n}:output": form(128, seed + 7) for seed, n in enumerate(shapes)}
    shaped = compress(made, max_error=0.02, calibration=moments)
    monkeypatch.setattr(metrics, "SHAPED", 0)
    plain = compress(made, max_error=0.02, calibration=moments)
    assert shaped.output_errors.mean() == pytest.approx(plain.output_errors.mean(), rel=0.02)
    one, two = (sum(np.size(v) for x in y.segments for v in x.leaves.values()) for y in (shaped, plain))
    assert one < 0.9 * two
