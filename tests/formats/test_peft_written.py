"""Writing PEFT folders: what cannot be written, what is overwritten, names and bases."""

import re
from pathlib import Path

import numpy as np
import pytest
from peft_folders import CONFIG, PREFIX, adapter

from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import adapter_folder, base_name, check_same_base, read_adapter, write_adapter


def test_overflow_is_named(tmp_path):
    big = adapter({"q": 2})
    big = big.replace(b={"q": np.full((2, 3), 1e6, np.float32)})
    with pytest.raises(
        HydraOptError, match=r"q\.lora_B\.weight: its values overflow float16: write bfloat16"
    ):
        write_adapter(tmp_path / "out", big, dtype="float16")
    with pytest.raises(HydraOptError, match=r"q\.lora_B\.weight: has NaN"):
        write_adapter(tmp_path / "out", big.replace(b={"q": np.full((2, 3), np.nan)}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "int8"}, "dtype 'int8': choose one of float16, bfloat16, float32"),
        ({"a": {}, "b": {}}, "holds no LoRA factor"),
        ({"extras": {f"{PREFIX}q.lora_A.weight": np.zeros(2)}}, "is both a LoRA factor"),
        ({"extras": {"x": np.array([object()])}}, "cannot be written"),
        ({"config": CONFIG | {"x": {1, 2}}}, "cannot be written: .*JSON"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path, change, words):
    with pytest.raises(HydraOptError, match=words):
        write_adapter(tmp_path / "deep" / "out", adapter({"q": 2}).replace(**change))
    assert not list(tmp_path.iterdir())


def test_existing_path_is_kept_unless_overwritten(tmp_path):
    out = tmp_path / "out"
    write_adapter(out, adapter({"q": 2}))
    before = {x.name: x.read_bytes() for x in out.iterdir()}
    with pytest.raises(HydraOptError, match=r"out: exists.*--overwrite"):
        write_adapter(out, adapter({"v": 3}))
    assert {x.name: x.read_bytes() for x in out.iterdir()} == before
    (out / "README.md").write_text("mine")
    (out / "adapter_model.bin").write_text("stale")
    write_adapter(out, adapter({"v": 3}), overwrite=True)
    assert set(read_adapter(out).a) == {"v"}
    assert (out / "README.md").read_text() == "mine"
    assert not (out / "adapter_model.bin").exists()
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_overwrite_spares_what_is_no_adapter(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("x")
    for name in ("file", "home"):
        with pytest.raises(HydraOptError, match="is not overwritten"):
            write_adapter(tmp_path / name, adapter({"q": 2}), overwrite=True)
    assert (tmp_path / "home" / "letter").read_text() == "x"
    (tmp_path / "empty").mkdir()
    write_adapter(tmp_path / "empty", adapter({"q": 2}), overwrite=True)
    assert set(read_adapter(tmp_path / "empty").a) == {"q"}


@pytest.mark.parametrize("fails", ["write_tensors", "_swap"])
def test_a_failed_overwrite_leaves_the_old_adapter(tmp_path, monkeypatch, fails):
    out = tmp_path / "out"
    write_adapter(out, adapter({"q": 2}))

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_folder, fails, fail)
    with pytest.raises(HydraOptError, match=r"out: cannot be written: .*No space left"):
        write_adapter(out, adapter({"v": 3}), overwrite=True)
    assert set(read_adapter(out).a) == {"q"}
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_a_failed_rename_puts_the_old_adapter_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_adapter(out, adapter({"q": 2}))
    rename = Path.rename

    def fail_for_new(self, target):
        return {"new": fail}.get(self.name, rename)(self, target)

    def fail(self, target):
        raise OSError("no rename today")

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(HydraOptError, match="no rename today"):
        write_adapter(out, adapter({"v": 3}), overwrite=True)
    assert set(read_adapter(out).a) == {"q"}
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(HydraOptError, match=r"out: cannot be written") as caught:
        write_adapter(tmp_path / "file" / "out", adapter({"q": 2}))
    assert "\n" not in str(caught.value)
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_folder_names_are_safe_and_distinct():
    tasks = ["a", "a/b", "a_b", "a%2Fb", "", ".", "..", "../x", "/", "é", "x" * 300, "x" * 301, "\0", "a b"]
    names = [adapter_folder.folder_name(x) for x in tasks]
    assert len(set(names)) == len(tasks)
    assert all(re.fullmatch(r"[^./\\\0][^/\\\0]{0,199}", x) for x in names)
    assert names[0] == "a"


@pytest.mark.parametrize(
    ("first", "second", "suffixes"),
    [
        ("gpt2", "gpt2", ()),
        ("gpt2", "openai-community/gpt2", ()),
        ("unsloth/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", ()),
        ("unsloth/Qwen2.5-0.5B-Instruct-bnb-4bit", "Qwen/Qwen2.5-0.5B-Instruct", ("-bnb-4bit",)),
        ("x/m-unsloth-bnb-4bit", "m", ("-bnb-4bit", "-unsloth")),
        ("/data/base/", "/data/base", ()),
        (None, "", ()),
    ],
)
def test_same_base(first, second, suffixes):
    pair = [adapter({"q": 2}, config={"base_model_name_or_path": x}) for x in (first, second)]
    check_same_base(pair, base_suffixes=suffixes)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("gpt2", "gpt2-medium"),
        ("gpt2", None),
        ("/home/a/base", "/home/b/base"),
        ("./base", "base"),
        ("x/m-bnb-4bit", "x/m"),
        ("-8bit", "m"),
    ],
)
def test_other_base(first, second):
    one = adapter({"q": 2}, config={"base_model_name_or_path": first}, source="one")
    two = adapter({"q": 2}, config={"base_model_name_or_path": second}, source="two")
    with pytest.raises(HydraOptError, match=r"one names .* and two names .*--any-base"):
        check_same_base([one, two], base_suffixes=("-8bit",))
    check_same_base([one, two], any_base=True)


def test_base_name():
    assert [base_name(x) for x in ({}, {"base_model_name_or_path": "gpt2"})] == ["", "gpt2"]
