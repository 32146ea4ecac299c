"""One worker of merge_vs_peft.py, run by an interpreter that has peft: PEFT's own merging, timed.

    python peft_merge.py ADAPTERS OUT

ADAPTERS is a folder of PEFT folders. Merges them with each combination type, prints wall-clock and
processor seconds as JSON and saves each result below OUT. Reading and saving are outside the times.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open

CASES: dict[str, dict[str, Any]] = {
    "linear": {"combination_type": "linear"},
    "svd": {"combination_type": "svd", "svd_rank": 16},
    "ties": {"combination_type": "ties", "density": 0.2},
    "ties_svd": {"combination_type": "ties_svd", "density": 0.2, "svd_rank": 16},
}


def empty_model(folder: Path) -> torch.nn.Module:
    """Linear layers of the names and shapes that an adapter has, and nothing else."""
    model = torch.nn.Module()
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        keys = [k for k in file.keys() if k.endswith("lora_A.weight")]  # noqa: SIM118
        for key in keys:
            *path, name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight").split(".")
            outputs = file.get_slice(key.replace("lora_A", "lora_B")).get_shape()[0]
            at = model
            for part in path:
                at.add_module(part, getattr(at, part, torch.nn.Module()))
                at = getattr(at, part)
            at.add_module(name, torch.nn.Linear(file.get_slice(key).get_shape()[1], outputs, bias=False))
    return model


def main() -> None:
    warnings.simplefilter("ignore")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(1)
    folders = sorted(Path(sys.argv[1]).iterdir())
    # names that no part of a module's name begins with: PEFT cuts ".NAME" out of the keys it saves
    names = [f"adapter-{t}" for t in range(len(folders))]
    model = peft.PeftModel.from_pretrained(empty_model(folders[0]), folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    weights = {"ties": 1.0, "ties_svd": 1.0}
    seconds = {}
    for case, options in CASES.items():
        start = time.perf_counter(), time.process_time()
        model.base_model.add_weighted_adapter(
            names, [weights.get(case, 1 / len(names))] * len(names), f"merged-{case}", **options
        )
        seconds[case] = time.perf_counter() - start[0], time.process_time() - start[1]
        model.save_pretrained(Path(sys.argv[2]) / case, selected_adapters=[f"merged-{case}"])
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
