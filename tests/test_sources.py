"""Where adapters are looked for: folders, folders of folders, patterns, names."""

import pytest
from commands import run

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
    ],
)
def test_what_holds_no_adapter_says_what_to_give(place, given, said):
    with pytest.raises(HydraOptError, match=said):
        reading.locate(given.format(place.parent))


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
