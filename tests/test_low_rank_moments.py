"""Moments of low rank: a diagonal plus a matrix of rank K in place of the whole moment."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from commands import run
from flax import nnx

import hydraopt_jax as hydra
from hydraopt_jax import HydraOptError, calibration, formats, merging, synthetic
from hydraopt_jax.calibration import moments
from hydraopt_jax.calibration.moments import diagonal_of
from hydraopt_jax.rate_control import metrics, unweighing

SIZE = 48


def inputs(rank, rows=256, noise=0.0, seed=0):
    """Rows `[N, I]` in so many dimensions of falling size, and noise whose size differs by entry."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(rank, SIZE)) * np.geomspace(1, 0.1, rank)[:, None]
    spread = noise * np.linspace(0.5, 1.5, SIZE)
    return (rng.normal(size=(rows, rank)) @ directions + spread * rng.normal(size=(rows, SIZE))).astype(
        np.float32
    )


def gathered(x, rank, batches=4):
    """A moment of rows, some of them at a time."""
    moment = calibration.start(x.shape[1], rank)
    for rows in np.split(x, batches):
        moment = calibration.accumulate(moment, jnp.asarray(rows))
    return np.asarray(calibration.mean(moment))


def test_inputs_of_a_low_rank_have_their_moment():
    x = inputs(6)
    found = gathered(x, 6)
    assert found.shape == (SIZE, 7)
    exact = x.T.astype(np.float64) @ x / len(x)
    np.testing.assert_allclose(calibration.matrix_of(found), exact, atol=1e-4 * np.trace(exact) / SIZE)


@pytest.mark.parametrize("rank", [0, 1, 4, 16])
def test_every_variance_is_exact_and_the_rest_near_the_best_of_its_rank(rank):
    x = inputs(20, noise=0.1)
    found = gathered(x, rank)
    exact = x.T.astype(np.float64) @ x / len(x)
    np.testing.assert_allclose(diagonal_of(found), np.diag(exact), rtol=1e-4)
    values, vectors = np.linalg.eigh(exact)
    kept = vectors[:, SIZE - rank :] * np.sqrt(values[SIZE - rank :])
    best = kept @ kept.T
    best += np.diag(np.diag(exact - best))
    missed, least = (np.linalg.norm(y - exact) for y in (calibration.matrix_of(found), best))
    # twice K random vectors promise a factor of about two
    assert missed < 1.7 * least + 1e-4 * np.linalg.norm(exact)
    # the matrix of low rank is at most the moment
    if rank:
        root = found[:, 1:].astype(np.float64)
        assert np.linalg.eigvalsh(exact - root @ root.T)[0] > -1e-4 * values[-1]


def test_the_whole_moment_is_kept_where_it_is_not_larger():
    x = inputs(6)
    np.testing.assert_array_equal(gathered(x, SIZE // 2), gathered(x, None))
    assert gathered(x, SIZE // 2 - 1).shape == (SIZE, SIZE // 2)


@pytest.mark.parametrize("rank", [0, 6, SIZE])
def test_a_whole_moment_is_reduced_to_what_is_gathered_at_a_rank(rank):
    x = inputs(20, noise=0.1)
    found, wanted = calibration.reduced(gathered(x, None), rank), gathered(x, rank)
    assert found.shape == wanted.shape
    matrices = [calibration.matrix_of(np.asarray(y)) for y in (found, wanted)]
    np.testing.assert_allclose(*matrices, atol=1e-3 * np.abs(wanted).max())


def test_masks_few_rows_and_zeros():
    x = inputs(6)
    mask = np.arange(len(x)) % 3 == 0
    moment = calibration.accumulate(calibration.start(SIZE, 6), jnp.asarray(x), jnp.asarray(mask))
    exact = x[mask].T.astype(np.float64) @ x[mask] / mask.sum()
    found = calibration.matrix_of(np.asarray(calibration.mean(moment)))
    np.testing.assert_allclose(found, exact, atol=1e-4 * np.trace(exact) / SIZE)
    # of one row, and of none
    found = gathered(x[:1], 6, batches=1)
    np.testing.assert_allclose(calibration.matrix_of(found), np.outer(x[0], x[0]), atol=1e-4)
    assert not np.asarray(calibration.mean(calibration.start(SIZE, 6))).any()


def test_it_composes_and_sums_of_runs_add_up():
    x = jnp.asarray(inputs(6))

    def run(rows):
        return calibration.accumulate(calibration.start(SIZE, 6), rows)

    parts = jax.vmap(run)(x.reshape(4, -1, SIZE))
    added = calibration.Moment(*(y.sum(0) for y in parts))
    matrix = lambda y: calibration.matrix_of(np.asarray(calibration.mean(y)))  # noqa: E731
    np.testing.assert_allclose(matrix(added), matrix(run(x)), atol=1e-3)
    found = jax.jit(lambda rows: calibration.mean(run(rows)))(x)
    np.testing.assert_allclose(calibration.matrix_of(np.asarray(found)), matrix(run(x)), atol=1e-3)
    apart = jax.jit(jax.vmap(calibration.mean))(parts)
    assert apart.shape == (4, SIZE, 7)


@pytest.mark.parametrize("rank", [2, 8])
def test_derivatives_are_finite_where_inputs_have_fewer_directions(rank):
    x = jnp.asarray(inputs(4, rows=64))

    def loss(rows):
        found = calibration.mean(calibration.accumulate(calibration.start(SIZE, rank), rows))
        return (found[:, 0] + (found[:, 1:] ** 2).sum(1)).sum()

    found = jax.grad(loss)(x)
    assert np.isfinite(found).all()
    # the variances are exact whatever the rank is, so their sum has the derivative of theirs
    np.testing.assert_allclose(found, 2 * x / len(x), rtol=0.05, atol=0.02 * np.abs(x).max() / len(x))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_file_in_half_precision_has_the_metric_of_its_numbers(dtype):
    found = (400 * gathered(inputs(6, noise=0.1), 6)).astype(dtype)
    exact = metrics.metric(found.astype(np.float64), "m", SIZE)
    half = metrics.metric(found, "m", SIZE)
    assert half.scale == pytest.approx(exact.scale, rel=1e-6)
    np.testing.assert_allclose(half.values, exact.values, rtol=1e-6)
    matrix = calibration.matrix_of(found)
    np.testing.assert_allclose(matrix, calibration.matrix_of(found.astype(np.float64)), rtol=1e-4, atol=1)


def test_a_large_one_is_never_a_matrix(monkeypatch):
    monkeypatch.setattr(metrics, "WHOLE", 16)
    monkeypatch.setattr(metrics, "BLOCKS", 4)
    monkeypatch.setattr(metrics, "SHAPED", 16)
    monkeypatch.setattr(metrics, "matrix_of", None)
    monkeypatch.setattr(unweighing, "matrix_of", None)
    x = np.random.default_rng(1).normal(size=(SIZE, 4))
    found = gathered(inputs(6, noise=0.1), 6)
    for inner in (False, True):
        assert metrics.metric(found, "m", SIZE, x, inner).gram(x).shape == (4, 4)


def test_the_damping_is_of_the_fingerprint(monkeypatch):
    before = calibration.digest({"q": np.eye(3)})
    monkeypatch.setattr(moments, "DAMPING", 0.2)
    assert calibration.digest({"q": np.eye(3)}) != before


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: calibration.start(8, -1), "rank=-1: must be 0, for variances only, or more"),
        (lambda: calibration.reduced(np.eye(8), -2), "rank=-2: must be 0"),
        (lambda: calibration.reduced(np.ones((8, 3)), 2), r"shape \[8, 3\] is not whole"),
        (lambda: calibration.reduced(np.ones(8), 2), r"shape \[8\] is not whole"),
    ],
)
def test_what_has_no_rank_is_refused(call, said):
    with pytest.raises(HydraOptError, match=said):
        call()


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(50, SIZE, rngs=rngs)
        self.q = nnx.Linear(SIZE, SIZE, rngs=rngs)
        self.k = nnx.Linear(SIZE, 5, rngs=rngs)
        self.head = nnx.Linear(5, 50, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.k(jnp.tanh(self.q(self.embed(tokens)))))


def test_a_model_is_seen_at_a_rank():
    """On both sides; a gradient that comes through five outputs has a moment of rank five."""
    model = Model(nnx.Rngs(0))
    batches = np.random.default_rng(0).integers(0, 50, (3, 2, 40))
    whole = calibration.collect(model, batches, outputs=True)
    found = calibration.collect(model, batches, outputs=True, rank=8)
    assert found.keys() == whole.keys()
    assert found["q"].shape == found["q:output"].shape == (SIZE, 9)
    assert found["k:output"].shape == (5, 5)
    for name, x in whole.items():
        np.testing.assert_allclose(diagonal_of(found[name]), np.diag(x), rtol=1e-3, atol=1e-9)
        # what is added up batch by batch, on either side, is the whole moment's part
        wanted = calibration.matrix_of(np.asarray(calibration.reduced(x, 8)))
        np.testing.assert_allclose(calibration.matrix_of(found[name]), wanted, atol=1e-3 * np.abs(x).max())
        # the reader's to change
        found[name] *= 2
    with pytest.raises(HydraOptError, match="rank=-1: must be 0, for variances only, or more"):
        calibration.collect(model, batches, rank=-1)


@pytest.mark.parametrize("rank", [3, 12, 23])
def test_modules_of_one_kernel_have_their_own_outputs(rank):
    """Those of 23 directions are kept whole: a part of twelve outputs is smaller so."""
    model = Model(nnx.Rngs(0))
    batches = np.random.default_rng(0).integers(0, 50, (3, 2, 40))
    names = tuple(f"part.{n}" for n in range(4))
    rename = lambda path: names if path == "q" else path  # noqa: E731
    given = {"outputs": True, "rank": rank}
    whole = calibration.matrix_of(calibration.collect(model, batches, **given)["q:output"])
    parts = calibration.collect(model, batches, rename=rename, **given)
    for n, name in enumerate(names):
        part, at = parts[f"{name}:output"], slice(12 * n, 12 * n + 12)
        assert part.shape == ((12, 4) if rank == 3 else (12, 12))
        scale = np.abs(whole).max()
        np.testing.assert_allclose(calibration.matrix_of(part), whole[at, at], atol=1e-5 * scale)
        assert part.flags.writeable
    assert parts["part.0"] is not parts["part.1"]


@pytest.mark.parametrize("whole", [SIZE, 16], ids=["decomposed", "krylov"])
def test_a_metric_is_that_of_the_matrix(monkeypatch, whole):
    monkeypatch.setattr(metrics, "WHOLE", whole)
    monkeypatch.setattr(metrics, "BLOCKS", 4)
    found = gathered(inputs(20, noise=0.1), 6)
    dense = calibration.matrix_of(found.astype(np.float64))
    x = np.random.default_rng(1).normal(size=(SIZE, 4))
    for inner in (False, True):
        one, two = (metrics.metric(y, "m", SIZE, x, inner) for y in (found, dense))
        np.testing.assert_allclose(one.gram(x), two.gram(x), rtol=1e-6)
        np.testing.assert_allclose(one.values, two.values, rtol=1e-6)
        assert one.scale == pytest.approx(two.scale, rel=1e-6)
    if whole < SIZE:
        assert one.moment is found
    near = metrics.metric(found, "m", SIZE, x)
    wanted = metrics.metric(dense, "m", SIZE, x)
    assert unweighing.shapes_noise(near)
    np.testing.assert_allclose(
        unweighing.whole_form(near), unweighing.whole_form(wanted), rtol=1e-6, atol=1e-9
    )


def test_a_store_has_the_errors_of_its_matrix():
    """Compressed with either, and better under the whole moment than with variances only."""
    shapes = {f"layers.{n}.q": (SIZE, 96) for n in range(4)}
    made = synthetic.collection(3, tasks=["a", "b"], modules=shapes, rank=4, dtype="float32")

    def moments(rank):
        return {n: gathered(inputs(6, noise=0.02, seed=i), rank) for i, n in enumerate(shapes)}

    found = {rank: moments(rank) for rank in (None, 6, 0)}
    stores = {rank: hydra.compress(made, budget=0.3, calibration=x) for rank, x in found.items()}
    dense = {n: calibration.matrix_of(x) for n, x in found[6].items()}
    again = hydra.compress(made, budget=0.3, calibration=dense)
    assert np.mean(stores[6].output_errors) == pytest.approx(np.mean(again.output_errors), rel=0.1)
    sides = metrics.metrics_of(shapes, found[None], inner=True)
    errors = {n: np.mean(list(hydra.measure(x, made, sides).values())) for n, x in stores.items()}
    assert errors[6] < 1.1 * errors[None]
    assert errors[6] < 0.8 * errors[0]


def test_regression_mean_takes_it():
    made = synthetic.collection(3, tasks=["a", "b"], modules={"q": (SIZE, 40)}, rank=4, dtype="float32")
    low = [{"q": gathered(inputs(6, noise=0.1, seed=n), 6)} for n in range(2)]
    dense = [{"q": calibration.matrix_of(x["q"])} for x in low]
    one, two = (merging.merge_adapters(made, "regmean", moments=x) for x in (low, dense))
    np.testing.assert_allclose(one.a["q"] @ one.b["q"], two.a["q"] @ two.b["q"], rtol=1e-4, atol=1e-5)
    with pytest.raises(HydraOptError, match="a second moment is"):
        merging.merge_adapters(made, "regmean", moments=[{"q": np.ones((SIZE + 1, 3))}] * 2)


def test_a_file_serves_compress_and_verify(tmp_path, capsys):
    made = synthetic.collection(3, tasks=["a", "b"], modules={"q": (SIZE, 96)}, rank=4, dtype="float32")
    for x in made:
        formats.write_adapter(tmp_path / x.task, x)
    path, out = tmp_path / "c.safetensors", tmp_path / "store"
    calibration.write_moments(path, {"q": gathered(inputs(6, noise=0.1), 6)})
    given = [tmp_path / x.task for x in made]
    assert run(capsys, "compress", *given, "--out", out, "--max-error", "0.05", "--calibration", path)[0] == 0
    status, _, error = run(capsys, "verify", out, *given, "--calibration", path)
    assert (status, error) == (0, "")


@pytest.mark.parametrize(
    ("moment", "said"),
    [
        (
            np.ones((SIZE + 1, 3)),
            r"m has shape \[49, 3\], its module needs \[48, 48\], \[48, 1 \+ K\] with a",
        ),
        (np.ones((SIZE, SIZE + 1)), r"m has shape \[48, 49\]"),
        (np.ones((SIZE, 3, 1)), r"m has shape \[48, 3, 1\]"),
        (np.ones(()), r"m has shape \[\]"),
        (-np.ones((SIZE, 3)), "m is not a second moment"),
        (np.full((SIZE, 3), np.nan), "m is not a second moment"),
        (np.zeros((SIZE, 3)), "m is not a second moment"),
    ],
)
def test_what_is_no_moment_is_refused(moment, said):
    with pytest.raises(HydraOptError, match=said):
        metrics.metric(moment, "m", SIZE)
