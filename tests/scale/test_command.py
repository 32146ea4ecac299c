"""The command on collections with a bad adapter, and before any work."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import run
from safetensors.numpy import load_file, save_file

from hydraopt_jax import store
from hydraopt_jax.deferred import size_of
from hydraopt_jax.jobs import progress

FORM = ["--form", "hydra", "--rank", "3", "--side", "in"]


@pytest.fixture
def broken(folders):
    """The second adapter's file ends early, the fourth has a value that is no number."""
    paths = [x.partition("=")[2] + "/adapter_model.safetensors" for x in folders]
    cut = Path(paths[1])
    cut.write_bytes(cut.read_bytes()[:-100])
    tensors = load_file(paths[3])
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, paths[3])
    return folders


@pytest.mark.parametrize("name", ["store", "store.safetensors"])
def test_a_bad_adapter_is_named_or_left_out_and_listed(capsys, broken, tmp_path, name):
    out = tmp_path / name
    arguments = ["compress", *broken, "--out", out, *FORM, "--json"]
    code, said, err = run(capsys, *arguments)
    assert (code, said) == (2, "")
    assert "in1/adapter_model.safetensors" in err
    assert not out.exists()
    assert not [x for x in tmp_path.iterdir() if "store" in x.name]
    code, said, err = run(capsys, *arguments, "--skip-bad")
    assert (code, err) == (0, "")
    left = json.loads(said)["left_out"]
    assert [x.rpartition("/")[2] for x in left] == ["in1", "in3"]
    assert "NaN" in list(left.values())[1]
    kept = store.open(out)
    assert kept.tasks == ("one", "a.b")
    assert kept.report["left_out"] == left


def test_a_dry_run_of_a_job_into_a_file_writes_nothing(capsys, folders, tmp_path):
    arguments = ["compress", *folders, "--out", tmp_path / "store.safetensors", *FORM, "--json"]
    assert run(capsys, *arguments, "--dry-run")[0] == 0
    assert not list(tmp_path.glob("store*"))


def test_a_job_that_cannot_fit_leaves_nothing_beside_its_file(capsys, folders, tmp_path):
    out = tmp_path / "store.safetensors"
    code, _, err = run(capsys, "compress", *folders, "--out", out, "--budget", "100B")
    assert (code, "smallest store" in err) == (2, True), err
    assert not list(tmp_path.glob("store*"))


def test_a_dry_run_says_what_the_job_takes_and_writes_nothing(capsys, folders, tmp_path):
    arguments = ["compress", *folders, "--out", tmp_path / "store", *FORM, "--json"]
    code, said, err = run(capsys, *arguments, "--dry-run")
    assert (code, err) == (0, "")
    plan = json.loads(said)["plan"]
    assert plan["time_class"] == "seconds"
    assert not list(tmp_path.glob("store*"))
    assert run(capsys, *arguments, "--no-zstd")[0] == 0
    segments = store.open(tmp_path / "store").segments
    stored = sum(size_of(v) for x in segments for v in x.leaves.values())
    assert plan["store"] == stored
    assert run(capsys, "verify", tmp_path / "store", *folders)[0] == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--coordinator", "x:1"], "--processes"),
        (["--processes", "2"], "--coordinator"),
    ],
)
def test_options_that_do_not_fit_are_refused(capsys, folders, tmp_path, options, named):
    code, _, err = run(capsys, "compress", *folders, "--out", tmp_path / "s", *options)
    assert code == 2
    assert named in err
    assert not list(tmp_path.glob("s*"))


def test_progress_speaks_once_a_minute():
    now, said = [0.0], []
    lines = progress.Lines(said.append, 60.0, lambda: now[0])
    lines.start(10, 2)
    lines.read(5_000_000)
    for second in (30, 61, 90, 122):
        now[0] = second
        lines.step(1)
    assert said == [
        "going on: 2 of 10 modules were done before",
        "4 of 10 modules, 1.97 per minute, about 3.0 minutes left, 5.00 MB read",
        "6 of 10 modules, 1.97 per minute, about 2.0 minutes left, 5.00 MB read",
    ]


def test_a_budget_is_planned_and_met_without_the_bad_ones(capsys, folders, tmp_path):
    (tmp_path / "broken").mkdir()
    given = [*folders, str(tmp_path / "broken"), "--out", tmp_path / "s", "--budget", "0.5", "--skip-bad"]
    code, out, _ = run(capsys, "compress", *given, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    assert not (tmp_path / "s").exists()
    code, out, _ = run(capsys, "compress", *given, "--json")
    said = json.loads(out)
    assert code == 0
    assert said["bytes_after"] <= plan["plan"]["store"]
    assert list(said["left_out"]) == [str(tmp_path / "broken")]
    assert sum(said["forms"].values()) == said["modules"]
