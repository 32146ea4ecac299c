"""Similarity against dense NumPy references, gauge and permutation invariance, missing and padded tasks."""

import re

import numpy as np
import pytest

from hydraopt_jax import adapters, report, synthetic
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import similarity
from hydraopt_jax.report import figures

pytestmark = pytest.mark.numeric

SHAPES = [(9, 7, 3), (12, 3, 3), (4, 11, 2), (6, 6, 1)]
INVARIANT = ["delta", "input_subspace", "output_subspace"]


def factors(shape: tuple[int, int, int], tasks: int = 5, modules: int = 2) -> tuple[np.ndarray, np.ndarray]:
    i, o, r = shape
    rng = np.random.default_rng([i, o, r])
    common_a, common_b = rng.normal(size=(modules, 1, i, r)), rng.normal(size=(modules, 1, r, o))
    a = common_a + rng.normal(size=(modules, tasks, i, r))
    b = common_b + rng.normal(size=(modules, tasks, r, o))
    return a.astype(np.float32), b.astype(np.float32)


def dense_cosine(x: np.ndarray) -> np.ndarray:
    flat = x.reshape(len(x), -1).astype(np.float64)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    return unit @ unit.T


def dense_angles(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosines between the column spaces of two dense matrices of full numerical rank r."""
    bases = []
    for matrix in (x, y):
        u, s, _ = np.linalg.svd(matrix.astype(np.float64))
        bases.append(u[:, : int((s > 1e-5 * s[0]).sum())])
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_cosines_match_dense(shape):
    a, b = factors(shape)
    found = similarity.compare(a, b)
    for m in range(len(a)):
        np.testing.assert_allclose(found.input_factor[m], dense_cosine(a[m]), atol=1e-5)
        np.testing.assert_allclose(found.output_factor[m], dense_cosine(b[m]), atol=1e-5)
        np.testing.assert_allclose(found.delta[m], dense_cosine(a[m] @ b[m]), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_principal_angles_match_dense(shape):
    a, b = factors(shape)
    deltas = a @ b
    found = similarity.compare(a, b)
    for m, s, t in np.ndindex(len(a), 5, 5):
        rows = dense_angles(deltas[m, s], deltas[m, t])
        columns = dense_angles(deltas[m, s].T, deltas[m, t].T)
        np.testing.assert_allclose(found.input_subspace[m, s, t], np.mean(rows**2), atol=1e-4)
        np.testing.assert_allclose(found.output_subspace[m, s, t], np.mean(columns**2), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("field", INVARIANT)
def test_gauge_changes_nothing(shape, field):
    a, b = factors(shape)
    gauge = np.random.default_rng(1).normal(size=(2, 5, shape[2], shape[2])) + 3 * np.eye(shape[2])
    turned = similarity.compare((a @ gauge).astype(np.float32), (np.linalg.inv(gauge) @ b).astype(np.float32))
    before = similarity.compare(a, b)
    np.testing.assert_allclose(getattr(turned, field), getattr(before, field), atol=1e-3)


def test_factor_cosine_depends_on_gauge():
    a, b = factors((9, 7, 3))
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(2, 5, 3, 3)))[0].astype(np.float32)
    change = np.abs(similarity.compare(a @ turn, turn.mT @ b).input_factor - dense_cosine(a[0]))
    assert change.max() > 0.1


@pytest.mark.parametrize("field", similarity.Similarity._fields)
def test_permuting_tasks_permutes_results(field):
    a, b = factors((9, 7, 3))
    order = np.array([3, 0, 4, 1, 2])
    expected = np.asarray(getattr(similarity.compare(a, b), field))[:, order][:, :, order]
    found = getattr(similarity.compare(a[:, order], b[:, order]), field)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("field", similarity.Similarity._fields)
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12])
def test_scale_changes_nothing(field, scale):
    a, b = factors((9, 7, 3))
    found = getattr(similarity.compare(a * np.float32(scale), b), field)
    np.testing.assert_allclose(found, getattr(similarity.compare(a, b), field), atol=1e-5)


@pytest.mark.parametrize("field", similarity.Similarity._fields)
def test_zero_padding_is_no_direction(field):
    a, b = factors((9, 7, 3))
    wide_a = np.concatenate([a, np.zeros_like(a[..., :2])], -1)
    wide_b = np.concatenate([b, np.zeros_like(b[..., :2, :])], -2)
    found = getattr(similarity.compare(wide_a, wide_b), field)
    np.testing.assert_allclose(found, getattr(similarity.compare(a, b), field), atol=1e-4)


def test_rank_deficient_factors_count_their_rank():
    a, b = factors((9, 7, 3))
    a[:, 0, :, 2] = a[:, 0, :, 1]
    a[:, 1] = 0
    found = similarity.compare(a, b)
    np.testing.assert_allclose(found.input_subspace[:, 0, 0], 1.0, atol=1e-5)
    for field in found:
        assert np.all(np.asarray(field)[:, 1] == 0)
        assert np.all(np.asarray(field)[:, :, 1] == 0)


def test_nested_subspace_counts_as_whole():
    a, b = factors((9, 7, 3))
    a[:, 1], b[:, 1] = a[:, 0], b[:, 0]
    a[:, 1, :, 1:] = 0
    np.testing.assert_allclose(similarity.compare(a, b).input_subspace[:, 0, 1], 1.0, atol=1e-5)


def test_summary_leaves_missing_modules_out():
    modules = synthetic.transformer_modules(2, 16, 4)
    one, two, three = synthetic.collection(tasks=3, modules=modules, rank=2, likeness=1.0)
    partial = {name: x for name, x in two.a.items() if "q_proj" not in name}
    two = two.replace(a=partial, b={name: two.b[name] for name in partial})
    summary = similarity.summarize(adapters.stack([one, two, three]))
    assert set(summary.kinds) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set(summary.modules) == set(modules)
    np.testing.assert_allclose(summary.mean.delta, np.ones((3, 3)), atol=1e-4)
    present = np.array([1.0, 0.0, 1.0])
    np.testing.assert_allclose(summary.kinds["q_proj"].delta, np.outer(present, present), atol=1e-4)


@pytest.mark.parametrize(
    ("module", "kind"),
    [("model.layers.11.mlp.fc2", "fc"), ("h.3.attn.c_attn", "c_attn"), ("7", "7"), ("a.b.0.1", "b")],
)
def test_layer_kind(module, kind):
    assert similarity.layer_kind(module) == kind


def test_tables_and_figures(tmp_path):
    pytest.importorskip("matplotlib")
    names = ["x/y.z", "[bold]", "$a$_b"]
    summary = similarity.summarize(adapters.stack(synthetic.collection(tasks=names)))
    assert report.kinds_table(summary).row_count == 5
    assert report.task_table(summary).row_count == 3
    report.plot_similarity(tmp_path / "s.png", summary)
    report.plot_tradeoff(tmp_path / "t.png", {"one": [(0.5, 0.1), (1.0, 0.0)], "two": [(0.2, 0.3)]})
    assert min((tmp_path / x).stat().st_size for x in ("s.png", "t.png")) > 5000


def test_an_svg_has_labels_and_two_schemes(tmp_path):
    pytest.importorskip("matplotlib")
    curves = {f"line {n}": [(0.1 * n, 0.1), (0.2 * n, 0.01)] for n in range(1, 9)}
    report.plot_tradeoff(tmp_path / "t.svg", curves, gray={"estimate": [(0.1, 0.1), (1.0, 0.01)]})
    summary = similarity.summarize(adapters.stack(synthetic.collection(tasks=2)))
    report.plot_similarity(tmp_path / "s.svg", summary)
    for name, words in (("t", [*curves, "estimate"]), ("s", summary.tasks)):
        style, body = (tmp_path / f"{name}.svg").read_text().split("</style>", 1)
        assert "prefers-color-scheme: dark" in style
        assert all(f"<!-- {word} -->" in body for word in words)
        used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", body))
        assert {"#1f2328", "#ffffff"} <= used <= {*figures.SCHEMES, "#000000", "#fefefe", "#010101"}


def test_labels_do_not_overlap():
    wanted = np.random.default_rng(0).random(12)
    found = np.array(figures.spread_labels(wanted, 0.05))
    assert (np.diff(np.sort(found)) > 0.05 - 1e-9).all()
    assert (np.argsort(found) == np.argsort(wanted)).all()
    np.testing.assert_allclose(figures.spread_labels([0.1, 0.5, 0.9], 0.05), [0.1, 0.5, 0.9])


def test_report_bad_input(tmp_path):
    pytest.importorskip("matplotlib")
    summary = similarity.summarize(adapters.stack(synthetic.collection(tasks=1)))
    with pytest.raises(HydraOptError, match="cannot write the figure"):
        report.plot_similarity(tmp_path / "missing" / "s.png", summary)
    with pytest.raises(HydraOptError, match="cannot write the figure"):
        report.plot_similarity(tmp_path / "s.unknown", summary)
    with pytest.raises(HydraOptError, match="no point to plot"):
        report.plot_tradeoff(tmp_path / "t.png", {})
    with pytest.raises(HydraOptError, match="not positive"):
        report.plot_tradeoff(tmp_path / "t.png", {"x": [(0.0, 1.0)]})


def test_missing_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(HydraOptError, match=r"pip install 'hydraopt-jax\[plot\]'"):
        report.plot_tradeoff(tmp_path / "t.png", {"x": [(1.0, 1.0)]})


def test_progress_is_silent_without_terminal(capsys):
    with report.progress("Reading [x]", 2) as advance:
        advance()
        advance(1)
    assert capsys.readouterr() == ("", "")
