"""What prediction leaves of the vectors of factors, and the context of each."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hydraopt_jax.codec import contexts, prediction
from hydraopt_jax.codec.contexts import MAX_MAGNITUDE
from hydraopt_jax.codec.layout import Piece
from hydraopt_jax.codec.prediction import Prediction
from hydraopt_jax.errors import HydraOptError


class Rest(NamedTuple):
    """What prediction leaves of a piece.

    Attributes:
      vectors: `[S, n]` in steps, 0 where not coded.
      guess: `[S, n]` what is predicted of them.
      context: `[S]` of each vector, 0 where not coded.
      offsets: of the contexts of its blocks, `[S, blocks]`.
      prediction: that has made the guess, or None.
    """

    vectors: np.ndarray
    guess: np.ndarray
    context: np.ndarray
    offsets: np.ndarray
    prediction: Prediction | None


def remainders(
    factors: Mapping[int, np.ndarray], rows: Sequence[Piece], known: Mapping[int, prediction.Base]
) -> dict[int, Rest]:
    """What prediction from the bases leaves of pieces, computed for all of one length at once."""
    out: dict[int, Rest] = {}
    for length in {rows[i].length for i in factors}:
        same = [i for i in factors if rows[i].length == length]
        ends = np.cumsum([len(factors[i]) for i in same]).tolist()
        place = {i: slice(*ends) for i, ends in zip(same, itertools.pairwise([0, *ends]), strict=True)}
        vectors = np.concatenate([factors[i] for i in same], dtype=np.float32)
        if not in_range(vectors):
            for i in same:
                check_range(factors[i], rows[i].module)
        coded = vectors.any(1)
        guess = np.zeros_like(vectors)
        units = np.full(len(vectors), -1)
        found: dict[int, Prediction | None] = dict.fromkeys(same)
        for base in {rows[i].base for i in same} - {-1}:
            mine = [i for i in same if rows[i].base == base]
            each = prediction.predict_each([vectors[place[i]].T for i in mine], known[base])
            for i, (found[i], part) in zip(mine, each, strict=True):
                guess[place[i]] = part.T
                units[place[i]] = prediction.units_of(found[i], len(part.T))
        vectors -= guess
        vectors[~coded] = 0
        side = np.repeat([rows[i].side for i in same], [len(factors[i]) for i in same])
        # a vector wholly predicted still needs a context: the least one
        spread = np.maximum(np.sqrt(prediction.mean_squares(vectors)), 1e-6)
        context = prediction.agreeing(contexts.classify(np.where(coded, spread, 0.0), side), units)
        moved = contexts.offsets(vectors, context)
        for i, at in place.items():
            out[i] = Rest(vectors[at], guess[at], context[at], moved[at], found[i])
    return out


def in_range(target: np.ndarray) -> bool:
    """Whether codes can hold all entries; NaN is not in range."""
    return bool(max(target.max(initial=0), -target.min(initial=0)) < MAX_MAGNITUDE)


def check_range(target: np.ndarray, module: str) -> None:
    """Raise for entries beyond the range of codes."""
    if not in_range(target):
        raise HydraOptError(
            f"module {module}: entries of {np.abs(target).max():.3g} quantizer steps; the finest step codes "
            f"{MAX_MAGNITUDE:.3g}: ask for a larger error, or keep the adapters as they are with --budget 1"
        )
