"""A fraction as a budget is of the factors, bytes are of everything, and full tensors are coded apart."""

import functools
import json
import time

import ml_dtypes
import numpy as np
import pytest
from commands import run

from hydraopt_jax import changes, formats, forms, store, synthetic
from hydraopt_jax.compression import compress
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.explicit import group_loop
from hydraopt_jax.formats.peft_collection import collection_of, open_adapter
from hydraopt_jax.jobs import job
from hydraopt_jax.rate_control import carried, engine, prepared
from hydraopt_jax.store import sizes, tensors
from hydraopt_jax.store.store import tensors_of

MODULES = {f"layer.{n}.q": (192, 192) for n in range(3)}


@pytest.fixture(scope="module")
def headed():
    """Adapters whose classifier heads are larger than their factors, as real ones of small encoders are."""
    rng = np.random.default_rng(3)
    made = synthetic.collection(1, tasks=["a", "b", "c"], modules=MODULES, rank=8, dtype="float16")
    return [
        x.replace(
            extras={
                "pre_classifier.weight": (rng.normal(size=(192, 384)) * 0.02).astype(np.float32),
                "classifier.bias": np.zeros(2, np.float32),
            }
        )
        for x in made
    ]


def account(path):
    return sizes.account(path, store.open(path))


def fraction(path, content):
    """What factors and description take of the factors' fp16 bytes."""
    parts = account(path)
    return (parts.factors + parts.metadata) / (2 * content.report["entries"])


def written(collection, folder):
    for x in collection:
        formats.write_adapter(folder / x.task, x, dtype=x.dtype)
    return [str(folder / x.task) for x in collection]


def found_in(names):
    return collection_of([open_adapter(x, None, {}) for x in names])


def in_memory(out, names, options):
    content = compress([formats.read_adapter(x) for x in names], **options)
    store.save(out, content)
    return content


def in_parts(out, names, options):
    """A job whose collection is coded in parts, its full tensors in segments of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(carried, "TENSOR_BYTES", 1 << 18)
        patch.setattr(
            engine.compress_to_target,
            "__kwdefaults__",
            {**engine.compress_to_target.__kwdefaults__, "segment_bytes": 1 << 15},
        )
        with job.alone(out):
            return job.run_job(out, found_in(names), functools.partial(compress, **options), {})


PATHS = pytest.mark.parametrize("make", [in_memory, in_parts])


@PATHS
def test_a_fraction_is_of_the_factors_whatever_the_heads(headed, tmp_path, make):
    """At 0.3 the factors take 0.3 of their fp16 bytes; heads beside them are counted by themselves."""
    names = written(headed, tmp_path)
    content = make(tmp_path / "s", names, {"budget": 0.3})
    assert 0.28 < fraction(tmp_path / "s", content) <= 0.3
    parts = account(tmp_path / "s")
    raw = sum(x.nbytes for a in headed for x in a.extras.values())
    assert 0.75 * raw < parts.heads < 0.9 * raw
    assert sum(parts) == sizes.size_on_disk(tmp_path / "s")
    back = store.open(tmp_path / "s")
    for x in headed:
        assert {k: (v.dtype, v.tobytes()) for k, v in tensors_of(back, x.task).items()} == {
            k: (v.dtype, v.tobytes()) for k, v in x.extras.items()
        }


@PATHS
def test_bytes_are_of_everything(headed, tmp_path, make):
    names = written(headed, tmp_path)
    content = make(tmp_path / "s", names, {"budget": 775_000})
    parts = account(tmp_path / "s")
    assert 772_500 < sum(parts) <= 775_000
    half = make(tmp_path / "half", names, {"budget": 405_000, "extras_dtype": "float16"})
    assert sum(account(tmp_path / "half")) <= 405_000
    assert account(tmp_path / "half").heads < 0.6 * parts.heads
    assert half.report["options"]["extras_dtype"] == "float16"
    assert 0 < np.nanmean(content.errors) < 1
    assert 0 < np.nanmean(half.errors) < 1


def test_plain_factors_that_are_compressed_in_a_folder_leave_the_manifest_its_bytes(headed, tmp_path):
    bare = [x.replace(extras={}) for x in headed]
    store.save(tmp_path / "s", compress(bare, budget=1.0))
    parts = account(tmp_path / "s")
    assert parts.metadata > (tmp_path / "s" / "manifest.json.gz").stat().st_size
    assert sum(parts) == sizes.size_on_disk(tmp_path / "s")


@PATHS
def test_a_budget_below_the_heads_is_refused_at_once(headed, tmp_path, make, monkeypatch):
    """Before anything is fitted, by name, with the way out; nothing is left behind."""
    names = written(headed, tmp_path / "in")
    fits = []
    monkeypatch.setattr(prepared, "prepare_part", lambda *x: fits.append(x))
    monkeypatch.setattr(engine, "passes", lambda *x: fits.append(x))
    begin = time.process_time()
    with pytest.raises(HydraOptError) as caught:
        make(tmp_path / "s", names, {"budget": 500_000})
    assert time.process_time() - begin < 5
    assert not fits
    said = str(caught.value)
    assert (
        "pre_classifier.weight, classifier.bias" in said or "classifier.bias, pre_classifier.weight" in said
    )
    assert "3 tasks" in said
    assert "--extras-dtype float16" in said
    assert [x.name for x in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_heads_are_rounded_to_their_own_dtype(headed, tmp_path, dtype):
    """Explicit forms, in memory and in groups, and tasks that come later: only what is wider is rounded."""
    names = written(headed, tmp_path)
    options = {"form": forms.Hydra(rank=4), "extras_dtype": dtype}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_loop, "TOGETHER", 0)
        with job.alone(tmp_path / "parts"):
            job.run_job(tmp_path / "parts", found_in(names), functools.partial(compress, **options), {})
    content = compress([formats.read_adapter(x) for x in names], **options)
    store.save(tmp_path / "memory", content)
    head = headed[0].extras["pre_classifier.weight"].astype(dtype or "float32")
    new = headed[1].replace(task="new", extras=headed[0].extras)
    for path in (tmp_path / "parts", tmp_path / "memory"):
        content = store.update(path, lambda x: changes.remove(changes.add(x, new), "b"))
        assert content.tasks == ("a", "c", "new")
        back = store.open(path)
        for task in ("a", "new"):
            kept = tensors_of(back, task)["pre_classifier.weight"]
            assert kept.dtype == head.dtype
            assert kept.tobytes() == head.tobytes()
        formats.write_adapter(tmp_path / f"out-{path.name}", store.decode(back, "a"))
        out = formats.read_adapter(tmp_path / f"out-{path.name}").extras["pre_classifier.weight"]
        assert out.tobytes() == head.tobytes()


@pytest.mark.parametrize(
    "x",
    [
        np.arange(6).reshape(2, 3),
        np.array(2.5, np.float32),
        np.zeros((0, 4), np.float16),
        np.full(5, np.nan, np.float32),
        np.arange(7, dtype=np.float32).astype(ml_dtypes.bfloat16),
        np.arange(24, dtype=np.float64).reshape(2, 3, 4).T,
    ],
)
def test_any_tensor_comes_back_bit_for_bit(x):
    found = tensors.encode_tensors({"x": x, "y": np.ones(3, np.float16)})
    assert (found["x"].dtype, found["x"].shape) == (x.dtype, x.shape)
    assert found["x"].tobytes() == np.ascontiguousarray(x).tobytes()
    assert found["y"].tolist() == [1, 1, 1]
    assert sum(map(tensors.stored_size, found.table)) == found.nbytes


def test_what_overflows_or_is_no_dtype_is_refused(headed):
    large = {"score.weight": np.array([1e6], np.float32)}
    with pytest.raises(
        HydraOptError, match=r"score.weight: values overflow float16; .*--extras-dtype bfloat"
    ):
        tensors.encode_tensors(large, "float16")
    with pytest.raises(HydraOptError, match="extras_dtype = 'int3'"):
        compress(headed, budget=0.5, extras_dtype="int3")
    with pytest.raises(HydraOptError, match="extras_dtype = 'int3'"):
        compress(headed, form=forms.Hydra(), extras_dtype="int3")


@pytest.mark.parametrize(
    "change", [lambda x: x[:-20], lambda x: b"", lambda x: bytes(1000), lambda x: x[::-1]]
)
def test_bytes_that_do_not_fit_their_table_are_refused(change):
    found = tensors.encode_tensors({"x": np.arange(100, dtype=np.float32)})
    row = [*found.table[0][:3], len(change(found.blob))]
    with pytest.raises(HydraOptError, match="x: its bytes in the store"):
        tensors.Tensors([row], change(found.blob))["x"]


def test_commands_account_for_factors_heads_and_description(headed, tmp_path, capsys):
    names = written(headed, tmp_path)
    out = tmp_path / "store"
    code, text, err = run(
        capsys, "compress", *names, "--out", out, "--budget", "0.3", "--extras-dtype", "float16", "--json"
    )
    assert (code, err) == (0, "")
    said = json.loads(text)
    assert sum(said["bytes_of"].values()) == said["bytes_after"]
    assert said["bytes_of"]["factors"] + said["bytes_of"]["metadata"] <= 0.3 * 2 * said["entries"]["before"]
    _, text, _ = run(capsys, "inspect", out)
    assert all(word in text for word in ("factors", "full tensors (heads)", "manifest, headers, checksums"))
    code, _, err = run(capsys, "compress", *names, "--out", tmp_path / "t", "--budget", "300kB")
    assert code == 2
    assert "pre_classifier.weight" in err
    assert err.count("\n") == 1
