"""What is interrupted at its end, or runs beside another command, loses no store and no file of the user."""

import errno
import os

import pytest
from commands import run

import hydraopt_jax as hydra
from hydraopt_jax import HydraOptError, buckets, formats, synthetic
from hydraopt_jax.store import folder

AT = "s3://b/store"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """No test is about a crash of the machine."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def many():
    return synthetic.collection(tasks=list("abcd"), modules={"m.q": (64, 48), "m.v": (64, 32)}, rank=4)


@pytest.fixture(scope="module")
def kept(many):
    return hydra.compress(many[:3], max_error=0.05)


@pytest.fixture
def adapters(many, tmp_path):
    """Arguments of `compress`: the adapters in folders."""
    for x in many:
        formats.write_adapter(tmp_path / "in" / x.task, x)
    return [f"{x.task}={tmp_path / 'in' / x.task}" for x in many]


@pytest.fixture
def service(tmp_path, monkeypatch):
    """A bucket that is a folder on this machine."""

    def spec(path):
        return {"driver": "file", "path": f"{tmp_path}/bucket/{path.partition('://')[2]}"}

    monkeypatch.setattr(buckets, "spec", spec)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def interrupt(*_, **__):
    raise KeyboardInterrupt


def lost_disk(*_, **__):
    raise OSError(errno.EIO, "Input/output error")


def no_connection(*_, **__):
    raise HydraOptError("no connection to the service")


def after(function, act):
    """The function, with `act` done after it."""

    def call(*arguments, **options):
        found = function(*arguments, **options)
        act()
        return found

    return call


def snapshot(path):
    return {x.relative_to(path): x.is_file() and x.read_bytes() for x in path.rglob("*")}


CHANGES = {
    "add": lambda at, many: hydra.update(at, lambda x: hydra.add(x, many[3])),
    "remove": lambda at, many: hydra.update(at, lambda x: hydra.remove(x, "a")),
    "save": lambda at, many: hydra.save(at, hydra.compress(many[:2], max_error=0.1), overwrite=True),
}
AFTER = {"add": tuple("abcd"), "remove": tuple("bc"), "save": tuple("ab")}


@pytest.mark.parametrize("act", [interrupt, lost_disk])
@pytest.mark.parametrize("name", CHANGES)
def test_an_error_after_the_rename_of_a_manifest_leaves_the_new_store(
    many, kept, tmp_path, monkeypatch, name, act
):
    hydra.save(tmp_path / "s", kept)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", after(os.replace, act))
        with pytest.raises((KeyboardInterrupt, HydraOptError)):
            CHANGES[name](tmp_path / "s", many)
    assert hydra.open(tmp_path / "s").tasks == AFTER[name]
    assert hydra.verify(tmp_path / "s")
    # the next change removes what no manifest names
    hydra.update(tmp_path / "s", lambda x: x)
    rows = folder.read_manifest(tmp_path / "s")["segments"]
    assert {x.name for x in (tmp_path / "s" / "segments").iterdir()} == {x["id"] for x in rows}


def test_so_it_does_where_no_store_was(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", after(os.replace, interrupt))
    with pytest.raises(KeyboardInterrupt):
        hydra.save(tmp_path / "s", kept)
    assert hydra.verify(tmp_path / "s")


@pytest.mark.parametrize("budget", ["1", "0.5"])
def test_so_does_a_job_that_replaces_a_store(kept, adapters, tmp_path, monkeypatch, capsys, budget):
    hydra.save(tmp_path / "s", kept)
    write = folder.write_manifest
    monkeypatch.setattr(folder, "write_manifest", after(write, lost_disk))
    status, _, said = run(
        capsys, "compress", *adapters, "--out", tmp_path / "s", "--budget", budget, "--overwrite", "--force"
    )
    assert (status, said.count("\n")) == (2, 1)
    assert hydra.open(tmp_path / "s").tasks == tuple("abcd")
    assert hydra.verify(tmp_path / "s")


def test_an_error_before_the_rename_leaves_the_old_store_alone(many, kept, tmp_path, monkeypatch):
    hydra.save(tmp_path / "s", kept)
    before = snapshot(tmp_path / "s")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        CHANGES["add"](tmp_path / "s", many)
    assert {k: v for k, v in snapshot(tmp_path / "s").items() if k.name != folder.NEW} == before


@pytest.mark.parametrize("act", [interrupt, no_connection])
@pytest.mark.parametrize("name", CHANGES)
def test_a_lost_answer_of_a_bucket_leaves_the_new_store(many, kept, service, monkeypatch, name, act):
    hydra.save(AT, kept)
    with monkeypatch.context() as patch:
        patch.setattr(buckets, "write", after(buckets.write, act))
        with pytest.raises((KeyboardInterrupt, HydraOptError)):
            CHANGES[name](AT, many)
    assert hydra.open(AT).tasks == AFTER[name]
    assert hydra.verify(AT)


@pytest.mark.parametrize("act", [interrupt, no_connection])
def test_an_upload_that_fails_before_the_manifest_leaves_nothing(many, kept, service, monkeypatch, act):
    hydra.save(AT, kept)
    before = buckets.keys(AT)
    monkeypatch.setattr(buckets, "write_objects", after(buckets.write_objects, act))
    with pytest.raises((KeyboardInterrupt, HydraOptError)):
        CHANGES["add"](AT, many)
    assert buckets.keys(AT) == before


def test_segments_that_a_third_writer_has_taken_over_stay(many, kept, service, monkeypatch):
    """The request was carried out, its answer lost, and the store changed again before it was repeated."""
    hydra.save(AT, kept)
    write = buckets.write

    def overtaken(path, data, version=None):
        assert write(path, data, version)
        monkeypatch.setattr(buckets, "write", write)
        CHANGES["remove"](AT, many)
        return write(path, data, version)

    monkeypatch.setattr(buckets, "write", overtaken)
    with pytest.raises(HydraOptError, match="another process has changed it"):
        CHANGES["add"](AT, many)
    assert hydra.open(AT).tasks == tuple("bcd")
    assert hydra.verify(AT)
