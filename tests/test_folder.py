"""Folders of segments: the same bytes back from one array and from several, damage found and named."""

import os
import shutil
import weakref

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from hydraopt_jax import forms, store
from hydraopt_jax.compression import compress
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.store import arrays, decoding, folder, portable, segment_data, sizes
from hydraopt_jax.store.folder import CHUNK as CHUNK_BYTES
from hydraopt_jax.store.folder import MANIFEST, SEGMENTS
from hydraopt_jax.store.store import make_segment

CHUNK, ARRAY = 256, 1000


@pytest.fixture
def cut(monkeypatch):
    """Arrays of 1,000 bytes, in four chunks of 250."""
    monkeypatch.setattr(folder, "CHUNK", CHUNK)
    monkeypatch.setattr(folder, "ARRAY_BYTES", ARRAY)


@pytest.fixture(scope="module")
def plain(small):
    return compress(small, form=forms.Hydra(heads=2, rank=2))


@pytest.fixture(scope="module")
def coded(small):
    return compress(small, max_error=0.03)


def files_of(path):
    return sorted(x for x in path.rglob("*") if x.is_file())


def arrays_of(path):
    return sorted((x for x in path.rglob("data*") if x.is_dir()), key=lambda x: int(x.name[5:] or 0))


def equal(one, two, tasks):
    for task in tasks:
        other = store.task_factors(two, task)
        for name, (a, b) in store.task_factors(one, task).items():
            np.testing.assert_array_equal(other[name][0], a)
            np.testing.assert_array_equal(other[name][1], b)


@pytest.mark.parametrize("kind", ["plain", "coded"])
@pytest.mark.parametrize("zstd", [False, True])
def test_several_arrays_round_trip(request, tmp_path, cut, kind, zstd):
    kept = request.getfixturevalue(kind)
    store.save(tmp_path / "s", kept, zstd=zstd)
    assert len(arrays_of(tmp_path / "s")) > 2
    back = store.open(tmp_path / "s")
    equal(kept, back, kept.tasks)
    assert store.verify(tmp_path / "s") == sum(len(x.leaves) for x in kept.segments)
    store.update(tmp_path / "s", lambda x: x.replace(report=x.report.replace(note="mine")))
    equal(kept, store.open(tmp_path / "s"), kept.tasks)
    assert store.open(tmp_path / "s").report["note"] == "mine"


@pytest.mark.parametrize("read", [lambda p: store.open(p).load(), store.verify])
@pytest.mark.parametrize("kind", ["plain", "coded"])
def test_missing_and_truncated_files_are_found(request, tmp_path, read, kind):
    """Every file: the manifest, chunks, and what Orbax says of them; the segment is named."""
    kept = request.getfixturevalue(kind)
    store.save(tmp_path / "s", kept, zstd=False)
    (segment,) = (tmp_path / "s" / SEGMENTS).iterdir()
    for file in files_of(tmp_path / "s"):
        needed = file.name == MANIFEST or file.parent.name == "data"
        data = file.read_bytes()
        file.unlink()
        for content in (None, data[: len(data) // 2] if data else b"x"):
            if content is not None:
                file.write_bytes(content)
            if needed or (read is store.verify and "data" in file.parts):
                words = "not a store|manifest" if file.name == MANIFEST else segment.name
                with pytest.raises(HydraOptError, match=words):
                    read(tmp_path / "s")
        file.write_bytes(data)
    read(tmp_path / "s")
    shutil.rmtree(segment)
    with pytest.raises(HydraOptError, match=f"segment {segment.name} is missing"):
        read(tmp_path / "s")


@pytest.mark.parametrize("kind", ["plain", "coded"])
def test_a_flipped_bit_anywhere_is_found_by_verify_and_never_read(request, tmp_path, kind):
    """Whatever is flipped: verify says so, and a reader either says so or reads what was written."""
    kept = request.getfixturevalue(kind)
    store.save(tmp_path / "s", kept, zstd=False)
    expected = [x.tobytes() for x in jax.tree.leaves(store.decode_terms(kept))]
    rng = np.random.default_rng(0)
    for file in files_of(tmp_path / "s"):
        data = file.read_bytes()
        for at in np.unique(np.linspace(0, len(data) - 1, 12).astype(int)) if data else ():
            changed = bytearray(data)
            changed[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(changed)
            # of the manifest's own header some bits mean nothing, and nothing that Orbax says beside arrays
            if (file.name == MANIFEST and at >= 10) or "data" in file.parts:
                with pytest.raises(HydraOptError):
                    store.verify(tmp_path / "s")
            try:
                # all tasks at once: lanes of leaves are decoded side by side
                read = jax.tree.leaves(store.decode_terms(store.open(tmp_path / "s")))
                assert [x.tobytes() for x in read] == expected
            except HydraOptError as error:
                assert "\n" not in str(error)  # noqa: PT017
        file.write_bytes(data)
    store.verify(tmp_path / "s")


@pytest.mark.parametrize("kind", ["plain", "coded"])
def test_a_flipped_bit_of_a_file_is_found(request, tmp_path, kind):
    kept = request.getfixturevalue(kind)
    path = tmp_path / "s.safetensors"
    store.save(path, kept)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in np.unique(np.linspace(0, len(data) - 1, 60).astype(int)):
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            store.verify(path)
            # padding of the header, which means nothing
            assert changed[at - 1 : at + 1].strip() in (b"", bytes(changed[at : at + 1]))
        except HydraOptError as error:
            assert "\n" not in str(error)  # noqa: PT017
    for cut_at in (0, 4, 100, len(data) - 1):
        path.write_bytes(data[:cut_at])
        with pytest.raises(HydraOptError):
            store.verify(path)


@pytest.mark.parametrize("read", [lambda p: store.open(p).load(), store.verify])
def test_swapped_arrays_are_found(plain, tmp_path, cut, read):
    store.save(tmp_path / "s", plain, zstd=False)
    second, third = arrays_of(tmp_path / "s")[1:3]
    second.rename(tmp_path / "aside")
    with pytest.raises(HydraOptError, match="damaged store"):
        read(tmp_path / "s")
    third.rename(second)
    (tmp_path / "aside").rename(third)
    with pytest.raises(HydraOptError, match="does not match its checksum"):
        read(tmp_path / "s")


def number_bytes(total):
    """Bytes in which no two chunks are alike."""
    return np.arange(total, dtype=np.uint32).astype(">u4").view(np.uint8)[:total]


def test_leaves_are_asked_for_when_there_is_room():
    """When an array comes, no piece beyond it has been asked for; a piece may span arrays."""
    pieces = np.split(number_bytes(6000), [100, 200, 200, 3300, 3400, 4700])
    asked = [0]

    def run():
        for piece in pieces:
            asked[0] += len(piece)
            yield piece

    parts = [(1000, 250)] * 6
    when, got = [], []
    for array in folder.arrays_of(run(), parts):
        when.append(asked[0])
        got.append(array.copy())
    ends = np.cumsum([len(x) for x in pieces])
    assert when == [int(ends[np.searchsorted(ends, 1000 * k)]) for k in range(1, 7)]
    np.testing.assert_array_equal(np.concatenate(got), number_bytes(6000))


@pytest.mark.parametrize(
    ("total", "chunk", "count"),
    [
        (1, 1, 1),
        (100_000, 50_000, 2),
        (1 << 24, 1 << 16, 256),
        (1 << 26, 1 << 18, 256),
        ((1 << 26) + 1, 1 << 18, 257),
    ],
)
def test_division(total, chunk, count):
    parts = folder.division(total)
    assert parts[0][1] == chunk
    assert sum(n // size for n, size in parts) == count
    assert all(n % size == 0 for n, size in parts)
    assert 0 <= sum(n for n, _ in parts) - total < count


@pytest.mark.parametrize("total", [65_537, 700_001, 1_299_709])
def test_a_run_of_any_length_has_few_files(tmp_path, total):
    """Orbax's chunks divide an array: a prime number of bytes would be as many files."""
    leaf = number_bytes(total - 2_000)
    kept = make_segment(["x"], {}, {"shared": leaf}, np.zeros((0, 1)))
    folder.write_segment(tmp_path, kept, name="s", zstd=False)
    assert len(files_of(tmp_path)) < 8 + total / CHUNK_BYTES + 1


def test_claims_beyond_the_files_are_refused(plain, tmp_path, monkeypatch):
    store.save(tmp_path / "s", plain, zstd=False)
    monkeypatch.setattr(folder, "EXPANSION", 0)
    total = segment_data.run_size(plain.segments[0])
    monkeypatch.setattr(folder, "ROOM", total)
    store.open(tmp_path / "s").load()
    monkeypatch.setattr(folder, "ROOM", total - 1)
    with pytest.raises(HydraOptError, match="claims what its files cannot hold"):
        store.open(tmp_path / "s")


def test_segments_that_stay_are_not_touched(coded, small, tmp_path):
    """Adding and removing write what they add and the manifest: same inode, same time of change."""
    from hydraopt_jax import changes

    path = tmp_path / "s"
    store.save(path, store.select(coded, ["one", "two/three", "four"]))
    (first,) = (path / SEGMENTS).iterdir()

    def stamps():
        return {x: (x.stat().st_ino, x.stat().st_mtime_ns) for x in first.rglob("*")}

    before = stamps()
    store.update(path, lambda x: changes.add(x, small[2]))
    assert stamps() == before
    assert len(list((path / SEGMENTS).iterdir())) == 2
    store.update(path, lambda x: changes.remove(x, "a.b"))
    assert stamps() == before
    assert list((path / SEGMENTS).iterdir()) == [first]


def test_writers_clear_what_a_crash_has_left(coded, tmp_path):
    path = tmp_path / "s"
    store.save(path, coded)
    (path / SEGMENTS / "litter").mkdir()
    (path / SEGMENTS / "litter" / "x").write_text("x")
    (path / f".{MANIFEST}.new").write_text("x")
    store.update(path, lambda x: x.replace(report=x.report.replace(note=1)))
    assert sorted(os.listdir(path)) == [MANIFEST, SEGMENTS]
    assert len(list((path / SEGMENTS).iterdir())) == 1


def test_both_containers_hold_the_same(coded, tmp_path):
    store.save(tmp_path / "s", coded)
    store.save(tmp_path / "s.safetensors", store.open(tmp_path / "s"))
    store.save(tmp_path / "again", store.open(tmp_path / "s.safetensors"))
    equal(coded, store.open(tmp_path / "again"), coded.tasks)
    names = [[x.name for x in (tmp_path / n / SEGMENTS).iterdir()] for n in ("s", "again")]
    assert names[0] == names[1]
    said = portable.read_header(portable.source_of(tmp_path / "s.safetensors"))[0]
    assert [x["id"] for x in said["segments"]] == names[0]
    assert sizes.size_on_disk(tmp_path / "s.safetensors") < sizes.size_on_disk(tmp_path / "s") + 4000


def test_all_arrays_share_one_cache_of_chunks(plain, tmp_path, cut, monkeypatch):
    import tensorstore

    store.save(tmp_path / "s", plain)
    made, original = [], tensorstore.Context
    monkeypatch.setattr(tensorstore, "Context", lambda *x: made.append(x) or original(*x))
    arrays.shared_context.cache_clear()
    assert len(arrays_of(tmp_path / "s")) > 2
    store.verify(tmp_path / "s")
    assert len(made) == 1


def test_a_writer_holds_one_array_at_a_time(plain, tmp_path, cut, monkeypatch):
    seen, save, run = [], ocp.partial.save, segment_data.run_pieces

    def saving(path, tree):
        seen.extend(weakref.ref(x) for x in tree.values())
        save(path, {k: x.copy() for k, x in tree.items()})

    def running(*given):
        for piece in run(*given):
            assert all(x() is None for x in seen)
            yield piece

    monkeypatch.setattr(ocp.partial, "save", saving)
    monkeypatch.setattr(segment_data, "run_pieces", running)
    store.save(tmp_path / "s", plain)
    assert len(seen) > 2


def test_every_leaf_is_read_once_for_all_modules_of_all_tasks(plain, tmp_path, monkeypatch):
    store.save(tmp_path / "s", plain)
    back, read = store.open(tmp_path / "s"), []
    for x in back.segments:
        for name, leaf in x.leaves.items():
            monkeypatch.setattr(
                leaf, "read", lambda *at, name=name, read_=leaf.read: read.append(name) or read_(*at)
            )
    decoding.decode_terms(back)
    assert len(read) == len(set(read)) > 2
