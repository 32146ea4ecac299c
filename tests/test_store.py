"""The store: round trips, partial reads, atomicity, refusals, damage."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from hydraopt_jax import compression, store, synthetic
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.store import checkpoint, container, container_writer


def compress(adapters, **options):
    return compression.compress(adapters, compression.Options(**options))


FORMS = [
    {},
    {"heads": 2, "rank": 3},
    {"heads": 1, "cores": True},
    {"heads": 3, "side": "out", "dtype": "bfloat16"},
    {"heads": 2, "cores": True, "dtype": "float16"},
]


@pytest.mark.parametrize("options", FORMS)
def test_round_trip(small, tmp_path, options):
    kept = compress(small, **options)
    checkpoint.save(tmp_path / "s", kept)
    back = checkpoint.restore(tmp_path / "s")
    assert back.tasks == kept.tasks
    assert back.report == json.loads(json.dumps(kept.report))
    np.testing.assert_allclose(back.errors, kept.errors, rtol=2e-3, atol=1e-9)
    for task in kept.tasks:
        for name, (a, b) in store.task_factors(kept, task).items():
            np.testing.assert_array_equal(store.task_factors(back, task)[name][0], a)
            np.testing.assert_array_equal(store.task_factors(back, task)[name][1], b)


@pytest.mark.parametrize("options", FORMS)
def test_claimed_errors_are_true(small, tmp_path, options):
    kept = compress(small, **options)
    for t, (task, measured) in enumerate(compression.measure(kept, small).items()):
        assert kept.tasks[t] == task
        np.testing.assert_allclose(measured, kept.errors[:, t].mean(), rtol=1e-3, atol=1e-10)


def test_one_task_reads_only_its_chunks(small, tmp_path, monkeypatch):
    kept = compress(small, heads=3)
    monkeypatch.setattr(container_writer, "CHUNK", 256)
    checkpoint.save(tmp_path / "s", kept, compress=False)
    whole = checkpoint.read_index(tmp_path / "s")[1]["leaves"]
    read = []
    original = container.read_file
    monkeypatch.setattr(container, "read_file", lambda p, name: read.append(name) or original(p, name))
    one = checkpoint.restore(tmp_path / "s", ["a.b"])
    for name, (a, b) in store.task_factors(kept, "a.b").items():
        np.testing.assert_array_equal(store.task_factors(one, "a.b")[name][0], a)
        np.testing.assert_array_equal(store.task_factors(one, "a.b")[name][1], b)
    chunks = {x for x in read if x.rpartition("/")[2].isdigit()}
    others = sum(size for name, size in whole.items() if name in ("task_0", "task_1", "task_3"))
    total = len(list((tmp_path / "s" / "state" / "data").glob("[0-9]*")))
    assert others > 512
    assert total - len(chunks) >= others // 256 - 3
    assert len(read) == len(set(read))


def test_a_partial_store_can_be_saved_again(small, tmp_path):
    checkpoint.save(tmp_path / "s", compress(small, heads=2))
    part = checkpoint.restore(tmp_path / "s", ["four", "one"])
    checkpoint.save(tmp_path / "p", part)
    again = checkpoint.restore(tmp_path / "p")
    assert again.tasks == ("four", "one")
    for name, (a, b) in store.task_factors(part, "one").items():
        np.testing.assert_array_equal(store.task_factors(again, "one")[name][0] @ b, a @ b)


def test_missing_modules_mixed_ranks_and_extras(small, tmp_path):
    name = next(iter(small[0].a))
    less = small[1]._replace(
        a={k: v for k, v in small[1].a.items() if k != name},
        b={k: v for k, v in small[1].b.items() if k != name},
        extras={"score.weight": np.arange(6.0, dtype=np.float16).reshape(2, 3)},
    )
    thin = small[2]._replace(
        a={k: v[:, :2] for k, v in small[2].a.items()}, b={k: v[:2] for k, v in small[2].b.items()}
    )
    collection = [small[0], less, thin, small[3]]
    kept = compress(collection, rank=16)
    checkpoint.save(tmp_path / "s", kept)
    back = checkpoint.restore(tmp_path / "s")
    assert name not in store.adapter(back, less.task).a
    np.testing.assert_array_equal(back.sources[1].extras["score.weight"], less.extras["score.weight"])
    assert max(compression.measure(back, collection).values()) < 1e-10
    assert np.isnan(kept.errors).sum() == 1


def test_all_zero_adapter_comes_back_as_zeros(small, tmp_path):
    zero = small[0]._replace(task="zero", b={k: np.zeros_like(v) for k, v in small[0].b.items()})
    kept = compress([*small, zero], heads=2)
    checkpoint.save(tmp_path / "s", kept)
    back = store.adapter(checkpoint.restore(tmp_path / "s"), "zero")
    assert all(not (back.a[k] @ back.b[k]).any() for k in back.a)


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}])
def test_one_adapter_alone_is_kept_whole(small, options):
    kept = compress(small[:1], **options)
    assert compression.measure(kept, small[:1])["one"] < 1e-6


@pytest.mark.parametrize("folder", ["qwen25-vi-alpaca", "distilbert-imdb", "bert-sms-spam"])
def test_real_single_adapters_export_unchanged(folder, tmp_path):
    from conftest import SHARED

    from hydraopt_jax import formats

    pytest.importorskip("torch" if folder != "qwen25-vi-alpaca" else "numpy")
    path = SHARED / "other" / folder
    if not path.exists():
        pytest.skip(f"no real adapter at {path}")
    one = formats.read_adapter(path)
    kept = compress([one])
    checkpoint.save(tmp_path / "s", kept)
    formats.write_adapter(tmp_path / "out", store.adapter(checkpoint.restore(tmp_path / "s"), one.task))
    back = formats.read_adapter(tmp_path / "out")
    for name in one.a:
        # products in float64, so that only what the store did is seen
        want = one.a[name].astype(np.float64) @ one.b[name]
        lost = back.a[name].astype(np.float64) @ back.b[name] - want
        assert np.linalg.norm(lost) <= 1e-6 * np.linalg.norm(want)
    assert {k: v.shape for k, v in back.extras.items()} == {k: v.shape for k, v in one.extras.items()}


def test_bytes_on_disk_are_the_arrays(tmp_path):
    made = synthetic.collection(tasks=8, modules=synthetic.transformer_modules(4, 256, 64), rank=8)
    kept = compress(made)
    checkpoint.save(tmp_path / "s", kept, compress=False)
    arrays = 2 * store.count(kept)
    assert arrays <= checkpoint.size_on_disk(tmp_path / "s") <= 1.03 * arrays + 3000


def test_refuses_to_overwrite(small, tmp_path):
    kept = compress(small)
    checkpoint.save(tmp_path / "s", kept)
    with pytest.raises(HydraOptError, match="exists"):
        checkpoint.save(tmp_path / "s", kept)
    checkpoint.save(tmp_path / "s", compress(small[:2]), overwrite=True)
    assert checkpoint.restore(tmp_path / "s").tasks == ("one", "two/three")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(HydraOptError, match="not a store"):
        checkpoint.save(tmp_path / "mine", kept, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_failed_save_leaves_nothing(small, tmp_path):
    with pytest.raises(checkpoint.TooLarge):
        checkpoint.save(tmp_path / "s", compress(small), limit=10)
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_is_found_and_named(small, tmp_path):
    checkpoint.save(tmp_path / "s", compress(small), compress=False)
    files = [x for x in (tmp_path / "s").rglob("*") if x.is_file()]
    big = max(files, key=os.path.getsize)
    data = bytearray(big.read_bytes())
    data[len(data) // 2] ^= 1
    big.write_bytes(data)
    with pytest.raises(HydraOptError, match="damaged"):
        checkpoint.restore(tmp_path / "s")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: None, "no store"),
        (lambda p: p.mkdir(), "not a store"),
        (lambda p: p.write_text("x"), "no store"),
    ],
)
def test_what_is_not_a_store(tmp_path, make, said):
    path = Path(tmp_path / "s")
    make(path)
    with pytest.raises(HydraOptError, match=said):
        checkpoint.restore(path)


def test_a_newer_schema_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr(container, "SCHEMA", 99)
    monkeypatch.setattr(container_writer, "ARRAY_BYTES", 2000)
    checkpoint.save(tmp_path / "s", compress(small))
    monkeypatch.undo()
    with pytest.raises(HydraOptError, match=r"schema 99 is newer .* upgrade hydraopt_jax"):
        checkpoint.restore(tmp_path / "s")


def test_a_store_of_a_version_before_the_first_release_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr(container, "SCHEMA", 3)
    checkpoint.save(tmp_path / "s", compress(small))
    monkeypatch.undo()
    with pytest.raises(HydraOptError, match=r"schema 3 is that of a version before .* compress the adapters"):
        checkpoint.restore(tmp_path / "s")


def test_equal_stores_are_equal_bytes(small, tmp_path):
    for name in ("s", "again"):
        checkpoint.save(tmp_path / name, compress(small, heads=2))
    files = [x.relative_to(tmp_path / "s") for x in (tmp_path / "s").rglob("*") if x.is_file()]
    assert len(files) == 6
    assert all((tmp_path / "s" / x).read_bytes() == (tmp_path / "again" / x).read_bytes() for x in files)


def test_unknown_task_lists_near_names(small, tmp_path):
    with pytest.raises(HydraOptError, match="'four'"):
        store.adapter(compress(small), "fuor")
