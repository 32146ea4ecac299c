"""What a stored task costs where it is used: bytes over HTTP, seconds into PEFT, device memory, lines.

    pip install '.[peft,hub]' && python -m experiments.serving.costs --folder /tmp/costs

The folder keeps the stores, which are made where they are missing: four minutes on two cores. Results go to
costs.json. What is measured can be chosen: `http device lines peft`.

Adapters are drawn with the spectra of trained ones and coded at an eighth of their fp16 bytes. Seconds are
processor seconds, the best of some rounds, and are compared with each other only. The model is an 8B Llama's,
32 layers, whose weights are never touched: loading an adapter reads none of them.
"""

import argparse
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import torch
import transformers
from peft import PeftModel

from hydraopt_jax import compression, serving, store, synthetic
from hydraopt_jax.deferred import size_of
from hydraopt_jax.formats import write_adapter
from hydraopt_jax.integrations import peft_model
from hydraopt_jax.integrations.model_card import bytes_of_tasks
from hydraopt_jax.integrations.peft_model import load_adapter

RESULT = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
RANK, ROUNDS, BUDGET = 16, 5, 0.125
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}


class Ranges(BaseHTTPRequestHandler):
    """One file by byte ranges, and the bytes of all answers."""

    protocol_version = "HTTP/1.1"
    content = b""
    sent = 0

    def do_GET(self) -> None:
        """A range of the file."""
        first, last = (int(x) for x in self.headers["Range"].removeprefix("bytes=").split("-"))
        body = self.content[first : last + 1]
        Ranges.sent += len(body)
        self.send_response(206)
        self.send_header("ETag", '"one"')
        self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(self.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *given: Any) -> None:
        """Nothing."""


HUNDRED = synthetic.transformer_modules(4, 512, 128)
ATTENTION = synthetic.transformer_modules(32, 4096, 1024)


def hundred(folder: Path) -> Path:
    """A store of a hundred tasks of rank 8."""
    path = folder / "hundred.safetensors"
    if not path.exists():
        tasks = [f"task-{n}" for n in range(100)]
        given: dict[str, Any] = {"tasks": tasks, "modules": HUNDRED, "rank": 8, "likeness": 0.6}
        adapters = synthetic.collection(2, dtype="float16", **given)
        store.save(path, compression.compress(adapters, budget=BUDGET))
    return path


def llama(folder: Path) -> Path:
    """A store of two tasks of rank 16 on an 8B Llama's attention, and their folders beside it."""
    path = folder / "llama.safetensors"
    if not path.exists():
        given: dict[str, Any] = {"tasks": ["one", "two"], "modules": ATTENTION, "rank": RANK}
        adapters = synthetic.collection(1, dtype="float16", **given)
        for x in adapters:
            write_adapter(folder / x.task, x, overwrite=True)
        store.save(path, compression.compress(adapters, budget=BUDGET))
    return path


def over_http(folder: Path) -> dict[str, Any]:
    """Bytes that one task of a hundred takes, against the headers' and its own."""
    path = hundred(folder)
    whole = store.open(path)
    own = bytes_of_tasks(whole)
    Ranges.content = path.read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/store.safetensors"
    # the file's header and each segment's own
    leaves = sum(size_of(v) for x in whole.segments for v in x.leaves.values())
    headers = path.stat().st_size - leaves
    rows = []
    for task in (whole.tasks[0], whole.tasks[49], whole.tasks[99]):
        Ranges.sent = 0
        found = store.decode(store.open(address), task)
        wanted = store.decode(whole, task)
        assert all((found.b[n] == x).all() for n, x in wanted.b.items())
        ratio = Ranges.sent / (headers + own[task])
        rows.append({"fetched": Ranges.sent, "headers": headers, "task": own[task], "ratio": ratio})
    server.shutdown()
    return {"store": len(Ranges.content), "tasks": len(whole.tasks), "rows": rows}


def on_device(folder: Path) -> dict[str, Any]:
    """Bytes that a store takes on JAX's device, against its adapters' at fp16."""
    path, numbers = hundred(folder), 100 * 8 * sum(map(sum, HUNDRED.values()))
    before = {id(x) for x in jax.live_arrays()}
    modules = serving.load(store.open(path))
    held = sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)
    assert modules
    return {"held": held, "fp16": 2 * numbers, "ratio": held / (2 * numbers)}


def measure(work: Callable[[int], Any]) -> float:
    """The least processor seconds of some rounds."""
    best = float("inf")
    for n in range(ROUNDS):
        start = time.process_time()
        work(n)
        best = min(best, time.process_time() - start)
    return best


def beside_decoding(work: Callable[[int], Any]) -> tuple[float, float]:
    """The least processor seconds of some rounds, in all and beside those that decode within them."""
    decoding: list[float] = []
    rounds = []

    def timed(*given: Any) -> Any:
        start = time.process_time()
        found = store.decode(*given)
        decoding.append(time.process_time() - start)
        return found

    with mock.patch.object(peft_model, "decode", timed):
        for n in range(ROUNDS):
            decoding.clear()
            start = time.process_time()
            work(n)
            whole = time.process_time() - start
            rounds.append((whole, whole - sum(decoding)))
    return min(x for x, _ in rounds), min(x for _, x in rounds)


def into_model(model: Any, path: Path, tasks: Sequence[str], given: Callable[[int], Any], n: int) -> None:
    """Load one of two tasks into a PEFT model, in turn."""
    load_adapter(model, path, tasks[n % 2], **given(n))


def into_peft(folder: Path) -> dict[str, Any]:
    """Seconds of a swap in a PEFT model, against PEFT's own load of the adapter's folder and the decoder."""
    path = llama(folder)
    config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=32, **LLAMA)
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    # memory that is never written takes none
    base = base.to_empty(device="cpu")
    model = PeftModel.from_pretrained(base, folder / "one", low_cpu_mem_usage=True)
    tasks = ("one", "two")
    given: dict[str, Any] = {"name": "slot", "rank": RANK, "any_base": True}
    found = {
        "numbers": RANK * sum(map(sum, ATTENTION.values())),
        "store": path.stat().st_size,
        "folder": measure(
            lambda n: model.load_adapter(folder / tasks[n % 2], f"f{n}", low_cpu_mem_usage=True)
        ),
        "decode": measure(lambda n: store.decode(store.open(path), tasks[n % 2])),
    }
    names: dict[str, Callable[[int], dict[str, Any]]] = {
        "new": lambda n: {"name": f"n{n}", "any_base": True},
        "swap": lambda n: given,
    }
    for what, more in names.items():
        load = functools.partial(into_model, model, path, tasks, more)
        found[what], beside = beside_decoding(load)
        found[f"{what}_beside_decoding"] = beside / found["folder"]
    # its weights are what the decoder gives
    layer = model.get_submodule("base_model.model.model.layers.31.self_attn.v_proj")
    wanted = store.decode(store.open(path), tasks[(ROUNDS - 1) % 2])
    delta = (layer.lora_B["slot"].weight @ layer.lora_A["slot"].weight).T * layer.scaling["slot"]
    name = "model.layers.31.self_attn.v_proj"
    exact = torch.from_numpy(wanted.a[name].astype("float32") @ wanted.b[name].astype("float32"))
    found["off"] = float((delta - exact).abs().max() / exact.abs().max())
    return found


def lines_to_type(folder: Path) -> int:
    """Lines of the page's example from imports to the answer, without the lines that make a model to try."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[1]
    return len([x for x in code.splitlines() if x.strip()])


PARTS: dict[str, Callable[[Path], Any]] = {
    "http": over_http,
    "device": on_device,
    "lines": lines_to_type,
    "peft": into_peft,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default="all", choices=["all", *PARTS])
    parser.add_argument("--folder", type=Path, required=True, help="where the stores are kept")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for part in PARTS if "all" in given.parts else given.parts:
        found[part] = PARTS[part](given.folder)
        print(part, json.dumps(found[part]), flush=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
