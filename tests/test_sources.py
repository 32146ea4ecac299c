"""Where adapters are looked for: folders, folders of folders, patterns, names."""

import numpy as np
import pytest
from commands import run
from safetensors.numpy import save_file

from hydraopt_jax import formats, reading, store
from hydraopt_jax.errors import HydraOptError


@pytest.fixture
def place(small, tmp_path):
    """A folder of two adapters, beside them what is none."""
    at = tmp_path / "adapters"
    for name, adapter in zip(("b", "a"), small, strict=False):
        formats.write_adapter(at / name, adapter)
    (at / "notes").mkdir()
    (at / "README.md").write_text("two adapters")
    return at


def test_a_folder_of_adapters_stands_for_them(place):
    want = [(str(place / "a"), None), (str(place / "b"), None)]
    assert reading.locate(place) == want
    assert reading.locate([f"{place}/*"]) == want
    assert reading.locate([place / "a", f"new={place / 'b'}"]) == [want[0], (str(place / "b"), "new")]
    assert reading.locate(["hf:org/name@1", "x=hf:org/name"]) == [
        ("hf:org/name@1", None),
        ("hf:org/name", "x"),
    ]
    assert [x.task for x in reading.read(place)] == ["a", "b"]


def test_a_name_with_an_equals_sign_ends_where_an_adapter_is_behind_it(place, monkeypatch):
    monkeypatch.chdir(place.parent)
    for given, want in (
        ("lr=3=adapters/a", ("adapters/a", "lr=3")),
        ("x=y/z=adapters/a", ("adapters/a", "x=y/z")),
        ("lr=3=hf:org/name", ("hf:org/name", "lr=3")),
        ("lr=3/none", ("3/none", "lr")),
        ("runs/lr=3", ("runs/lr=3", None)),
        ("x=", ("", "x")),
    ):
        assert reading.locate(given, strict=False) == [want]
    (place / "a").rename("lr=3")
    assert reading.locate("x=lr=3") == [("lr=3", "x")]


def test_an_adapter_without_its_configuration_is_not_passed_over(place):
    (place / "a" / "adapter_config.json").unlink()
    with pytest.raises(HydraOptError, match=r"adapter_config\.json"):
        reading.read(place)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{}", "its adapters lie deeper"),
        ("{}/adapters/notes", "a folder of such folders"),
        ("one={}/adapters", "one name for the 2 adapters"),
        ("{}/adapters/x*", "no folder of that pattern"),
        ("{}/lr=1/x*", "no folder of that pattern"),
    ],
)
def test_what_holds_no_adapter_says_what_to_give(place, given, said):
    with pytest.raises(HydraOptError, match=said):
        reading.locate(given.format(place.parent))


def lora_file(at):
    """A LoRA file of one module."""
    at.parent.mkdir(parents=True, exist_ok=True)
    ones = np.ones((2, 4), np.float32)
    save_file({"unet.q.lora_A.weight": ones, "unet.q.lora_B.weight": ones.T.copy()}, at)


@pytest.mark.parametrize("name", ["c/checkpoint-500", "c/final"])
@pytest.mark.parametrize("given", ["adapters", "adapters/*"])
def test_an_adapter_that_lies_deeper_than_others_is_not_passed_over(place, small, given, name, monkeypatch):
    monkeypatch.chdir(place.parent)
    formats.write_adapter(place / name, small[0])
    with pytest.raises(HydraOptError, match=f"some of its adapters lie deeper, such as adapters/{name}"):
        reading.locate(given)
    assert [x.task for x in reading.read(["adapters/a", "adapters/c"])] == ["a", name[2:]]


@pytest.mark.parametrize("name", ["b/cat.safetensors", "b/cat/pytorch_lora_weights.safetensors"])
def test_a_lora_file_that_lies_deeper_than_others_is_not_passed_over(tmp_path, name):
    lora_file(tmp_path / "a" / "pytorch_lora_weights.safetensors")
    lora_file(tmp_path / name)
    with pytest.raises(HydraOptError, match=f"some of its adapters lie deeper, such as .*{name}: name"):
        reading.locate(tmp_path)


def test_what_is_no_adapter_is_passed_over(place, small):
    """A base model, and what a killed writer left."""
    save_file({"q.weight": np.ones(2, np.float32)}, place / "notes" / "model.safetensors")
    formats.write_adapter(place / ".c.x.tmp" / "new", small[0])
    formats.write_adapter(place / "a" / ".old" / "new", small[0])
    assert [x for x, _ in reading.locate(place)] == [str(place / "a"), str(place / "b")]


def test_adapters_in_an_adapters_folder_are_not_passed_over(place, small):
    """PEFT's save_pretrained of several adapters: "default" above the others."""
    formats.write_adapter(place / "a" / "checkpoint-20", small[0])
    assert len(reading.locate(place)) == 2
    formats.write_adapter(place / "a" / "legal", small[0])
    for given in (place, place / "a", f"{place}/*", [place / "b", place / "a"]):
        with pytest.raises(HydraOptError, match=r"/a: other adapters lie in .* as .*/a/legal: name each"):
            reading.locate(given)
    found = reading.read([f"default={place / 'a'}", place / "a" / "legal"])
    assert [x.task for x in found] == ["default", "legal"]


@pytest.mark.parametrize(
    ("given", "tasks"),
    [
        ("runs/lr=1/*", ["a", "b"]),
        ("lr=1/*", ["x"]),
        ("runs/lr=1", ["a", "b"]),
        ("runs/lr=1/a", ["a"]),
        ("legal=runs/lr=1/a", ["legal"]),
        ("legal=lr=1/x", ["legal"]),
        ("org/legal=lr=1/x", ["org/legal"]),
    ],
)
def test_a_path_may_have_an_equals_sign(place, small, given, tasks, monkeypatch):
    monkeypatch.chdir(place.parent)
    (place.parent / "runs").mkdir()
    place.rename("runs/lr=1")
    formats.write_adapter("lr=1/x", small[0])
    assert [x.task for x in reading.read(given)] == tasks


@pytest.mark.parametrize("given", ["runs/lr=1/none", "hf=1/none"])
def test_a_path_with_an_equals_sign_that_is_not_there_is_named(given):
    with pytest.raises(HydraOptError, match=f"^{given.removeprefix('hf=')}: no such folder"):
        reading.read(given)


@pytest.mark.parametrize("name", ["", "cat="])
@pytest.mark.parametrize("address", ["https://me:secret@hub.org/a.safetensors?x=1", "s3://bucket/a*"])
def test_adapters_are_not_read_from_addresses(name, address):
    with pytest.raises(HydraOptError, match=r"^(https://hub|s3).*: adapters are not read from") as refused:
        reading.read(name + address)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("given", ["links/legal", "links/*", "links/legal/."])
def test_a_linked_adapter_has_the_name_of_the_link(place, given, monkeypatch):
    monkeypatch.chdir(place.parent)
    (place.parent / "links").mkdir()
    (place.parent / "links" / "legal").symlink_to(place / "a")
    assert [x.task for x in reading.read(given)] == ["legal"]


def test_a_linked_file_has_the_name_of_the_link(tmp_path):
    """The hub's cache has blobs, and links that have names."""
    lora_file(tmp_path / "blobs" / "0123.safetensors")
    (tmp_path / "loras" / "dog").mkdir(parents=True)
    for name in ("cat.safetensors", "dog/pytorch_lora_weights.safetensors"):
        (tmp_path / "loras" / name).symlink_to(tmp_path / "blobs" / "0123.safetensors")
    assert [x.task for x in reading.read(tmp_path / "loras")] == ["cat", "dog"]


def test_a_store_beside_the_files_that_it_is_of_is_none_of_them(capsys, tmp_path):
    lora_file(tmp_path / "loras" / "cat.safetensors")
    made = tmp_path / "loras" / "store.safetensors"
    given = ("compress", tmp_path / "loras", "--max-error", "0.1", "--force", "--overwrite", "--out", made)
    for _ in range(2):
        code, _, err = run(capsys, *given)
        assert code == 0, err
        assert store.open(made).tasks == ("cat",)
    assert [x for x, _ in reading.locate(f"{tmp_path}/loras/*.safetensors")] == [
        str(tmp_path / "loras" / "cat.safetensors")
    ]
    code, _, err = run(capsys, "compress", made, "--out", tmp_path / "t")
    assert (code, "store.safetensors: is a store, not an adapter" in err) == (2, True)


def test_the_command_takes_a_folder_of_adapters(capsys, place, tmp_path):
    code, out, err = run(capsys, "compress", place, "--max-error", "0.1", "--out", tmp_path / "s")
    assert (code, err) == (0, "")
    assert "2 adapters, " in out
    assert store.open(tmp_path / "s").tasks == ("a", "b")
    assert run(capsys, "verify", tmp_path / "s", place)[0] == 0
    code, _, err = run(capsys, "compress", tmp_path / "s", "--out", tmp_path / "t")
    assert code == 2
    assert "is a store, not an adapter" in err


def test_skip_bad_lists_a_folder_without_adapters(capsys, place, tmp_path):
    given = ["compress", place / "a", place / "notes", "--skip-bad", "--max-error", "0.1"]
    code, out, _ = run(capsys, *given, "--out", tmp_path / "s")
    assert code == 0
    assert f"left out: {place / 'notes'}" in " ".join(out.split())
