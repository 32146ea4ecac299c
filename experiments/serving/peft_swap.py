"""What it takes to put a stored task into a PEFT model, against PEFT's own load of the exported folder.

    pip install '.[peft]' && python -m experiments.serving.peft_swap

One layer of an 8B Llama's shapes, two adapters of rank 16 on its seven modules, coded at an eighth of their
fp16 bytes. Processor seconds, the best of five, which are compared with each other only.
"""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from peft import PeftModel

from hydraopt_jax import compression, reading, store, synthetic
from hydraopt_jax.integrations.peft import load_adapter

RESULT = Path(__file__).with_suffix(".json")
RANK, ROUNDS = 16, 5
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}


def measure(work):
    """The least processor seconds of some rounds."""
    best = float("inf")
    for n in range(ROUNDS):
        start = time.process_time()
        work(n)
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    """Measure and write the JSON."""
    config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=1, **SHAPE)
    base = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    modules = synthetic.transformer_modules(1, 4096, 1024, mlp=14336)
    adapters = synthetic.collection(1, tasks=["one", "two"], modules=modules, rank=RANK, dtype="float16")
    with TemporaryDirectory() as place:
        path = Path(place) / "s.safetensors"
        store.save(path, compression.compress(adapters, budget=0.125))
        reading.export(store.open(path), "one", Path(place) / "one")
        model = PeftModel.from_pretrained(base, Path(place) / "one")
        found = {
            "numbers": sum(x.size for y in (adapters[0].a, adapters[0].b) for x in y.values()),
            "folder": measure(
                lambda n: model.load_adapter(Path(place) / "one", f"f{n}", low_cpu_mem_usage=True)
            ),
            "decode": measure(lambda n: store.decode(store.open(path), "one")),
            "new": measure(lambda n: load_adapter(model, path, "one", name=f"n{n}", any_base=True)),
            "swap": measure(
                lambda n: load_adapter(model, path, "one", name="slot", rank=RANK, any_base=True)
            ),
        }
    found["new_ratio"] = found["new"] / (found["folder"] + found["decode"])
    found["swap_ratio"] = found["swap"] / (found["folder"] + found["decode"])
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
