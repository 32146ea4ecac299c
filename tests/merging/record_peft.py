"""What PEFT's own merging makes of small seeded adapters, recorded for test_peft_parity.py.

    python tests/merging/record_peft.py

writes golden/peft.npz beside this file. Needs torch and peft; recorded with peft 0.21.2 and torch 2.13.0.
"""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "peft.npz"
INPUTS, OUTPUTS, TASKS = 12, 9, 3
WEIGHTS = [0.7, 0.5, 1.2]
SIGNED = [0.7, -0.5, 1.2]
# rank and alpha of each adapter: alike, as PEFT's sums of factors need them; and not
ALIKE = [(3, 6), (3, 6), (3, 6)]
UNEVEN = [(2, 6), (3, 3), (4, 10)]
DENSITY = 0.4


def functions() -> dict[str, np.ndarray]:
    """Results of peft.utils.merge_utils on three matrices."""
    import torch
    from peft.utils import merge_utils

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(OUTPUTS, INPUTS, generator=generator) for _ in range(TASKS)]
    weights = torch.tensor(WEIGHTS)
    out = {"tensors": torch.stack(tensors)}
    out["magnitude"] = merge_utils.magnitude_prune(tensors, weights, DENSITY)
    for elect in ("total", "frequency"):
        out[f"ties {elect}"] = merge_utils.ties(tensors, weights, DENSITY, elect)
    torch.manual_seed(1)
    out["masks"] = torch.stack([torch.bernoulli(torch.full_like(x, DENSITY)) for x in tensors])
    torch.manual_seed(1)
    out["dare"] = merge_utils.dare_linear(tensors, weights, DENSITY)
    for elect in ("total", "frequency"):
        torch.manual_seed(1)
        out[f"dare-ties {elect}"] = merge_utils.dare_ties(tensors, weights, DENSITY, elect)
    return {k: v.numpy() for k, v in out.items()}


def adapters(shapes: list[tuple[int, int]], cases: dict[str, tuple[list[float], dict]]) -> dict:
    """Factors of seeded adapters of one linear layer, and the deltas of what PEFT merges them to."""
    import peft
    import torch

    model = torch.nn.Sequential()
    model.add_module("q", torch.nn.Linear(INPUTS, OUTPUTS))
    generator = torch.Generator().manual_seed(2)
    for t, (rank, alpha) in enumerate(shapes):
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q"])
        if t:
            model.add_adapter(str(t), config)
        else:
            model = peft.get_peft_model(model, config, adapter_name="0")
    layer = model.base_model.model.q
    out = {}
    for t in range(len(shapes)):
        for side, module in (("a", layer.lora_A), ("b", layer.lora_B)):
            weight = module[str(t)].weight
            weight.data = torch.randn(weight.shape, generator=generator)
            out[f"{side}{t}"] = weight.data.numpy().copy()
    names = [str(t) for t in range(len(shapes))]
    for n, (case, (weights, options)) in enumerate(cases.items()):
        model.add_weighted_adapter(names, weights, f"merged{n}", **options)
        out[case] = layer.get_delta_weight(f"merged{n}").detach().numpy()
    return out


def record() -> dict[str, np.ndarray]:
    """All recorded arrays by name."""
    import warnings

    pruned = {"density": DENSITY, "svd_rank": 4}
    alike = {
        "linear": (WEIGHTS, {"combination_type": "linear"}),
        "linear signed": (SIGNED, {"combination_type": "linear"}),
        "ties": (WEIGHTS, {"combination_type": "ties", "density": DENSITY}),
        "ties_svd": (WEIGHTS, {"combination_type": "ties_svd", **pruned}),
        "magnitude_prune_svd": (WEIGHTS, {"combination_type": "magnitude_prune_svd", **pruned}),
    }
    uneven = {
        "svd": (WEIGHTS, {"combination_type": "svd"}),
        "svd signed": (SIGNED, {"combination_type": "svd", "svd_rank": 2}),
        "cat": (SIGNED, {"combination_type": "cat"}),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = {
            "functions": functions(),
            "alike": adapters(ALIKE, alike),
            "uneven": adapters(UNEVEN, uneven),
        }
    return {f"{part}/{k}": v for part, rows in parts.items() for k, v in rows.items()}


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **record())
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")
