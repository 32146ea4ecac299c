"""The pieces of the two passes against float64: sums in strips, their products, heads and errors."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hydraopt_jax import devices
from hydraopt_jax.explicit import streaming, streaming_gram

GRID = devices.make(1, jax.devices()[:1])
KINDS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def factors(seed, tasks, rank, inputs, outputs, kind="float32", alike=0.0):
    """Factors as files have them, in `kind`: a share of each task's rows of `a` is common to all."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((1, tasks, rank, inputs)) + alike * rng.standard_normal((1, 1, rank, inputs))
    b = rng.standard_normal((1, tasks, outputs, rank))
    scale = rng.uniform(0.5, 2, (1, tasks)).astype(np.float32)
    return a.astype(KINDS[kind]), b.astype(KINDS[kind]), scale


def deltas(a, b, scale):
    return np.einsum("tri,tor,t->tio", a[0].astype(float), b[0].astype(float), scale[0].astype(float))


def on_mesh(arrays, spec):
    return tuple(devices.put_on_mesh(GRID, x, spec) for x in arrays)


def added(a, b, scale, sides, size):
    sums = streaming.blank(tuple({"in": a.shape[-1], "out": b.shape[-2]}[s] for s in sides), mesh=GRID)
    arrays = on_mesh((streaming_gram.bits(a), streaming_gram.bits(b), scale), streaming_gram.BOTH)
    return streaming_gram.accumulate(sums, *arrays, mesh=GRID, sides=sides, dtype=a.dtype.name, size=size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, 4, 11, 100])
def test_pieces_add_up_to_the_sum(kind, size):
    # eleven tasks in pieces of three or four: the last piece has tasks of the one before it
    a, b, scale = factors(0, 11, 2, 9, 6, kind)
    (inside, outside), grams = added(a, b, scale, ("in", "out"), size)
    each = deltas(a, b, scale)
    each /= np.linalg.norm(each, axis=(1, 2), keepdims=True)
    for strips, whole in (
        (inside, np.einsum("tio,tjo->ij", each, each)),
        (outside, np.einsum("tio,tip->op", each, each)),
    ):
        spans = streaming_gram.rows_of_strips(len(whole))
        assert len(spans) == len(strips) == 2
        for strip, (at, end) in zip(strips, spans, strict=True):
            np.testing.assert_allclose(strip[0, 0], whole[at:end, at:], atol=2e-6)
        q = np.random.default_rng(1).standard_normal((len(whole), 3)).astype(np.float32)
        product = streaming_gram.multiply(tuple(x[0, 0] for x in strips), jnp.asarray(q))
        np.testing.assert_allclose(product, whole @ q, atol=1e-5)
    wide = a[0].astype(float)
    np.testing.assert_allclose(grams.a[0], wide @ wide.swapaxes(1, 2), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grams.energy[0], (deltas(a, b, scale) ** 2).sum((1, 2)), rtol=1e-5)


def test_strips_of_any_size_are_the_upper_triangle(monkeypatch):
    monkeypatch.setattr(streaming_gram, "STRIP", 4)
    for size in (1, 2, 3, 7, 8, 9, 13, 16, 23):
        spans = streaming_gram.rows_of_strips(size)
        assert [at for at, _ in spans] == [0, *(end for _, end in spans[:-1])]
        assert spans[-1][1] == size
        x = np.random.default_rng(size).standard_normal((size, size)).astype(np.float32)
        x += x.T
        q = np.eye(size, 2, dtype=np.float32)
        strips = tuple(jnp.asarray(x[at:end, at:]) for at, end in spans)
        np.testing.assert_allclose(streaming_gram.multiply(strips, jnp.asarray(q)), x @ q, atol=1e-6)


def projected(a, b, scale, side, rank, kind, gain):
    """Shared factor as stored, heads and squared errors; the factor's columns scaled by `gain`."""
    each = deltas(a, b, scale)
    wide = each if side == "in" else each.swapaxes(1, 2)
    u = np.linalg.svd(wide.transpose(1, 0, 2).reshape(wide.shape[1], -1), full_matrices=False)[0][:, :rank]
    stored = (u * gain)[None].astype(KINDS[kind])
    shared = streaming_gram.Range(
        *on_mesh(streaming_gram.range_of(stored.astype(np.float32)), streaming_gram.LOCAL)
    )
    _, grams = added(a, b, scale, (), 4)
    arrays = on_mesh((a, b, scale), streaming_gram.BOTH)
    out = streaming_gram.project(shared, *arrays, grams, mesh=GRID, side=side, dtype=kind)
    heads = np.asarray(out.values)[0].astype(float)
    factor = stored[0].astype(float)
    made = factor @ heads if side == "in" else heads @ factor.T
    return factor, wide, heads, np.asarray(out.error)[0], ((each - made) ** 2).sum((1, 2))


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gain", [1.0, 1e-3, np.array([1e3, 1.0, 1e-2, 1e-3])], ids=["1", "1e-3", "mixed"])
def test_errors_are_those_of_what_is_stored(side, kind, gain):
    a, b, scale = factors(2, 6, 4, 40, 24, kind, alike=2.0)
    _, _, _, said, true = projected(a, b, scale, side, 4, kind, gain)
    np.testing.assert_allclose(said, true, rtol=1e-3)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_near_zero(side, kind):
    # the basis holds every delta whole: rounding is all the error there is
    a, b, scale = factors(3, 3, 2, 40, 24, kind)
    _, wide, _, said, true = projected(a, b, scale, side, 6, kind, 1.0)
    energy = (wide**2).sum((1, 2))
    if kind == "float32":
        assert (np.maximum(said, true) < 1e-12 * energy).all()
    else:
        np.testing.assert_allclose(said, true, rtol=0.02)
        assert (true < 1e-4 * energy).all()


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_heads_are_the_best_for_the_factor_as_stored(kind):
    a, b, scale = factors(4, 5, 4, 40, 24)
    factor, wide, heads, _, _ = projected(a, b, scale, "in", 4, kind, 1.0)
    best = np.linalg.lstsq(factor, wide.transpose(1, 0, 2).reshape(40, -1), rcond=None)[0]
    best = best.reshape(4, 5, 24).transpose(1, 0, 2)
    step = {"bfloat16": 2**-8, "float16": 2**-11}[kind]
    np.testing.assert_allclose(heads, best, rtol=1.01 * step, atol=1e-5)


def test_dependent_columns_span_what_they_span():
    c, d = np.random.default_rng(0).standard_normal((2, 30))
    stored = np.stack([c, d, 2 * c, 0 * c], 1).astype(np.float32)
    q, inverse, squares = (x[0] for x in streaming_gram.range_of(stored[None]))
    np.testing.assert_allclose(q @ (q.T @ stored), stored, atol=1e-5)
    np.testing.assert_allclose(stored @ (inverse.T @ q.T), stored @ np.linalg.pinv(stored), atol=1e-6)
    np.testing.assert_allclose(squares, (stored**2).sum(0), rtol=1e-6)


def test_directions_that_underflow_take_no_part():
    a, b, scale = factors(5, 5, 4, 40, 24, "float16")
    gain = np.array([1.0, 1.0, 1.0, 1e-9])
    factor, _, heads, said, true = projected(a, b, scale, "in", 4, "float16", gain)
    assert not factor[:, 3].any()
    assert not heads[:, 3].any()
    np.testing.assert_allclose(said, true, rtol=1e-3)
