"""Stores survive: killed writers, two writers, readers meanwhile, changes that fail."""

import contextlib
import json
import os
import shutil
import signal
import threading

import numpy as np
import pytest

from hydraopt_jax import durable, forms, store
from hydraopt_jax.compression import compress
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.locks import locked
from hydraopt_jax.store import folder
from hydraopt_jax.store.folder import SEGMENTS

# of a job
IDENTITY = json.dumps({"mark": "abcdef12" * 8})


@pytest.fixture(scope="module")
def kept(small):
    return compress(small, form=forms.Hydra(heads=2, rank=2))


@pytest.fixture(scope="module")
def other(small):
    return compress(small[:2], form=forms.Hydra(heads=2, rank=2))


def killed_at(point, work):
    """Run `work` in a fork that kills itself before its `point`-th change of names; did it get so far?"""
    child = os.fork()
    while child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    calls = []

    def counted(call):
        def run(*arguments, **options):
            calls.append(call)
            assert len(calls) != point or os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return run

    for module, name in ((os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "fsync"), (os, "mkdir")):
        setattr(module, name, counted(getattr(module, name)))
    try:
        work()
    finally:
        os._exit(0)


def copying(tmp_path, old, new):
    """A `write_segment` that copies what Orbax has written elsewhere: its threads do not survive a fork."""
    rows = {}
    for name, content in (("old", old), ("new", new)):
        store.save(tmp_path / name, content)
        rows[name] = folder.read_manifest(tmp_path / name)["segments"]

    def write(store_path, segment, *, name=None, zstd=True):
        source = "old" if len(segment.tasks) == len(old.tasks) else "new"
        (row,) = rows[source]
        target = store_path / SEGMENTS / row["id"]
        # as Orbax does it: under another name first
        for left in (target, target.with_suffix(".tmp")):
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(tmp_path / source / SEGMENTS / row["id"], target.with_suffix(".tmp"))
        os.replace(target.with_suffix(".tmp"), target)
        durable.sync_tree(target)
        return {k: row[k] for k in ("id", "bytes", "header", "sha256", "arrays", "files")}

    return rows, write


@pytest.mark.filterwarnings("ignore:os.fork")
def test_killed_before_every_change_of_names(kept, other, tmp_path, monkeypatch):
    """The old store or the new one is there after every kill, and the next writer leaves no litter."""
    path = tmp_path / "store"
    rows, write = copying(tmp_path, kept, other)
    monkeypatch.setattr(folder, "write_segment", write)
    store.save(path, kept)

    def work():
        store.save(path, other, overwrite=True)

    seen, point = [], 1
    while killed_at(point, work):
        seen.append(store.open(path).load().tasks)
        store.save(path, kept, overwrite=True)
        assert store.open(path).load().tasks == kept.tasks
        assert [x.name for x in (path / SEGMENTS).iterdir()] == [rows["old"][0]["id"]]
        assert sorted(x.name for x in path.iterdir()) == [folder.MANIFEST, SEGMENTS]
        point += 1
    assert store.open(path).tasks == other.tasks
    assert set(seen) == {kept.tasks, other.tasks}
    assert seen[0] == kept.tasks
    assert point > 12


@pytest.mark.filterwarnings("ignore:os.fork")
def test_a_first_save_that_was_killed_is_begun_anew(kept, other, tmp_path, monkeypatch):
    """No store was there, none is; the path may be written to, and what is left of the kill goes."""
    path = tmp_path / "store"
    rows, write = copying(tmp_path, kept, other)
    monkeypatch.setattr(folder, "write_segment", write)
    point = 1
    while killed_at(point, lambda: store.save(path, kept)) and not (path / folder.MANIFEST).exists():
        store.save(path, other)
        assert store.open(path).load().tasks == other.tasks
        assert [x.name for x in (path / SEGMENTS).iterdir()] == [rows["new"][0]["id"]]
        assert sorted(x.name for x in path.iterdir()) == [folder.MANIFEST, SEGMENTS]
        shutil.rmtree(path)
        point += 1
    assert point > 8


@pytest.mark.filterwarnings("ignore:os.fork")
def test_a_job_whose_removal_was_killed_is_not_gone_on_with(tmp_path):
    """What a job says is done is there, or it says nothing."""

    def begin():
        for x in ("one", "two"):
            (tmp_path / SEGMENTS / x / "state").mkdir(parents=True, exist_ok=True)
            (tmp_path / SEGMENTS / x / "state" / "data").touch()
            (tmp_path / folder.JOB).mkdir(exist_ok=True)
            (tmp_path / folder.JOB / f"{x}.segment.json").touch()
            (tmp_path / folder.JOB / "job.json").write_text(IDENTITY)

    begin()
    point, seen = 1, set()
    while killed_at(point, lambda: folder.remove_unnamed(tmp_path, {"segments": []})):
        said = {x.name.partition(".")[0] for x in (tmp_path / folder.JOB).glob("*.segment.json")}
        whole = {x.parts[-3] for x in tmp_path.glob(f"{SEGMENTS}/*/state/data")}
        assert said in (set(), whole)
        seen.add((len(said), len(whole)))
        begin()
        point += 1
    assert {(2, 2), (0, 2), (0, 1)} <= seen
    assert not any((tmp_path / x).exists() for x in (folder.JOB, folder.GONE))


def test_a_second_writer_gets_a_line(kept, tmp_path):
    holds, done = threading.Event(), threading.Event()

    def hold():
        with locked(tmp_path / "s"):
            holds.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait()
    with pytest.raises(HydraOptError, match="another process is writing it"):
        store.save(tmp_path / "s", kept)
    done.set()
    thread.join()
    store.save(tmp_path / "s", kept)
    assert [x.name for x in tmp_path.iterdir()] == ["s"]


def test_readers_see_whole_stores(kept, other, tmp_path):
    """A store that is replaced under a reader is read as it was or as it is, never half and half."""
    store.save(tmp_path / "s", kept)
    done = threading.Event()

    def write():
        for k in range(24):
            store.save(tmp_path / "s", (other, kept)[k % 2], overwrite=True)
        done.set()

    want = {x.tasks: store.task_factors(x, "one") for x in (kept, other)}
    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not done.is_set():
        try:
            read = store.open(tmp_path / "s")
            found = store.task_factors(read, "one")
        except HydraOptError as error:
            # the leaves of a store that is gone
            assert "was replaced since it was opened" in str(error)  # noqa: PT017
            continue
        seen.append(read.tasks)
        for name, (a, b) in want[read.tasks].items():
            np.testing.assert_array_equal(found[name][0], a)
            np.testing.assert_array_equal(found[name][1], b)
    writer.join()
    assert len(seen) > 5
    assert set(seen) <= set(want)


@pytest.mark.parametrize("name", ["s", "s.safetensors"])
def test_a_store_that_was_replaced_is_not_called_damaged(kept, other, tmp_path, name):
    store.save(tmp_path / name, kept)
    before = store.open(tmp_path / name)
    store.save(tmp_path / name, other, overwrite=True)
    with pytest.raises(HydraOptError, match="was replaced since it was opened: open it again"):
        store.decode(before, "one")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_job_beside_a_file_that_was_half_removed_goes_with_the_next_change(
    kept, tmp_path, monkeypatch, count
):
    store.save(tmp_path / "s.safetensors", kept)
    left = tmp_path / "s.safetensors.job"
    for name in (folder.JOB, SEGMENTS):
        (left / name / "x").mkdir(parents=True)
    (left / folder.JOB / "job.json").write_text(IDENTITY)
    calls, remove = [], shutil.rmtree

    def dying(path, **options):
        calls.append(path)
        if len(calls) == count:
            raise KeyboardInterrupt
        remove(path, **options)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", dying)
        store.update(tmp_path / "s.safetensors", lambda x: x)
    store.update(tmp_path / "s.safetensors", lambda x: x)
    assert [x.name for x in tmp_path.iterdir()] == ["s.safetensors"]


def test_what_a_killed_job_left_beside_a_file_goes_with_the_next_change(kept, tmp_path):
    path = tmp_path / "s.safetensors"
    store.save(path, kept)
    (tmp_path / "s.safetensors.job" / folder.JOB).mkdir(parents=True)
    store.update(path, lambda x: x.replace(report=x.report.replace(note="mine")))
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


def test_damage_is_called_so_after_a_change_elsewhere(kept, tmp_path):
    """A change that leaves a segment where it was is no excuse for it."""
    store.save(tmp_path / "s", kept)
    before = store.open(tmp_path / "s")
    store.update(tmp_path / "s", lambda x: x.replace(report=x.report.replace(note="mine")))
    (data,) = (tmp_path / "s").glob("segments/*/state/data/0")
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(HydraOptError, match="damaged store"):
        store.decode(before, "one")


def test_a_change_that_fails_leaves_the_store_as_it_was(kept, tmp_path):
    store.save(tmp_path / "s", kept)
    before = {x: x.read_bytes() for x in (tmp_path / "s").rglob("*") if x.is_file()}
    with pytest.raises(ZeroDivisionError):
        store.update(tmp_path / "s", lambda x: x.replace(tasks=1 / 0))
    with pytest.raises(HydraOptError, match="cannot be written as JSON"):
        store.update(tmp_path / "s", lambda x: x.replace(report=x.report.replace(note=float("nan"))))
    assert {x: x.read_bytes() for x in (tmp_path / "s").rglob("*") if x.is_file()} == before
    assert [x.name for x in tmp_path.iterdir()] == ["s"]
