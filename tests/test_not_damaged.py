"""Only a damaged file is called so: not memory that is short, a missing package, an interruption or a bug."""

import contextlib
import gc

import jax
import numpy as np
import pytest
import tensorstore
from commands import run

import hydraopt_jax as hydra
from hydraopt_jax import cli, formats
from hydraopt_jax.cli import stores
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import orbax_trees
from hydraopt_jax.store import checks, plain, segment_data

# Orbax's own event loop goes on for a moment after it has raised, into later tests
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SHORT = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")
INNOCENT = [
    MemoryError("8 GiB"),
    SHORT,
    KeyboardInterrupt(),
    ModuleNotFoundError("x", name="x"),
    AssertionError("bug"),
]


def decode_all(path):
    return [hydra.decode(store, t) for store in [hydra.open(path)] for t in store.tasks]


READS = [decode_all, hydra.verify, hydra.open]


@pytest.fixture(scope="module")
def kept(small):
    return hydra.compress(small, form=hydra.forms.Hydra(heads=2))


@pytest.fixture
def path(kept, tmp_path):
    hydra.save(tmp_path / "s", kept)
    return tmp_path / "s"


def raising(error):
    def run(*_, **__):
        raise error

    return run


@pytest.mark.parametrize("error", INNOCENT, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize(
    ("module", "name", "reads"),
    [
        (plain, "from_leaves", READS[:2]),
        (checks, "check_manifest", READS),
        (checks, "check_segment", READS),
        (tensorstore, "open", READS),
        (segment_data, "inflate_at_most", READS),
    ],
)
def test_what_is_no_damage_passes_as_it_is(path, monkeypatch, error, module, name, reads):
    monkeypatch.setattr(module, name, raising(error))
    for read in reads:
        with pytest.raises(type(error)) as caught:
            read(path)
        assert caught.value is error


@pytest.mark.parametrize(
    "error", [KeyError("bug"), TypeError("bug"), IndexError("bug"), OverflowError("bug")]
)
def test_what_may_be_a_bug_is_not_called_damage(path, monkeypatch, error):
    monkeypatch.setattr(plain, "from_leaves", raising(error))
    for read in READS[:2]:
        with pytest.raises(HydraOptError, match=r"report this as a fault of hydraopt_jax") as caught:
            read(path)
        assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(24, "Too many open files")]
)
def test_a_file_that_cannot_be_opened_is_not_damaged(path, monkeypatch, error):
    monkeypatch.setattr(type(path), "read_bytes", raising(error))
    with pytest.raises(HydraOptError, match=f"cannot be read: {error.strerror}") as caught:
        hydra.open(path)
    assert "damaged" not in str(caught.value)


def test_what_is_damaged_is_called_so(path):
    data = max((path / "segments").rglob("*"), key=lambda x: x.stat().st_size * x.is_file())
    for change in (lambda: data.write_bytes(data.read_bytes()[:-1] + b"x"), data.unlink):
        change()
        with pytest.raises(HydraOptError, match="damaged store"):
            decode_all(path)


@pytest.mark.parametrize("error", INNOCENT[:4], ids=lambda x: type(x).__name__)
def test_checkpoints_of_trees(small, tmp_path, monkeypatch, error):
    formats.write_checkpoint(tmp_path / "t", small[0], "flax_nnx", scale=1.0)
    for name in ("load", "metadata"):
        with monkeypatch.context() as patch:
            patch.setattr(orbax_trees.ocp, name, raising(error))
            with pytest.raises(type(error)) as caught:
                orbax_trees.load_factors(tmp_path / "t")
            assert caught.value is error


def test_a_damaged_checkpoint_of_a_tree_is_named(small, tmp_path):
    formats.write_checkpoint(tmp_path / "t", small[0], "flax_nnx", scale=1.0)
    files = [x for x in (tmp_path / "t").rglob("*") if x.is_file()]
    assert len(files) > 2
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
        # some files say nothing of the factors
        with contextlib.suppress(HydraOptError):
            assert orbax_trees.load_factors(tmp_path / "t")
        file.write_bytes(data)
    gc.collect()


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (MemoryError(), 2, "out of memory"),
        (
            np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype("f4")),
            2,
            "out of memory: Unable to allocate",
        ),
        (SHORT, 2, "out of memory on a device: RESOURCE_EXHAUSTED"),
        (ModuleNotFoundError("x", name="x"), 2, "the package x is not installed"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_the_command_says_it_in_a_line(capsys, path, monkeypatch, error, status, words):
    monkeypatch.setattr(segment_data, "inflate_at_most", raising(error))
    code, said, told = run(capsys, "inspect", path)
    assert (code, said) == (status, "")
    assert words in told
    assert told.strip().count("\n") == 0
    assert "damaged" not in told


def test_a_bug_is_a_traceback(path, monkeypatch):
    monkeypatch.setattr(stores.store, "open", raising(AssertionError("bug")))
    with pytest.raises(AssertionError, match="bug"):
        cli.main(["inspect", str(path)])


def test_a_pickle_that_memory_cannot_hold(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    (tmp_path / "x.bin").write_bytes(b"")
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")):
        monkeypatch.setattr(torch, "load", raising(error))
        with pytest.raises(MemoryError):
            list(formats.tensor_files.read_tensors(tmp_path / "x.bin"))
