"""Collections in groups: the same store as in memory, whatever the groups."""

import functools
import os

import numpy as np
import pytest
from stores import work

from hydraopt_jax import compression, formats, store
from hydraopt_jax.changes import add
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.explicit import group_loop
from hydraopt_jax.explicit.groups import GROUP_BYTES
from hydraopt_jax.formats import peft_collection, weights_file
from hydraopt_jax.forms import Hydra
from hydraopt_jax.rate_control import distortion
from hydraopt_jax.store import folder, removal
from hydraopt_jax.store.store import task_errors

CORES = Hydra(heads=2, rank=3, side="in", cores=True)
# [24, 12]: four adapters of rank 4 span less than the input side and more than the output side
MODULES = ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"]


def some(adapter, modules):
    """An adapter of some of the modules alone."""
    return adapter.replace(a={m: adapter.a[m] for m in modules}, b={m: adapter.b[m] for m in modules})


def written(adapters, place):
    """Adapters on disk, as a collection and read whole."""
    cards, read = [], []
    for n, adapter in enumerate(adapters):
        formats.write_adapter(place / f"in{n}", adapter)
        cards.append(peft_collection.open_adapter(str(place / f"in{n}"), adapter.task, {}))
        read.append(formats.read_adapter(place / f"in{n}", task=adapter.task))
    return peft_collection.collection_of(cards), read


def run(out, found, form, group_bytes=GROUP_BYTES, dtype=None):
    compress = functools.partial(group_loop.compress_in_form, form=form, group_bytes=group_bytes, dtype=dtype)
    return work(out, found, compress, {"form": form, "dtype": dtype})


@pytest.mark.parametrize(
    ("form", "group_bytes", "dtype"),
    [
        (Hydra(rank=3), 1, None),
        (Hydra(rank=2, side="out"), 1 << 27, "bfloat16"),
        (CORES, 1, None),
        (CORES, 1 << 27, None),
    ],
)
def test_store_is_that_of_the_collection_in_memory(small, tmp_path, form, group_bytes, dtype):
    found, read = written([some(x, MODULES) for x in small], tmp_path)
    said = run(tmp_path / "s", found, form, group_bytes, dtype)
    kept = store.open(tmp_path / "s")
    expected = compression.compress(read, form=form, dtype=dtype)
    np.testing.assert_allclose(kept.errors, expected.errors, rtol=5e-3, atol=1e-6)
    np.testing.assert_array_equal(said.errors, kept.errors)
    assert len(kept.segments) == 1
    for name, bound in expected.report["bound"].items():
        assert kept.report["bound"][name] == pytest.approx(bound, rel=1e-3, abs=1e-6)
    measured = distortion.measure(kept, read)
    mean = dict(zip(kept.tasks, task_errors(kept.errors).tolist(), strict=True))
    assert measured == pytest.approx(mean, rel=2e-3)
    assert {x.name for x in (tmp_path / "s").iterdir()} == {"manifest.json.gz", "segments"}


@pytest.fixture
def streamed(small, tmp_path, monkeypatch):
    """A job's store, `small`; in several arrays, `large`; by the writer of stores in memory,
    `memory`. With full tensors and a module that one task lacks."""
    one, two, three, four = (some(x, MODULES) for x in small)
    head = np.arange(6, dtype=np.float16).reshape(2, 3)
    adapters = [one, two.replace(extras={"score.weight": head}), some(three, MODULES[:1]), four]
    found, _ = written(adapters, tmp_path)
    run(tmp_path / "small", found, CORES)
    store.save(tmp_path / "memory", store.open(tmp_path / "small"))
    monkeypatch.setattr(folder, "ARRAY_BYTES", 1000)
    run(tmp_path / "large", found, CORES)
    return tmp_path


def arrays(path):
    """Bytes of a store's arrays, by their places in their segments."""
    every = (x for x in path.rglob("*") if x.is_file() and x.parent.name.startswith("data"))
    return {x.relative_to(path / "segments").as_posix().partition("/")[2]: x.read_bytes() for x in every}


def test_a_job_writes_the_bytes_of_the_writer_in_memory(streamed):
    found = [arrays(streamed / x) for x in ("small", "memory")]
    assert found[0] == found[1]
    assert sorted(found[0]) == ["state/data/.zarray", "state/data/0"]
    assert {"state/data_0/0", "state/data_1/0"} < set(arrays(streamed / "large"))


def test_a_store_of_several_arrays_holds_the_same(streamed):
    small, large = (store.open(streamed / x) for x in ("small", "large"))
    assert small.tasks == large.tasks
    assert small.report == large.report
    np.testing.assert_array_equal(small.errors, large.errors)
    assert np.argwhere(np.isnan(large.errors))[:, 1].tolist() == [2]
    assert store.decode(large, "two/three").extras["score.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    for task in small.tasks:
        one, two = (store.task_factors(store.select(x, [task]), task) for x in (small, large))
        assert list(one) == list(two)
        for name, pair in one.items():
            np.testing.assert_array_equal(np.concatenate(pair, None), np.concatenate(two[name], None))


def test_a_store_of_several_arrays_is_changed_and_checked_as_any_other(streamed, small):
    large = streamed / "large"
    assert store.verify(large) == sum(len(x.leaves) for x in store.open(large).segments)
    before = store.task_factors(store.open(large), "one")
    store.update(large, lambda x: removal.remove(add(x, some(small[3], MODULES).replace(task="new")), "a.b"))
    kept = store.open(large)
    assert kept.tasks == ("one", "two/three", "four", "new")
    for name, pair in store.task_factors(kept, "one").items():
        np.testing.assert_array_equal(pair[1], before[name][1])
    assert store.verify(large) == sum(len(x.leaves) for x in kept.segments)


def test_full_tensors_that_changed_are_refused(small, tmp_path):
    head = np.arange(6, dtype=np.float16).reshape(2, 3)
    adapters = [some(x, MODULES).replace(extras={"score.weight": head}) for x in small]
    found, _ = written(adapters, tmp_path)
    changed = adapters[1].replace(extras={"score.weight": np.zeros((3, 2), np.float16)})
    formats.write_adapter(found.cards[1].source, changed, overwrite=True)
    with pytest.raises(HydraOptError, match="adapter 2 have changed"):
        run(tmp_path / "s", found, CORES)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["group-0", "tensors-0"])
def test_segments_that_change_before_the_store_is_whole_are_named(small, tmp_path, monkeypatch, name):
    head = np.arange(6, dtype=np.float16).reshape(2, 3)
    adapters = [some(x, MODULES).replace(extras={"score.weight": head}) for x in small]
    found, _ = written(adapters, tmp_path)
    put = group_loop.bundled

    def late(*arguments):
        (file,) = (tmp_path / "s" / "segments").glob(f"*-{name}/state/data/0")
        os.truncate(file, 10)
        return put(*arguments)

    monkeypatch.setattr(group_loop, "bundled", late)
    with pytest.raises(HydraOptError, match=f"damaged store: segment [0-9a-f]*-{name} "):
        run(tmp_path / "s", found, CORES, group_bytes=1)


def test_a_file_that_changed_after_it_was_looked_at_is_refused(small, tmp_path):
    found, _ = written([some(x, MODULES) for x in small], tmp_path)
    formats.write_adapter(tmp_path / "in1", some(small[0], MODULES), overwrite=True)
    with pytest.raises(HydraOptError, match="has it changed"):
        run(tmp_path / "s", found, Hydra(rank=3))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_largest_magnitude_tells_what_is_not_finite(dtype, bad):
    values = np.array([1, -3, 2], dtype)
    assert weights_file.largest(values) == 3
    values[1] = bad
    assert not np.isfinite(weights_file.largest(values))
