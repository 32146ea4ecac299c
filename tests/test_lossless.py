"""A budget of 1: adapters kept as they came, bit for bit, whatever their dtypes and scales."""

import functools
import json

import ml_dtypes
import numpy as np
import pytest
from commands import run
from safetensors.numpy import load_file, save_file

from hydraopt_jax import changes, formats, store, synthetic
from hydraopt_jax.compression import compress
from hydraopt_jax.formats.memory_collection import raw_of
from hydraopt_jax.jobs import headers, job
from hydraopt_jax.store import sizes

KEY = "base_model.model.{}.lora_{}.weight"
HALF, BRAIN, SINGLE = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
DOUBLE = np.dtype(np.float64)
# per adapter: dtypes of A and B, rank, alpha, other fields
KINDS = {
    "fp16": (HALF, HALF, 4, 8, {}),
    "fp16-odd-scale": (HALF, HALF, 3, 5, {}),
    "bf16-rslora": (BRAIN, BRAIN, 8, 11, {"use_rslora": True}),
    "fp32": (SINGLE, SINGLE, 4, 4, {}),
    "fp32-odd-scale": (SINGLE, SINGLE, 6, 7, {"use_rslora": True}),
    "mixed": (HALF, SINGLE, 3, 7, {"alpha_pattern": {"k": 2}}),
    "fp64": (DOUBLE, DOUBLE, 3, 10, {"use_rslora": True}),
}


def made(folder, name, modules=("layers.0.q", "layers.0.k"), seed=0):
    """A folder of an adapter of a kind, its values of every magnitude and some zeros of both signs."""
    low, high, rank, alpha, fields = KINDS[name]
    rng = np.random.default_rng(list(KINDS).index(name) + 10 * seed)
    tensors = {}
    for m in modules:
        a = rng.normal(size=(rank, 40)) * np.exp(rng.normal(size=(rank, 1)))
        b = rng.normal(size=(24, rank)) * np.exp(3 * rng.normal(size=(24, 1)))
        b[:, -1], b[0], b[1] = 0.0, -0.0, 3e-7
        tensors |= {KEY.format(m, "A"): a.astype(low), KEY.format(m, "B"): b.astype(high)}
    path = folder / name
    path.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": "x", "r": rank, "lora_alpha": alpha, **fields}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        tensors | {"score.weight": rng.normal(size=(2, 3)).astype(low)}, path / "adapter_model.safetensors"
    )
    return path


@pytest.fixture(params=["each", "all"])
def sets(request):
    """Each kind by itself, and all of them in one collection."""
    return [[k] for k in KINDS] if request.param == "each" else [list(KINDS)]


def bits(x):
    """Dtype, shape and bytes."""
    x = np.ascontiguousarray(x)
    return x.dtype, x.shape, x.tobytes()


def same_adapters(one, two):
    assert list(one.a) == list(two.a)
    for name in one.a:
        assert bits(one.a[name]) == bits(two.a[name])
        assert bits(one.b[name]) == bits(two.b[name])
    assert {k: bits(v) for k, v in one.extras.items()} == {k: bits(v) for k, v in two.extras.items()}


def exported(capsys, content, path):
    """The folder that a task of a store is exported to; its task is named as the folder that it came from."""
    out = path.with_name("exported")
    arguments = ["export", content, "--task", path.name, "--out", out]
    assert run(capsys, *arguments, *["--overwrite"] * out.exists())[0] == 0
    return out


def same_files(one, two):
    """Whether two folders have the same tensors, bit for bit."""
    before, after = (load_file(p / "adapter_model.safetensors") for p in (one, two))
    return {k: bits(v) for k, v in before.items()} == {k: bits(v) for k, v in after.items()}


@pytest.mark.parametrize("options", [[], ["--skip-bad"], ["--no-zstd"]])
def test_a_command_gives_back_the_very_tensors(capsys, tmp_path, sets, options):
    for kinds in sets:
        root = tmp_path / "-".join(kinds)
        paths = [made(root, k) for k in kinds]
        status, said, error = run(
            capsys, "compress", *paths, "--budget", "1", "--out", root / "s", "--json", *options
        )
        assert (status, error) == (0, "")
        said = json.loads(said)
        assert said["form"] == "lossless"
        assert said["error"]["worst"] == 0
        assert said["bytes_after"] == sizes.size_on_disk(root / "s")
        factors = sum(
            v.nbytes
            for p in paths
            for k, v in load_file(p / "adapter_model.safetensors").items()
            if "lora" in k
        )
        assert said["factor_bytes"] == factors
        assert run(capsys, "export", root / "s", "--all", "--out", root / "out")[0] == 0
        for path in paths:
            back = root / "out" / path.name
            before, after = (load_file(p / "adapter_model.safetensors") for p in (path, back))
            assert {k: bits(v) for k, v in before.items()} == {k: bits(v) for k, v in after.items()}
            configs = [json.loads((p / "adapter_config.json").read_text()) for p in (path, back)]
            assert configs[0] == configs[1]
        assert run(capsys, "verify", root / "s", *paths)[0] == 0


def test_in_memory_what_was_read_comes_back(tmp_path, sets):
    for kinds in sets:
        root = tmp_path / "-".join(kinds)
        given = [formats.read_adapter(made(root, k)) for k in kinds]
        kept = compress(given, budget=1)
        store.save(root / "s", kept)
        for x in given:
            for content in (kept, store.open(root / "s"), store.select(store.open(root / "s"), [x.task])):
                same_adapters(x, store.decode(content, x.task))
            formats.write_adapter(root / "out" / x.task, store.decode(store.open(root / "s"), x.task))
            same_adapters(x, formats.read_adapter(root / "out" / x.task))


def test_half_precision_is_written_as_its_file_had_it(tmp_path):
    """B is what `b / scale` rounds to: the scale is not folded into a half-precision factor."""
    for kind in ("fp16", "fp16-odd-scale", "bf16-rslora"):
        path = made(tmp_path, kind)
        kept = compress([formats.read_adapter(path)], budget=1.0)
        formats.write_adapter(tmp_path / "out" / kind, store.decode(kept, kind))
        before, after = (load_file(p / "adapter_model.safetensors") for p in (path, tmp_path / "out" / kind))
        assert {k: bits(v) for k, v in before.items()} == {k: bits(v) for k, v in after.items()}


def test_fp16_takes_little_more_than_its_bytes(capsys, tmp_path):
    """Coded before, because the store's own kilobytes did not fit; this is no error now."""
    given = synthetic.collection(tasks=["x"], modules={"q": (200, 100)}, rank=8, dtype="float16")
    formats.write_adapter(tmp_path / "in", given[0])
    status, said, error = run(
        capsys, "compress", tmp_path / "in", "--budget", "100%", "--out", tmp_path / "s", "--no-zstd"
    )
    assert (status, error) == (0, "")
    size = 2 * 8 * 300
    assert size < sizes.size_on_disk(tmp_path / "s") < size + 4000
    assert "kept bit for bit: 4.80 kB, 100% of their fp16 bytes" in " ".join(said.split())


def test_the_large_path_writes_the_same_store(tmp_path):
    paths = [made(tmp_path, k) for k in KINDS]
    found, _ = headers.read_headers([(str(p), None) for p in paths], tmp_path / "job")
    content = job.run_job(tmp_path / "large", found, functools.partial(compress, budget="100%"), {})
    assert content.report["form"] == "lossless"
    for path in paths:
        same_adapters(formats.read_adapter(path), store.decode(store.open(tmp_path / "large"), path.name))


def test_tasks_come_and_go_as_they_came(tmp_path):
    given = [formats.read_adapter(made(tmp_path, k)) for k in KINDS]
    grown = compress(given[:2], budget=1)
    for x in given[2:]:
        grown = changes.add(grown, x)
    left = changes.remove(grown, given[0].task)
    store.save(tmp_path / "s", left)
    back = store.open(tmp_path / "s")
    assert back.tasks == tuple(x.task for x in given[1:])
    for x in given[1:]:
        same_adapters(x, store.decode(back, x.task))


@pytest.mark.parametrize("kind", ["fp32-odd-scale", "mixed", "fp64"])
def test_what_folding_rounds_is_kept_through_every_change(capsys, tmp_path, kind):
    paths = [made(tmp_path / str(k), kind, seed=k).rename(tmp_path / f"t{k}") for k in range(3)]
    s = tmp_path / "s"
    assert run(capsys, "compress", *paths[:2], "--budget", "1", "--force", "--out", s)[0] == 0
    assert run(capsys, "add", s, paths[2])[0] == 0
    written = [same_files(x, exported(capsys, s, x)) for x in paths]
    assert run(capsys, "remove", s, "t0", "--refit")[0] == 0
    assert "lossless" in run(capsys, "inspect", s)[1]
    written += [same_files(x, exported(capsys, s, x)) for x in paths[1:]]
    given = [formats.read_adapter(x) for x in paths]
    kept = changes.refit(compress(given, budget=1), given)
    for x, path in zip(given, paths, strict=True):
        same_adapters(x, store.decode(kept, x.task))
        formats.write_adapter(tmp_path / "out" / x.task, store.decode(kept, x.task))
        written.append(same_files(path, tmp_path / "out" / x.task))
    assert all(written)


def test_factors_that_were_replaced_are_not_those_of_the_file(tmp_path):
    x = formats.read_adapter(made(tmp_path, "fp32-odd-scale"))
    assert x.raw
    for twice in (x, store.decode(compress([x], budget=1), x.task)):
        twice = twice.replace(b={k: 2 * v for k, v in twice.b.items()})
        kept = store.decode(compress([twice], budget=1), x.task)
        assert all(np.array_equal(kept.b[k], 2 * x.b[k]) for k in x.b)
        formats.write_adapter(tmp_path / "out", twice, overwrite=True)
        again = formats.read_adapter(tmp_path / "out")
        assert all(np.array_equal(again.b[k], 2 * x.b[k]) for k in x.b)


def test_double_precision_in_memory_comes_back():
    rng = np.random.default_rng(0)
    x = synthetic.collection(tasks=["x"], modules={"q": (12, 8)}, rank=2, dtype="float32")[0]
    for dtype in ("float64", "float32"):
        y = x.replace(dtype=dtype, a={"q": rng.normal(size=(12, 2))}, b={"q": rng.normal(size=(2, 8))})
        kept = compress([y], budget=9.0)
        for content in (kept, changes.refit(kept, [y]), changes.add(kept, y.replace(task="y"))):
            for task in content.tasks:
                same_adapters(y, store.decode(content, task))


def test_a_scale_of_another_format_is_in_b():
    """Without a configuration of PEFT what came is the float32 product, and it is kept."""
    x = synthetic.collection(tasks=["x"], modules={"q": (12, 8)}, rank=2, dtype="float16")[0]
    x = x.replace(config={}, b={k: v * np.float32(1.1) for k, v in x.b.items()})
    raw = raw_of(x, "q")
    assert (raw.b.dtype, raw.scale) == (SINGLE, 1.0)
    same_adapters(x.replace(a={"q": raw.a}), store.decode(compress([x], budget=2), "x"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weight", "x=2"], "weights: does nothing under a budget of 1"),
        (["--alone"], "alone: does nothing under a budget of 1"),
    ],
)
def test_what_does_nothing_beside_it_is_refused(capsys, tmp_path, options, words):
    status, _, error = run(
        capsys, "compress", made(tmp_path, "fp16"), "--budget", "1", "--out", tmp_path / "s", *options
    )
    assert status == 2
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "s").exists()
