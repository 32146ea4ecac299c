"""Low-rank linear algebra against dense NumPy in float64."""

import numpy as np
import pytest

from hydraopt_jax.linalg import decompose

pytestmark = pytest.mark.numeric

SHAPES = [(9, 7, 3), (3, 8, 5), (8, 2, 4), (5, 5, 1)]


def factors(shape: tuple[int, int, int], tasks: int = 4) -> tuple[np.ndarray, np.ndarray]:
    i, o, r = shape
    rng = np.random.default_rng([i, o, r])
    a, b = rng.normal(size=(tasks, i, r)), rng.normal(size=(tasks, r, o))
    return a.astype(np.float32), b.astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd(shape):
    a, b = factors(shape)
    dense = np.linalg.svd(a.astype(np.float64) @ b, compute_uv=False)
    u, s, v = (np.asarray(x) for x in decompose.svd(a, b))
    n = min(shape)
    np.testing.assert_allclose(s[:, :n], dense[:, :n], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose((u * s[:, None]) @ v, a @ b, atol=1e-4)
    kept = u[:, :, :n], v[:, :n]
    np.testing.assert_allclose(kept[0].mT @ kept[0], np.tile(np.eye(n), (4, 1, 1)), atol=1e-4)
    np.testing.assert_allclose(kept[1] @ kept[1].mT, np.tile(np.eye(n), (4, 1, 1)), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_energy_transpose_and_gauge(shape):
    a, b = factors(shape)
    gauge = np.random.default_rng(0).normal(size=(4, shape[2], shape[2])) + 3 * np.eye(shape[2])
    found = decompose.svd(a, b)
    turned = decompose.svd((a @ gauge).astype(np.float32), (np.linalg.inv(gauge) @ b).astype(np.float32))
    np.testing.assert_allclose(found.s, turned.s, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.energy, np.sum((a @ b) ** 2, (1, 2)), rtol=1e-5)
    u, s, v = (np.asarray(x) for x in found.mT)
    np.testing.assert_allclose((u * s[:, None]) @ v, (a @ b).mT, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_gram_and_inner(shape):
    a, b = factors(shape)
    flat = (a.astype(np.float64) @ b).reshape(4, -1)
    np.testing.assert_allclose(decompose.gram(a, b), flat @ flat.T, rtol=1e-4, atol=1e-4)
    other_a, other_b = a[::-1], b[::-1]
    np.testing.assert_allclose(
        decompose.inner(a, b, other_a, other_b), np.sum(flat * flat[::-1], 1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_residual_energy_has_no_cancellation(shape, size):
    a, b = factors(shape)
    noise = size * np.random.default_rng(0).normal(size=b.shape)
    near = (b + noise).astype(np.float32)
    expected = np.sum((a.astype(np.float64) @ b - a.astype(np.float64) @ near) ** 2, (1, 2))
    energy = np.sum((a @ b) ** 2, (1, 2))
    error = np.abs(decompose.residual_energy(a, b, a, near) - expected) / energy
    assert error.max() < 1e-5 * max(size, 1e-7)


@pytest.mark.parametrize(("rank", "tail"), [(0, 6.0), (1, 3.0), (2, 1.0), (3, 0.0), (9, 0.0)])
def test_eigen_tail(rank, tail):
    np.testing.assert_allclose(decompose.eigen_tail(np.array([1.0, -1e-9, 3.0, 2.0]), rank), tail, atol=1e-6)


def test_top_eigenvectors():
    x = np.random.default_rng(0).normal(size=(3, 6, 6)).astype(np.float32)
    matrix = x @ x.mT
    vectors, values = decompose.top_eigenvectors(matrix, 2)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[:, ::-1], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(matrix @ vectors, vectors * values[:, None, :2], atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_reduce_keeps_inner_products(shape):
    a, _ = factors(shape)
    q, coordinates = decompose.reduce(a)
    wide = np.asarray(decompose.wide(a))
    np.testing.assert_array_equal(wide[:, : shape[2]], a[0])
    np.testing.assert_allclose(q.T @ q, np.eye(q.shape[1]), atol=1e-5)
    np.testing.assert_allclose(q @ decompose.wide(coordinates), wide, atol=1e-4)
    assert coordinates.shape == (4, min(4 * shape[2], shape[0]), shape[2])


@pytest.mark.parametrize("shape", SHAPES)
def test_balance(shape):
    a, b = factors(shape)
    a, b = a * np.float32(1e4), b * np.float32(1e-3)
    a[1, :, 0], b[2, 0], b[3, 0], a[3, :, 0] = 0, 0, 0, 0
    left, right = decompose.balance(a, b)
    np.testing.assert_allclose(left @ right, a @ b, rtol=1e-4, atol=1e-3)
    norms = np.linalg.norm(left, axis=-2)[0], np.linalg.norm(right, axis=-1)[0]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


def test_task_weights():
    np.testing.assert_allclose(decompose.task_weights(np.array([4.0, 0.0, 0.5])), [0.25, 0.0, 2.0])
