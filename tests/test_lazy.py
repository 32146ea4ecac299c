"""Stores that are not held in memory: outlines, batches, changes of what has not been read."""

import shutil

import numpy as np
import pytest
from commands import run

from hydraopt_jax import compression, formats, store, synthetic
from hydraopt_jax.cli import changes as verbs
from hydraopt_jax.cli import common
from hydraopt_jax.deferred import Deferred
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.jobs import coded, reading, segments
from hydraopt_jax.rate_control import navigate
from hydraopt_jax.store import changes, checkpoint, container_writer, packing

MODULES = {"layers.0.q": (96, 64), "layers.1.q": (96, 64)}
FORMS = {
    "segments": None,
    "coded": lambda x: navigate.compress(x, navigate.Options(max_error=0.01)),
    "lossless": lambda x: navigate.compress(x, navigate.Options(budget=9.0)),
    "heads": lambda x: compression.compress(x, compression.Options(rank=3)),
    "two heads, cores": lambda x: compression.compress(
        x, compression.Options(heads=2, cores=True, side="out")
    ),
}


@pytest.fixture(scope="module")
def adapters():
    head = {"score.weight": np.arange(6, dtype=np.float16).reshape(2, 3)}
    made = synthetic.collection(2, tasks=5, modules=MODULES, rank=3, likeness=0.7, dtype="float32")
    made[1] = made[1]._replace(extras=head)
    made[3] = made[3]._replace(extras=head)
    return made


@pytest.fixture(scope="module", params=FORMS)
def path(request, adapters, tmp_path_factory):
    """A store of the first four adapters, not to be changed."""
    folder = tmp_path_factory.mktemp("stores")
    if FORMS[request.param] is not None:
        checkpoint.save(folder / "s", FORMS[request.param](adapters[:4]))
        return folder / "s"
    for x in adapters[:4]:
        formats.write_adapter(folder / x.task, x)
    names = [str(folder / x.task) for x in adapters[:4]]
    found = reading.collection([reading.open_adapter(n, None, {}) for n in names])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "DIRECTIONS", 6)
        coded.run(folder / "s", found, navigate.Options(max_error=0.01), segment_bytes=1 << 12)
    assert len(checkpoint.restore(folder / "s").payload.segments) > 1
    return folder / "s"


def contents(folder):
    return {x.relative_to(folder).as_posix(): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def readable(content):
    """Whether the factors of an outline can be read."""
    return content.payload is None or not content.payload.segments


@pytest.fixture
def spans(monkeypatch):
    """Lengths of what is read of leaves."""
    out = []
    opened = checkpoint.open_store

    def open_store(at):
        found = opened(at)

        def read(name, start, stop):
            out.append((name, stop - start))
            return found.read(name, start, stop)

        return checkpoint.Opened(found.index, read)

    monkeypatch.setattr(checkpoint, "open_store", open_store)
    return out


def test_an_outline_says_what_the_store_says(path):
    whole, outline = checkpoint.restore(path), checkpoint.outline(path)
    assert outline.tasks == whole.tasks
    assert outline.report == whole.report
    assert list(outline.modules) == list(whole.modules)
    np.testing.assert_array_equal(outline.errors, whole.errors)
    assert store.count(outline) == store.count(whole)
    for name, terms in whole.modules.items():
        for one, two in zip(terms, outline.modules[name], strict=True):
            assert [np.shape(x) for x in one.a] == [x.shape for x in two.a]
            np.testing.assert_array_equal(one.b_of, two.b_of)
    for one, two in zip(whole.sources, outline.sources, strict=True):
        assert one._replace(extras={}) == two._replace(extras={})
        assert {k: x.tolist() for k, x in one.extras.items()} == {
            k: np.asarray(x).tolist() for k, x in two.extras.items()
        }


def test_factors_of_an_outline_are_read_or_refused_and_never_wrong(path):
    whole, outline = checkpoint.restore(path), checkpoint.outline(path)
    for task in whole.tasks:
        if not readable(outline):
            with pytest.raises(HydraOptError, match="restore the tasks that are wanted"):
                store.task_factors(outline, task)
            continue
        other = store.task_factors(outline, task)
        for name, pair in store.task_factors(whole, task).items():
            np.testing.assert_array_equal(np.concatenate(pair, None), np.concatenate(other[name], None))


def test_an_outline_reads_none_of_the_factors(path, spans):
    content = checkpoint.outline(path)
    if content.payload is None or content.payload.segments:
        assert [name for name, _ in spans] == ["errors"]


CHANGES = {
    "add": lambda content, adapters: changes.add(content, adapters[4]),
    "remove": lambda content, adapters: changes.remove(content, content.tasks[1]),
    "both": lambda content, adapters: changes.add(changes.remove(content, content.tasks[0]), adapters[4]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_an_outline_writes_the_bytes_of_one_in_memory(path, adapters, tmp_path, change):
    act = lambda content: CHANGES[change](content, adapters)  # noqa: E731
    shutil.copytree(path, tmp_path / "s")
    checkpoint.update(tmp_path / "s", act)
    checkpoint.save(tmp_path / "memory", act(checkpoint.restore(path)))
    assert contents(tmp_path / "s") == contents(tmp_path / "memory")


def test_a_change_holds_no_more_than_a_part(path, adapters, tmp_path, spans):
    shutil.copytree(path, tmp_path / "s")
    parts = [x for v in packing.pack(checkpoint.outline(path))[0].values() for x in v]
    if not any(isinstance(x, Deferred) for x in parts):
        pytest.skip("a collection coded in one piece is held whole")
    spans.clear()
    checkpoint.update(tmp_path / "s", lambda x: changes.add(x, adapters[4]))
    assert max(size for _, size in spans) == max(x.nbytes for x in parts if isinstance(x, Deferred))


def test_a_damaged_leaf_leaves_the_store_as_it_was(path, adapters, tmp_path):
    shutil.copytree(path, tmp_path / "s")
    chunk = max((x for x in (tmp_path / "s").rglob("[0-9]*") if x.is_file()), key=lambda x: x.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 1
    chunk.write_bytes(data)
    before = contents(tmp_path / "s")
    with pytest.raises(HydraOptError, match="does not match its checksum"):
        checkpoint.update(tmp_path / "s", lambda x: changes.add(x, adapters[4]))
    assert contents(tmp_path / "s") == before
    assert [x.name for x in tmp_path.iterdir() if not x.name.startswith(".")] == ["s"]


def test_batches_are_the_store_some_tasks_at_a_time(path, monkeypatch):
    whole = checkpoint.restore(path)
    monkeypatch.setattr(checkpoint, "BATCH", whole.report["entries"] * 2)
    several = list(checkpoint.batches(path, whole.tasks))
    assert [len(x.tasks) for x in several] == [2, 2]
    assert tuple(t for x in several for t in x.tasks) == whole.tasks
    for content in several:
        for task in content.tasks:
            other = store.task_factors(whole, task)
            for name, (a, b) in store.task_factors(content, task).items():
                np.testing.assert_array_equal(a @ b, other[name][0] @ other[name][1])
    assert checkpoint.verify(path) == len(contents(path))
    monkeypatch.setattr(checkpoint, "BATCH", whole.report["entries"] * 3)
    # of segments of two tasks one, not one and a half
    assert [len(x.tasks) for x in checkpoint.batches(path, whole.tasks)] == (
        [3, 1] if readable(whole) else [2, 2]
    )


def test_a_store_that_is_replaced_between_batches_says_so(path, adapters, tmp_path, monkeypatch):
    # small chunks: what a reader still holds of the old store is told as it was
    monkeypatch.setattr(container_writer, "CHUNK", 256)
    checkpoint.save(tmp_path / "s", checkpoint.restore(path))
    monkeypatch.setattr(checkpoint, "BATCH", 1)
    stores = checkpoint.batches(tmp_path / "s", checkpoint.read_index(tmp_path / "s")[0])
    next(stores)
    checkpoint.update(tmp_path / "s", lambda x: changes.remove(x, x.tasks[0]))
    with pytest.raises(HydraOptError, match="was replaced while it was read: run it again"):
        list(stores)


def test_verbs_go_through_a_large_store_in_batches(capsys, path, adapters, tmp_path, monkeypatch):
    shutil.copytree(path, tmp_path / "s")
    for x in adapters:
        formats.write_adapter(tmp_path / "in" / x.task, x)
    folders = [tmp_path / "in" / x.task for x in adapters]
    monkeypatch.setattr(common, "LARGE", 1)
    monkeypatch.setattr(verbs, "LARGE", 1)
    monkeypatch.setattr(checkpoint, "BATCH", 1)
    assert run(capsys, "export", tmp_path / "s", "--all", "--out", tmp_path / "out")[0] == 0
    whole = checkpoint.restore(path)
    for task in whole.tasks:
        back = formats.read_adapter(tmp_path / "out" / task)
        expected = store.adapter(whole, task)
        for name in expected.a:
            np.testing.assert_allclose(
                back.a[name] @ back.b[name], expected.a[name] @ expected.b[name], rtol=1e-3, atol=1e-5
            )
    assert run(capsys, "verify", tmp_path / "s", *folders[:4], "--json")[0] == 0
    again = f"{adapters[0].task}={folders[1]}"
    code, _, err = run(capsys, "verify", tmp_path / "s", folders[0], again)
    assert code == 2
    assert "is used by both" in err
    code, out, _ = run(capsys, "add", tmp_path / "s", folders[4])
    assert code == 0
    assert "not estimated: the collection is large" in " ".join(out.split())
    assert run(capsys, "verify", tmp_path / "s", folders[4], folders[0])[0] == 0
    code, _, err = run(capsys, "remove", tmp_path / "s", whole.tasks[0], "--refit")
    assert code == 2
    assert "this one is large: compress it again" in err
    assert run(capsys, "remove", tmp_path / "s", whole.tasks[0])[0] == 0
    assert checkpoint.outline(tmp_path / "s").tasks == (*whole.tasks[1:], adapters[4].task)


def test_a_part_beyond_its_leaf_is_refused():
    leaf = Deferred((8,), np.uint8, lambda start, stop: bytes(stop - start))
    assert leaf.part(4, (2,), np.float16).nbytes == 4
    with pytest.raises(ValueError, match="4 bytes from byte 5 on of 8"):
        leaf.part(5, (2,), np.float16)
