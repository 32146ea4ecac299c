"""Jobs killed, stopped and out of room."""

import errno
import itertools
import os
import resource
import shutil
import signal
from contextlib import contextmanager

import pytest
from commands import run
from orbax.checkpoint import v1 as ocp
from stores import content

from hydraopt_jax import compression, formats, store, synthetic
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.explicit import group_loop
from hydraopt_jax.jobs import place
from hydraopt_jax.store import folder


class Killed(BaseException):
    """What nothing catches."""


def kill():
    raise Killed


def fill_up():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def job(tmp_path, monkeypatch, capsys):
    """Runs the command on five adapters, a module a group: (exit status, standard output, standard error)."""
    monkeypatch.setitem(group_loop.compress_in_form.__kwdefaults__, "group_bytes", 1)
    sources = []
    for adapter in synthetic.collection(
        1, tasks=5, modules={f"l.{x}": (24, 16) for x in "qkv"}, rank=4, dtype="float32"
    ):
        formats.write_adapter(tmp_path / adapter.task, adapter)
        sources.append(tmp_path / adapter.task)

    form = "--form", "hydra", "--rank", "3", "--side", "in", "--force"

    def call(out, *more):
        capsys.readouterr()
        return run(capsys, "compress", *sources, "--out", out, *form, *more)

    return call


@contextmanager
def before(module, name, count, act):
    """In here the n-th call of a function, and every later one, does `act` first."""
    function, calls = getattr(module, name), itertools.count(1)

    def call(*arguments, **more):
        if next(calls) >= count:
            act()
        return function(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, call)
        yield


def done(out):
    """Names of the notes on groups that are done."""
    return sorted(x.stem for x in (out / "job").glob("group-?.json"))


# written are the job's mark, then of each of three groups its segment, where that lies, and that it is done
@pytest.mark.parametrize(
    ("array_bytes", "module", "name", "count", "kept"),
    [
        (folder.ARRAY_BYTES, place, "write_json", 2, 0),
        (folder.ARRAY_BYTES, place, "write_json", 5, 1),
        (folder.ARRAY_BYTES, place, "write_json", 6, 1),
        (folder.ARRAY_BYTES, folder, "write_segment", 4, 3),
        (folder.ARRAY_BYTES, folder, "write_manifest", 1, 3),
        (500, ocp.partial, "save", 2, 0),
        (500, ocp.partial, "finalize", 2, 1),
        (500, folder, "write_manifest", 1, 3),
    ],
)
def test_a_killed_job_goes_on_and_ends_with_the_same_store(
    job, monkeypatch, tmp_path, array_bytes, module, name, count, kept
):
    monkeypatch.setattr(folder, "ARRAY_BYTES", array_bytes)
    assert job(tmp_path / "whole")[0] == 0
    out = tmp_path / "killed"
    with before(module, name, count, kill), pytest.raises(Killed):
        job(out)
    if not kept:
        # what another try could not go on with is not left behind
        assert not out.exists()
        assert job(out, "--json")[::2] == (0, "")
    else:
        assert len(done(out)) == kept
        with pytest.raises(HydraOptError, match="an unfinished job: run its command again to go on"):
            store.open(out)
        assert job(out, "--json")[::2] == (0, f"hydraopt: going on: {kept} of 3 modules were done before\n")
    assert content(out) == content(tmp_path / "whole")
    assert {x.name for x in tmp_path.iterdir()} >= {"whole", "killed"}
    assert not list(tmp_path.glob("*killed?*"))


def test_a_job_killed_after_its_manifest_leaves_a_whole_store(job, tmp_path):
    out = tmp_path / "store"
    with before(folder, "remove_unnamed", 1, kill), pytest.raises(Killed):
        job(out)
    kept = store.open(out)
    assert store.verify(out) > 1
    # what is left of the job goes with the next change
    assert (out / "job").exists()
    store.save(out, kept, overwrite=True)
    assert {x.name for x in out.iterdir()} == {"manifest.json.gz", "segments"}
    assert len(list((out / "segments").iterdir())) == 1


@pytest.mark.parametrize(
    ("module", "name", "count"), [(place, "write_json", 5), (folder, "write_manifest", 1)]
)
def test_a_store_that_is_there_stays_whole_until_its_successor_is(job, tmp_path, module, name, count):
    out = tmp_path / "store"
    assert job(out)[0] == 0
    was = content(out)
    with before(module, name, count, kill), pytest.raises(Killed):
        job(out, "--overwrite", "--dtype", "float16")
    assert {k: v for k, v in content(out).items() if k in was} == was
    assert store.verify(out) > 1
    said = job(out, "--overwrite", "--dtype", "float16", "--json")
    assert said[0] == 0
    assert "going on: " in said[2]
    assert store.open(out).report["options"]["dtype"] == "float16"
    assert {x.name for x in out.iterdir()} == {"manifest.json.gz", "segments"}
    assert len(list((out / "segments").iterdir())) == 1


def test_sigterm_ends_a_job_with_a_message(job, tmp_path):
    ignored = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    out = tmp_path / "store"
    with before(place, "write_json", 7, lambda: signal.raise_signal(signal.SIGTERM)):
        code, said, err = job(out, "--json")
    assert signal.signal(signal.SIGTERM, ignored) == signal.SIG_IGN
    assert (code, said) == (143, "")
    assert err.startswith("hydraopt: stopped by SIGTERM")
    assert err.count("\n") == 1
    assert len(done(out)) == 2
    code, _, err = job(out, "--dtype", "float16")
    assert code == 2
    assert f"hydraopt: {out}: is an unfinished job with other adapters or options: delete it" in err


def test_an_unfinished_overwrite_does_not_ask_to_delete_the_store(job, tmp_path):
    out = tmp_path / "store"
    assert job(out)[0] == 0
    with before(folder, "write_manifest", 1, fill_up):
        assert job(out, "--overwrite")[0] == 2
    code, _, err = job(out, "--overwrite", "--dtype", "float16")
    assert code == 2
    assert (
        f"hydraopt: {out / folder.JOB}: is an unfinished job with other adapters or options: delete it" in err
    )
    shutil.rmtree(out / folder.JOB)
    assert store.verify(out)
    assert job(out, "--overwrite", "--dtype", "float16")[0] == 0


@pytest.mark.parametrize(
    ("module", "name", "count", "kept"), [(place, "write_json", 5, 1), (folder, "write_manifest", 1, 3)]
)
def test_a_full_disk_is_one_clear_line_and_keeps_what_is_done(job, tmp_path, module, name, count, kept):
    out = tmp_path / "store"
    with before(module, name, count, fill_up):
        code, said, err = job(out, "--json")
    assert (code, said, err.count("\n")) == (2, "", 1)
    assert err.startswith("hydraopt: ")
    assert "cannot be written: No space left on device" in err
    assert "run the same command again" in err
    assert len(done(out)) == kept
    with pytest.raises(HydraOptError, match="unfinished job"):
        store.open(out)
    assert job(out, "--json")[2] == f"hydraopt: going on: {kept} of 3 modules were done before\n"
    assert store.verify(out)


@contextmanager
def small_files(most):
    """No file may grow beyond so many bytes in here, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["store", "store.safetensors"])
def test_what_the_system_refuses_to_write_is_one_line_whoever_writes_it(small, tmp_path, name):
    path = tmp_path / name
    made = compression.compress(small, budget=1.0)
    with small_files(8000), pytest.raises(HydraOptError, match="cannot be written: File too large"):
        store.save(path, made)
    assert not list(tmp_path.iterdir())
    store.save(path, compression.compress(small[:1], budget=1.0))
    was = content(path) if path.is_dir() else path.read_bytes()
    with small_files(8000), pytest.raises(HydraOptError, match="cannot be written: File too large"):
        store.save(path, made, overwrite=True)
    assert (content(path) if path.is_dir() else path.read_bytes()) == was
    assert {x.name for x in tmp_path.iterdir()} == {name}
