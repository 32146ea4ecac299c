"""Stores that are not held in memory: read in part, in batches, changed without being read."""

import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from commands import run

from hydraopt_jax import changes, formats, forms, store, synthetic
from hydraopt_jax.compression import compress
from hydraopt_jax.deferred import Deferred, joined, size_of
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats.memory_collection import in_memory
from hydraopt_jax.rate_control import engine, parts
from hydraopt_jax.rate_control.options import Options
from hydraopt_jax.store import decoding, files, folder, removal
from hydraopt_jax.store.store import tensors_of

MODULES = {"layers.0.q": (96, 64), "layers.1.q": (96, 64)}


def in_parts(adapters):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "DIRECTIONS", 6)
        return engine.compress_to_target(in_memory(adapters), Options(max_error=0.01), segment_bytes=1 << 12)


FORMS = {
    "segments": in_parts,
    "coded": lambda x: compress(x, max_error=0.01),
    "lossless": lambda x: compress(x, budget=9.0),
    "heads": lambda x: compress(x, form=forms.Hydra(rank=3)),
    "two heads, cores": lambda x: compress(x, form=forms.Hydra(heads=2, cores=True, side="out")),
}


@pytest.fixture(scope="module")
def adapters():
    head = {"score.weight": np.arange(6, dtype=np.float16).reshape(2, 3)}
    made = synthetic.collection(2, tasks=5, modules=MODULES, rank=3, likeness=0.7, dtype="float32")
    return [x.replace(extras=head) if k in (1, 3) else x for k, x in enumerate(made)]


@pytest.fixture(scope="module", params=FORMS)
def kept(request, adapters):
    found = FORMS[request.param](adapters[:4])
    assert request.param != "segments" or len(found.segments) > 2
    return found


@pytest.fixture(params=["s", "s.safetensors"])
def path(request, kept, tmp_path):
    store.save(tmp_path / request.param, kept)
    return tmp_path / request.param


def spy(opened):
    """Names of the leaves that are read of a store from now on."""
    read = []
    for n, segment in enumerate(opened.segments):
        for name, leaf in segment.leaves.items():
            original = leaf.read
            leaf.read = lambda *x, key=(n, name), original=original: read.append(key) or original(*x)
    return read


def same(one, two, task):
    x, y = (store.task_factors(s, task) for s in (one, two))
    return x.keys() == y.keys() and all(
        np.array_equal(a, b) for n in x for a, b in zip(x[n], y[n], strict=True)
    )


def test_a_lazy_store_says_what_the_store_says(kept, path):
    lazy = store.open(path)
    read = spy(lazy)
    assert lazy.tasks == kept.tasks
    assert lazy.report == kept.report
    assert lazy.shapes == kept.shapes
    assert store.count(lazy) == store.count(kept)
    assert removal.held(lazy) == ()
    assert not read
    np.testing.assert_array_equal(lazy.errors, kept.errors)
    assert {name for _, name in read} == {"errors"}
    for task in kept.tasks:
        one, two = tensors_of(kept, task), tensors_of(lazy, task)
        assert {k: v.tolist() for k, v in one.items()} == {k: v.tolist() for k, v in two.items()}


CHANGES = {
    "add": lambda content, adapters: changes.add(content, adapters[4]),
    "remove": lambda content, adapters: changes.remove(content, content.tasks[1]),
    "both": lambda content, adapters: changes.add(changes.remove(content, content.tasks[0]), adapters[4]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_lazy_store_writes_what_one_in_memory_does(kept, path, adapters, tmp_path, change):
    act = lambda content: CHANGES[change](content, adapters)  # noqa: E731
    lazy = store.update(path, act)
    memory = act(kept)
    assert lazy.tasks == memory.tasks
    assert lazy.report == memory.report
    np.testing.assert_array_equal(lazy.errors, memory.errors)
    assert all(same(lazy, memory, task) for task in memory.tasks)
    for one, two in zip(lazy.segments, memory.segments, strict=True):
        assert set(one.leaves) == set(two.leaves)
        assert all(np.array_equal(np.asarray(one.leaves[k]), np.asarray(v)) for k, v in two.leaves.items())


def test_a_removal_reads_no_factors(path):
    if path.suffix:
        pytest.skip("a file is written whole")
    content = store.open(path)
    read = spy(content)
    left = changes.remove(content, content.tasks[1])
    assert {name for _, name in read} <= {"errors"}
    assert left.tasks == (content.tasks[0], *content.tasks[2:])


def test_a_damaged_leaf_leaves_the_store_as_it_was(path, adapters, tmp_path):
    if path.suffix:
        pytest.skip("of a folder")
    chunk = max((x for x in path.rglob("[0-9]*") if x.is_file()), key=lambda x: x.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    before = {x: x.read_bytes() for x in path.rglob("*") if x.is_file()}
    with pytest.raises(HydraOptError, match="damaged store"):
        store.update(path, lambda x: changes.add(x.load(), adapters[4]))
    assert {x: x.read_bytes() for x in path.rglob("*") if x.is_file()} == before
    assert [x.name for x in tmp_path.iterdir() if not x.name.startswith(".")] == ["s"]


def test_batches_are_the_store_some_tasks_at_a_time(kept, path):
    lazy = store.open(path)
    several = list(files.batches(lazy, limit=kept.report["entries"] * 2))
    assert [len(x.tasks) for x in several] == [2, 2]
    assert tuple(t for x in several for t in x.tasks) == kept.tasks
    assert all(same(kept, content, task) for content in several for task in content.tasks)
    # of segments of two tasks one, not one and a half
    three = [len(x.tasks) for x in files.batches(lazy, limit=kept.report["entries"] * 3)]
    assert three == ([2, 2] if max(len(x.tasks) for x in kept.segments) == 2 else [3, 1])


def test_a_store_that_is_replaced_while_it_is_read_says_so(kept, path, adapters):
    old = store.open(path)
    store.save(path, store.select(kept, [kept.tasks[2]]), overwrite=True)
    with pytest.raises(HydraOptError, match="was replaced since it was opened"):
        old.load()
    assert store.open(path).tasks == (kept.tasks[2],)


def test_a_store_that_is_replaced_while_its_files_are_checked_is_checked_again(
    adapters, tmp_path, monkeypatch
):
    """Files of the store before are gone when their bytes are asked for."""
    path, (one, other) = tmp_path / "s", (compress(x, budget=9.0) for x in (adapters[:2], adapters[2:]))
    store.save(path, one)
    real, turns = Path.is_file, [1]

    def is_file(self):
        found = real(self)
        if turns and path / "segments" in self.parents:
            turns.clear()
            store.save(path, other, overwrite=True)
        return found

    monkeypatch.setattr(Path, "is_file", is_file)
    assert store.verify(path) == sum(len(x.leaves) for x in other.segments)
    assert not turns


def test_real_bytes_of_parts():
    leaf = Deferred((8,), np.uint8, lambda start, stop: bytes(range(start, stop)))
    assert leaf.part(4, (2,), np.float16).nbytes == 4
    with pytest.raises(ValueError, match="4 bytes from byte 5 on of 8"):
        leaf.part(5, (2,), np.float16)
    both = joined([np.array([9], np.uint8), leaf])
    assert bytes(both.read(0, 4)) == bytes([9, 0, 1, 2])
    assert bytes(both.read(3, 9)) == bytes(range(2, 8))


def test_every_leaf_of_a_folder_is_written_once(kept, adapters, tmp_path):
    """A segment whose bytes are there already is not written again."""
    for x in adapters[:2]:
        formats.write_adapter(tmp_path / x.task, x)
    store.save(tmp_path / "s", kept)
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    inode = {x.name: x.stat().st_ino for x in (tmp_path / "copy" / folder.SEGMENTS).iterdir()}
    store.save(tmp_path / "copy", kept, overwrite=True)
    assert {x.name: x.stat().st_ino for x in (tmp_path / "copy" / folder.SEGMENTS).iterdir()} == inode


def test_tasks_decoded_together_are_as_each_alone(kept, path):
    lazy = store.open(path)
    for found in decoding.decode_all(lazy):
        alone = store.decode(kept, found.task)
        assert (found.task, found.dtype, found.config) == (alone.task, alone.dtype, alone.config)
        assert found.a.keys() == alone.a.keys()
        assert all(np.array_equal(found.a[n], alone.a[n]) for n in alone.a)
        assert all(np.array_equal(found.b[n], alone.b[n]) for n in alone.b)
        assert {k: v.tolist() for k, v in found.extras.items()} == {
            k: v.tolist() for k, v in alone.extras.items()
        }


def test_an_export_of_all_decodes_every_segment_once(adapters, tmp_path, monkeypatch, capsys):
    kept = in_parts(adapters[:4])
    store.save(tmp_path / "s", kept)
    decoded, original = [], decoding.decode_segment
    monkeypatch.setattr(decoding, "decode_segment", lambda x, *y: decoded.append(x) or original(x, *y))
    status, _, _ = run(capsys, "export", tmp_path / "s", "--all", "--out", tmp_path / "out")
    assert status == 0
    assert len(decoded) == sum(x.coded for x in kept.segments)


@pytest.fixture(scope="module")
def made_wide():
    *most, last = synthetic.collection(0, tasks=201, modules={"q": (1024, 1024)}, rank=2, dtype="float32")
    return compress(most, form=forms.Hydra(rank=2, side="in")), last


@pytest.fixture
def wide(made_wide, tmp_path):
    """A store of 200 tasks on disk, whose factors are most of it, and one more adapter."""
    store.save(tmp_path / "wide", made_wide[0])
    return tmp_path / "wide", made_wide[1]


def test_a_task_joins_plain_factors_that_are_read_one_by_one(wide):
    path, last = wide
    lazy = store.open(path)
    tracemalloc.start()
    changes.add(lazy, last)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < sum(size_of(v) for x in lazy.segments for v in x.leaves.values()) / 2


def test_a_removal_reads_what_it_writes_again_once(wide, monkeypatch):
    path, _ = wide
    read, original = [], folder.reader

    def counting(*given):
        inner = original(*given)
        return lambda start, stop: read.append(stop - start) or inner(start, stop)

    monkeypatch.setattr(folder, "reader", counting)
    left = store.update(path, lambda x: changes.remove(x, x.tasks[1]))
    size = sum(size_of(v) for x in left.segments for v in x.leaves.values())
    assert size < sum(read) < 1.5 * size


def test_decoding_takes_little_beside_the_factors(tmp_path):
    """In float32, in which they come; codes, contexts and the terms of other modules go as they are used."""
    modules = {f"layers.{n}.q_proj": (1024, 768) for n in range(96)}
    kept = compress(synthetic.collection(tasks=1, modules=modules, rank=8), budget=0.2)
    store.save(tmp_path / "s", kept)
    opened = store.open(tmp_path / "s")
    store.decode(opened, opened.tasks[0])
    tracemalloc.start()
    found = store.decode(opened, opened.tasks[0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = sum(x.nbytes for side in (found.a, found.b) for x in side.values())
    assert size > 2e6
    assert peak < 2.5 * size
