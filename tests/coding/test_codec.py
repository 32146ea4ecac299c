"""The codec: what is written comes back, at the rate that the entropy promises."""

import numpy as np
import pytest

from hydraopt_jax.coding import classes, codec, entropy, streams, trellis
from hydraopt_jax.layout import PROJECTED, TermShape, leaf_names, pieces


def laplacian(rng, count, spread):
    return (rng.laplace(size=count) * spread).astype(np.float32)


@pytest.fixture(scope="module")
def quantised():
    """Three streams of unlike lengths and scales, one of them empty."""
    rng = np.random.default_rng(0)
    values, index = [], []
    for lengths in ([300, 700, 5000], [], [64, 90]):
        vectors = [laplacian(rng, n, 2.0 ** rng.uniform(0, 9)) for n in lengths]
        cls = [
            classes.classify(np.sqrt((v**2).mean(keepdims=True)), np.abs(v).max(keepdims=True), 1)[0]
            for v in vectors
        ]
        values.append(codec.join(vectors, np.float32))
        index.append(codec.join([np.full(len(v), c) for v, c in zip(vectors, cls, strict=True)], np.int32))
    return values, index, streams.quantise(values, index, classes.gaussian(), codec.MULTIPLIER)


def test_streams_decode_to_what_was_encoded(quantised):
    _, index, symbols = quantised
    table = streams.tables(streams.histogram(symbols))
    blobs = streams.encode(symbols, table)
    back = streams.decode(blobs, index, streams.unpack_tables(streams.pack_tables(table)))
    for mine, theirs in zip(streams.values(symbols), back, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_coded_size_is_the_entropy_within_a_per_cent(quantised):
    _, _, symbols = quantised
    counts = streams.histogram(symbols)
    blobs = streams.encode(symbols, streams.tables(counts))
    raw = (classes.SHIFT[symbols.cls].sum() + np.count_nonzero(symbols.magnitude)) / 8
    ideal = codec.entropy_bytes(counts) + raw
    assert ideal < sum(map(len, blobs)) < 1.01 * ideal + 8 * sum(symbols.lanes) + 16


def test_trellis_beats_the_scalar_quantiser_of_its_rate():
    """At a high rate the trellis leaves less error than a uniform quantiser of the same entropy."""
    rng = np.random.default_rng(1)
    y = (rng.normal(size=40960) * 60).astype(np.float32)
    cls = np.full(len(y), classes.classify(np.array([60.0]), np.abs(y).max(keepdims=True), 0)[0])
    frequencies = classes.gaussian()
    for _ in range(3):
        symbols = streams.quantise([y], [cls], frequencies, codec.MULTIPLIER)
        counts = streams.histogram(symbols)
        frequencies = counts + 8 * classes.gaussian()
    raw = classes.SHIFT[symbols.cls].sum() + np.count_nonzero(symbols.magnitude)
    bits = (8 * codec.entropy_bytes(counts) + raw) / len(y)
    error = np.mean((y - streams.values(symbols)[0]) ** 2)
    step = 60 * np.sqrt(2 * np.pi * np.e) / 2**bits
    assert error < 0.88 * step**2 / 12


def test_viterbi_is_optimal_against_all_paths():
    rng = np.random.default_rng(2)
    y = (rng.normal(size=6) * 1.5).astype(np.float32)
    cls = np.full(6, classes.classify(np.array([1.5]), np.abs(y).max(keepdims=True), 0)[0])
    bits = trellis.costs(classes.gaussian())
    magnitude, _ = trellis.quantise(y[:, None], cls[:, None], bits, 0.5)

    def total(path):
        state, out = 0, 0.0
        for value, c, k in zip(y, cls, path, strict=True):
            q = state % 2
            out += (abs(value) - (2 * k - q * (k > 0))) ** 2 + 0.5 * (bits[c, q, k] + (k > 0))
            state = trellis.NEXT[state, k % 2]
        return out

    best = min(total(path) for path in np.ndindex(*[4] * 6))
    np.testing.assert_allclose(total(np.asarray(magnitude)[:, 0]), best, rtol=1e-5)


def test_classes_hold_every_value():
    spread = np.array([1e-9, 0.5, 3.0, 1e4])
    peak = np.array([1e-9, 40.0, 5000.0, 3e5])
    index = classes.classify(spread, peak, 0)
    assert (peak / 2 < classes.TOP[index]).all()
    assert classes.classify(np.zeros(1), np.zeros(1), 1)[0] == 0


def test_integer_frequencies_sum_and_keep_what_occurs():
    rng = np.random.default_rng(3)
    counts = rng.poisson(0.4, (50, classes.HIGH)).astype(float)
    counts[7] = 0
    table = entropy.integer_frequencies(counts)
    np.testing.assert_array_equal(table.sum(-1), np.where(counts.sum(-1) > 0, 1 << 14, 0))
    assert ((table > 0) == (counts > 0)).all()


def terms(rng, predicted):
    """Two tasks of one module, the second like the first."""
    a = rng.normal(size=(2, 96, 3)).astype(np.float32) * 20
    b = rng.normal(size=(2, 64, 3)).astype(np.float32) * 20
    a[1], b[1] = a[0] + 0.3 * rng.normal(size=a[0].shape), b[0][:, ::-1]
    a[1, :, 2] = 0
    shape = TermShape((0, 1), (0, 1), 96, 3, 64, predicted)
    return {"q": (codec.Target(shape, a, b),)}


@pytest.mark.parametrize("predicted", [0, PROJECTED])
def test_serialised_terms_come_back(predicted):
    coded = codec.quantise(terms(np.random.default_rng(4), predicted), classes.gaussian())
    gains = {0: [np.array([0.5, 0.25, 2.0])], 1: [np.array([1.0, -1.0])]}
    leaves = codec.serialise(coded, gains)
    (back,) = codec.deserialise(leaves, coded.shapes, [0, 1])["q"]
    (kept,) = codec.factors(coded)["q"]
    np.testing.assert_allclose(back.a, kept.a, atol=1e-4)
    np.testing.assert_allclose(back.b, kept.b, atol=1e-4)
    np.testing.assert_allclose(back.core, [[0.5, 0.25, 2.0], [1.0, -1.0, 0.0]], rtol=1e-3)
    size = sum(map(len, leaves.values()))
    assert abs(codec.sizes(coded, gains) - size) < 0.02 * size + 16


def test_prediction_from_a_like_factor_saves_bytes():
    sizes = []
    for predicted in (0, PROJECTED):
        coded = codec.quantise(terms(np.random.default_rng(4), predicted), classes.gaussian())
        sizes.append(len(codec.serialise(coded, {0: [np.ones(3)], 1: [np.ones(2)]})["task_1"]))
    assert sizes[1] < 0.75 * sizes[0]


def test_one_task_reads_only_its_leaves():
    coded = codec.quantise(terms(np.random.default_rng(4), 0), classes.gaussian())
    leaves = codec.serialise(coded, {0: [np.ones(3)], 1: [np.ones(2)]})
    alone = {k: v for k, v in leaves.items() if k in ("shared", "task_1")}
    (back,) = codec.deserialise(alone, coded.shapes, [1])["q"]
    np.testing.assert_array_equal(back.a[1], codec.factors(coded)["q"][0].a[1])
    np.testing.assert_array_equal(back.a[0], 0)


def test_groups_too_small_for_a_leaf_go_to_the_shared_one():
    names, groups = leaf_names([frozenset({0, 1}), frozenset({1, 2})], [100, 9000], 3)
    assert (names, groups) == (["shared", "head_0"], [[1, 2]])


def test_a_base_of_predictions_is_read_by_all():
    shape = TermShape((1, 0, -1), (1, 0, -1), 8, 2, 8, PROJECTED)
    rows, _ = pieces({"q": (shape,)})
    assert [(x.side, x.factor, x.base, x.leaf) for x in rows] == [
        (0, 0, -1, "shared"),
        (0, 1, 0, "task_0"),
        (1, 0, -1, "shared"),
        (1, 1, 2, "task_0"),
    ]
