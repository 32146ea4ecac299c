"""NaN, infinities and halves of characters are one line and exit status 2, wherever JSON is read."""

import gzip
import json
import os

import numpy as np
import pytest
from commands import run

import hydraopt_jax as hydra
from hydraopt_jax import formats, strict_json, synthetic
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.jobs import place

ASKED = [["--form", "hydra", "--heads", "1"], ["--budget", "0.9"], ["--budget", "1"]]
BAD = {
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "-Infinity": b"-Infinity",
    "1e999": b"1e999",
    "an escaped half": rb'"\ud800"',
    "a half the other way": rb'"x\uDFFFx"',
    "a half in bytes": b'"\xed\xa0\x80"',
    "no UTF-8": b'"\xff"',
    "deep": b"[" * 100_000,
    "long": b"1" * 5000,
}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_refused(value):
    with pytest.raises(ValueError, match=r"."):
        strict_json.loads(b'{"a": [1, {"b": ' + value + b"}]}")


@pytest.mark.parametrize(
    "text", ['{"a": [1, -2.5e3, null, true, "\\ud83d\\ude00 ä"]}', "[]", "1e308", '"\\\\ud800"']
)
def test_all_else_is_as_the_standard_library_reads_it(text):
    assert strict_json.loads(text) == strict_json.loads(text.encode()) == json.loads(text)


@pytest.mark.parametrize("options", [*ASKED, ["--dry-run"]])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("field", ["lora_dropout", "base_model_name_or_path"])
def test_a_configuration(capsys, folders, tmp_path, options, value, field):
    file = tmp_path / "in0" / "adapter_config.json"
    config = json.loads(file.read_text())
    config[field] = "HERE"
    file.write_bytes(json.dumps(config).encode().replace(b'"HERE"', value))
    status, said, error = run(capsys, "compress", *folders, "--out", tmp_path / "s", *options)
    assert (status, said) == (2, "")
    assert error.count("\n") == 1
    assert str(file) in error
    assert sorted(x.name for x in tmp_path.iterdir()) == [f"in{n}" for n in range(4)]


@pytest.mark.parametrize("key", ["r", "\ud800"])
def test_a_configuration_made_by_hand(small, key):
    config = {**small[0].config, "more": [{key: "\udfff" if key == "r" else 1}]}
    with pytest.raises(HydraOptError, match=r"configuration is not JSON: .*surrogate"):
        hydra.compress([small[0].replace(config=config), *small[1:]])
    with pytest.raises(HydraOptError, match=r"configuration is not JSON: more\[0\].r is nan"):
        hydra.compress([small[0].replace(config={"more": [{"r": float("nan")}]}), *small[1:]])


@pytest.mark.parametrize("options", ASKED)
def test_names_of_files_that_are_no_utf_8(capsys, small, tmp_path, options):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    formats.write_adapter(odd, small[0])
    status, _, error = run(capsys, "compress", odd, "--out", tmp_path / "s", *options)
    assert status == 2
    assert "is not valid UTF-8: rename it with NAME=ADAPTER" in error
    assert run(capsys, "compress", f"cafe={odd}", "--out", tmp_path / "s", *options)[0] == 0
    assert hydra.open(tmp_path / "s").sources[0].origin.endswith("caf\\udce9")


def test_the_report_of_a_store_made_by_hand(small, tmp_path):
    kept = hydra.compress(small[:1], form=hydra.forms.Hydra(heads=1))
    for value, words in ((np.nan, "report.mine is nan"), ("\ud800", "surrogate"), ({1, 2}, "set")):
        bad = kept.replace(report=kept.report.replace(mine=value))
        with pytest.raises(HydraOptError, match=words):
            hydra.save(tmp_path / "s", bad)
    assert not list(tmp_path.iterdir())


def test_files_of_a_job(tmp_path):
    place.write_json(tmp_path / "job.json", {"a": 1})
    assert place.read_json(tmp_path / "job.json") == {"a": 1}
    for text in ('{"a": ', "", "\x00"):
        (tmp_path / "job.json").write_text(text)
        with pytest.raises(HydraOptError, match=r"is incomplete .*delete"):
            place.read_json(tmp_path / "job.json")


def test_a_manifest(tmp_path):
    made = synthetic.collection(tasks=["x"], modules={"q": (6, 4)}, rank=2, dtype="float32")
    hydra.save(tmp_path / "s", hydra.compress(made, form=hydra.forms.Hydra(heads=1)))
    file = tmp_path / "s" / "manifest.json.gz"
    whole = gzip.decompress(file.read_bytes())
    assert whole.count(b'"digest":""') == 1
    for odd in (b"NaN", rb'"\ud800"'):
        file.write_bytes(gzip.compress(whole.replace(b'"digest":""', b'"digest":' + odd)))
        with pytest.raises(HydraOptError, match="damaged store"):
            hydra.open(tmp_path / "s")
