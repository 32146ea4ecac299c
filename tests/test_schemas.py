"""What --json prints is what docs/schemas.json says, verb by verb."""

import json
from pathlib import Path

import jsonschema
import pytest
from commands import run

from hydraopt_jax import compression, formats, store
from hydraopt_jax.cli.verbs import VERBS
from hydraopt_jax.demo import main as demo

SCHEMAS = json.loads((Path(__file__).parents[1] / "docs" / "schemas.json").read_text())


def check(verb, payload):
    jsonschema.Draft202012Validator({**SCHEMAS, "$ref": f"#/$defs/{verb}"}).validate(payload)


def ok(capsys, verb, *arguments):
    code, out, _ = run(capsys, verb, *arguments, "--json")
    assert code == 0
    said = json.loads(out)
    assert said["schema"] == f"hydraopt.{verb}/1"
    check(verb, said)
    return said


def test_schemas_are_schemas():
    jsonschema.Draft202012Validator.check_schema(SCHEMAS)
    assert set(VERBS) <= set(SCHEMAS["$defs"])


def test_output_of_stores(capsys, folders, tmp_path):
    s = tmp_path / "s"
    ok(capsys, "compress", *folders[:3], "--out", s, "--max-error", "0.05")
    ok(capsys, "compress", *folders[:3], "--out", tmp_path / "d", "--dry-run")
    ok(capsys, "compress", *folders[:3], "--out", tmp_path / "l", "--budget", "1")
    ok(
        capsys,
        "compress",
        *folders[:2],
        "--out",
        tmp_path / "h",
        "--form",
        "hydra",
        "--heads",
        "1",
    )
    ok(capsys, "inspect", s, "--references", "--verbose")
    ok(capsys, "inspect", tmp_path / "h")
    ok(capsys, "verify", s)
    ok(capsys, "verify", s, *folders[:3])
    ok(capsys, "export", s, "--task", "one", "--rank", "2", "--out", tmp_path / "x")
    ok(capsys, "add", s, folders[3], "--estimate")
    ok(capsys, "remove", s, "one")
    ok(capsys, "remove", s, "--purge")
    ok(capsys, "pack", s, tmp_path / "s.safetensors")
    ok(capsys, "unpack", tmp_path / "s.safetensors", tmp_path / "u")


@pytest.mark.parametrize("name", ["s", "s.safetensors"])
def test_a_damaged_store_is_a_failed_check(capsys, small, tmp_path, name):
    path = tmp_path / name
    store.save(path, compression.compress(small[:2], budget=1))
    file = max((x for x in (path, *path.rglob("*")) if x.is_file()), key=lambda x: x.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, out, err = run(capsys, "verify", path, "--json")
    said = json.loads(out)
    check("verify", said)
    assert (code, said["checksums"], said["ok"]) == (1, "wrong", False)
    assert err == f"hydraopt: {said['damage']}\n"
    assert run(capsys, "verify", path)[:2] == (1, "")
    assert run(capsys, "export", path, "--all", "--out", tmp_path / "x")[0] == 2
    assert run(capsys, "verify", tmp_path / "none", "--json")[:2] == (2, "")


def test_output_of_collections(capsys, folders, tmp_path):
    ok(capsys, "similarity", *folders)
    ok(capsys, "frontier", *folders, "--budget", "0.6", "--baselines", "ties")
    ok(capsys, "merge", *folders, "--out", tmp_path / "m", "--weight", "one=2")


def test_output_of_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr("hydraopt_jax.report.can_plot", lambda: False)
    said = demo.run_demo(tmp_path / "demo", tasks=["inflect-en", "inflect-de"], budgets=(0.5,), items=2)
    assert said["plot"] is None
    assert not (tmp_path / "demo" / "tradeoff.png").exists()
    assert formats.read_adapter(tmp_path / "demo" / "exported" / said["exported"]["task"]).a
    check("demo", {"schema": "hydraopt.demo/1", **said})


def test_an_unknown_field_is_found():
    with pytest.raises(jsonschema.ValidationError):
        check(
            "pack", {"schema": "hydraopt.pack/1", "store": "s", "bytes_before": 1, "bytes_after": 1, "x": 1}
        )
