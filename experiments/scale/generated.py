"""Collections made as they are read: a reader with the interface of `scale.reading`, and no files."""

import zlib
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from hydraopt_jax.scale.reading import Card, Collection, Entry, Pair


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
    table = {m: Entry("", "", i, o, rank, 2.0) for m, (i, o) in modules.items()}
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

    cards = tuple(
        Card(f"task-{t:05d}", table, [], "bfloat16", {}, {}, f"generated {t}", f"{seed}-{t}", "")
        for t in range(tasks)
    )
    size = sum(2 * tasks * rank * (i + o) for i, o in modules.values())
    return Collection(cards, dict(modules), read, lambda task: {}, size)
