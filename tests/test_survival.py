"""Stores survive: killed writers, two writers, readers meanwhile, flipped bits, lost files."""

import os
import shutil
import signal
import threading

import numpy as np
import pytest

from hydraopt_jax import atomic, compression, store
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.store import checkpoint, container, container_writer


@pytest.fixture(scope="module")
def kept(small):
    return compression.compress(small, compression.Options(heads=2, rank=2))


@pytest.fixture(scope="module")
def other(small):
    return compression.compress(small[:2], compression.Options(heads=2, rank=2))


def words(folder):
    """The text of both files of a folder, which is whole where they are equal."""
    one, two = ((folder / name).read_text() for name in ("one", "two"))
    assert one == two
    return one


def fill(folder, text):
    folder.mkdir()
    for name in ("one", "two"):
        (folder / name).write_text(text)


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
    atomic.exchange = counted(atomic.exchange)
    try:
        work()
    finally:
        os._exit(0)


@pytest.mark.filterwarnings("ignore:os.fork")
@pytest.mark.parametrize("can_exchange", [True, False])
def test_killed_before_every_change_of_names(tmp_path, monkeypatch, can_exchange):
    """The old folder or the new one is there after every kill, and the next writer leaves no litter."""
    path = tmp_path / "store"
    fill(path, "old")
    real = atomic.exchange
    monkeypatch.setattr(atomic, "exchange", lambda one, two: can_exchange and real(one, two))

    def work():
        with atomic.writing(path) as place:
            fill(place / "new", "new")
            atomic.sync_tree(place / "new")
            atomic.replace(place / "new", path)

    seen, point = [], 1
    while killed_at(point, work):
        seen.append(words(atomic.current(path)))
        with atomic.writing(path) as place:
            fill(place / "new", "old")
            atomic.replace(place / "new", path)
        assert words(path) == "old"
        assert [x.name for x in tmp_path.iterdir()] == ["store"]
        point += 1
    assert words(path) == "new"
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert point > 12


def test_a_second_writer_gets_a_line(kept, tmp_path):
    with atomic.writing(tmp_path / "s"), pytest.raises(HydraOptError, match="another process is writing it"):
        checkpoint.save(tmp_path / "s", kept)
    checkpoint.save(tmp_path / "s", kept)
    assert [x.name for x in tmp_path.iterdir()] == ["s"]


def test_readers_see_whole_stores(kept, other, tmp_path):
    for name, content in (("a", kept), ("b", other)):
        checkpoint.save(tmp_path / name, content)
    shutil.copytree(tmp_path / "a", tmp_path / "s")
    done = threading.Event()

    def write():
        for k in range(150):
            with atomic.writing(tmp_path / "s") as place:
                shutil.copytree(tmp_path / "ba"[k % 2], place / "new")
                atomic.replace(place / "new", tmp_path / "s")
        done.set()

    want = {x.tasks: store.task_factors(x, "one") for x in (kept, other)}
    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not done.is_set():
        read = checkpoint.restore(tmp_path / "s")
        seen.append(read.tasks)
        for name, (a, b) in want[read.tasks].items():
            np.testing.assert_array_equal(store.task_factors(read, "one")[name][0], a)
            np.testing.assert_array_equal(store.task_factors(read, "one")[name][1], b)
    writer.join()
    assert len(seen) > 10
    assert set(seen) == set(want)


def test_a_change_that_fails_leaves_the_store_as_it_was(kept, tmp_path):
    checkpoint.save(tmp_path / "s", kept, compress=False)
    with pytest.raises(ZeroDivisionError):
        checkpoint.update(tmp_path / "s", lambda x: x._replace(errors=1 / 0))
    assert checkpoint.restore(tmp_path / "s").tasks == kept.tasks
    checkpoint.update(tmp_path / "s", lambda x: x._replace(report={**x.report, "note": "mine"}))
    assert checkpoint.restore(tmp_path / "s").report["note"] == "mine"
    assert not container.is_compressed(tmp_path / "s")
    assert [x.name for x in tmp_path.iterdir()] == ["s"]


def files_of(path):
    return sorted(x for x in path.rglob("*") if x.is_file())


@pytest.mark.parametrize("read", [checkpoint.restore, checkpoint.verify])
def test_a_flipped_bit_anywhere_is_found_and_its_file_named(kept, tmp_path, read):
    checkpoint.save(tmp_path / "s", kept, compress=False)
    rng = np.random.default_rng(0)
    for file in files_of(tmp_path / "s"):
        data = file.read_bytes()
        for at in np.unique(np.linspace(0, len(data) - 1, 60).astype(int)) if data else ():
            changed = bytearray(data)
            changed[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(changed)
            with pytest.raises(HydraOptError, match=file.name):
                read(tmp_path / "s")
        file.write_bytes(data)
    read(tmp_path / "s")


@pytest.mark.parametrize("read", [checkpoint.restore, checkpoint.verify])
def test_missing_and_truncated_files_are_named(kept, tmp_path, read):
    checkpoint.save(tmp_path / "s", kept)
    for file in files_of(tmp_path / "s"):
        data = file.read_bytes()
        file.unlink()
        with pytest.raises(HydraOptError, match=file.name):
            read(tmp_path / "s")
        file.write_bytes(data[: len(data) // 2] if data else b"x")
        with pytest.raises(HydraOptError, match=file.name):
            read(tmp_path / "s")
        file.write_bytes(data)
    assert checkpoint.verify(tmp_path / "s") == 6


def test_a_truncated_chunk_is_found_by_a_restore_that_does_not_read_it(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(container_writer, "CHUNK", 256)
    checkpoint.save(tmp_path / "s", kept, compress=False)
    last = max((tmp_path / "s" / "state" / "data").glob("[0-9]*"), key=lambda x: int(x.name))
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(HydraOptError, match=f"data/{last.name} has"):
        checkpoint.restore(tmp_path / "s", ["one"])
