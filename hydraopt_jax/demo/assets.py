"""The files of the trained base, of its adapters and of the held-out sample."""

import gzip
import json
import zipfile
from pathlib import Path

import jax.numpy as jnp
from safetensors import safe_open

from hydraopt_jax.demo.model import Base, Config
from hydraopt_jax.demo.tasks import Item, characters, features, phonemes
from hydraopt_jax.demo.vocabulary import Vocabulary, from_tokens

DATA = Path(__file__).with_name("data")
BASE_FILE = DATA / "base.safetensors"
ADAPTERS_FILE = DATA / "adapters-shared.zip"
SAMPLE_FILE = DATA / "held-out.tsv.gz"


def load_base(path: Path = BASE_FILE) -> Base:
    """The trained transformer in float32."""
    with safe_open(path, "numpy") as file:
        params = {k: jnp.asarray(file.get_tensor(k), jnp.float32) for k in sorted(file.keys())}
        return Base(params, Config(**json.loads(file.metadata()["config"])))


def load_vocabulary(path: Path = BASE_FILE) -> Vocabulary:
    """The vocabulary that the base was trained with."""
    with safe_open(path, "numpy") as file:
        return from_tokens(json.loads(file.metadata()["vocabulary"]))


def unpack_adapters(path: Path, folder: Path) -> list[Path]:
    """Paths of the PEFT folders of an archive, extracted to `folder`, in the archive's order."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
        return [folder / name for name in dict.fromkeys(entry.split("/")[0] for entry in archive.namelist())]


def load_sample(path: Path = SAMPLE_FILE) -> dict[str, list[Item]]:
    """Held-out items of each task, as `save_sample` of experiments/morphology wrote them."""
    out: dict[str, list[Item]] = {}
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        name, asked, wanted = line.split("\t")
        out.setdefault(name, []).append(Item(_split(asked), _split(wanted)))
    return out


def _split(text: str) -> tuple[str, ...]:
    letters, bundle, sounds = text.rsplit("|", 2)
    return characters(letters) + (features(bundle) if bundle else ()) + phonemes(sounds)
