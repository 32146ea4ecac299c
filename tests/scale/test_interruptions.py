"""Jobs killed, stopped and out of room."""

import errno
import itertools
import os
import signal
from contextlib import contextmanager

import pytest
from commands import run

from hydraopt_jax import formats, synthetic
from hydraopt_jax.jobs import job as jobs
from hydraopt_jax.store import checkpoint, container_writer


class Killed(BaseException):
    """What nothing catches."""


def kill():
    raise Killed


def fill_up():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def job(tmp_path, monkeypatch, capsys):
    """Runs the command on five adapters, a module a group: (exit status, standard output, standard error)."""
    monkeypatch.setitem(jobs.run.__kwdefaults__, "group_bytes", 1)
    sources = []
    for adapter in synthetic.collection(
        1, tasks=5, modules={f"l.{x}": (24, 16) for x in "qkv"}, rank=4, dtype="float32"
    ):
        formats.write_adapter(tmp_path / adapter.task, adapter)
        sources.append(tmp_path / adapter.task)

    form = "--rank", "3", "--side", "in", "--force"

    def call(out, *more):
        capsys.readouterr()
        return run(capsys, "compress", *sources, "--out", out, *form, *more)

    return call


@contextmanager
def before(module, name, count, act):
    """In here the n-th call of a function, and every later one, does `act` first."""
    function, calls = getattr(module, name), itertools.count(1)

    def call(*arguments):
        if next(calls) >= count:
            act()
        return function(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, call)
        yield


def content(path):
    """Every file of a store."""
    return {x.relative_to(path).as_posix(): x.read_bytes() for x in path.rglob("*") if x.is_file()}


@pytest.mark.parametrize(
    ("array_bytes", "module", "name", "count"),
    [
        (container_writer.ARRAY_BYTES, checkpoint, "settle", 1),
        (500, container_writer.ocp.partial, "save", 3),
        (500, checkpoint, "settle", 1),
    ],
)
def test_a_killed_job_goes_on_and_ends_with_the_same_store(
    job, monkeypatch, tmp_path, array_bytes, module, name, count
):
    monkeypatch.setattr(container_writer, "ARRAY_BYTES", array_bytes)
    assert job(tmp_path / "whole")[0] == 0
    out = tmp_path / "killed"
    # the first to be written is the job's mark, then come three groups
    with before(jobs, "write_json", 3, kill), pytest.raises(Killed):
        job(out)
    with before(module, name, count, kill), pytest.raises(Killed):
        job(out)
    assert not out.exists()
    assert job(out, "--json")[2] == "hydraopt: going on: 3 of 3 modules were done before\n"
    assert content(out) == content(tmp_path / "whole")
    assert not list(tmp_path.glob("*killed.*"))


def test_sigterm_ends_a_job_with_a_message(job, tmp_path):
    ignored = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    out = tmp_path / "store"
    with before(jobs, "write_json", 4, lambda: signal.raise_signal(signal.SIGTERM)):
        code, said, err = job(out, "--json")
    assert signal.signal(signal.SIGTERM, ignored) == signal.SIG_IGN
    assert (code, said) == (143, "")
    assert err.startswith("hydraopt: stopped by SIGTERM")
    assert err.count("\n") == 1
    assert len(list(jobs.folder_of(out).glob("group-*.json"))) == 2
    code, _, err = job(out, "--dtype", "float16")
    assert code == 2
    assert "unfinished job with other adapters or options" in err


@pytest.mark.parametrize(
    ("module", "name", "count", "kept"), [(jobs, "write_json", 3, 1), (checkpoint, "settle", 1, 3)]
)
def test_a_full_disk_is_one_clear_line_and_keeps_what_is_done(job, tmp_path, module, name, count, kept):
    out = tmp_path / "store"
    with before(module, name, count, fill_up):
        code, said, err = job(out, "--json")
    assert (code, said, err.count("\n")) == (2, "", 1)
    assert err.startswith("hydraopt: ")
    assert "cannot be written: No space left on device" in err
    assert "run the same command again" in err
    assert len(list(jobs.folder_of(out).glob("group-*.json"))) == kept
    assert not out.exists()
    assert job(out, "--json")[2] == f"hydraopt: going on: {kept} of 3 modules were done before\n"
    assert checkpoint.verify(out)
