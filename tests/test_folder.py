"""Containers of one array and of several: the same bytes back, no more read or held than is needed."""

import os
import shutil

import numpy as np
import pytest

from hydraopt_jax import compression, store
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.rate_control import navigate
from hydraopt_jax.store import checkpoint, container, container_writer

CHUNK, ARRAY = 256, 1000


@pytest.fixture
def cut(monkeypatch):
    """Arrays of 1,000 bytes, in four chunks of 250."""
    monkeypatch.setattr(container_writer, "CHUNK", CHUNK)
    monkeypatch.setattr(container_writer, "ARRAY_BYTES", ARRAY)


@pytest.fixture(scope="module")
def plain(small):
    return compression.compress(small, compression.Options(heads=2, rank=2))


@pytest.fixture(scope="module")
def coded(small):
    return navigate.compress(small, navigate.Options(max_error=0.05))


def files_of(path):
    return sorted(x for x in path.rglob("*") if x.is_file())


def arrays_of(path):
    return sorted((x for x in path.rglob("data*") if x.is_dir()), key=lambda x: int(x.name[5:] or 0))


def equal(one, two, tasks):
    for task in tasks:
        for name, (a, b) in store.task_factors(one, task).items():
            np.testing.assert_array_equal(store.task_factors(two, task)[name][0], a)
            np.testing.assert_array_equal(store.task_factors(two, task)[name][1], b)


@pytest.mark.parametrize("kind", ["plain", "coded"])
@pytest.mark.parametrize("compress", [False, True])
def test_several_arrays_round_trip(request, tmp_path, cut, kind, compress):
    kept = request.getfixturevalue(kind)
    for name in ("s", "again"):
        checkpoint.save(tmp_path / name, kept, compress=compress)
    assert len(arrays_of(tmp_path / "s")) > 2
    back = checkpoint.restore(tmp_path / "s")
    equal(kept, back, kept.tasks)
    equal(kept, checkpoint.restore(tmp_path / "s", ["a.b"]), ["a.b"])
    assert checkpoint.verify(tmp_path / "s") == len(files_of(tmp_path / "s"))
    assert container.is_compressed(tmp_path / "s") == compress
    for one, two in zip(files_of(tmp_path / "s"), files_of(tmp_path / "again"), strict=True):
        assert one.read_bytes() == two.read_bytes()
    checkpoint.update(tmp_path / "s", lambda x: x._replace(report={**x.report, "note": "mine"}))
    equal(kept, checkpoint.restore(tmp_path / "s"), kept.tasks)


def test_one_task_reads_only_its_chunks_of_several_arrays(small, tmp_path, cut, monkeypatch):
    kept = compression.compress(small, compression.Options(heads=3))
    checkpoint.save(tmp_path / "s", kept, compress=False)
    meta, item = container.read_description(tmp_path / "s")
    leaves = checkpoint.read_index(tmp_path / "s")[1]["leaves"]
    wanted, at = set(range(-(-meta["index"][0] // 250))), meta["index"][0]
    names = {"errors", "shared", "task_2", *(k for k in leaves if k.startswith("head_"))}
    for name, size in leaves.items():
        wanted |= set(range(at // 250, (at + size - 1) // 250 + 1)) if name in names else set()
        at += size
    read = []
    original = container.read_file
    monkeypatch.setattr(container, "read_file", lambda p, name: read.append(name) or original(p, name))
    equal(kept, checkpoint.restore(tmp_path / "s", ["a.b"]), ["a.b"])
    chunks = [x for x in read if x.rpartition("/")[2].isdigit()]
    assert len(chunks) == len(set(chunks))
    assert set(chunks) <= {f"{item}/{container.array_name(k // 4)}/{k % 4}" for k in wanted}
    assert len(chunks) < 0.7 * sum(len(x) for x in meta["chunks"])


@pytest.mark.parametrize("read", [checkpoint.restore, checkpoint.verify])
def test_damage_of_any_file_is_found_and_named(plain, tmp_path, cut, read):
    checkpoint.save(tmp_path / "s", plain, compress=False)
    rng = np.random.default_rng(0)
    for file in files_of(tmp_path / "s"):
        name = file.relative_to(tmp_path / "s").as_posix()
        data = file.read_bytes()
        for at in rng.integers(len(data), size=2) if data else ():
            changed = bytearray(data)
            changed[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(changed)
            with pytest.raises(HydraOptError, match=name):
                read(tmp_path / "s")
        file.write_bytes(data[: len(data) // 2] if data else b"x")
        with pytest.raises(HydraOptError, match=name):
            read(tmp_path / "s")
        file.unlink()
        with pytest.raises(HydraOptError, match=name):
            read(tmp_path / "s")
        file.write_bytes(data)
    read(tmp_path / "s")


@pytest.mark.parametrize("read", [checkpoint.restore, checkpoint.verify])
def test_swapped_and_missing_arrays_are_found_and_named(plain, tmp_path, cut, read):
    checkpoint.save(tmp_path / "s", plain, compress=False)
    second, third = arrays_of(tmp_path / "s")[1:3]
    second.rename(tmp_path / "aside")
    with pytest.raises(HydraOptError, match=r"data_1/\S+ is missing"):
        read(tmp_path / "s")
    third.rename(second)
    (tmp_path / "aside").rename(third)
    with pytest.raises(HydraOptError, match=r"data_1/0 does not match its checksum"):
        read(tmp_path / "s")


def number_bytes(total):
    """Bytes in which no two chunks are alike."""
    return np.arange(total, dtype=np.uint32).astype(">u4").view(np.uint8)[:total]


def test_leaves_are_asked_for_when_there_is_room(tmp_path, cut, monkeypatch):
    """When an array is saved, no piece beyond it has been asked for; a piece may span arrays."""
    pieces = np.split(number_bytes(6000), [100, 200, 200, 3300, 3400, 4700])
    asked, when = [0], []
    save = container_writer.ocp.partial.save

    def leaves():
        for piece in pieces:
            asked[0] += len(piece)
            yield piece

    def spy(folder, tree):
        when.append(asked[0])
        save(folder, tree)

    monkeypatch.setattr(container_writer.ocp.partial, "save", spy)
    container_writer.write(tmp_path / "s", {"leaves": {"a": 3000, "b": 3000}}, leaves(), False)
    meta, item = container.read_description(tmp_path / "s")
    ends, head = np.cumsum([len(x) for x in pieces]), meta["index"][0]
    assert when == [int(ends[np.searchsorted(ends, min(k * ARRAY - head, 6000))]) for k in range(1, 8)]
    opened = container.open_container(tmp_path / "s", meta, item)
    cache = {}
    assert container.read_index(opened, cache) == {"leaves": {"a": 3000, "b": 3000}}
    for start, stop in ((0, 6000), (999 - head, 1001 - head), (2500, 4800), (5999, 6000)):
        span = container.read_span(opened, head + start, head + stop, cache)
        np.testing.assert_array_equal(span, number_bytes(6000)[start:stop])
        assert len(cache) == 1
    with pytest.raises(HydraOptError, match="points at bytes"):
        container.read_span(opened, 0, opened.total + 1, cache)


@pytest.mark.parametrize("size", [10, 5999, 6001])
def test_leaves_that_are_not_those_of_the_index_are_refused(tmp_path, cut, size):
    with pytest.raises(ValueError, match="bytes instead of"):
        container_writer.write(tmp_path / "s", {"leaves": {"a": 6000}}, [bytes(size)], False)
    assert not (tmp_path / "s" / container.DESCRIPTION).exists()


@pytest.mark.parametrize(
    ("total", "chunk", "count"),
    [
        (1, 1, 1),
        (100_000, 50_000, 2),
        (1 << 24, 1 << 16, 256),
        (1 << 26, 1 << 18, 256),
        (1 << 40, 1 << 18, 256),
    ],
)
def test_division(total, chunk, count):
    assert container_writer.division(total) == (chunk, count)


@pytest.mark.parametrize("beyond", [0, 1])
def test_what_fits_one_array_stays_one(tmp_path, cut, monkeypatch, beyond):
    index = {"leaves": {"a": 990}}
    head = 990 + len(container.zlib.compress(b'{"leaves":{"a":990}}', 9))
    monkeypatch.setattr(container_writer, "ARRAY_BYTES", head - beyond)
    container_writer.write(tmp_path / "s", index, [number_bytes(990)], False)
    assert len(arrays_of(tmp_path / "s")) == 1 + beyond


def test_claims_of_many_arrays_count_together(plain, tmp_path, cut, monkeypatch):
    checkpoint.save(tmp_path / "s", plain, compress=False)
    total = sum(os.path.getsize(f) for x in arrays_of(tmp_path / "s") for f in x.glob("[0-9]*"))
    monkeypatch.setattr(container, "EXPANSION", 0)
    monkeypatch.setattr(container, "ROOM", total)
    checkpoint.restore(tmp_path / "s")
    monkeypatch.setattr(container, "ROOM", total - 1)
    with pytest.raises(HydraOptError, match="zarray claims what its files cannot hold"):
        checkpoint.restore(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(HydraOptError, match="write it without zstd"):
        checkpoint.save(tmp_path / "s", plain)
    assert list(tmp_path.iterdir()) == []
