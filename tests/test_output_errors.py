"""Stores made with calibration claim both errors, each under its name, and are checked like with like."""

import json

import numpy as np
import pytest
from commands import run, run_apart

import hydraopt_jax as hydra
from hydraopt_jax import calibration, changes, formats, synthetic
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.rate_control.metrics import metrics_of
from hydraopt_jax.store.store import error_leaf, task_errors

MODULES = {"layers.0.q": (96, 64), "layers.1.q": (96, 64)}


def moments(both=False):
    """Inputs that live in few dimensions, so that errors of outputs are not those of weights."""
    rng = np.random.default_rng(0)
    out = {}
    for name, sizes in MODULES.items():
        for suffix, size in (("", sizes[0]), *([(":output", sizes[1])] if both else [])):
            root = rng.normal(size=(size, 12))
            out[name + suffix] = (root @ root.T).astype(np.float32)
    return out


def claiming(content, name, factor):
    """A store that claims other errors than it has."""
    (x,) = content.segments
    lie = {name: error_leaf(x.error_table(name) * factor)}
    return content.replace(segments=(x.replace(leaves={**x.leaves, **lie}),))


def test_no_error_is_above_what_its_store_says():
    true = np.array([0, 1e-12, *np.linspace(0.01, 1, 99), np.nan])
    kept = error_leaf(true).view(np.float16).astype(np.float32) ** 2
    assert (kept >= (1 - 1e-5) * true)[:-1].all()
    assert error_leaf(np.array([1 + 1e-6])).view(np.float16) == 1
    np.testing.assert_allclose(kept[2:], true[2:], rtol=2e-3)
    # nothing is added again where a store is made of a store
    np.testing.assert_array_equal(error_leaf(kept), error_leaf(true))


@pytest.fixture(scope="module")
def many():
    return synthetic.collection(0, tasks=["a", "b"], modules=MODULES, rank=4, likeness=0.5, dtype="float32")


@pytest.fixture(scope="module")
def given(many, tmp_path_factory):
    place = tmp_path_factory.mktemp("given")
    for x in many:
        formats.write_adapter(place / x.task, x)
    calibration.write_moments(place / "cal.safetensors", moments())
    return [place / x.task for x in many], place / "cal.safetensors"


@pytest.fixture(scope="module")
def made(given):
    """The command's store, which no test changes, and what the command said."""
    names, cal = given
    out = cal.with_name("store")
    code, text, err = run_apart(
        "compress", *names, "--budget", "0.5", "--calibration", cal, "--out", out, "--json"
    )
    assert (code, err) == (0, "")
    return out, json.loads(text)


def test_a_calibrated_store_verifies(given, made, capsys):
    """Without the calibration by weights, with it by outputs, too."""
    names, cal = given
    for more in ([], ["--calibration", cal]):
        code, text, err = run(capsys, "verify", made[0], *names, *more, "--json")
        assert (code, err) == (0, "")
        said = json.loads(text)
        assert said["ok"]
        assert ("output_error" in said) == bool(more)
    for key in ("error", "output_error"):
        for task, pair in said[key].items():
            assert pair["claimed"] == pytest.approx(made[1][key]["per_task"][task], rel=2e-3)
            assert pair["measured"] == pytest.approx(pair["claimed"], rel=0.01)
    assert said["output_error"]["a"]["measured"] < 0.5 * said["error"]["a"]["measured"]
    _, text, _ = run(capsys, "verify", made[0], *names, "--calibration", cal)
    assert "of weights" in text
    assert "of outputs" in text


def test_a_limit_of_the_errors_of_outputs_is_stated(made, capsys):
    """Of coders whose readers know the moments: no store comes near it."""
    said = json.loads(run(capsys, "inspect", made[0], "--json")[1])
    assert 0 < said["estimate"]["separate"] < said["output_error"]["mean"]
    assert said["estimate"]["of"] == "outputs"


def test_a_wrong_store_still_fails(many, given, made, capsys, tmp_path):
    names, cal = given
    content = hydra.open(made[0])
    hydra.save(tmp_path / "w", claiming(content, "errors", 0.9))
    hydra.save(tmp_path / "o", claiming(content, "output_errors", 0.9))
    for path, more, expected in (
        ("w", [], 1),
        ("w", ["--calibration", cal], 1),
        ("o", [], 0),
        ("o", ["--calibration", cal], 1),
    ):
        assert run(capsys, "verify", tmp_path / path, *names, *more)[0] == expected
    formats.write_adapter(tmp_path / "x", many[0].replace(b={k: 3 * v for k, v in many[0].b.items()}))
    assert run(capsys, "verify", made[0], f"a={tmp_path / 'x'}")[0] == 1


def test_each_error_is_labeled_where_it_is_shown(made, capsys, monkeypatch):
    # room for the labels beside the adapters' paths
    monkeypatch.setenv("COLUMNS", "160")
    _, said = made
    assert (said["error"]["of"], said["output_error"]["of"]) == ("weights", "outputs")
    assert said["error"]["bound"] is None
    assert said["output_error"]["bound"] <= said["output_error"]["mean"] < said["error"]["mean"]
    _, text, _ = run(capsys, "inspect", made[0])
    assert "of weights" in text
    assert "of outputs" in text
    seen = json.loads(run(capsys, "inspect", made[0], "--json")[1])
    assert seen["output_error"]["mean"] == pytest.approx(said["output_error"]["mean"], rel=2e-3)


def test_another_calibration_or_none_is_said(given, made, capsys, tmp_path):
    names, cal = given
    other = tmp_path / "other.safetensors"
    calibration.write_moments(other, {k: 2 * v for k, v in moments().items()})
    plain = tmp_path / "plain"
    assert run(capsys, "compress", *names, "--budget", "0.5", "--out", plain)[0] == 0
    for path, given_one, more, words in (
        (made[0], other, names, "not the calibration that"),
        (plain, cal, names, "claims no output errors"),
        (made[0], cal, [], "give them, too"),
    ):
        code, out, err = run(capsys, "verify", path, *more, "--calibration", given_one)
        assert (code, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1


def test_verify_decomposes_no_moment(given, made, capsys, monkeypatch):
    """Errors take inner products alone; a decomposition of each moment takes minutes for large models."""
    names, cal = given
    monkeypatch.setattr(np.linalg, "eigh", None)
    code, out, err = run(capsys, "verify", made[0], *names, "--calibration", cal, "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)["output_error"].values()
    assert [x["measured"] for x in rows] == pytest.approx([x["claimed"] for x in rows], rel=5e-3)


@pytest.mark.parametrize("both", [False, True])
def test_both_tables_are_what_is_measured(many, both, tmp_path):
    """Also of gradients at the outputs, after a restore, and of the tasks that are left after a removal."""
    known = moments(both)
    hydra.save(tmp_path / "s", hydra.compress(many, budget=0.5, calibration=known))
    back = hydra.open(tmp_path / "s")
    weights = hydra.measure(back, many)
    outputs = hydra.measure(back, many, metrics_of(MODULES, known))
    alone = hydra.measure(back, many, metrics_of(MODULES, known, inner=True))
    assert alone == pytest.approx(outputs, rel=1e-4)
    np.testing.assert_allclose(list(weights.values()), task_errors(back.errors), rtol=5e-3)
    np.testing.assert_allclose(list(outputs.values()), task_errors(back.output_errors), rtol=5e-3)
    left = hydra.remove(back, "a")
    np.testing.assert_array_equal(left.output_errors, back.output_errors[:, 1:])
    with pytest.raises(HydraOptError, match="--calibration"):
        changes.refit(left, many[1:])
    assert hydra.compress(many, budget=0.5).output_errors is None
