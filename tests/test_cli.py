"""The command as a user meets it: what it prints, its exit status, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from commands import run

from hydraopt_jax import formats, synthetic
from hydraopt_jax.demo import main as demo

HYDRA = ["--form", "hydra"]


def ok(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def refused(capsys, *arguments, code=2):
    got, out, err = run(capsys, *arguments)
    assert got == code
    assert out == ""
    assert err.startswith("hydraopt: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def made(capsys, folders, tmp_path):
    path = tmp_path / "store"
    return path, ok(capsys, "compress", *folders, "--out", path, *HYDRA, "--heads", 2, "--rank", 3)


def test_compress_inspect_export_verify(capsys, folders, made, tmp_path):
    path, said = made
    assert said["tasks"] == ["one", "two/three", "a.b", "four"]
    assert said["bytes_after"] < said["bytes_before"]
    assert said["error"]["bound"] <= said["error"]["mean"] <= said["error"]["worst"]
    seen = ok(capsys, "inspect", path)
    assert seen["error"]["mean"] == pytest.approx(said["error"]["mean"], rel=1e-2)
    checked = ok(capsys, "verify", path, *folders)
    assert checked["ok"]
    assert checked["error"]["a.b"]["measured"] == pytest.approx(checked["error"]["a.b"]["claimed"], rel=1e-2)
    one = ok(capsys, "export", path, "--task", "two/three", "--out", tmp_path / "x")
    assert formats.read_adapter(one["exported"]["two/three"]).a
    every = ok(capsys, "export", path, "--all", "--out", tmp_path / "all")
    assert len({Path(x).name for x in every["exported"].values()}) == 4
    assert all(Path(x).parent == tmp_path / "all" for x in every["exported"].values())


def test_tables_name_the_tasks(capsys, folders, tmp_path):
    code, out, err = run(capsys, "compress", *folders, "--out", tmp_path / "s")
    assert (code, err) == (0, "")
    assert all(word in out for word in ("two/three", "worst task", "fp16", "smaller", "Gaussian estimate"))


@pytest.mark.parametrize("options", [[], ["--solver", "optax", "--steps", "20"], ["--cores", "--heads", "1"]])
@pytest.mark.parametrize("side", ["in", "out"])
def test_solvers_and_sides(capsys, folders, tmp_path, options, side):
    form = [*HYDRA, "--side", side, "--rank", "2", *options]
    said = ok(capsys, "compress", *folders, "--out", tmp_path / "s", *form)
    assert 0 < said["error"]["mean"] < 1


def test_similarity_prints_and_plots(capsys, folders, tmp_path):
    said = ok(capsys, "similarity", *folders, "--plot", tmp_path / "heat.png")
    np.testing.assert_allclose(np.diag(said["mean"]["delta"]), 1, rtol=1e-5)
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_demo_writes_stores_scores_and_a_plot(tmp_path):
    said = demo.run_demo(
        tmp_path / "demo", tasks=["inflect-en", "inflect-de", "correct-fr"], budgets=(0.5, 0.1), items=2
    )
    sizes = [x["bytes"] for x in said["stores"]]
    assert sizes == sorted(sizes, reverse=True)
    assert all(x["fraction"] <= x["budget"] for x in said["stores"])
    assert said["stores"][0]["error"] < said["stores"][1]["error"]
    assert said["own_adapters"]["scores"].keys() == set(said["tasks"])
    assert (tmp_path / "demo" / "tradeoff.png").exists()
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == said


def test_demo_leaves_nothing_when_it_is_stopped(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "build_demo", lambda *_: signal.raise_signal(signal.SIGTERM))
    ignored = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert "stopped by SIGTERM" in refused(capsys, "demo", "--out", tmp_path / "d", code=143)
    assert signal.signal(signal.SIGTERM, ignored) == signal.SIG_IGN
    assert not list(tmp_path.iterdir())


def test_demo_does_not_write_over_anything(capsys, tmp_path):
    assert "exists" in refused(capsys, "demo", "--out", tmp_path)


def test_budget_makes_a_store_that_verifies(capsys, folders, tmp_path):
    out = tmp_path / "store"
    said = ok(capsys, "compress", *folders, "--budget", "0.6", "--out", out)
    assert said["bytes_after"] <= 0.6 * 2 * said["entries"]["before"]
    assert sum(said["forms"].values()) == said["modules"]
    assert set(said["estimate"]) == {"separate", "joint", "of"}
    assert said["estimate"]["of"] == "weights"
    assert ok(capsys, "verify", out, *folders)["ok"]
    assert ok(capsys, "inspect", out)["form"] == "coded"


def test_frontier_command_prints_every_curve(capsys, folders, tmp_path):
    options = ["--budget", "0.6", "--budget", "0.6", "--plot", tmp_path / "f.pdf"]
    options += ["--baselines", "ties, k-merge, ties"]
    said = ok(capsys, "frontier", *folders, *options)
    assert {"hydraopt_jax", "HydraOpt, fp16", "merged (mean delta)", "k-merge"} <= set(said["curves"])
    assert (len(said["fractions"]), len(said["curves"]["hydraopt_jax"])) == (1, 1)
    assert said["curves"]["ties"][0]["fraction"] == pytest.approx(0.25)
    assert "'magic'" in refused(capsys, "frontier", *folders, "--baselines", "magic")
    assert (tmp_path / "f.pdf").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--budget", "many"], "'many'"),
        (["--budget", "3000"], "unit"),
        (["--budget", "10B"], "below the smallest store"),
        (["--budget", "0.5", "--heads", "2"], "--heads"),
        (["--budget", "0.5", "--max-error", "0.1"], "exactly one"),
        (["--max-error", "0"], "positive"),
        ([*HYDRA, "--budget", "0.5"], "--budget: cannot be combined with --form hydra"),
        ([*HYDRA, "--weight", "one=2"], "--weight: cannot be combined with --form hydra"),
        (["--budget", "0.5", "--weight", "one"], "NAME=NUMBER"),
        (["--budget", "0.5", "--calibration", "none.safetensors"], "none.safetensors"),
    ],
)
def test_bad_targets_write_nothing(capsys, folders, tmp_path, options, named):
    said = refused(capsys, "compress", *folders, "--out", tmp_path / "store", *options)
    assert named in said
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--heads", "9"], "heads"),
        (["--heads", "x"], "--heads"),
        (["--rank", "0"], "rank"),
        (["--side", "left"], "side"),
        (["--solver", "magic"], "solver"),
        (["--start", "mean"], "start = 'mean': does nothing with solver = 'closed'"),
        (["--steps", "3"], "steps = 3: does nothing with solver = 'closed'"),
        (["--cores"], "cores: do nothing with a head for each of the 4 tasks"),
        (["--dtype", "int3"], "dtype"),
        (["--solver", "optax", "--start", "mean", "--rank", "40"], "rank"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_options(capsys, folders, tmp_path, options, named):
    assert named in refused(capsys, "compress", *folders, "--out", tmp_path / "s", *HYDRA, *options)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "options", [["--heads", "2"], ["--rank", "3"], ["--cores"], ["--side", "in"], ["--dtype", "float32"]]
)
def test_options_of_a_form_need_it(capsys, folders, tmp_path, options):
    said = refused(capsys, "compress", *folders, "--out", tmp_path / "s", *options)
    assert said.startswith(f"hydraopt: {options[0]}: ")
    assert "--form hydra" in said
    assert not (tmp_path / "s").exists()


def test_nothing_asked_for_is_a_quarter_of_the_bytes(capsys, tmp_path):
    made = synthetic.collection(tasks=2, modules={"q": (256, 192)}, rank=8, dtype="float32")
    for x in made:
        formats.write_adapter(tmp_path / x.task, x)
    given = [tmp_path / x.task for x in made]
    code, out, err = run(capsys, "compress", *given, "--out", tmp_path / "s")
    assert (code, err) == (0, "")
    assert "a quarter of the factors' fp16 bytes" in " ".join(out.split())
    seen = ok(capsys, "inspect", tmp_path / "s")
    assert seen["options"]["budget"] == 0.25
    assert seen["bytes"] <= 0.25 * 2 * seen["entries"]["before"]


def damaged(tmp_path, small, name, change):
    formats.write_adapter(tmp_path / name, small[0])
    change(tmp_path / name)
    return tmp_path / name


def drop(name):
    return lambda folder: (folder / name).unlink()


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop("adapter_config.json"), "adapter_config.json"),
        (drop("adapter_model.safetensors"), "adapter_model"),
        (truncate, "adapter_model.safetensors"),
    ],
)
def test_damaged_adapters(capsys, small, folders, tmp_path, change, named):
    bad = damaged(tmp_path, small, "bad", change)
    assert named in refused(capsys, "compress", *folders, bad, "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_missing_adapter(capsys, tmp_path):
    assert "nowhere" in refused(capsys, "compress", tmp_path / "nowhere", "--out", tmp_path / "s")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_name_the_module(capsys, small, folders, tmp_path, value):
    name = next(iter(small[0].b))
    formats.write_adapter(tmp_path / "bad", small[0])
    file = tmp_path / "bad" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors[f"base_model.model.{name}.lora_B.weight"][0, 0] = value
    safetensors.numpy.save_file(tensors, file)
    assert name in refused(capsys, "compress", *folders, tmp_path / "bad", "--out", tmp_path / "s")


def test_other_base_other_shape_same_name(capsys, small, folders, tmp_path):
    base = small[0].replace(config={**small[0].config, "base_model_name_or_path": "some/other"})
    formats.write_adapter(tmp_path / "base", base)
    assert "--any-base" in refused(capsys, "compress", *folders, tmp_path / "base", "--out", tmp_path / "s")
    name = next(iter(small[0].a))
    wide = small[0].replace(a={**small[0].a, name: np.ones((99, 4), np.float32)})
    formats.write_adapter(tmp_path / "wide", wide)
    said = refused(capsys, "compress", *folders, tmp_path / "wide", "--out", tmp_path / "s")
    assert name in said
    assert "99" in said
    twice = refused(capsys, "compress", *folders, folders[0], "--out", tmp_path / "s")
    assert "'one'" in twice


def test_existing_output_and_overwrite(capsys, folders, made):
    path, _ = made
    assert "--overwrite" in refused(capsys, "compress", *folders, "--out", path)
    said = ok(capsys, "compress", *folders, "--out", path, *HYDRA, "--heads", 1, "--overwrite")
    assert ok(capsys, "inspect", path)["options"]["heads"] == said["options"]["heads"] == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output(capsys, folders, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "written" in refused(capsys, "compress", *folders, "--out", tmp_path / "locked" / "s")


def test_output_below_a_file(capsys, folders, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "file" in refused(capsys, "compress", *folders, "--out", tmp_path / "file" / "s")


def test_a_store_larger_than_its_input(capsys, small, tmp_path):
    formats.write_adapter(tmp_path / "half", small[0], dtype="float16")
    arguments = ["compress", tmp_path / "half", "--out", tmp_path / "s", *HYDRA, "--dtype", "float32"]
    assert "--force" in refused(capsys, *arguments, code=1)
    assert not (tmp_path / "s").exists()
    ok(capsys, *arguments, "--force")


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_what_is_not_a_store(capsys, tmp_path, verb):
    assert "store" in refused(capsys, verb, tmp_path)


def test_a_store_is_packed_into_a_file_and_unpacked(capsys, folders, made, tmp_path):
    path, _ = made
    file, again = tmp_path / "s.safetensors", tmp_path / "again"
    packed = ok(capsys, "pack", path, file)
    assert packed["bytes_after"] == file.stat().st_size
    assert packed["bytes_before"] == sum(x.stat().st_size for x in path.rglob("*") if x.is_file())
    assert ok(capsys, "verify", file, *folders)["ok"]
    assert ok(capsys, "inspect", file)["leaves"] == ok(capsys, "inspect", path)["leaves"]
    assert "exists" in refused(capsys, "pack", path, file)
    assert ".safetensors" in refused(capsys, "pack", path, tmp_path / "s.bin")
    assert "give the name of a folder" in refused(capsys, "unpack", path, tmp_path / "t.safetensors")
    ok(capsys, "unpack", file, again)
    files = {x.relative_to(again): x for x in again.rglob("*") if x.is_file()}
    assert {x.relative_to(path) for x in path.rglob("*") if x.is_file()} == set(files)
    assert ok(capsys, "verify", again, *folders)["ok"]
    assert not {"s.bin", "t.safetensors"} & {x.name for x in tmp_path.iterdir()}


def test_export_needs_a_task(capsys, made, tmp_path):
    path, _ = made
    assert "--task" in refused(capsys, "export", path, "--out", tmp_path / "x")
    assert "'one'" in refused(capsys, "export", path, "--task", "onr", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_verify_fails_when_the_adapters_changed(capsys, small, made, tmp_path):
    path, _ = made
    formats.write_adapter(tmp_path / "new", small[0].replace(b={k: v * 3 for k, v in small[0].b.items()}))
    code, _, err = run(capsys, "verify", path, f"one={tmp_path / 'new'}")
    assert code == 1
    assert "one" in err


def test_add_and_remove_say_what_they_did(capsys, folders, tmp_path):
    path = tmp_path / "store"
    ok(capsys, "compress", *folders[:3], "--out", path, *HYDRA, "--heads", "2", "--rank", "3")
    said = ok(capsys, "add", path, folders[3], "--estimate")
    assert said["tasks"] == ["one", "two/three", "a.b", "four"]
    assert said["refit"]["stand_ins"] == []
    assert said["error"]["task"] < 1
    assert 0 < said["refit"]["task"] < 1
    assert ok(capsys, "verify", path, *folders)["ok"]
    assert "'four' is in the store" in refused(capsys, "add", path, folders[3])
    fewer = ok(capsys, "remove", path, "one")
    assert "refit" not in fewer
    assert fewer["tasks"] == ["two/three", "a.b", "four"]
    assert fewer["bytes_after"] < fewer["bytes_before"]
    (tmp_path / "in1").rename(tmp_path / "moved")
    assert "--original two/three=FOLDER" in refused(capsys, "remove", path, "a.b", "--refit")
    moved = f"two/three={tmp_path / 'moved'}"
    again = ok(capsys, "remove", path, "a.b", "--refit", "--original", moved)
    assert again["tasks"] == ["two/three", "four"]
    assert ok(capsys, "verify", path, moved, folders[3])["ok"]


def test_the_mean_of_a_change_is_over_modules_and_tasks(capsys, folders, small, tmp_path):
    name = next(iter(small[0].a))
    formats.write_adapter(
        tmp_path / "new", small[0].replace(a={name: small[0].a[name]}, b={name: small[0].b[name]})
    )
    ok(capsys, "compress", *folders[1:3], "--out", tmp_path / "s", *HYDRA, "--heads", "1")
    said = ok(capsys, "add", tmp_path / "s", tmp_path / "new")
    seen = ok(capsys, "inspect", tmp_path / "s")["error"]
    assert said["error"]["mean"] == seen["mean"] != pytest.approx(np.mean(list(seen["per_task"].values())))


def test_options_and_adapters_that_would_not_be_used_are_refused(capsys, folders, small, tmp_path):
    path = tmp_path / "store"
    ok(capsys, "compress", *folders[:3], "--out", path, *HYDRA)
    for n, adapter in enumerate(small[2:]):
        formats.write_adapter(tmp_path / "more" / f"new-{n}", adapter)
    assert "holds 2 adapters: add one at a time" in refused(capsys, "add", path, tmp_path / "more")
    assert "give one of them" in refused(capsys, "add", path, folders[3], "--refit", "--estimate")
    assert "give one of them" in refused(capsys, "remove", path, "one", "--refit", "--estimate")
    assert "--original: used with" in refused(capsys, "add", path, folders[3], "--original", folders[0])
    assert "--original: used with" in refused(capsys, "remove", path, "one", "--original", folders[0])
    assert ok(capsys, "export", path, "--task", "one", "--task", "one", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["verify", "s", "--any-base"], "--any-base: used with ADAPTERS only"),
        (["verify", "s", "--base-suffix", "-bnb"], "--base-suffix: used with ADAPTERS only"),
        (["merge", "a", "b", "--out", "m", "--seed", "7"], "--seed: linear draws no masks"),
        (["similarity", "a", "--plot", ""], "--plot: is empty"),
        (["frontier", "a", "--plot", ""], "--plot: is empty"),
        (["frontier", "a", "--baselines", ""], "--baselines: is empty"),
        (["inspect", "s", "--plot", ""], "--plot: is empty"),
    ],
)
def test_options_that_would_do_nothing_are_refused(capsys, words, said):
    assert said in refused(capsys, *words)


def test_a_reader_that_stops_is_no_failure(folders, tmp_path, capsys):
    ok(capsys, "compress", *folders, "--out", tmp_path / "s", *HYDRA)
    for more in ([], ["--json"]):
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "hydraopt_jax.cli", "inspect", str(tmp_path / "s"), *more]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=120)
        os.close(write)
        assert (done.returncode, done.stderr) == (0, b"")


def test_names_that_no_disk_takes_are_one_line(capsys, folders, tmp_path):
    for words in (["inspect", "x" * 300], ["merge", *folders, "--out", tmp_path / ("x" * 300)]):
        said = refused(capsys, *words)
        assert "too long" in said.lower()
        assert said.count("\n") == 1
