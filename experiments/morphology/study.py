"""What studies of calibrated stores share: the forty adapters, their second moments, unseen prompts."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.morphology import outputs
from experiments.morphology.config import Data, Refining
from experiments.morphology.dataset import load_items
from hydraopt_jax import formats, refinement
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.demo.assets import ADAPTERS_FILE, BASE_FILE, load_base, load_vocabulary, unpack_adapters
from hydraopt_jax.demo.model import forward
from hydraopt_jax.demo.tasks import Item
from hydraopt_jax.demo.vocabulary import encode_items
from hydraopt_jax.store import Store, decode_terms
from hydraopt_jax.store.sizes import measure_size


class Study(NamedTuple):
    """What stores are made of, and how they are measured.

    Attributes:
      collection: the adapters of the shared initialization.
      moments: of their modules' inputs and output gradients.
      diverged: the divergence of a store's logits on prompts that the moments did not see.
    """

    collection: list[Adapter]
    moments: dict[str, np.ndarray]
    diverged: Callable[[Store], float]

    def measure(self, store: Store) -> dict[str, Any]:
        """Bytes, their share, and the divergence of a store."""
        total = 2 * sum(x.a[n].size + x.b[n].size for x in self.collection for n in x.a)
        size = measure_size(store)
        return {"bytes": size, "share": size / total, "divergence": self.diverged(store)}


def arguments(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of a study: where its data are, and where its results go."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="the folder download.py filled")
    parser.add_argument("--json", type=Path, required=True, help="results")
    return parser.parse_args(argv)


def prepare(data: Path) -> Study:
    """The study of the adapters that ship with the package, on the prompts of a data folder."""
    with tempfile.TemporaryDirectory() as folder:
        paths = unpack_adapters(ADAPTERS_FILE, Path(folder))
        collection = [formats.read_adapter(p) for p in paths]
    base, vocabulary = load_base(BASE_FILE), load_vocabulary(BASE_FILE)
    items, given = load_items(data, Data()), Refining()
    lora = refinement.originals(collection)
    wanted: dict[str, Sequence[Item]] = {x.task: list(items[x.task]["train"]) for x in collection}
    prompts = encode_items(vocabulary, wanted, limit=given.moments + given.check).prompts
    heard = outputs.answered(base, lora, prompts)
    moments = outputs.moments(base, lora, outputs.batch(heard, 0, given.moments), jax.random.key(0))
    unseen = outputs.batch(heard, given.moments, given.check)
    loss = jax.jit(refinement.divergence(lambda own, x: forward(base, own, x.tokens), lambda x: x.counts))

    def diverged(store: Store) -> float:
        stored = {n: (0 * a, 0 * b) for n, (a, b) in lora.items()}
        stored |= refinement.stacked(decode_terms(store))
        return float(loss(stored, lora, unseen))

    return Study(collection, moments, diverged)
