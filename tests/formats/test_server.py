"""Adapters for servers: one rank, one scale, no patterns; what a server refuses is refused by name."""

import json

import numpy as np
import pytest
from commands import run
from peft_folders import CONFIG, PREFIX, adapter, delta, folder, linear, values

from hydraopt_jax import compression, reading, store
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import read_adapter, server, write_adapter
from hydraopt_jax.formats.peft import contents
from hydraopt_jax.formats.peft_config import module_scale

MIXED = {"layers.0.q": 4, "layers.1.q": 2, "layers.2.q": 2}


def ignoring_patterns(path):
    """Module -> delta as a server has it that reads `r` and `lora_alpha` alone, and makes room for `r`."""
    config = json.loads((path / "adapter_config.json").read_text())
    found = read_adapter(path)
    assert max(x.shape[1] for x in found.a.values()) <= config["r"]
    one = config["lora_alpha"] / config["r"]
    return {n: delta(found, n) / module_scale(config, n) * one for n in found.a}


@pytest.mark.parametrize("asked", [{}, {"padded": True}, {"profile": "vllm"}, {"rank": 8, "padded": True}])
def test_mixed_ranks_are_the_same_with_and_without_patterns(tmp_path, asked):
    source = adapter(MIXED, config=CONFIG | {"r": 4, "lora_alpha": 12})
    fitted = server.fit_server(source, **asked)
    assert fitted.errors == {}
    write_adapter(tmp_path / "out", fitted.adapter)
    for name, found in ignoring_patterns(tmp_path / "out").items():
        np.testing.assert_allclose(found, delta(source, name), rtol=1e-6, atol=1e-6)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["r"] == asked.get("rank", 4)
    assert bool(written["rank_pattern"]) is not bool(asked)


def test_a_module_wider_than_asked_is_cut_to_the_nearest_product(tmp_path):
    source = adapter(MIXED)
    found, errors = server.fit_server(source, rank=2)
    assert list(errors) == ["layers.0.q"]
    u, s, v = np.linalg.svd(delta(source, "layers.0.q"))
    np.testing.assert_allclose(delta(found, "layers.0.q"), u[:, :2] * s[:2] @ v[:2], atol=1e-5)
    assert errors["layers.0.q"] == pytest.approx((s[2:] ** 2).sum() / (s**2).sum())
    np.testing.assert_array_equal(found.a["layers.1.q"], source.a["layers.1.q"])


def test_the_profile_never_exceeds_the_rank_of_the_original():
    wide = adapter({"q": 3, "v": 1}, config=CONFIG)
    found, errors = server.fit_server(wide, profile="vllm")
    assert {x.shape[1] for x in found.a.values()} == {CONFIG["r"]}
    assert set(errors) == {"q"}
    asked = server.fit_server(wide, profile="vllm", rank=3)
    assert {x.shape[1] for x in asked.adapter.a.values()} == {3}
    assert asked.errors == {}


def test_a_zero_delta_stays_zero():
    zero = adapter({"q": 3}).replace(b={"q": np.zeros((3, 3), np.float32)})
    found, errors = server.fit_server(zero, rank=1)
    assert errors == {"q": 0.0}
    assert not delta(found, "q").any()


def test_an_adapter_of_one_rank_is_kept_bit_for_bit(tmp_path):
    first = read_adapter(folder(tmp_path / "in", linear("layers.0.q", dtype=np.float16), use_rslora=True))
    kept = compression.compress([first], budget=1.0)
    reading.export(kept, first.task, tmp_path / "out", profile="vllm")
    files = [(tmp_path / x / "adapter_model.safetensors").read_bytes() for x in ("in", "out")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"extras": {f"{PREFIX}score.weight": np.zeros(2)}},
            r"'t' has full tensors .*, score\.weight, which",
        ),
        (
            {
                "extras": {f"{PREFIX}lm_head.weight": np.zeros(2)},
                "config": CONFIG | {"modules_to_save": ["lm_head"]},
            },
            r"has modules_to_save \(lm_head\) beside its factors, lm_head\.weight",
        ),
        ({"config": CONFIG | {"use_dora": True}}, "is DoRA, which vLLM refuses"),
        ({"layout": {"q": {"kind": "convolution", "kernel": [1]}}}, "adapts the convolution q"),
    ],
)
def test_what_vllm_refuses_is_refused_by_name(change, words):
    with pytest.raises(HydraOptError, match=words):
        server.fit_server(adapter({"q": 2}).replace(**change), profile="vllm")
    server.fit_server(adapter({"q": 2}).replace(**change), rank=2)


@pytest.mark.parametrize(
    ("asked", "words"),
    [({"rank": 0}, "rank = 0: give at least 1"), ({"profile": "x"}, "profile = 'x': choose")],
)
def test_what_is_asked_is_checked(asked, words):
    with pytest.raises(HydraOptError, match=words):
        server.fit_server(adapter({"q": 2}), **asked)


def test_fields_that_promise_tensors_that_are_not_there_are_cleared():
    config = CONFIG | {"modules_to_save": ["score"], "bias": "lora_only", "trainable_token_indices": [1]}
    found, _ = contents(server.fit_server(adapter({"q": 2}, config=config), profile="vllm").adapter)
    assert (found["modules_to_save"], found["bias"], found["trainable_token_indices"]) == (None, "none", None)


@pytest.fixture
def kept(tmp_path):
    """A store of two plain tasks and one with a head."""
    plain = [adapter({"q": 3, "v": 2}, config=CONFIG | {"r": 3}).replace(task=t) for t in ("one", "two")]
    head = plain[0].replace(task="head", extras={f"{PREFIX}score.weight": values(3, 2, 3)})
    store.save(tmp_path / "s.safetensors", compression.compress([*plain, head], budget=1.0))
    return tmp_path / "s.safetensors"


def test_the_command_says_what_was_cut(kept, tmp_path, capsys):
    asked = ("export", kept, "--task", "one", "--rank", "2", "--profile", "vllm", "--out", tmp_path / "o")
    status, said, _ = run(capsys, *asked, "--json")
    payload = json.loads(said)
    assert (status, payload["ranks"]) == (0, {"one": 2})
    assert payload["cut"]["one"]["modules"] == 1
    assert 0 < payload["cut"]["one"]["mean"] == payload["cut"]["one"]["worst"] < 1
    status, said, _ = run(capsys, *asked, "--overwrite")
    assert "one: 1 modules were truncated" in " ".join(said.split())
    status, said, _ = run(
        capsys, "export", kept, "--task", "two", "--rank", "8", "--pad", "--out", tmp_path / "p"
    )
    assert {x.shape[1] for x in read_adapter(tmp_path / "p").a.values()} == {8}


def test_the_command_refuses_before_it_writes(kept, tmp_path, capsys):
    status, said, error = run(capsys, "export", kept, "--all", "--profile", "vllm", "--out", tmp_path / "o")
    assert (status, said) == (2, "")
    assert error.startswith("hydraopt: task 'head' has full tensors")
    assert not (tmp_path / "o").exists()
