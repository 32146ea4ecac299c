"""A store says how it was made, and a recipe makes it again."""

import json

import pytest
import yaml
from commands import run

from hydraopt_jax import formats, provenance, store
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.integrations import hub


@pytest.fixture
def made(capsys, folders, tmp_path, monkeypatch):
    """A store of the command, made on a known day."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    given = ["--max-error", "0.05", "--weight", "one=2", "--any-base"]
    assert run(capsys, "compress", *folders, *given, "--out", tmp_path / "s1")[0] == 0
    return tmp_path / "s1"


def data_of(path):
    """Bytes of all leaves."""
    return [{k: bytes(v.read(0, v.shape[0])) for k, v in x.leaves.items()} for x in store.open(path).segments]


def test_a_store_says_how_it_was_made(capsys, made, folders):
    said = store.open(made).report["provenance"]
    assert said["made"] == {
        "verb": "compress",
        "options": {"any_base": True, "max_error": 0.05, "weights": ["one=2"]},
        "version": provenance.version(),
        "date": "2001-09-09",
    }
    shown = run(capsys, "inspect", made)[1]
    assert "hydraopt compress ADAPTERS --any-base --max-error 0.05 --weight one=2" in " ".join(shown.split())
    assert run(capsys, "remove", made, "one")[0] == 0
    after = store.open(made).report["provenance"]
    assert after["changed"]["verb"] == "remove"
    # nothing names a removed task
    assert after["made"]["options"]["weights"] == []
    assert run(capsys, "add", made, folders[0], "--any-base")[0] == 0
    assert store.open(made).report["provenance"]["changed"]["options"] == {"any_base": True}


@pytest.mark.parametrize("name", ["r.json", "r.yaml"])
def test_a_recipe_makes_the_same_store(capsys, made, tmp_path, name):
    assert run(capsys, "inspect", made, "--recipe", tmp_path / name)[0] == 0
    # another store of as long a name is the same to the last byte of every leaf
    assert run(capsys, "compress", "--recipe", tmp_path / name, "--out", tmp_path / "s2")[0] == 0
    assert data_of(tmp_path / "s2") == data_of(made)
    assert store.open(tmp_path / "s2").report == store.open(made).report
    assert "exists" in run(capsys, "inspect", made, "--recipe", tmp_path / name)[2]


def test_what_the_command_line_gives_goes_before_the_recipe(capsys, made, tmp_path):
    run(capsys, "inspect", made, "--recipe", tmp_path / "r.json")
    recipe = json.loads((tmp_path / "r.json").read_text())
    recipe["options"]["weights"] = "one=2"
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    given = ["--recipe", tmp_path / "r.json", "--max-error", "0.2", "--out", tmp_path / "s2"]
    assert run(capsys, "compress", *given)[0] == 0
    assert store.open(tmp_path / "s2").report["options"]["max_error"] == 0.2
    assert store.open(tmp_path / "s2").report["options"]["weights"] == {"one": 2.0}


def test_other_adapters_than_the_recipe_has_are_refused(capsys, made, small, tmp_path):
    run(capsys, "inspect", made, "--recipe", tmp_path / "r.json")
    changed = small[0].replace(b={k: 2 * v for k, v in small[0].b.items()})
    formats.write_adapter(tmp_path / "in0", changed, overwrite=True)
    code, out, err = run(capsys, "compress", "--recipe", tmp_path / "r.json", "--out", tmp_path / "s2")
    assert (code, out) == (2, "")
    assert "one: has changed since" in err
    assert not (tmp_path / "s2").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON:"),
        ("[]", "not a recipe"),
        ('{"recipe": 2}', "not a recipe of this version"),
        ('{"recipe": 1, "option": {}}', "did you mean 'options'"),
        ('{"recipe": 1, "options": {"bugdet": "0.1"}}', "did you mean 'budget'"),
        ('{"recipe": 1, "adapters": ["x"]}', "give task and source"),
        ('{"recipe": 1, "options": []}', "options are a mapping"),
        ('{"recipe": 1, "options": {"max_error": {"a": 1}}}', "options: max_error: give one value"),
    ],
)
def test_a_bad_recipe_is_named(capsys, tmp_path, text, said):
    (tmp_path / "r.json").write_text(text)
    code, out, err = run(capsys, "compress", "--recipe", tmp_path / "r.json", "--out", tmp_path / "s")
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_task_may_have_an_equals_sign(capsys, folders, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    first, second = (x.rpartition("=")[2] for x in folders[:2])
    given = [
        f"lr=3={first}",
        f"v=x={second}",
        "--max-error",
        "0.05",
        "--weight",
        "lr=3=2",
        "--protect",
        "v=x",
    ]
    assert run(capsys, "compress", *given, "--out", tmp_path / "s1")[0] == 0
    assert store.open(tmp_path / "s1").report["options"]["weights"] == {"lr=3": 2, "v=x": 4}
    assert run(capsys, "inspect", tmp_path / "s1", "--recipe", tmp_path / "r.yaml")[0] == 0
    assert run(capsys, "compress", "--recipe", tmp_path / "r.yaml", "--out", tmp_path / "s2")[0] == 0
    assert data_of(tmp_path / "s2") == data_of(tmp_path / "s1")
    more = ["--protect", "lr=3", "--protect", "v=x=2", "--out", tmp_path / "s3"]
    assert run(capsys, "compress", *given[:4], *more)[0] == 0
    assert store.open(tmp_path / "s3").report["options"]["weights"] == {"lr=3": 4, "v=x": 2}


def test_stores_of_python_say_nothing(small, tmp_path):
    import hydraopt_jax as hydra

    kept = hydra.compress(small[:2], max_error=0.1)
    assert "provenance" not in kept.report
    with pytest.raises(HydraOptError, match="has no provenance"):
        provenance.recipe_of(kept)


def test_a_store_is_pushed_without_paths(made):
    content = store.open(made)
    known = {**content.report["provenance"]["made"], "options": {"calibration": "/home/me/c.safetensors"}}
    content = content.replace(report=content.report.replace(provenance={"made": known}))
    assert hub.without_paths(content).report["provenance"]["made"]["options"] == {
        "calibration": "c.safetensors"
    }


def test_recipes_are_text_that_others_read(capsys, made, tmp_path):
    run(capsys, "inspect", made, "--recipe", tmp_path / "r.yaml")
    run(capsys, "inspect", made, "--recipe", tmp_path / "r.json")
    assert yaml.safe_load((tmp_path / "r.yaml").read_text()) == json.loads((tmp_path / "r.json").read_text())


def test_a_recipe_that_cannot_be_written_is_said_before_the_plot(capsys, made, tmp_path):
    (tmp_path / "r.json").write_text("mine")
    code, _, err = run(capsys, "inspect", made, "--plot", tmp_path / "p.svg", "--recipe", tmp_path / "r.json")
    assert code == 2
    assert "r.json: exists" in err
    assert not (tmp_path / "p.svg").exists()


def test_a_form_of_the_command_line_stands_for_the_targets_of_the_recipe(capsys, made, tmp_path):
    run(capsys, "inspect", made, "--recipe", tmp_path / "r.json")
    given = ["--recipe", tmp_path / "r.json", "--form", "hydra", "--heads", "2", "--out", tmp_path / "s2"]
    code, _, err = run(capsys, "compress", *given)
    assert code == 0, err
    said = store.open(tmp_path / "s2").report["provenance"]["made"]["options"]
    assert said == {"any_base": True, "form": "hydra", "heads": 2}
    code, _, err = run(capsys, "compress", *given[:-1], tmp_path / "s3", "--weight", "one=2")
    assert code == 2
    assert "--weight: cannot be combined" in err


def test_a_target_of_the_command_line_stands_for_those_of_the_recipe(capsys, made, tmp_path):
    run(capsys, "inspect", made, "--recipe", tmp_path / "r.json")
    given = ["--recipe", tmp_path / "r.json", "--budget", "0.9", "--out", tmp_path / "s2"]
    code, _, err = run(capsys, "compress", *given)
    assert code == 0, err
    said = store.open(tmp_path / "s2").report["provenance"]["made"]["options"]
    assert said["budget"] == "0.9"
    assert "max_error" not in said
    assert said["weights"] == ["one=2"]
