"""Whole collections merged: mixed ranks, missing modules, scales, and the command as a user meets it."""

import json

import jax
import numpy as np
import pytest
from commands import run

from hydraopt_jax import HydraOptError, calibration, formats, merging, synthetic
from hydraopt_jax.adapters import Adapter


def mean(collection, module):
    zero = np.zeros((24, 1)), np.zeros((1, next(x.b[module].shape[1] for x in collection if module in x.b)))
    return np.mean([x.a.get(module, zero[0]) @ x.b.get(module, zero[1]) for x in collection], 0)


@pytest.fixture(scope="module")
def small():
    """Four seeded adapters of one layer whose modules have one shape: a method compiles once."""
    return synthetic.collection(
        1,
        tasks=["one", "two/three", "a.b", "four"],
        modules=synthetic.transformer_modules(1, 24, 24),
        rank=4,
        likeness=0.6,
        dtype="float32",
    )


@pytest.fixture
def uneven(small):
    """Mixed ranks, and a module that the first adapter lacks."""
    gone = next(iter(small[0].a))
    first = small[0].replace(
        a={k: v for k, v in small[0].a.items() if k != gone},
        b={k: v for k, v in small[0].b.items() if k != gone},
        config={**small[0].config, "target_modules": ["k_proj"], "exclude_modules": [gone]},
    )
    second = small[1].replace(
        a={k: v[:, :2] for k, v in small[1].a.items()}, b={k: v[:2] for k, v in small[1].b.items()}
    )
    return [first, second, *small[2:]], gone


def test_mean_of_mixed_ranks_and_missing_modules_is_exact(uneven, tmp_path):
    collection, gone = uneven
    merged = merging.merge_adapters(collection, "concatenation", weights=[0.25] * 4)
    formats.write_adapter(tmp_path / "m", merged)
    again = formats.read_adapter(tmp_path / "m")
    assert set(again.a) == set(collection[1].a)
    assert gone in again.config["target_modules"]
    assert "exclude_modules" not in again.config
    for name in again.a:
        np.testing.assert_allclose(again.a[name] @ again.b[name], mean(collection, name), atol=1e-5)


def test_errors_are_those_of_dense_deltas(uneven):
    collection, _ = uneven
    merged = merging.merge_adapters(collection, "linear", rank=3)
    errors = merging.merged_errors(collection, merged)
    for row, name in zip(errors, merged.a, strict=True):
        one = merged.a[name] @ merged.b[name]
        deltas = [x.a[name] @ x.b[name] for x in collection[1:]]
        want = [((d - one) ** 2).sum() / (d**2).sum() for d in deltas]
        np.testing.assert_allclose(row[1:], want, rtol=1e-3)
    assert np.isnan(errors).sum() == 1


@pytest.mark.parametrize(
    ("method", "options", "times"),
    [
        ("linear", {}, 1),
        ("ties", {"density": 1.0}, 1),
        ("knots", {"density": 1.0}, 1),
        ("core-space", {"density": 1.0}, 1),
        ("task-arithmetic", {}, 3),
        # three copies at a third each come back threefold: why factors are not to be averaged
        ("linear-factors", {}, 3),
    ],
)
def test_three_copies(small, method, options, times):
    same = [small[0].replace(task=str(t)) for t in range(3)]
    merged = merging.merge_adapters(same, method, **options)
    for name, a in small[0].a.items():
        np.testing.assert_allclose(merged.a[name] @ merged.b[name], times * a @ small[0].b[name], atol=1e-5)


def test_embeddings_keep_their_layout(tmp_path):
    layout = {"wte": {"kind": "embedding"}}
    rng = np.random.default_rng(0)
    made = [
        Adapter(str(t), {"wte": rng.normal(size=(9, 2))}, {"wte": rng.normal(size=(2, 5))}, layout=layout)
        for t in range(2)
    ]
    formats.write_adapter(tmp_path / "m", merging.merge_adapters(made, "linear", rank=4))
    assert formats.read_adapter(tmp_path / "m").layout == layout


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", ["--rank", "3", "--scale", "0.5"]),
        ("ties", ["--density", "0.5", "--elect", "frequency"]),
        ("della", ["--density", "0.6", "--epsilon", "0.3", "--seed", "4"]),
        ("tsv-m", ["--keep", "2", "--rank", "8"]),
    ],
)
def test_merge_writes_what_the_library_makes(capsys, small, folders, tmp_path, method, options):
    out = tmp_path / "merged"
    code, said, err = run(capsys, "merge", *folders, "--method", method, *options, "--out", out, "--json")
    assert (code, err) == (0, "")
    said = json.loads(said)
    assert set(said["error"]["per_task"]) == {x.task for x in small}
    read = dict(zip(options[::2], options[1::2], strict=True))
    known = {k[2:]: {"--elect": str}.get(k, json.loads)(v) for k, v in read.items()}
    key = jax.random.key(known.pop("seed", 0))
    want = merging.merge_adapters(small, method, key=key, **known)
    got = formats.read_adapter(out)
    for name in want.a:
        np.testing.assert_allclose(got.a[name] @ got.b[name], want.a[name] @ want.b[name], atol=1e-6)
    assert said["error"]["mean"] == pytest.approx(np.nanmean(merging.merged_errors(small, got)), rel=1e-4)


def test_weights_of_some_tasks_leave_the_others_theirs(capsys, small, folders, tmp_path):
    given = ["--weight", "one=1", "--weight", "a.b=-0.1", "--rank", "3", "--out", tmp_path / "m", "--json"]
    code, said, _ = run(capsys, "merge", *folders, *given)
    assert code == 0
    weights = [1.0, 0.25, -0.1, 0.25]
    assert list(json.loads(said)["weights"].values()) == pytest.approx(weights)
    want = merging.merge_adapters(small, "linear", weights=weights, rank=3)
    got = formats.read_adapter(tmp_path / "m")
    for name in want.a:
        np.testing.assert_allclose(got.a[name] @ got.b[name], want.a[name] @ want.b[name], atol=1e-6)


def test_the_best_scale_is_the_best(small):
    """No other scale has a lower mean error, and that of the best is the one that is promised."""
    merged = merging.merge_adapters(small, "ties")
    scale, error = merging.best_scale(small, merged)

    def mean(factor):
        return np.nanmean(merging.merged_errors(small, merging.merge_adapters(small, "ties", scale=factor)))

    assert mean(scale) == pytest.approx(error, rel=1e-4)
    assert all(mean(scale * x) > error for x in (0.9, 1.1))


def test_errors_above_one_are_explained(capsys, folders, tmp_path):
    """A sum of many tasks is too long: the line says what 100% is, and which scale is the best."""
    given = ["merge", *folders, "--method", "ties"]
    code, said, _ = run(capsys, *given, "--scale", "4", "--out", tmp_path / "m")
    text = " ".join(said.split())
    assert code == 0
    assert "100% is that of no adapter" in text
    assert "--scale auto" in text
    _, said, _ = run(capsys, *given, "--scale", "auto", "--out", tmp_path / "n", "--json")
    found = json.loads(said)
    assert found["error"]["mean"] == pytest.approx(found["best"]["mean"], rel=1e-3)
    assert found["scale"] == pytest.approx(found["best"]["scale"])
    assert found["error"]["mean"] <= 1


def test_the_best_scale_is_not_advised_where_it_was_taken(capsys, folders, tmp_path, monkeypatch):
    """Of errors that are nothing but rounding the least is far below the others."""
    monkeypatch.setattr(merging, "best_scale", lambda *_: (2.0, 0.0))
    for scale, said in (("1", True), ("auto", False)):
        code, out, _ = run(capsys, "merge", *folders[:2], "--scale", scale, "--out", tmp_path / scale)
        assert code == 0
        assert ("--scale auto" in out) == said


def test_regmean_takes_a_file_of_moments_a_task(capsys, small, folders, tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for adapter in small:
        x = rng.normal(size=(len(adapter.a), 60, 24))
        moments = {name: row.T @ row / 60 for name, row in zip(adapter.a, x, strict=True)}
        file = tmp_path / f"{len(rows)}.safetensors"
        calibration.write_moments(file, moments)
        rows += [f"--moments={adapter.task}={file}"]
    out = tmp_path / "m"
    code, _, _ = run(capsys, "merge", *folders, "--method", "regmean", *rows, "--rank", "16", "--out", out)
    assert code == 0
    name = next(iter(small[0].a))
    loaded = [calibration.read_moments(x.rpartition("=")[2])[name] for x in rows]
    loaded = [0.9 * c + 0.1 * np.diag(np.diag(c)) for c in loaded]
    deltas = [x.a[name] @ x.b[name] for x in small]
    want = np.linalg.solve(sum(loaded), sum(c @ d for c, d in zip(loaded, deltas, strict=True)))
    got = formats.read_adapter(out)
    np.testing.assert_allclose(got.a[name] @ got.b[name], want, atol=1e-4)
    code, said, err = run(capsys, "merge", *folders, "--method", "regmean", rows[0], "--out", tmp_path / "n")
    assert (code, said) == (2, "")
    assert "four" in err
    assert not (tmp_path / "n").exists()


def test_merge_warns_of_factors_and_of_what_it_leaves_out(capsys, small, tmp_path):
    for n, adapter in enumerate(small[:2]):
        head = {"base_model.model.score.weight": np.ones((2, 3), np.float32)}
        formats.write_adapter(tmp_path / f"h{n}", adapter.replace(extras=head))
    given = ["merge", tmp_path / "h0", tmp_path / "h1", "--method", "linear-factors", "--out", tmp_path / "m"]
    code, said, err = run(capsys, *given, "--json")
    assert code == 0
    assert json.loads(said)["method"] == "linear-factors"
    assert "averages factors" in err
    assert "score.weight" in err
    assert formats.read_adapter(tmp_path / "m").extras == {}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--weight", "1"], "--weight 1: give NAME=NUMBER"),
        (["--weight", "one=x"], "--weight one=x: give NAME=NUMBER"),
        (["--weight", "one=1", "--weight", "one=2"], "was given before"),
        (["--weight", "onr=1"], "did you mean 'one'"),
        (["--weight", "one=nan"], "finite"),
        (["--scale", "x"], "--scale x: give a number, or auto"),
        (["--scale", "inf"], "--scale inf"),
        (["--method", "tie"], "method 'tie': did you mean 'ties'?"),
        (["--method", "ties", "--density", "0"], "(0, 1]"),
        (["--method", "ties", "--density", "1.5"], "(0, 1]"),
        (["--method", "ties", "--density", "nan"], "(0, 1]"),
        (["--method", "magic"], "linear, task-arithmetic"),
        (["--method", "share"], "--baselines share"),
        (["--density", "0.5"], "linear takes rank"),
        (["--method", "concatenation", "--rank", "3"], "takes no option"),
        (["--rank", "0"], "rank"),
        (["--dtype", "int8"], "dtype"),
        (["--method", "regmean"], "moments"),
        (["--method", "regmean", "--moments", "nobody=x"], "nobody"),
        (["--method", "della", "--density", "0.95"], "epsilon"),
    ],
)
def test_bad_use_writes_nothing(capsys, folders, tmp_path, options, named):
    code, out, err = run(capsys, "merge", *folders, *options, "--out", tmp_path / "m")
    assert (code, out) == (2, "")
    assert err.startswith("hydraopt: ")
    assert err.count("\n") == 1
    assert named in err
    assert not (tmp_path / "m").exists()


def test_adapters_of_another_base_write_nothing(capsys, small, folders, tmp_path):
    other = small[0].replace(config={**small[0].config, "base_model_name_or_path": "some/other"})
    formats.write_adapter(tmp_path / "other", other)
    code, out, err = run(capsys, "merge", *folders, tmp_path / "other", "--out", tmp_path / "m")
    assert (code, out) == (2, "")
    assert "--any-base" in err
    assert not (tmp_path / "m").exists()


def test_an_existing_folder_is_kept(capsys, folders, tmp_path):
    (tmp_path / "m").mkdir()
    code, _, err = run(capsys, "merge", *folders, "--out", tmp_path / "m")
    assert code == 2
    assert "--overwrite" in err
    assert not list((tmp_path / "m").iterdir())


def test_moments_must_cover_every_module():
    collection = synthetic.collection(tasks=2, rank=2, modules={"q": (6, 4)})
    with pytest.raises(HydraOptError, match="q: the second moments of 'task-01'"):
        merging.merge_adapters(collection, "regmean", moments=[{"q": np.eye(6)}, {}])


def test_a_merged_adapter_promises_no_tensors_that_it_has_not(small, tmp_path):
    """PEFT adds `modules_to_save` for a task type with a head, and looks for trainable tokens."""
    promises = {"task_type": "SEQ_CLS", "modules_to_save": ["score"], "trainable_token_indices": [1, 5]}
    merged = merging.merge_adapters([x.replace(config={**x.config, **promises}) for x in small], "linear")
    assert merged.config["task_type"] is None
    assert not {"modules_to_save", "trainable_token_indices"} & set(merged.config)


def test_a_module_that_is_zero_leaves_errors_of_the_others(capsys, small, tmp_path):
    gone = next(iter(small[0].a))
    given = [small[0].replace(b={**small[0].b, gone: 0 * small[0].b[gone]}), *small[1:]]
    names = []
    for n, x in enumerate(given):
        formats.write_adapter(tmp_path / f"in{n}", x)
        names.append(f"{n}={tmp_path / f'in{n}'}")
    code, out, _ = run(capsys, "merge", *names, "--out", tmp_path / "m", "--json")
    said = json.loads(out)
    assert code == 0
    assert all(np.isfinite(x) for x in str_errors(said))


def str_errors(said):
    """Every number that the report of a merge has of errors."""
    error = said["error"]
    return [error["mean"], error["worst"], *error["per_task"].values()]
