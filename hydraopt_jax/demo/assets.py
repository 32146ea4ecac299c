"""The trained base, the adapters and the held-out sample: reading and writing their files."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import safe_open
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from safetensors.numpy import save_file

from hydraopt_jax.demo.model import PROJECTIONS, Base, Config, Lora
from hydraopt_jax.demo.tasks import Item, characters, features, phonemes
from hydraopt_jax.demo.vocabulary import Vocabulary, from_tokens

DATA = Path(__file__).with_name("data")
BASE_NAME = "hydraopt-jax/morphology-base"
BASE_FILE = DATA / "base.safetensors"
ADAPTERS_FILE = DATA / "adapters-shared.zip"
SAMPLE_FILE = DATA / "held-out.tsv.gz"
_PREFIX = "base_model.model."
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a fixed date, so that the same adapters give the same archive


def save_base(path: Path, base: Base, vocabulary: Vocabulary) -> None:
    """Writes fp16 weights, with the sizes and the vocabulary in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"config": json.dumps(base.config._asdict()), "vocabulary": json.dumps(vocabulary.tokens)}
    save_file({k: np.asarray(v, np.float16) for k, v in base.params.items()}, path, metadata=header)


def load_base(path: Path = BASE_FILE) -> Base:
    """The trained transformer, in fp32."""
    with safe_open(path, "numpy") as file:
        params = {k: jnp.asarray(file.get_tensor(k), jnp.float32) for k in sorted(file.keys())}
        return Base(params, Config(**json.loads(file.metadata()["config"])))


def load_vocabulary(path: Path = BASE_FILE) -> Vocabulary:
    """The tokens the base was trained with."""
    with safe_open(path, "numpy") as file:
        return from_tokens(json.loads(file.metadata()["vocabulary"]))


def _peft_files(lora: Lora, alpha: float) -> dict[str, bytes]:
    """One adapter in PEFT's layout; `b` comes without the scale, which is alpha / rank."""
    tensors = {}
    for name, (a, b) in lora.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(np.asarray(a, np.float16).T)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(np.asarray(b, np.float16).T)
    rank = next(iter(lora.values()))[0].shape[1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE_NAME,
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


def save_adapters(path: Path, adapters: dict[str, Lora], alpha: float) -> None:
    """PEFT folders, one a task: in an archive if `path` ends in .zip, else below the folder `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {f"{t}/{n}": c for t, lora in adapters.items() for n, c in _peft_files(lora, alpha).items()}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name, content in files.items():
                entry = zipfile.ZipInfo(name, _EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, content)
        return
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def unpack_adapters(path: Path, folder: Path) -> list[Path]:
    """Takes the PEFT folders out of an archive; returns them in the archive's order."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
        return [folder / name for name in dict.fromkeys(entry.split("/")[0] for entry in archive.namelist())]


def _peft_factors(config: bytes, tensors: bytes) -> dict[str, tuple[Array, Array]]:
    """`(a [I, R], b [R, O])` of every module in fp32, alpha / rank folded into `b`."""
    settings = json.loads(config)
    scale = settings["lora_alpha"] / settings["r"]
    found = load_tensors(tensors)
    names = sorted(k.removesuffix(".lora_A.weight") for k in found if k.endswith(".lora_A.weight"))
    return {
        name.removeprefix(_PREFIX): (
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
                out[task] = _peft_factors(config, tensors)
    else:
        for folder in sorted(p.parent for p in path.glob(f"*/{names[0]}")):
            config, tensors = ((folder / name).read_bytes() for name in names)
            out[folder.name] = _peft_factors(config, tensors)
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
        "\t".join((name, _join(item.input), _join(item.output)))
        for name, rows in items.items()
        for item in rows
    ]
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as file:
        file.write(("\n".join(lines) + "\n").encode())
    path.write_bytes(buffer.getvalue())


def load_sample(path: Path = SAMPLE_FILE) -> dict[str, list[Item]]:
    """Held-out items of each task, as `save_sample` wrote them."""
    out: dict[str, list[Item]] = {}
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        name, asked, wanted = line.split("\t")
        out.setdefault(name, []).append(Item(_split(asked), _split(wanted)))
    return out


def _join(tokens: tuple[str, ...]) -> str:
    letters = "".join(t for t in tokens if ":" not in t[1:])
    bundle = ";".join(t.removeprefix("feature:") for t in tokens if t.startswith("feature:"))
    sounds = " ".join(t.removeprefix("phoneme:") for t in tokens if t.startswith("phoneme:"))
    return "|".join((letters, bundle, sounds))


def _split(text: str) -> tuple[str, ...]:
    letters, bundle, sounds = text.rsplit("|", 2)
    return characters(letters) + (features(bundle) if bundle else ()) + phonemes(sounds)
