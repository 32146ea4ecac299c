"""Activations below the adapters: run once per sequence, kept on disk, gathered into padded batches.

All adapters of this experiment sit on the upper layers, so what the lower ones make of a sequence is the
same for the base, for every adapter and for every store. Training then costs the upper layers alone.
"""

import itertools
import os
from collections.abc import Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.llm import model
from experiments.llm.base import Base, cache_folder
from experiments.llm.tasks import Sequence, digest

CHUNK = 160


class Shapes(NamedTuple):
    """Padded sizes of batches.

    Tokens of a sequence, of one whose answer is longer than its reference, of all answers of a batch; rows
    that are decoded together, and tokens before their answers go on.
    """

    lengths: tuple[int, ...]
    longer: tuple[int, ...]
    packed: tuple[int, ...]
    rows: tuple[int, ...]
    cached: tuple[int, ...]


@cache
def shapes() -> Shapes:
    """Many sizes on a processor, where padding costs time; few on an accelerator, where compiling does."""
    if jax.default_backend() == "cpu":
        packed = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 768, 1024)
        return Shapes((32, 40, 48, 56, 64, 88), (112, 136), packed, (8, 32), (56, 88, 136))
    return Shapes((88,), (136,), (256, 512, 1024), (16, 128), (136,))


class Batch(NamedTuple):
    """N padded sequences and their answers' positions, packed.

    `hidden` `[N, P, D]` enters the upper layers; `at` `[A]` indexes its flattened positions, those that
    predict `targets` `[A]`; `weights` `[A]` is 0 where the packing is padded; `rows` `[A]` is the sequence
    of each.
    """

    hidden: np.ndarray
    at: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    rows: np.ndarray


def fit(size: int, sizes: tuple[int, ...]) -> int:
    """The smallest of `sizes` that holds `size`: few shapes, few compilations."""
    return next(s for s in sizes if s >= size)


def length_of(sequence: Sequence) -> int:
    """Padded length of a sequence without its last token, which nothing follows."""
    return fit(len(sequence.tokens) - 1, shapes().lengths + shapes().longer)


def pad(rows: list[list[int]], length: int, fill: int) -> np.ndarray:
    """`rows` as `[N, length]`, filled on the right."""
    out = np.full((len(rows), length), fill, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


@partial(jax.jit, static_argnames="config")
def run_lower(
    params: dict[str, Any], layers: dict[str, Any], tokens: jax.Array, *, config: model.Config
) -> jax.Array:
    """Activations `[N, P, D]` of `tokens` `[N, P]` after the lower layers."""
    return model.run_layers(layers, model.embed(params, tokens), config=config)[0]


class Lower(NamedTuple):
    """The base without its upper layers, on the device."""

    base: Base
    outer: dict[str, Any]
    layers: dict[str, Any]
    upper: dict[str, Any]
    depth: int


def place(base: Base, upper: int) -> Lower:
    """The base's weights on the device, split below the upper `upper` layers."""
    params = jax.tree.map(jnp.asarray, base.params)
    count = base.config.layers - upper
    low, high = model.split_layers(params["layers"], count)
    return Lower(base, {k: v for k, v in params.items() if k != "layers"}, low, high, count)


def hidden_of(
    lower: Lower, sequences: list[Sequence], *, dtype: Any = np.float16, rows: int = 8
) -> list[np.ndarray]:
    """Activations `[len - 1, D]` of each sequence below the upper layers; run once, then read from disk."""
    chunks = [sequences[first : first + CHUNK] for first in range(0, len(sequences), CHUNK)]
    return [hidden for chunk in chunks for hidden in _chunk_of(lower, chunk, np.dtype(dtype), rows)]


def _chunk_of(lower: Lower, sequences: list[Sequence], dtype: np.dtype, rows: int) -> list[np.ndarray]:
    starts = np.concatenate([[0], np.cumsum([len(s.tokens) - 1 for s in sequences])]).astype(int)
    path = (
        cache_folder()
        / f"{lower.base.name.replace('/', '_')}-{lower.depth}-{digest(sequences)}-{dtype.name}.npy"
    )
    if not path.exists():
        out = np.empty((int(starts[-1]), lower.base.config.width), dtype)
        for chosen in in_order(sequences, rows):
            ids = [sequences[i].tokens[:-1] for i in chosen] + [[]] * (rows - len(chosen))
            tokens = pad(ids, max(length_of(sequences[i]) for i in chosen), lower.base.stop)
            hidden = np.asarray(run_lower(lower.outer, lower.layers, tokens, config=lower.base.config))
            for row, i in enumerate(chosen):
                out[starts[i] : starts[i + 1]] = hidden[row, : starts[i + 1] - starts[i]]
        if not np.isfinite(out).all():
            raise SystemExit(f"activations of {lower.base.name} exceed {dtype.name}")
        part = path.with_suffix(f".{os.getpid()}.npy")
        np.save(part, out)
        part.rename(path)
    stored = np.load(path, mmap_mode="r")
    return [stored[a:b] for a, b in itertools.pairwise(starts.tolist())]


def gather(
    sequences: list[Sequence],
    hidden: list[np.ndarray],
    chosen: list[int],
    rows: int,
    *,
    length: int | None = None,
    size: int | None = None,
) -> Batch:
    """The batch of `chosen` sequences, padded to `rows`, and to `length` and `size` or the nearest usual."""
    length = length or max(length_of(sequences[i]) for i in chosen)
    x = np.zeros((rows, length, hidden[chosen[0]].shape[1]), np.float32)
    at: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for row, i in enumerate(chosen):
        x[row, : len(hidden[i])] = hidden[i]
        first = row * length + len(sequences[i].prompt) - 1
        at += range(first, first + len(sequences[i].answer))
        targets += sequences[i].answer
        owner += [row] * len(sequences[i].answer)
    size = size or fit(len(at), shapes().packed)
    packed = [np.asarray(v + [0] * (size - len(v)), np.int32) for v in (at, targets, owner)]
    weights = (np.arange(size) < len(at)).astype(np.float32)
    return Batch(x, packed[0], packed[1], weights, packed[2])


def in_order(sequences: list[Sequence], rows: int) -> Iterator[list[int]]:
    """Indices of all sequences in batches of similar length."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].tokens))
    for first in range(0, len(order), rows):
        yield order[first : first + rows]


def shuffled(sequences: list[Sequence], rows: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Indices in shuffled full batches of one padded length each, epoch after epoch, for ever."""
    while True:
        batches = []
        for length in shapes().lengths:
            mine = [i for i in rng.permutation(len(sequences)).tolist() if length_of(sequences[i]) == length]
            batches += [mine[k : k + rows] for k in range(0, len(mine) - rows + 1, rows)]
        if not batches:
            raise SystemExit(f"{len(sequences)} sequences hold no batch of {rows} of one length")
        yield from (batches[i] for i in rng.permutation(len(batches)).tolist())
