"""Collections in groups: the same store as in memory, whatever the groups."""

import numpy as np
import pytest

from hydraopt_jax import changes, checkpoint, compression, formats, store
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.scale import assembly, jobs, reading

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
    said = jobs.run(tmp_path / "s", found, options, group_bytes=group_bytes)
    kept = checkpoint.restore(tmp_path / "s")
    expected = compression.compress(read, options)
    np.testing.assert_allclose(kept.errors, expected.errors, rtol=5e-3, atol=1e-6)
    np.testing.assert_allclose(said.errors, kept.errors, rtol=2e-3, atol=1e-6)
    for name, bound in expected.report["bound"].items():
        assert kept.report["bound"][name] == pytest.approx(bound, rel=1e-3, abs=1e-6)
    measured = compression.measure(kept, read)
    mean = dict(zip(kept.tasks, kept.errors.mean(0), strict=True))
    assert measured == pytest.approx(mean, rel=2e-3)
    assert not jobs.folder_of(tmp_path / "s").exists()


@pytest.fixture
def streamed(small, tmp_path, monkeypatch):
    """A store written in memory, `small`, and the same one too large for that, `large`; with full tensors and
    a module that one task lacks."""
    one, two, three, four = (some(x, MODULES) for x in small)
    head = np.arange(6, dtype=np.float16).reshape(2, 3)
    adapters = [one, two._replace(extras={"score.weight": head}), some(three, MODULES[:1]), four]
    found, _ = written(adapters, tmp_path)
    jobs.run(tmp_path / "small", found, CORES)
    monkeypatch.setattr(assembly, "IN_MEMORY", 0)
    jobs.run(tmp_path / "large", found, CORES)
    return tmp_path


def test_a_store_too_large_for_memory_holds_the_same(streamed):
    small, large = (checkpoint.restore(streamed / x) for x in ("small", "large"))
    assert [checkpoint.schema_of(streamed / x) for x in ("small", "large")] == [2, 1]
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


def test_a_store_too_large_for_memory_is_changed_and_checked_as_any_other(streamed, small):
    large = streamed / "large"
    assert checkpoint.verify(large) > 5
    before = store.task_factors(checkpoint.restore(large), "one")
    checkpoint.update(
        large, lambda x: changes.remove(changes.add(x, some(small[3], MODULES)._replace(task="new")), "a.b")
    )
    kept = checkpoint.restore(large)
    assert kept.tasks == ("one", "two/three", "four", "new")
    assert checkpoint.schema_of(large) == checkpoint.SCHEMA
    for name, pair in store.task_factors(kept, "one").items():
        np.testing.assert_array_equal(pair[1], before[name][1])


def test_a_flipped_bit_of_a_store_too_large_for_memory_is_found(streamed):
    file = streamed / "large" / "state" / "shared" / "0"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(HydraOptError, match="shared"):
        checkpoint.verify(streamed / "large")
