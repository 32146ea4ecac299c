"""Collections that are generated as they are read: no files unless `write` makes them."""

import argparse
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from hydraopt_jax import synthetic
from hydraopt_jax.collection import Card, Collection, ModuleEntry, Pair
from hydraopt_jax.store.lossless import Raw

MODELS = {
    "0.5b": synthetic.transformer_modules(24, 896, 128),
    "narrow": {f"model.layers.{n}.q_proj": (64, 64) for n in range(4)},
    "slice": {f"model.layers.{n}.q_proj": (2048, 2048) for n in range(4)},
    "8b": synthetic.transformer_modules(32, 4096, 1024, mlp=14336),
}


def model(name: str, layers: int | None = None) -> dict[str, tuple[int, int]]:
    """Module -> (I, O) of a model, or of its first layers."""
    modules = MODELS[name]
    count = len({x.split(".")[2] for x in modules})
    return dict(list(modules.items())[: len(modules) // count * (layers or count)])


def collection(
    tasks: int, modules: Mapping[str, tuple[int, int]], rank: int = 16, seed: int = 0
) -> Collection:
    """Seeded bfloat16 adapters: half of each input factor's energy is common to all tasks; direction r of an
    adapter has amplitude (r + 1)^-1.5, about as in trained ones.

    Args:
      tasks: T.
      modules: module -> (I, O).
      rank: R.
      seed: of everything.
    """
    decay = (np.arange(1, rank + 1, dtype=np.float32) ** -1.5)[None, :]
    table = {m: ModuleEntry("", "", i, o, rank, 2.0) for m, (i, o) in modules.items()}
    common: dict[str, np.ndarray] = {}

    def shared(name: str) -> np.ndarray:
        if name not in common:
            common.clear()
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            common[name] = rng.standard_normal((rank, modules[name][0]), np.float32)
        return common[name]

    def read(task: int, names: Sequence[str]) -> list[Pair]:
        out: list[Pair] = []
        for name in names:
            inputs, outputs = modules[name]
            rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode()), task + 1]))
            a = rng.standard_normal((rank, inputs), np.float32)
            a += shared(name)
            b = rng.standard_normal((outputs, rank), np.float32)
            b *= decay / np.float32(inputs)
            out.append((a.astype(ml_dtypes.bfloat16), b.astype(ml_dtypes.bfloat16), 2.0))
        return out

    def raw(task: int, name: str) -> Raw:
        ((a, b, scale),) = read(task, [name])
        return Raw(a.T, b.T, scale)

    # cards that name a file are taken to have their factors as files have them, bfloat16 and a scale beside
    cards = tuple(
        Card(f"task-{t:05d}", table, [], "bfloat16", {}, {}, f"generated {t}", f"{seed}-{t}", "generated")
        for t in range(tasks)
    )
    size = sum(2 * tasks * rank * (i + o) for i, o in modules.values())
    return Collection(cards, dict(modules), read, lambda task: {}, raw, size)


def options(parser: argparse.ArgumentParser, model: str, layers: int | None, tasks: int) -> None:
    """What scripts ask that put a generated collection on disk, with their defaults."""
    parser.add_argument("--model", choices=MODELS, default=model)
    parser.add_argument("--layers", type=int, default=layers, help="only the first layers")
    parser.add_argument("--tasks", type=int, default=tasks)
    parser.add_argument(
        "--inputs", metavar="FOLDER", help="keep the adapters there, take those that are there"
    )
    parser.add_argument("--json", metavar="FILE")


def on_disk(arguments: argparse.Namespace, spare: Path) -> list[Path]:
    """The adapters that the `options` ask for, in the folder that they name or else in another one."""
    found = collection(arguments.tasks, model(arguments.model, arguments.layers))
    folders = [Path(arguments.inputs or spare) / x for x in found.tasks]
    for n, folder in enumerate(folders):
        if not folder.exists():
            write(found, n, folder)
    return folders


def write(found: Collection, task: int, folder: Path) -> None:
    """Write an adapter of a generated collection as PEFT does."""
    folder.mkdir(parents=True)
    names = list(found.shapes)
    rank = found.rank(names[0], task)
    tensors: dict[str, np.ndarray] = {}
    for name, (a, b, _) in zip(names, found.read(task, names), strict=True):
        tensors |= {f"base_model.model.{name}.lora_{k}.weight": x for k, x in (("A", a), ("B", b))}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({x.rsplit(".", 1)[1] for x in names}),
        "base_model_name_or_path": "generated",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
