"""Files of the trained base, its adapters and the held-out sample, as the training writes them.

`hydraopt_jax.demo.assets` reads what ships.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from safetensors.numpy import save_file

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.demo.assets import ADAPTERS_FILE
from hydraopt_jax.demo.model import PROJECTIONS, Base, Lora
from hydraopt_jax.demo.tasks import Item
from hydraopt_jax.demo.vocabulary import Vocabulary

PREFIX = "base_model.model."
# a fixed date, so that the same adapters give the same archive
EPOCH = (1980, 1, 1, 0, 0, 0)


def save_base(path: Path, base: Base, vocabulary: Vocabulary) -> None:
    """Writes fp16 weights, with the sizes and the vocabulary in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"config": json.dumps(base.config._asdict()), "vocabulary": json.dumps(vocabulary.tokens)}
    save_file({k: np.asarray(v, np.float16) for k, v in base.params.items()}, path, metadata=header)


def revision_of(base: Base) -> str:
    """Digest of a base's weights as they are saved."""
    digest = hashlib.sha256()
    for name in sorted(base.params):
        digest.update(np.asarray(base.params[name], np.float16).tobytes())
    return digest.hexdigest()[:16]


def check_base(adapters: Sequence[Adapter], base: Base) -> None:
    """Raises SystemExit unless the adapters were trained on the base; those that ship do not say on which."""
    own = revision_of(base)
    for x in adapters:
        if x.config.get("revision") not in (None, own):
            raise SystemExit(f"{x.task}: trained on another base than --base: give that one")


def peft_files(lora: Lora, alpha: float, revision: str | None) -> dict[str, bytes]:
    """One adapter in PEFT's layout; `b` comes without the scale, which is alpha / rank."""
    tensors = {}
    for name, (a, b) in lora.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(np.asarray(a, np.float16).T)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(np.asarray(b, np.float16).T)
    rank = next(iter(lora.values()))[0].shape[1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "hydraopt-jax/morphology-base",
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(PROJECTIONS),
    }
    text = json.dumps(config, indent=2) + "\n"
    return {"adapter_config.json": text.encode(), "adapter_model.safetensors": save_tensors(tensors)}


def save_adapters(path: Path, adapters: dict[str, Lora], alpha: float, revision: str | None = None) -> None:
    """PEFT folders, one a task: in an archive if `path` ends in .zip, else below the folder `path`.

    Args:
        revision: of their base, see `revision_of`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {
        f"{t}/{n}": c for t, lora in adapters.items() for n, c in peft_files(lora, alpha, revision).items()
    }
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name, content in files.items():
                entry = zipfile.ZipInfo(name, EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, content)
        return
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def peft_factors(config: bytes, tensors: bytes) -> dict[str, tuple[Array, Array]]:
    """`(a [I, R], b [R, O])` of every module in fp32, alpha / rank folded into `b`."""
    settings = json.loads(config)
    scale = settings["lora_alpha"] / settings["r"]
    found = load_tensors(tensors)
    names = sorted(k.removesuffix(".lora_A.weight") for k in found if k.endswith(".lora_A.weight"))
    return {
        name.removeprefix(PREFIX): (
            jnp.asarray(found[f"{name}.lora_A.weight"].T, jnp.float32),
            jnp.asarray(found[f"{name}.lora_B.weight"].T, jnp.float32) * scale,
        )
        for name in names
    }


def load_adapters(path: Path = ADAPTERS_FILE) -> dict[str, Lora]:
    """Adapters of an archive or of a folder of PEFT folders: task -> module -> `(a [I, R], b [R, O])`.

    Raises:
        FileNotFoundError: there is no adapter at `path`.
    """
    names = ("adapter_config.json", "adapter_model.safetensors")
    out: dict[str, Lora] = {}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for task in dict.fromkeys(entry.split("/")[0] for entry in archive.namelist()):
                config, tensors = (archive.read(f"{task}/{name}") for name in names)
                out[task] = peft_factors(config, tensors)
    else:
        for folder in sorted(p.parent for p in path.glob(f"*/{names[0]}")):
            config, tensors = ((folder / name).read_bytes() for name in names)
            out[folder.name] = peft_factors(config, tensors)
    if not out:
        raise FileNotFoundError(f"{path}: no PEFT folder in it (looked for */{names[0]})")
    return out


def stack_adapters(adapters: dict[str, Lora]) -> Lora:
    """Adapters of equal shapes with a task axis in front: module -> `(a [T, I, R], b [T, R, O])`."""
    loras = list(adapters.values())
    return {
        name: (jnp.stack([lora[name][0] for lora in loras]), jnp.stack([lora[name][1] for lora in loras]))
        for name in loras[0]
    }


def save_sample(path: Path, items: dict[str, list[Item]]) -> None:
    """Held-out items as gzipped `task TAB input TAB output`, tokens separated by spaces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        "\t".join((name, joined(item.input), joined(item.output)))
        for name, rows in items.items()
        for item in rows
    ]
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as file:
        file.write(("\n".join(lines) + "\n").encode())
    path.write_bytes(buffer.getvalue())


def joined(tokens: tuple[str, ...]) -> str:
    """Tokens as text: letters, features and phonemes, with bars between."""
    letters = "".join(t for t in tokens if ":" not in t[1:])
    bundle = ";".join(t.removeprefix("feature:") for t in tokens if t.startswith("feature:"))
    sounds = " ".join(t.removeprefix("phoneme:") for t in tokens if t.startswith("phoneme:"))
    return "|".join((letters, bundle, sounds))
