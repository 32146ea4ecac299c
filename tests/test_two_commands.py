"""Two commands at once on one output: the second gets one line, and nothing is half written."""

import os
import subprocess
import sys
import time

import pytest
from commands import run

from hydraopt_jax import compression, formats, store
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.jobs import job
from hydraopt_jax.locks import locked

FORM = ["--form", "hydra", "--heads", "2"]

# takes the lock as the command does, says so, and waits to be told to go on
HOLD = """
import sys
from pathlib import Path
from hydraopt_jax.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def holding(tmp_path):
    """Another process that holds a lock of `s`."""
    started = []

    def hold(path):
        started.append(start("-c", HOLD, path))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


@pytest.mark.parametrize(
    "options",
    [
        FORM,
        ["--budget", "0.9"],
        ["--budget", "1"],
        ["--budget", "0.9", "--skip-bad"],
        ["--dry-run"],
    ],
)
def test_a_job_on_the_same_output_is_refused(capsys, folders, tmp_path, holding, options):
    held = holding(tmp_path / "s")
    before = sorted(x.name for x in tmp_path.iterdir())
    given = ["compress", *folders, "--out", tmp_path / "s", *options]
    status, said, error = run(capsys, *given)
    assert (status, said) == (2, "")
    assert error == f"hydraopt: {tmp_path / 's'}: another process is writing it: try again when it is done\n"
    assert sorted(x.name for x in tmp_path.iterdir()) == before
    held.communicate("\n")
    status, _, error = run(capsys, *given)
    assert (status, error) == (0, "")
    assert not [x.name for x in tmp_path.iterdir() if x.name.startswith(".")]


@pytest.mark.parametrize("name", ["s", "s.safetensors"])
def test_a_change_of_a_store_that_another_writes_is_refused(capsys, small, tmp_path, holding, name):
    path = tmp_path / name
    store.save(path, compression.compress(small[:2], max_error=0.05))
    before = {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*")}
    held = holding(path)
    formats.write_adapter(tmp_path / "in", small[2])
    given = [["remove", path, "one"], ["add", path, f"new={tmp_path / 'in'}"]]
    for arguments in given:
        status, said, error = run(capsys, *arguments)
        assert (status, said) == (2, "")
        assert error == f"hydraopt: {path}: another process is writing it: try again when it is done\n"
    with pytest.raises(HydraOptError, match="another process is writing it"):
        store.save(path, store.open(path), overwrite=True)
    # readers do not wait
    assert store.verify(path) > 1
    assert {x: x.stat().st_mtime_ns for x in before if x != tmp_path} == {
        x: t for x, t in before.items() if x != tmp_path
    }
    held.communicate("\n")
    assert all(run(capsys, *arguments)[0] == 0 for arguments in given)
    assert store.open(path).tasks == ("two/three", "new")


def test_an_export_to_the_same_folder_is_refused(small, tmp_path, holding):
    holding(tmp_path / "out")
    with pytest.raises(HydraOptError, match="another process is writing it"):
        formats.write_adapter(tmp_path / "out", small[0])
    assert not (tmp_path / "out").exists()


def test_a_lock_of_a_dead_process_holds_nothing(capsys, folders, tmp_path, holding):
    held = holding(tmp_path / "s")
    held.kill()
    held.wait()
    assert (tmp_path / ".s.lock").exists()
    assert run(capsys, "compress", *folders, "--out", tmp_path / "s", *FORM)[0] == 0
    assert not (tmp_path / ".s.lock").exists()


def test_one_thread_may_hold_a_job_twice(tmp_path):
    with job.alone(tmp_path / "s"):
        with job.alone(tmp_path / "s"):
            assert (tmp_path / ".s.lock").exists()
        assert (tmp_path / ".s.lock").exists()
        with pytest.raises(HydraOptError, match="another process"), locked(tmp_path / "s"):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [FORM, ["--max-error", "0.01", "--skip-bad"]])
def test_two_real_commands(folders, tmp_path, options):
    """Started together: one writes the store, the other says why it does not; nothing of a job is left."""
    given = ["-m", "hydraopt_jax.cli", "compress", *folders, "--out", tmp_path / "s", *options]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    both = [start(*given, env=environment) for _ in range(2)]
    said = [x.communicate(timeout=300)[1] for x in both]
    codes = [x.returncode for x in both]
    assert sorted(codes) == [0, 2], said
    assert any(x in said[codes.index(2)] for x in ("another process is writing it", "exists"))
    assert said[codes.index(2)].count("\n") == 1
    assert store.verify(tmp_path / "s") > 1
    left = {x.name for x in tmp_path.iterdir()} - {"s", *(f"in{n}" for n in range(4))}
    assert not left
    assert {x.name for x in (tmp_path / "s").iterdir()} == {"manifest.json.gz", "segments"}


def test_the_lock_is_waited_for_by_nobody(tmp_path, holding):
    holding(tmp_path / "s")
    begun = time.perf_counter()
    with pytest.raises(HydraOptError), locked(tmp_path / "s"):
        pass
    assert time.perf_counter() - begun < 5
