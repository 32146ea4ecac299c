"""Two commands at once on one output: the second gets one line, and nothing is half written."""

import os
import subprocess
import sys
import time

import pytest
from commands import run

from hydraopt_jax import atomic, formats
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.jobs import job
from hydraopt_jax.store import checkpoint

# takes the lock as the command does, says so, and waits to be told to go on
HOLD = """
import sys
from hydraopt_jax import atomic
from pathlib import Path
with atomic.locked(Path(sys.argv[1]), sys.argv[2]):
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

    def hold(path, role):
        started.append(start("-c", HOLD, path, role))
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
        ["--heads", "2"],
        ["--budget", "0.9"],
        ["--budget", "1"],
        ["--budget", "0.9", "--skip-bad"],
        ["--dry-run"],
    ],
)
def test_a_job_on_the_same_output_is_refused(capsys, folders, tmp_path, holding, options):
    held = holding(tmp_path / "s", "job")
    before = sorted(x.name for x in tmp_path.iterdir())
    given = ["compress", *folders, "--out", tmp_path / "s", *options]
    status, said, error = run(capsys, *given)
    assert (status, said) == (2, "")
    assert error == f"hydraopt: {tmp_path / 's'}: another process is writing it: try again when it is done\n"
    assert sorted(x.name for x in tmp_path.iterdir()) == before
    held.communicate("\n")
    assert run(capsys, *given)[0] == 0
    assert not [x.name for x in tmp_path.iterdir() if x.name.startswith(".")]


def test_an_export_to_the_same_folder_is_refused(small, tmp_path, holding):
    holding(tmp_path / "out", "lock")
    with pytest.raises(HydraOptError, match="another process is writing it"):
        formats.write_adapter(tmp_path / "out", small[0])
    assert not (tmp_path / "out").exists()


def test_a_lock_of_a_dead_process_holds_nothing(capsys, folders, tmp_path, holding):
    held = holding(tmp_path / "s", "job")
    held.kill()
    held.wait()
    assert (tmp_path / ".s.job").exists()
    assert run(capsys, "compress", *folders, "--out", tmp_path / "s", "--heads", "2")[0] == 0
    assert not (tmp_path / ".s.job").exists()


def test_one_thread_may_hold_a_job_twice(tmp_path):
    with job.alone(tmp_path / "s"):
        with job.alone(tmp_path / "s"):
            assert (tmp_path / ".s.job").exists()
        assert (tmp_path / ".s.job").exists()
        with pytest.raises(HydraOptError, match="another process"), atomic.locked(tmp_path / "s", "job"):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--heads", "2"], ["--max-error", "0.01", "--skip-bad"]])
def test_two_real_commands(folders, tmp_path, options):
    """Started together: one writes the store, the other says why it does not; the job's folder is gone."""
    given = ["-m", "hydraopt_jax.cli", "compress", *folders, "--out", tmp_path / "s", *options]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    both = [start(*given, env=environment) for _ in range(2)]
    said = [x.communicate(timeout=300)[1] for x in both]
    codes = [x.returncode for x in both]
    assert sorted(codes) == [0, 2], said
    assert any(x in said[codes.index(2)] for x in ("another process is writing it", "exists"))
    assert said[codes.index(2)].count("\n") == 1
    assert checkpoint.verify(tmp_path / "s") > 1
    left = {x.name for x in tmp_path.iterdir()} - {"s", *(f"in{n}" for n in range(4))}
    assert not left


def test_the_lock_is_waited_for_by_nobody(tmp_path, holding):
    holding(tmp_path / "s", "lock")
    begun = time.perf_counter()
    with pytest.raises(HydraOptError), atomic.writing(tmp_path / "s"):
        pass
    assert time.perf_counter() - begun < 5
