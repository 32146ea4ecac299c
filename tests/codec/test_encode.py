"""Leaves: factors of a collection in, the same factors out of the leaves that a task reads."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydraopt_jax.codec import contexts, encode, prediction
from hydraopt_jax.codec.bitstream import Damaged
from hydraopt_jax.codec.decode import decode_leaves
from hydraopt_jax.codec.layout import PROJECTED, TermShape, leaf_names, pieces
from hydraopt_jax.errors import HydraOptError

GAINS = {0: [np.array([0.5, 0.25, 2.0])], 1: [np.array([1.0, -1.0])]}


def terms(predicted):
    """Two tasks of one module, the second like the first."""
    rng = np.random.default_rng(4)
    a = rng.normal(size=(2, 96, 3)).astype(np.float32) * 20
    b = rng.normal(size=(2, 64, 3)).astype(np.float32) * 20
    a[1], b[1] = a[0] + 0.3 * rng.normal(size=a[0].shape), b[0][:, ::-1]
    a[1, :, 2] = 0
    shape = TermShape((0, 1), (0, 1), 96, 3, 64, predicted)
    return {"q": (encode.TermInSteps(shape, a, b),)}


def one_term(a, b):
    """One task of one module."""
    shape = TermShape((0,), (0,), a.shape[0], a.shape[1], b.shape[0], 0)
    return {"q": (encode.TermInSteps(shape, a[None], b[None]),)}


@pytest.mark.parametrize("predicted", [0, PROJECTED])
def test_leaves_decode_to_what_was_encoded(predicted):
    coded = encode.quantize(terms(predicted), contexts.gaussian())
    leaves = encode.serialize(coded, GAINS)
    back = decode_leaves(leaves, coded.shapes, [0, 1])
    for value, want in zip(back.values, coded.values, strict=True):
        np.testing.assert_array_equal(value, want)
    np.testing.assert_allclose(np.concatenate(back.gains[0]), [0.5, 0.25, 2.0], rtol=1e-3)
    np.testing.assert_allclose(np.concatenate(back.gains[1]), [1.0, -1.0], rtol=1e-3)
    size = sum(map(len, leaves.values()))
    assert abs(encode.estimate_bytes(coded, encode.sides(coded, GAINS)) - size) < 0.02 * size + 16


def test_errors_of_decoded_factors_are_a_fraction_of_a_step():
    coded = encode.quantize(terms(0), contexts.gaussian(), 0.0)
    target = terms(0)["q"][0]
    for value, want in zip(coded.values, (*target.a, *target.b), strict=True):
        assert np.abs(value - want).max() <= 2
        assert np.mean((value - want) ** 2) < 0.4


def test_prediction_from_a_like_factor_saves_bytes():
    sizes = [
        len(encode.serialize(encode.quantize(terms(p), contexts.gaussian()), GAINS)["task_1"])
        for p in (0, PROJECTED)
    ]
    assert sizes[1] < 0.75 * sizes[0]


def test_one_task_reads_only_its_leaves():
    coded = encode.quantize(terms(0), contexts.gaussian())
    leaves = encode.serialize(coded, GAINS)
    alone = decode_leaves({k: leaves[k] for k in ("shared", "task_1")}, coded.shapes, [1])
    kept = [i for i, x in enumerate(alone.pieces) if x.leaf == "task_1"]
    assert len(kept) == 2
    for i in kept:
        np.testing.assert_array_equal(alone.values[i], coded.values[i])
    assert all(alone.values[i] is None for i in range(4) if i not in kept)
    with pytest.raises(Damaged, match="no leaf task_0"):
        decode_leaves({k: leaves[k] for k in ("shared", "task_1")}, coded.shapes, [0])


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=40, deadline=None)
@given(st.lists(FLOATS, min_size=12, max_size=12), st.floats(-12, 1))
def test_any_finite_factors_at_any_step(numbers, exponent):
    """Either refused in a line that names the module, or what is decoded is what was claimed."""
    values = np.array(numbers, np.float32)
    norm = float(np.abs(values).max()) or 1.0
    with np.errstate(over="ignore"):
        steps = (values / np.float32(norm) / np.float32(10.0**exponent)).astype(np.float32)
    goals = one_term(steps[:8].reshape(4, 2), steps[8:].reshape(2, 2))
    try:
        coded = encode.quantize(goals, contexts.gaussian())
    except HydraOptError as error:
        assert np.abs(steps).max() >= contexts.MAX_MAGNITUDE
        assert "module q" in str(error)  # noqa: PT017
        return
    live = [(coded.contexts[0] > 0) & (coded.contexts[1] > 0)]
    leaves = encode.serialize(coded, {0: [np.ones(int(x.sum())) for x in live]})
    back = decode_leaves(leaves, coded.shapes, [0])
    targets = (*goals["q"][0].a, *goals["q"][0].b)
    for value, want, target in zip(back.values, coded.values, targets, strict=True):
        np.testing.assert_array_equal(value, want)
        # four steps where float32 resolves them
        assert (np.abs(value - target) <= 4 + 1e-6 * np.abs(target)).all()


def test_entries_beyond_what_a_code_holds_are_refused():
    goals = one_term(np.full((4, 2), 1e9, np.float32), np.ones((3, 2), np.float32))
    with pytest.raises(HydraOptError, match=r"module q: entries of 1e\+09 quantizer steps"):
        encode.quantize(goals, contexts.gaussian())


@pytest.mark.parametrize("seed", range(60))
def test_damaged_leaves_are_found_or_harmless(seed):
    """A leaf with a byte flipped decodes to factors of the right shapes, or is told to be damaged."""
    coded = encode.quantize(terms(PROJECTED), contexts.gaussian())
    leaves = encode.serialize(coded, GAINS)
    rng = np.random.default_rng(seed)
    name = ("shared", "task_0", "task_1")[seed % 3]
    data = bytearray(leaves[name])
    data[rng.integers(min(len(data), 120 if seed % 2 else len(data)))] = rng.integers(256)
    try:
        back = decode_leaves({**leaves, name: bytes(data)}, coded.shapes, [0, 1])
    except Damaged:
        return
    assert [x.shape for x in back.values] == [x.shape for x in coded.values]


def test_prediction_does_not_depend_on_the_order_of_sums():
    """Permuting rows of the base changes nothing: all sums are exact."""
    rng = np.random.default_rng(8)
    base = np.rint(rng.normal(size=(2000, 6)) * 300).astype(np.float32)
    weights = np.rint(rng.normal(size=(6, 3)) * 5000).astype(np.int64)
    order, units = rng.permutation(6), np.array([1, 2, 4])
    np.testing.assert_array_equal(
        prediction.apply_weights(prediction.scaled(base), weights, units),
        prediction.apply_weights(prediction.scaled(base[:, order]), weights[order], units),
    )
    found = prediction.apply_weights(prediction.scaled(base), weights, units)
    assert (found / prediction.GRID % 1 == 0).all()
    lengths = np.sqrt((base**2).sum(0))
    assert (np.abs(np.log2(lengths) - prediction.exponents(base)) < 1).all()


def test_coefficients_beyond_what_is_exact_are_refused():
    base = np.full((4, 1), 2.0**28, np.float32)
    with pytest.raises(Damaged, match="too large"):
        prediction.apply_weights(prediction.scaled(base), np.full((1, 1), 2**30), np.array([1]))


@pytest.mark.parametrize("peak", [1.0, 1e14])
def test_factors_that_are_predicted_together_are_as_if_alone(peak, monkeypatch):
    """Among them one that is like nothing, and one whose coefficients may be too large to be exact."""
    rng = np.random.default_rng(1)
    base = prediction.scaled(np.rint(rng.normal(size=(96, 4)) * 64).astype(np.float32) / 16)
    like = [(base.known @ rng.normal(size=(4, n)) * 40).astype(np.float32) for n in (3, 1, 2, 3)]
    targets = [*like[:2], rng.normal(size=(96, 2)).astype(np.float32), np.float32(peak) * like[2], like[3]]
    alone = [prediction.predict(x, base, base.solver())[:2] for x in targets]
    assert [x is not None for x, _ in alone] == [True, True, False, peak == 1, True]
    for size in (1, 96 * 6, 1 << 18):
        monkeypatch.setattr(prediction, "TOGETHER", size)
        for (one, guess), (found, part) in zip(alone, prediction.predict_each(targets, base), strict=True):
            np.testing.assert_array_equal(guess, part)
            assert (one is None) == (found is None)
            for x, y in zip(one or (), found or (), strict=True):
                np.testing.assert_array_equal(x, y)
    nothing = prediction.scaled(np.zeros((96, 4), np.float32))
    assert [x for x, _ in prediction.predict_each(targets, nothing)] == [None] * 5


def test_the_decoder_needs_no_jax():
    """The modules of the decoder import nothing but NumPy and the standard library."""
    code = (
        "import sys, types; sys.modules['jax'] = None\n"
        "package = types.ModuleType('hydraopt_jax'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['hydraopt_jax'] = package\n"
        "import hydraopt_jax.codec.decode\n"
        "assert not any(x.startswith(('jax', 'flax', 'optax', 'orbax')) for x in sys.modules if x != 'jax')\n"
    )
    root = encode.__file__.rsplit("/codec/", 1)[0]
    subprocess.run([sys.executable, "-c", code, root], check=True)


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
