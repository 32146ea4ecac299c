"""Loads exports of a store with PEFT into transformers and compares greedy answers with those of `compare`.

    python -m experiments.llm.peft_answers --data DATA --regime shared --row "budget 0.125"

Needs the extras llm and peft (and accelerate, with which transformers reads the wheel's GGUF). Compares
tasks that generate freely, since classification is restricted to labels here. Writes results/peft-
REGIME.json: items per task, and how many answers differ.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from experiments.llm import adapters, stores
from experiments.llm.base import DEFAULT, Base, load_base, wheel_path
from experiments.llm.compare import slug_of, stored_answers, stores_folder
from experiments.llm.decoding import LONGEST_ANSWER
from experiments.llm.tasks import TASKS, load_sequences

HERE = Path(__file__).parent


def load_reference(name: str) -> Any:
    """transformers' model of the base, in fp32."""
    import torch
    import transformers

    kind = transformers.AutoModelForCausalLM
    if name == DEFAULT:
        path = wheel_path()
        return kind.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    return kind.from_pretrained(name, dtype=torch.float32).eval()


def generate(reference: Any, base: Base, prompt: list[int]) -> list[int]:
    """Its greedy answer to `prompt`, with the id that ends it if it ends."""
    import torch

    given = torch.tensor([prompt])
    limits = {"max_new_tokens": LONGEST_ANSWER, "eos_token_id": base.stop, "pad_token_id": base.stop}
    with torch.no_grad():
        out = reference.generate(given, attention_mask=torch.ones_like(given), do_sample=False, **limits)
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    from peft import PeftModel

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' files (see sources)")
    parser.add_argument("--base", default=DEFAULT, help="hub id or folder of a Llama-architecture model")
    parser.add_argument("--regime", choices=adapters.REGIMES, required=True)
    parser.add_argument(
        "--row", required=True, help="a row of compare that is a store on disk, such as 'budget 0.125'"
    )
    parser.add_argument("--adapters", type=Path, default=HERE / "adapters", help="where train wrote")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--collection", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument(
        "--tasks", nargs="*", default=["en-fr", "typos", "shell"], choices=list(TASKS), help="exports"
    )
    parser.add_argument("--items", type=int, default=20)
    given = parser.parse_args(argv)
    base = load_base(given.base)
    collection = stores.read_collection(given.adapters / given.regime, given.collection)
    found = {}
    for name in given.tasks:
        sequences = load_sequences(TASKS[name], given.data, base.tokenizer, base.stop)["test"][: given.items]
        answers = stored_answers(collection, given.row, name)
        with tempfile.TemporaryDirectory() as folder:
            stores.export(stores_folder(collection) / slug_of(given.row), name, Path(folder) / name)
            adapted = PeftModel.from_pretrained(load_reference(given.base), Path(folder) / name)
            differing = sum(
                generate(adapted, base, s.prompt) != answer
                for s, answer in zip(sequences, answers, strict=False)
            )
        found[name] = {"items": len(sequences), "differing": differing}
        print(f"{name}: {len(sequences)} items, {differing} answers differ", flush=True)
    path = given.results / f"peft-{given.regime}.json"
    path.write_text(
        json.dumps({"row": given.row, "adapters": stores.digest(collection), "tasks": found}) + "\n"
    )


if __name__ == "__main__":
    main()
