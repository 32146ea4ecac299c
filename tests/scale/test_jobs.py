"""Collections in groups: the same store as in memory, whatever the groups."""

import os

import numpy as np
import pytest

from hydraopt_jax import compression, formats, store
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.jobs import job, reading, weights
from hydraopt_jax.store import changes, checkpoint, container_writer

CORES = compression.Options(heads=2, rank=3, side="in", cores=True)
# [24, 12]: four adapters of rank 4 span less than the input side and more than the output side
MODULES = ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"]


def some(adapter, modules):
    """An adapter of some of the modules alone."""
    return adapter._replace(a={m: adapter.a[m] for m in modules}, b={m: adapter.b[m] for m in modules})


def written(adapters, folder):
    """Adapters on disk, as a collection and read whole."""
    cards, read = [], []
    for n, adapter in enumerate(adapters):
        formats.write_adapter(folder / f"in{n}", adapter)
        cards.append(reading.open_adapter(str(folder / f"in{n}"), adapter.task, {}))
        read.append(formats.read_adapter(folder / f"in{n}", task=adapter.task))
    return reading.collection(cards), read


@pytest.mark.parametrize(
    ("options", "group_bytes"),
    [
        (compression.Options(rank=3), 1),
        (compression.Options(rank=2, side="out", dtype="bfloat16"), 1 << 27),
        (CORES, 1 << 27),
    ],
)
def test_store_is_that_of_the_collection_in_memory(small, tmp_path, options, group_bytes):
    found, read = written([some(x, MODULES) for x in small], tmp_path)
    said = job.run(tmp_path / "s", found, options, group_bytes=group_bytes)
    kept = checkpoint.restore(tmp_path / "s")
    expected = compression.compress(read, options)
    np.testing.assert_allclose(kept.errors, expected.errors, rtol=5e-3, atol=1e-6)
    np.testing.assert_allclose(said.errors, kept.errors, rtol=2e-3, atol=1e-6)
    for name, bound in expected.report["bound"].items():
        assert kept.report["bound"][name] == pytest.approx(bound, rel=1e-3, abs=1e-6)
    measured = compression.measure(kept, read)
    mean = dict(zip(kept.tasks, kept.errors.mean(0), strict=True))
    assert measured == pytest.approx(mean, rel=2e-3)
    assert not job.folder_of(tmp_path / "s").exists()


@pytest.fixture
def streamed(small, tmp_path, monkeypatch):
    """A job's store, `small`; in several arrays, `large`; by the writer of stores in memory,
    `memory`. With full tensors and a module that one task lacks."""
    one, two, three, four = (some(x, MODULES) for x in small)
    head = np.arange(6, dtype=np.float16).reshape(2, 3)
    adapters = [one, two._replace(extras={"score.weight": head}), some(three, MODULES[:1]), four]
    found, _ = written(adapters, tmp_path)
    job.run(tmp_path / "small", found, CORES)
    checkpoint.save(tmp_path / "memory", checkpoint.restore(tmp_path / "small"))
    monkeypatch.setattr(container_writer, "ARRAY_BYTES", 1000)
    job.run(tmp_path / "large", found, CORES)
    return tmp_path


def test_a_job_writes_the_bytes_of_the_writer_in_memory(streamed):
    files = [
        {f.relative_to(streamed / x): f.read_bytes() for f in (streamed / x).rglob("*") if f.is_file()}
        for x in ("small", "memory")
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 6


def test_a_store_of_several_arrays_holds_the_same(streamed):
    small, large = (checkpoint.restore(streamed / x) for x in ("small", "large"))
    assert small.tasks == large.tasks
    assert small.report == large.report
    np.testing.assert_array_equal(small.errors, large.errors)
    assert np.argwhere(np.isnan(large.errors))[:, 1].tolist() == [2]
    assert large.sources[1].extras["score.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    for task in small.tasks:
        alone = (checkpoint.restore(streamed / x, [task]) for x in ("small", "large"))
        one, two = (store.task_factors(x, task) for x in alone)
        assert list(one) == list(two)
        for name, pair in one.items():
            np.testing.assert_array_equal(np.concatenate(pair, None), np.concatenate(two[name], None))


def test_a_store_of_several_arrays_is_changed_and_checked_as_any_other(streamed, small, monkeypatch):
    large = streamed / "large"
    assert checkpoint.verify(large) > 7
    before = store.task_factors(checkpoint.restore(large), "one")
    change = lambda x: changes.remove(changes.add(x, some(small[3], MODULES)._replace(task="new")), "a.b")  # noqa: E731
    checkpoint.update(large, change)
    kept = checkpoint.restore(large)
    assert kept.tasks == ("one", "two/three", "four", "new")
    for name, pair in store.task_factors(kept, "one").items():
        np.testing.assert_array_equal(pair[1], before[name][1])


def test_full_tensors_that_changed_are_refused(small, tmp_path):
    head = np.arange(6, dtype=np.float16).reshape(2, 3)
    adapters = [some(x, MODULES)._replace(extras={"score.weight": head}) for x in small]
    found, _ = written(adapters, tmp_path)
    changed = adapters[1]._replace(extras={"score.weight": np.zeros((3, 2), np.float16)})
    formats.write_adapter(found.cards[1].source, changed, overwrite=True)
    with pytest.raises(HydraOptError, match="adapter 2 have changed"):
        job.run(tmp_path / "s", found, CORES)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("name", "said"), [("group-0", "group-0.bin: is not whole"), ("extras-1", "extras-1.bin: is not whole")]
)
def test_parts_that_change_before_they_are_written_are_refused(small, tmp_path, monkeypatch, name, said):
    head = np.arange(6, dtype=np.float16).reshape(2, 3)
    adapters = [some(x, MODULES)._replace(extras={"score.weight": head}) for x in small]
    found, _ = written(adapters, tmp_path)
    put = job.put

    def late(*arguments):
        os.truncate(job.folder_of(tmp_path / "s") / f"{name}.bin", 10)
        put(*arguments)

    monkeypatch.setattr(job, "put", late)
    with pytest.raises(HydraOptError, match=said):
        job.run(tmp_path / "s", found, CORES)
    assert not (tmp_path / "s").exists()


def test_a_file_that_changed_after_it_was_looked_at_is_refused(small, tmp_path):
    found, _ = written([some(x, MODULES) for x in small], tmp_path)
    formats.write_adapter(tmp_path / "in1", some(small[0], MODULES), overwrite=True)
    with pytest.raises(HydraOptError, match="has it changed"):
        job.run(tmp_path / "s", found, compression.Options(rank=3))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_largest_magnitude_tells_what_is_not_finite(dtype, bad):
    values = np.array([1, -3, 2], dtype)
    assert weights.largest(values) == 3
    values[1] = bad
    assert not np.isfinite(weights.largest(values))
