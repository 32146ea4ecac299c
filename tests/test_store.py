"""The store: round trips, partial reads, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

import hydraopt_jax as hydra
from hydraopt_jax import forms, store, synthetic
from hydraopt_jax.compression import compress
from hydraopt_jax.errors import HydraOptError, TooLarge
from hydraopt_jax.rate_control import distortion
from hydraopt_jax.store import folder, manifest, sizes
from hydraopt_jax.store.store import tensors_of

FORMS = {
    "hydra": {"form": forms.Hydra()},
    "two heads": {"form": forms.Hydra(heads=2, rank=3)},
    "cores": {"form": forms.Hydra(heads=1, cores=True)},
    "out": {"form": forms.Hydra(heads=3, side="out"), "dtype": "bfloat16"},
    "half cores": {"form": forms.Hydra(heads=2, cores=True), "dtype": "float16"},
    "coded": {"max_error": 0.05},
    "lossless": {"budget": 9.0},
}
NAMES = ("s", "s.safetensors")


def same(one, two, task):
    """Whether two stores hold the very same of a task."""
    x, y = (store.task_factors(s, task) for s in (one, two))
    return x.keys() == y.keys() and all(
        np.array_equal(a, b) for n in x for a, b in zip(x[n], y[n], strict=True)
    )


@pytest.fixture(scope="module", params=FORMS)
def kept(request, small):
    return compress(small, **FORMS[request.param])


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(kept, tmp_path, name):
    store.save(tmp_path / name, kept)
    back = store.open(tmp_path / name)
    assert back.tasks == kept.tasks
    assert back.report == json.loads(json.dumps(kept.report))
    assert back.shapes == kept.shapes
    assert back.sources == kept.sources
    np.testing.assert_array_equal(back.errors, kept.errors)
    assert all(same(kept, back, task) for task in kept.tasks)
    assert all(same(kept, back.load(), task) for task in kept.tasks)
    assert store.verify(tmp_path / name) == sum(len(x.leaves) for x in kept.segments)


def test_claimed_errors_are_true(small, kept):
    for t, (task, measured) in enumerate(hydra.measure(kept, small).items()):
        assert kept.tasks[t] == task
        np.testing.assert_allclose(measured, np.nanmean(kept.errors[:, t]), rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_some_tasks_are_a_store_of_their_own(kept, tmp_path, name):
    """Smaller than the whole, in the order asked for, the same numbers to the bit."""
    store.save(tmp_path / f"whole-{name}", kept)
    whole = store.open(tmp_path / f"whole-{name}")
    for path, source in (("a", kept), ("b", whole)):
        part = store.select(source, ["four", "one"])
        store.save(tmp_path / f"{path}-{name}", part)
        again = store.open(tmp_path / f"{path}-{name}")
        assert again.tasks == ("four", "one")
        assert all(same(kept, again, task) for task in again.tasks)
        np.testing.assert_array_equal(again.errors, kept.errors[:, [3, 0]])
        mine = [sizes.size_on_disk(tmp_path / f"{x}-{name}") for x in (path, "whole")]
        assert mine[0] <= mine[1]


def test_one_task_reads_only_its_leaves(kept, tmp_path, monkeypatch):
    store.save(tmp_path / "s", kept)
    opened = store.open(tmp_path / "s")
    read = []
    for segment in opened.segments:
        for name, leaf in segment.leaves.items():
            original = leaf.read
            leaf.read = lambda *span, name=name, original=original: read.append(name) or original(*span)
    one = store.decode(opened, "a.b")
    assert len(one.a) == len(kept.shapes)
    others = {"task_0", "task_1", "task_3", "errors"}
    assert not others & set(read)
    assert set(read) <= {"shared", "task_2"} | {x for x in read if x.startswith("head_")}


def test_missing_modules_mixed_ranks_and_full_tensors(small, tmp_path):
    name = next(iter(small[0].a))
    less = small[1].replace(
        a={k: v for k, v in small[1].a.items() if k != name},
        b={k: v for k, v in small[1].b.items() if k != name},
        extras={"score.weight": np.arange(6.0, dtype=np.float16).reshape(2, 3)},
    )
    thin = small[2].replace(
        a={k: v[:, :2] for k, v in small[2].a.items()}, b={k: v[:2] for k, v in small[2].b.items()}
    )
    collection = [small[0], less, thin, small[3]]
    kept = compress(collection, form=forms.Hydra(rank=16))
    store.save(tmp_path / "s", kept)
    back = store.open(tmp_path / "s")
    assert name not in store.decode(back, less.task).a
    np.testing.assert_array_equal(tensors_of(back, less.task)["score.weight"], less.extras["score.weight"])
    assert max(distortion.measure(back, collection).values()) < 1e-10
    assert np.isnan(kept.errors).sum() == 1


def test_all_zero_adapter_comes_back_as_zeros(small, tmp_path):
    zero = small[0].replace(task="zero", b={k: np.zeros_like(v) for k, v in small[0].b.items()})
    kept = compress([*small, zero], form=forms.Hydra(heads=2))
    store.save(tmp_path / "s", kept)
    back = store.decode(store.open(tmp_path / "s"), "zero")
    assert all(not (back.a[k] @ back.b[k]).any() for k in back.a)


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}])
def test_one_adapter_alone_is_kept_whole(small, options):
    kept = compress(small[:1], form=forms.Hydra(), **options)
    assert distortion.measure(kept, small[:1])["one"] < 1e-6


@pytest.mark.parametrize("folder_name", ["qwen25-vi-alpaca", "distilbert-imdb", "bert-sms-spam"])
def test_real_single_adapters_export_unchanged(folder_name, tmp_path):
    from conftest import SHARED

    from hydraopt_jax import formats

    pytest.importorskip("torch" if folder_name != "qwen25-vi-alpaca" else "numpy")
    path = SHARED / "other" / folder_name
    if not path.exists():
        pytest.skip(f"no real adapter at {path}")
    one = formats.read_adapter(path)
    kept = compress([one], form=forms.Hydra())
    store.save(tmp_path / "s", kept)
    hydra.export(store.open(tmp_path / "s"), one.task, tmp_path / "out")
    back = formats.read_adapter(tmp_path / "out")
    for name in one.a:
        # products in float64, so that only what the store did is seen
        want = one.a[name].astype(np.float64) @ one.b[name]
        lost = back.a[name].astype(np.float64) @ back.b[name] - want
        assert np.linalg.norm(lost) <= 1e-6 * np.linalg.norm(want)
    assert {k: v.shape for k, v in back.extras.items()} == {k: v.shape for k, v in one.extras.items()}


def leaf_bytes(kept):
    return sum(np.size(v) for x in kept.segments for k, v in x.leaves.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"form": forms.Hydra()}, {"budget": 0.25}])
def test_a_store_costs_little_beside_its_factors(tmp_path, name, options):
    """At most 1% and 4 kB over its leaves, as the size that is counted says before anything is written."""
    made = synthetic.collection(tasks=8, modules=synthetic.transformer_modules(4, 256, 64), rank=8)
    kept = compress(made, **options)
    store.save(tmp_path / name, kept, zstd=False)
    size = sizes.size_on_disk(tmp_path / name)
    assert leaf_bytes(kept) <= size <= 1.01 * leaf_bytes(kept) + 4000
    if name == "s":
        assert size <= sizes.measure_size(kept, tmp_path / name) <= size + 40


def test_refuses_to_overwrite(small, kept, tmp_path):
    for name in NAMES:
        store.save(tmp_path / name, kept)
        with pytest.raises(HydraOptError, match="exists"):
            store.save(tmp_path / name, kept)
        store.save(tmp_path / name, store.select(kept, ["one", "two/three"]), overwrite=True)
        assert store.open(tmp_path / name).tasks == ("one", "two/three")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "mine.safetensors").write_text("x")
    for name, words in (("mine", "not a store"), ("mine.safetensors", "not a complete safetensors file")):
        with pytest.raises(HydraOptError, match=words):
            store.save(tmp_path / name, kept, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert (tmp_path / "mine.safetensors").read_text() == "x"


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_save_leaves_nothing(kept, tmp_path, name):
    with pytest.raises(TooLarge):
        store.save(tmp_path / name, kept, limit=10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: None, "no store"),
        (lambda p: p.mkdir(), "not a store"),
        (lambda p: p.write_text("x"), "no store"),
        (lambda p: (p / "job").mkdir(parents=True), "unfinished job"),
    ],
)
def test_what_is_not_a_store(tmp_path, make, said):
    path = Path(tmp_path / "s")
    make(path)
    with pytest.raises(HydraOptError, match=said):
        store.open(path)


@pytest.mark.parametrize("name", NAMES)
def test_other_versions_are_refused(kept, tmp_path, monkeypatch, name):
    for version, words in ((99, "version 99 .* is newer .* upgrade hydraopt_jax"), (3, "before the first")):
        monkeypatch.setattr(manifest, "VERSION", version)
        store.save(tmp_path / f"{version}-{name}", kept)
        monkeypatch.undo()
        with pytest.raises(HydraOptError, match=words):
            store.open(tmp_path / f"{version}-{name}")


def test_a_folder_of_an_early_version_is_named(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(HydraOptError, match=r"version 1 to 4 .* compress the adapters again"):
        store.open(tmp_path / "s")


def test_equal_stores_are_equal_bytes(small, tmp_path):
    """Of a file all bytes; of a folder all but Orbax's own account of when and where."""
    for name in ("s", "again"):
        kept = compress(small, form=forms.Hydra(heads=2))
        store.save(tmp_path / name, kept)
        store.save(tmp_path / f"{name}.safetensors", kept)
    one, two = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("s", "again"))
    assert one == two
    names = [[x.name for x in (tmp_path / n / folder.SEGMENTS).iterdir()] for n in ("s", "again")]
    assert names[0] == names[1]


def test_unknown_task_lists_near_names(kept):
    with pytest.raises(HydraOptError, match="'four'"):
        store.decode(kept, "fuor")


def test_a_store_is_shown_in_a_few_lines(kept, tmp_path):
    store.save(tmp_path / "s", kept)
    for x in (kept, store.open(tmp_path / "s")):
        assert len(repr(x)) < 400
        assert "4 tasks" in repr(x)
