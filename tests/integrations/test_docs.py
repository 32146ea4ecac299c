"""What the pages on vLLM, PEFT and image models tell a user to type works; vllm and curl are left out."""

import glob
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from commands import run
from safetensors.numpy import save_file

from hydraopt_jax import calibration, formats, store, synthetic

DOCS = Path(__file__).parents[2] / "docs"
PYTHON = re.compile(r"```python\n(.*?)```", re.S)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where a user is: with two adapters of org/base."""
    monkeypatch.chdir(tmp_path)
    modules = synthetic.transformer_modules(2, 64, 32)
    for x in synthetic.collection(1, tasks=["legal", "medical"], modules=modules, rank=8, likeness=0.6):
        named = x.replace(config={**x.config, "base_model_name_or_path": "org/base"})
        formats.write_adapter(tmp_path / "adapters" / x.task, named)
    return tmp_path


def type_commands(capsys, page):
    """Run a page's `hydraopt` commands and return its Python."""
    text = (DOCS / page).read_text()
    for line in re.findall(r"^    hydraopt (.*)$", text, re.M):
        words = [y for x in shlex.split(line) for y in (sorted(glob.glob(x)) if glob.has_magic(x) else [x])]
        status, _, error = run(capsys, *words)
        assert status == 0, error
    return "\n".join(PYTHON.findall(text))


def test_serving(place, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "home"))
    code = type_commands(capsys, "serving-vllm.md")
    names: dict = {}
    exec(code, names)
    assert "True ['adapter_config.json', 'adapter_model.safetensors']" in capsys.readouterr().out
    assert (place / "home/hydraopt_jax/tasks") in names["path"].parents
    assert {x.name for x in (place / "folders").iterdir()} == {"legal", "medical"}


def test_image_files(place, capsys):
    rng = np.random.default_rng(0)
    (place / "loras").mkdir()
    for task in ("cat", "dog"):
        tensors = {}
        for n in range(2):
            module = f"lora_unet_mid_block_attentions_0_transformer_blocks_{n}_attn1_to_q"
            tensors[f"{module}.lora_down.weight"] = rng.normal(size=(8, 320)).astype(np.float16)
            tensors[f"{module}.lora_up.weight"] = rng.normal(size=(320, 8)).astype(np.float16)
            tensors[f"{module}.alpha"] = np.array(4, np.float16)
        save_file(tensors, place / "loras" / f"{task}.safetensors")
    assert type_commands(capsys, "image-files.md") == ""
    found, first = (formats.read_adapter(f"{x}.safetensors") for x in ("cat-again", "loras/cat"))
    for name in first.a:
        wanted = first.a[name].astype(np.float32) @ first.b[name]
        off = found.a[name].astype(np.float32) @ found.b[name] - wanted
        assert 0 < (off**2).sum() < 0.9 * (wanted**2).sum()
    assert (place / "loras-again/dog/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_peft(tmp_path, monkeypatch, capsys):
    for name in ("torch", "transformers", "tokenizers", "peft"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    setup, *rest = PYTHON.findall((DOCS / "peft.md").read_text())
    exec(setup, {})
    type_commands(capsys, "peft.md")
    names: dict = {}
    exec("\n".join(rest), names)
    assert "Sec" in capsys.readouterr().out
    assert list(names["model"].peft_config) == ["legal"]
    one, pooled = (calibration.read_moments(x) for x in ("calibration.safetensors", "pooled.safetensors"))
    assert (
        one.keys() == {x for x in pooled if not x.endswith(":output")} == set(store.open("calibrated").shapes)
    )
