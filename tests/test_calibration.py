"""Second moments: accumulation is the definition, files come back."""

import json
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from commands import run

from hydraopt_jax import HydraOptError, calibration, changes, compression, formats, store, synthetic
from hydraopt_jax.calibration import moments, tap
from hydraopt_jax.formats.memory_collection import in_memory
from hydraopt_jax.rate_control import metrics, search, unweighing
from hydraopt_jax.rate_control.options import Options
from hydraopt_jax.store import sizes


def test_accumulated_batches_are_the_mean_outer_product():
    x = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
    mask = np.random.default_rng(1).random((5, 7)) < 0.6
    moment = calibration.start(3)
    for rows, keep in zip(x, mask, strict=True):
        moment = calibration.accumulate(moment, jnp.asarray(rows), jnp.asarray(keep))
    kept = x[mask].astype(np.float64)
    np.testing.assert_allclose(calibration.mean(moment), kept.T @ kept / len(kept), rtol=1e-5)


def test_file_comes_back(tmp_path):
    moments = {"layers/0.q": np.eye(4), "k": np.arange(3.0)}
    calibration.write_moments(tmp_path / "c.safetensors", moments)
    back = calibration.read_moments(tmp_path / "c.safetensors")
    assert set(back) == set(moments)
    np.testing.assert_array_equal(back["layers/0.q"], np.eye(4))


def test_unreadable_file_is_one_line(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(HydraOptError, match=r"c\.safetensors: no such file: `hydraopt calibrate .*`"):
        calibration.read_moments(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(HydraOptError, match="calibration file"):
        calibration.read_moments(path)


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(HydraOptError, match=r"none/c\.safetensors: cannot be written: No such file or dir"):
        calibration.write_moments(tmp_path / "none" / "c.safetensors", {"q": np.eye(2)})


SHAPES = {"layers.0.q": (12, 8), "layers.1.q": (12, 8), "layers.1.k": (8, 12)}


@pytest.fixture(scope="module")
def made():
    return synthetic.collection(4, tasks=["a", "b"], modules=SHAPES, rank=2, dtype="float32")


def moment(seed, size, scale=1.0):
    x = np.random.default_rng(seed).normal(size=(64, size)) * np.linspace(0.2, 2, size)
    return (scale * x.T @ x / 64).astype(np.float32)


def test_a_partial_calibration_falls_back_to_errors_of_weights(made):
    known = {"layers.0.q": moment(0, 12)}
    whole = known | {n: np.eye(i, dtype=np.float32) for n, (i, _) in list(SHAPES.items())[1:]}
    part, full = (compression.compress(made, max_error=0.02, calibration=x) for x in (known, whole))
    assert part.report["uncalibrated"] == ["layers.1.q", "layers.1.k"]
    assert "uncalibrated" not in full.report
    # scaled to a mean eigenvalue of 1, the identity is what was not known
    np.testing.assert_allclose(part.output_errors, full.output_errors, rtol=1e-3)
    np.testing.assert_allclose(part.output_errors[1:], part.errors[1:], rtol=1e-2)


def test_a_diagonal_moment_is_the_matrix_it_stands_for_without_a_decomposition(made, monkeypatch):
    diagonal = {n: np.diag(moment(0, i)).copy() for n, (i, _) in SHAPES.items()}
    diagonal |= {f"{n}:output": np.diag(moment(1, o)).copy() for n, (_, o) in SHAPES.items()}
    whole = compression.compress(
        made, max_error=0.02, calibration={n: np.diag(x) for n, x in diagonal.items()}
    )
    monkeypatch.setattr(np.linalg, "eigh", None)
    found = compression.compress(made, max_error=0.02, calibration=diagonal)
    np.testing.assert_allclose(found.output_errors, whole.output_errors, rtol=0.05)
    np.testing.assert_allclose(found.errors, whole.errors, rtol=0.05)


@pytest.mark.parametrize("share", [1e-4, 0.3, 1.0])
@pytest.mark.parametrize("around", [None, 2], ids=["decomposed", "krylov"])
def test_a_share_of_the_identity_keeps_the_mean_eigenvalue(monkeypatch, share, around):
    """However a moment is given; of all, errors of outputs are those of weights."""
    monkeypatch.setattr(moments, "DAMPING", share)
    monkeypatch.setattr(metrics, "WHOLE", 16)
    full = 7 * decaying_moment(48)
    x = np.random.default_rng(0).standard_normal((48, 4))
    vectors = None if around is None else x[:, :around]
    found = metrics.metric(full, "m", 48, vectors)
    exact = (1 - share) * full / (np.trace(full) / 48) + share * np.eye(48)
    np.testing.assert_allclose(found.gram(x), x.T @ exact @ x, rtol=1e-4, atol=1e-3 * share)
    np.testing.assert_allclose(unweighing.whole_form(found), exact, rtol=1e-3, atol=1e-4)
    if around is None:
        assert found.values.mean() == pytest.approx(1, rel=1e-4)
    variances = metrics.metric(np.diagonal(full), "m", 48)
    np.testing.assert_allclose(variances.values, np.diagonal(exact), rtol=1e-4)


def decaying_moment(size, seed=0):
    """A second moment whose eigenvalues fall from 100 to 1e-3 of their mean, as those of activations do."""
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    values = np.geomspace(1.0, 1e-5, size)
    return ((q * values / values.mean()) @ q.T).astype(np.float32)


@pytest.mark.parametrize("repeated", [False, True])
def test_a_large_moment_is_exact_for_the_vectors_it_was_made_for(monkeypatch, repeated):
    monkeypatch.setattr(metrics, "WHOLE", 64)
    rng, full = np.random.default_rng(1), decaying_moment(192)
    x = rng.standard_normal((192, 4))
    if repeated:
        # tasks of one initialization, and a factor of lower rank
        x = np.concatenate([x, x, np.zeros((192, 1))], 1)
    other = rng.standard_normal((192, 5))
    near = metrics.metric(full, "m", 192, x)
    whole = metrics.metric(full, "m", 192)
    assert near.vectors.shape == (192, metrics.BLOCKS * x.shape[1])
    assert whole.moment is None
    np.testing.assert_allclose(near.vectors.T @ near.vectors, np.eye(near.vectors.shape[1]), atol=1e-8)
    for a, b in ((near.gram(other), whole.gram(other)), (near.gram(x), whole.gram(x))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    for y in (x, other):
        cross = whole.weigh(x).T @ whole.weigh(y)
        np.testing.assert_allclose(near.weigh(x).T @ near.weigh(y), cross, atol=1e-4 * np.abs(cross).max())


def test_a_large_moment_filters_vectors_as_the_whole_one_does(monkeypatch):
    x, full = np.random.default_rng(1).standard_normal((256, 4)), decaying_moment(256)
    whole = metrics.metric(full, "m", 256)
    monkeypatch.setattr(metrics, "WHOLE", 64)
    near = metrics.metric(full, "m", 256, x)
    for steps in (0.3, 1.0, 10.0):
        wanted = unweighing.unweigh(whole, steps * whole.weigh(x)[None])[0]
        missed = unweighing.unweigh(near, steps * near.weigh(x)[None])[0] - wanted
        # errors of outputs, which is what the filter is for
        assert np.trace(whole.gram(missed)) < 1e-3 * np.trace(whole.gram(wanted))


def test_stores_with_large_moments_claim_the_errors_that_outputs_have(monkeypatch):
    shapes = {"q": (192, 64), "k": (192, 32)}
    made = synthetic.collection(4, tasks=["a", "b"], modules=shapes, rank=2, dtype="float32")
    moments = {n: decaying_moment(192, seed) for seed, n in enumerate(shapes)}
    whole = compression.compress(made, max_error=0.02, calibration=moments)
    decomposed, decompose = [], np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda x: decomposed.append(len(x)) or decompose(x))
    monkeypatch.setattr(metrics, "WHOLE", 64)
    found = compression.compress(made, max_error=0.02, calibration=moments)
    assert max(decomposed) == metrics.BLOCKS * 4
    assert sizes.measure_size(found) == pytest.approx(sizes.measure_size(whole), rel=0.05)
    for t, given in enumerate(made):
        kept = store.decode(found, given.task)
        for m, n in enumerate(shapes):
            wanted = given.a[n] @ given.b[n]
            missed = wanted - np.asarray(kept.a[n]) @ np.asarray(kept.b[n])
            weights = metrics.metric(moments[n], n, 192)
            error = np.trace(weights.gram(missed)) / np.trace(weights.gram(wanted))
            assert found.output_errors[m, t] == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("whole", [64, 192], ids=["krylov", "decomposed"])
def test_moments_that_rounding_made_indefinite_shape_noise(monkeypatch, whole):
    monkeypatch.setattr(metrics, "WHOLE", whole)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((48, 192)) * np.where(np.arange(192) < 40, 10, 1)
    rough = (x.T @ x / 100).astype(ml_dtypes.float8_e5m2).astype(np.float32)
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(metrics.damped(rough / (np.trace(rough) / 192), np.eye(192)))
    made = synthetic.collection(4, tasks=["a", "b"], modules={"q": (192, 64)}, rank=2, dtype="float32")
    found = compression.compress(made, max_error=0.01, calibration={"q": rough})
    assert np.nanmean(found.output_errors) <= 0.01


def test_a_metric_keeps_the_filters_used_last():
    found = metrics.metric(decaying_moment(64), "m", 64)
    for k in (-9.0, -6.0, -3.0, 0.0, -9.0, 3.0):
        ((first, left),) = unweighing.filters_of(found, [k])
        assert first.feedback.shape == (64, 64)
        assert 0 < left < 1
    assert list(found.filters) == [-3.0, 0.0, -9.0, 3.0]
    assert unweighing.filters_of(found, [3.0])[0][0] is first
    unweighing.forget_filters({"m": (found, None)})
    assert not found.filters
    assert unweighing.shapes_noise(found)


def test_moments_above_a_size_shape_no_noise(monkeypatch):
    monkeypatch.setattr(metrics, "SHAPED", 63)
    assert not unweighing.shapes_noise(metrics.metric(decaying_moment(64), "m", 64))
    assert unweighing.shapes_noise(metrics.metric(decaying_moment(63), "m", 63))


def test_more_of_a_target_may_stay_unused_where_noise_is_shaped(made):
    full = {n: moment(0, i) for n, (i, _) in SHAPES.items()}
    cases = [
        (None, search.SLACK),
        ({n: np.diag(x) for n, x in full.items()}, search.SLACK),
        ({"layers.9.q": full["layers.0.q"]}, search.SLACK),
        (full, search.SHAPED_SLACK),
    ]
    for known, slack in cases:
        for target in ({"max_error": 0.1}, {"budget": 1_000_000}):
            found = search.target_of(in_memory(made), Options(calibration=known, **target), 0)
            assert found.slack == slack


def test_half_of_the_output_moments_count_as_the_others_do_on_average():
    known = {n: moment(0, i) for n, (i, _) in SHAPES.items()}
    known |= {"layers.0.q:output": moment(1, 8, 2.0), "layers.1.q:output": moment(1, 8, 8.0)}
    assert metrics.uncovered(SHAPES, known) == ["layers.1.k"]
    found = metrics.metrics_of(SHAPES, known)
    scales = [found[n][1].scale for n in SHAPES]
    assert scales[2] == pytest.approx(np.sqrt(scales[0] * scales[1]), rel=1e-5)
    np.testing.assert_array_equal(found["layers.1.k"][1].weigh(np.eye(12)), np.eye(12))
    # module by module as all at once
    for n, shape in SHAPES.items():
        assert metrics.metrics_of({n: shape}, known)[n][1].scale == found[n][1].scale


@pytest.mark.parametrize(
    ("name", "near"),
    [("model.layers.0.q", "model.layers.0.q"), ("layer0/q", "layer0/q"), ("", "''")],
)
def test_other_names_are_refused_with_near_ones(made, name, near):
    said = f"no tensor has the name of a module: it has .*{near}.*'layers.0.q': rename"
    with pytest.raises(HydraOptError, match=said):
        compression.compress(made, max_error=0.02, calibration={name: moment(0, 12)})


def test_a_prefix_is_shown_where_names_end_alike(made):
    """Of all modules the one that the calibration has under another prefix is named, not the first."""
    given = {"base.layers.1.k": moment(0, 12), "base.layers.1.k:output": moment(1, 8)}
    said = "it has 'base.layers.1.k', the adapters have 'layers.1.k': rename"
    with pytest.raises(HydraOptError, match=said):
        compression.compress(made, max_error=0.02, calibration=given)


@pytest.mark.parametrize(
    ("name", "what"), [("none", "no such file"), (".", "no readable calibration file .safetensors.")]
)
def test_a_file_that_is_none_says_how_to_make_one(tmp_path, name, what):
    said = f"{what}: `hydraopt calibrate MODEL TEXT --out FILE` makes one"
    with pytest.raises(HydraOptError, match=said):
        calibration.read_moments(tmp_path / name)


def test_the_command_says_what_falls_back(made, tmp_path, capsys):
    for x in made:
        formats.write_adapter(tmp_path / x.task, x)
    calibration.write_moments(tmp_path / "c.safetensors", {"layers.0.q": moment(0, 12)})
    given = [tmp_path / x.task for x in made], tmp_path / "s"
    status, said, error = run(
        capsys, "compress", *given[0], "--out", given[1], "--max-error", "0.05", "--calibration",
        tmp_path / "c.safetensors",
    )  # fmt: skip
    assert (status, error) == (0, "")
    line = "layers.1.k and 1 more: no second moment in the calibration"
    assert line in " ".join(said.split())
    status, said, _ = run(capsys, "inspect", given[1])
    assert line in " ".join(said.split())
    status, said, error = run(
        capsys, "verify", given[1], *given[0], "--calibration", tmp_path / "c.safetensors"
    )
    assert (status, error) == (0, "")


def test_a_task_that_is_added_says_what_the_calibration_lacks(made, tmp_path, capsys):
    """A module that only the new task has; before, its errors counted as errors of weights in silence."""
    known = {n: moment(0, i) for n, (i, _) in SHAPES.items()}
    calibration.write_moments(tmp_path / "c.safetensors", known)
    more = synthetic.collection(5, tasks=["c"], modules={**SHAPES, "layers.2.v": (12, 8)}, rank=2)[0]
    for x in (*made, more):
        formats.write_adapter(tmp_path / x.task, x)
    given = ["--calibration", tmp_path / "c.safetensors"]
    store = tmp_path / "store.safetensors"
    asked = ["--max-error", "0.1", *given]
    assert run(capsys, "compress", tmp_path / "a", tmp_path / "b", "--out", store, *asked)[0] == 0
    status, said, error = run(capsys, "add", store, tmp_path / "c", *given)
    assert status == 0, error
    line = "layers.2.v: no second moment in the calibration: their errors count as errors of weights"
    assert line in " ".join(said.split())
    status, said, error = run(capsys, "inspect", store, "--json")
    assert json.loads(said)["uncalibrated"] == ["layers.2.v"]


@pytest.mark.parametrize(
    ("text", "out", "said"),
    [
        ("none.txt", "c", "none.txt: cannot be read: No such file or directory: give a text file in UTF-8"),
        ("latin.txt", "c", "latin.txt: cannot be read: 'utf-8' codec can't decode"),
        (
            "text.txt",
            "text.txt",
            "text.txt: exists: choose another path, or replace what is there (--overwrite, overwrite=True)",
        ),
        ("text.txt", "none/c", "none/c: there is no such folder"),
        ("text.txt", "c", "model: needs PyTorch, transformers and PEFT: install the peft extra"),
    ],
)
def test_the_command_that_calibrates_refuses_in_one_line(tmp_path, monkeypatch, capsys, text, out, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "text.txt").write_text("some text")
    status, shown, error = run(capsys, "calibrate", "model", text, "--out", out)
    assert (status, shown) == (2, "")
    assert said in error
    assert error.count("\n") == 1
    assert {x.name for x in tmp_path.iterdir()} == {"latin.txt", "text.txt"}


def test_rows_that_are_left_out_may_be_no_numbers():
    rows, mask = jnp.array([[1.0, 0.0], [jnp.nan, jnp.inf]]), jnp.array([True, False])
    found = calibration.mean(calibration.accumulate(calibration.start(2), rows, mask))
    np.testing.assert_allclose(found, [[1, 0], [0, 0]])
    for known in (None, np.ones((2, 3), np.float32)):
        assert np.isfinite(tap.second(rows, mask.astype(jnp.float32), known)).all()


def test_a_task_without_any_calibrated_module_is_added_by_its_weights():
    made = synthetic.collection(tasks=3, modules={"q": (32, 24), "o": (24, 32)}, rank=3, dtype="float32")
    moments = {"q": np.linspace(0.1, 2, 32).astype(np.float32)}
    kept = compression.compress(made[:2], max_error=0.05, calibration=moments)
    only = made[2].replace(a={"o": made[2].a["o"]}, b={"o": made[2].b["o"]})
    grown = changes.add(kept, only, calibration=moments)
    assert grown.report["uncalibrated"] == ["o"]
    assert grown.errors[list(grown.shapes).index("o"), 2] < 0.1
    with pytest.raises(HydraOptError, match="no tensor has the name of a module"):
        changes.add(kept, made[2], calibration={"k": moments["q"]})
