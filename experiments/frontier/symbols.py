"""What richer statistics could save on the coder's own codes, and what any quantizer could.

    python -m experiments.frontier.symbols gpt2=FOLDER forty=FOLDER llm=FOLDER \\
        --json experiments/frontier/symbols.json

Shares of the bytes of a store near a budget. A condition has its price: an adaptive coder counts what it
has seen under it, from a prior that both sides know (the discretized Gaussians of `contexts`, as much as
WEIGHT codes), and its code length is compared with that under the store's tables, these included.

- adaptive tables: the contexts as they are, nothing stored;
- the same after the magnitude before in the vector (0, 1, more), after the sum of the two before, after that
  at the same entry of the vector before, by direction (0 to 7): each one more condition;
- the parity of the code before, a part of the trellis state; the quantizer is a condition already;
- signs: by the sign before in the vector, by that at the same entry of the vector before;
- two-parameter tables: in place of frequencies the share of zeros and the mean of the others, a byte each;
- contexts of vectors, gains, coefficients: what they take;
- coefficients, adaptive: a coder of their bit lengths, alone and by whether the vector and the one that it is
  predicted from are of the same direction;
- any quantizer: Gaussian vectors of the same variances and distortions, by the rate-distortion function.

Needs no model.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments.frontier.ideas import watched
from experiments.frontier.named import Named
from hydraopt_jax.codec import encode, frequency_tables, prediction, streams, syntax
from hydraopt_jax.codec.contexts import SYMBOLS
from hydraopt_jax.codec.layout import Piece, by_leaf
from hydraopt_jax.rate_control import coding, search
from hydraopt_jax.rate_control.problem import Problem

# codes that the prior of an adaptive coder counts as much as
WEIGHT = 32.0
COIN = np.full((1, 2), 0.5)


class Codes(NamedTuple):
    """All codes of a store in order, `[N]` each.

    Attributes:
      row: `2 * context + quantizer`.
      symbol: the entropy-coded symbol.
      negative: whether below zero; zeros are not.
      first: whether first of its vector.
      above: position of the same entry of the vector before in its factor, -1 for none.
      direction: of its vector.
    """

    row: np.ndarray
    symbol: np.ndarray
    negative: np.ndarray
    first: np.ndarray
    above: np.ndarray
    direction: np.ndarray


def codes_of(coded: encode.Coded) -> Codes:
    """The codes of all leaves."""
    parts, start = [], 0
    for members, x in zip(members_of(coded), coded.symbols, strict=True):
        signed = streams.signed_symbols(x)
        place = [places(coded.pieces[i], coded.contexts[i]) for i in members]
        first, above, direction = (np.concatenate(y) for y in zip(*place, strict=True))
        at = np.arange(len(signed)) + start
        above = np.where(above > 0, at - above, -1)
        parts.append(
            (signed // (2 * SYMBOLS), signed // 2 % SYMBOLS, signed % 2 > 0, first, above, direction)
        )
        start += len(signed)
    return Codes(*(np.concatenate(y) for y in zip(*parts, strict=True)))


def places(row: Piece, context: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each code of a piece whether it is the first of its vector, how far back the same entry of the
    vector before is (0 for none), and its direction."""
    coded = np.flatnonzero(context > 0)
    first = np.tile(np.arange(row.length) == 0, len(coded))
    back = np.repeat(np.where(np.arange(len(coded)) > 0, row.length, 0), row.length)
    return first, back, np.repeat(coded, row.length)


def adaptive_bits(symbol: np.ndarray, row: np.ndarray, prior: np.ndarray, *given: np.ndarray) -> float:
    """Bits of a coder that adds to a prior what it has seen in the same row under the same condition.

    Args:
      symbol: `[N]`.
      row: `[N]`, of `prior`.
      prior: `[rows, symbols]` shares.
      given: conditions `[N]`.

    >>> one = np.zeros(4, int)
    >>> round(adaptive_bits(np.array([0, 0, 1, 1]), one, np.full((1, 2), 0.5)), 1)
    4.0
    """
    key = row.astype(np.int64)
    for x in given:
        key = key * (int(x.max(initial=0)) + 1) + x
    _, at, key = np.unique(key, return_index=True, return_inverse=True)
    size = prior.shape[1]
    counts = np.bincount(key * size + symbol, minlength=size * len(at)).reshape(-1, size)
    before = WEIGHT * prior[row[at]]
    seen = counts > 0
    whole = log_gamma(counts.sum(1) + WEIGHT) - log_gamma(np.array([WEIGHT]))
    each = log_gamma(counts[seen] + before[seen]) - log_gamma(before[seen])
    return float((whole.sum() - each.sum()) / math.log(2))


log_gamma = np.vectorize(math.lgamma, otypes=[float])


def two_parameter_bits(row: np.ndarray, symbol: np.ndarray) -> float:
    """Bits with tables of two parameters: the share of zeros, and a geometric rest; 16 bits for each row."""
    total = 0.0
    for r in np.unique(row):
        mine = symbol[row == r]
        zeros, rest = float((mine == 0).mean()), mine[mine > 0]
        known = np.clip(zeros, 1e-4, 1 - 1e-4)
        total -= (mine == 0).sum() * np.log2(known) + len(rest) * np.log2(1 - known)
        if len(rest):
            stop = 1 / max(float(rest.mean()), 1 + 1e-4)
            total -= len(rest) * np.log2(stop) + (rest - 1).sum() * np.log2(1 - stop)
        total += 16
    return float(total)


def table_bits(coded: encode.Coded) -> tuple[float, float]:
    """Bits of the symbols under the store's tables, and of these."""
    tables = frequency_tables.pack_tables(frequency_tables.from_counts(coded.counts))
    return 8 * encode.entropy_bytes(coded.counts), 8.0 * len(tables)


def neighbors(x: Codes) -> dict[str, tuple[np.ndarray, ...]]:
    """Conditions by name."""
    size = np.minimum(x.symbol, 2)
    before = np.where(x.first, 0, np.roll(size, 1))
    early = np.where(x.first | np.roll(x.first, 1), 0, np.roll(size, 2))
    return {
        "adaptive tables": (),
        "after the magnitude before": (before,),
        "after the two before": (before + early,),
        "after the entry above": (np.where(x.above >= 0, size[x.above], 3),),
        "by direction": (np.minimum(x.direction, 7),),
        "after the parity before": (np.where(x.first, 0, np.roll(x.symbol % 2, 1)),),
    }


def sign_bits(x: Codes) -> dict[str, float]:
    """Bits of the signs of nonzero symbols under conditions, less one bit each."""
    some = x.symbol > 0
    state = np.where(some, 1 + x.negative, 0)
    conditions = {
        "signs, after the one before": np.where(x.first, 0, np.roll(state, 1)),
        "signs, after the entry above": np.where(x.above >= 0, state[x.above], 0),
    }
    zero = np.zeros(some.sum(), np.int64)
    return {
        k: adaptive_bits(x.negative[some].astype(np.int64), zero, COIN, v[some]) - some.sum()
        for k, v in conditions.items()
    }


def coefficient_bits(coded: encode.Coded) -> tuple[float, float, float]:
    """Bits of the coefficients as they are packed, adaptively by bit length, and by direction too."""
    packed, values, same = 0.0, [], []
    for mine in members_of(coded):
        found = [coded.predictions[i] for i in mine]
        packed += 8 * len(prediction.pack_coefficients(found))
        for i, x in zip(mine, found, strict=True):
            if x is None or not x.used.any():
                continue
            base = np.flatnonzero(coded.contexts[coded.pieces[i].base] > 0)
            values.append(x.coefficients[:, x.used].ravel())
            same.append((base[:, None] == np.flatnonzero(x.used)[None]).ravel())
    if not values:
        return 0.0, 0.0, 0.0
    flat, alike = np.concatenate(values), np.concatenate(same).astype(np.int64)
    length = np.ceil(np.log2(np.abs(flat) + 1)).astype(np.int64)
    # below the leading bit, and a sign
    rest = float(np.where(length > 0, length, 0).sum())
    zero, prior = np.zeros_like(length), np.full((1, 32), 1 / 32)
    alone, by_direction = (adaptive_bits(length, zero, prior, x) for x in (zero, alike))
    return packed, alone + rest, by_direction + rest


def side_bits(trial: coding.Trial) -> Iterator[tuple[str, int]]:
    """Bits of the contexts of vectors, and of the gains."""
    coded = trial.coded
    rows = [([coded.pieces[i] for i in x], [coded.contexts[i] for i in x]) for x in members_of(coded)]
    yield "contexts of vectors", 8 * sum(len(syntax.pack_contexts(*x)) for x in rows)
    yield "gains", 8 * sum(len(encode.packed_gains(coded, t, x)) for t, x in trial.gains.items())


def members_of(coded: encode.Coded) -> Collection[Sequence[int]]:
    """Positions of the pieces of each leaf."""
    return by_leaf(coded.pieces, coded.leaves).values()


def gaussian_bits(problem: Problem, step: float) -> tuple[float, float]:
    """Bits of the codes with middle bits and signs, and of Gaussian vectors at the same distortions."""
    trial, kept = watched(problem, step)
    coded = trial.coded
    # leaves' lengths and tables are not codes
    paid = 8 * (encode.estimate_bytes(coded, {}) - 8 * len(coded.leaves)) - table_bits(coded)[1]
    least = 0.0
    # before these, tables were fitted
    for (values, x), mine in zip(kept[-len(coded.leaves) :], members_of(coded), strict=True):
        ends = [coded.pieces[i].length for i in mine for _ in range(np.count_nonzero(coded.contexts[i]))]
        starts = np.cumsum([0, *ends[:-1]])
        if not len(ends):
            continue
        energy = np.add.reduceat(values.astype(np.float64) ** 2, starts)
        lost = np.add.reduceat((values.astype(np.float64) - streams.values(x)) ** 2, starts)
        least += float((np.array(ends) / 2 * np.log2(np.maximum(energy / np.maximum(lost, 1e-9), 1))).sum())
    return paid, least


def figures(problem: Problem, step: float) -> Iterator[tuple[str, float]]:
    """Names and shares of the store's bytes that are saved."""
    trial = coding.encode_at_step(problem, step)
    whole, x = 8 * trial.bytes, codes_of(trial.coded)
    stored, tables = table_bits(trial.coded)
    prior = coding.prior_tables().reshape(-1, SYMBOLS)
    yield "tables", tables / whole
    for name, given in neighbors(x).items():
        yield name, (stored + tables - adaptive_bits(x.symbol, x.row, prior, *given)) / whole
    for name, bits in sign_bits(x).items():
        yield name, -bits / whole
    yield "two-parameter tables", (stored + tables - two_parameter_bits(x.row, x.symbol)) / whole
    for name, bits in side_bits(trial):
        yield name, bits / whole
    packed, alone, by_direction = coefficient_bits(trial.coded)
    yield "coefficients", packed / whole
    yield "coefficients, adaptive", (packed - alone) / whole
    yield "the same, by direction", (packed - by_direction) / whole
    paid, least = gaussian_bits(problem, step)
    yield "any quantizer", (paid - least) / whole


def measure(problem: Problem, size: float) -> dict[str, float]:
    """The figures near a size in bytes."""
    return {k: round(float(v), 4) for k, v in figures(problem, search.first_step(problem, size))}


def main() -> None:
    """Measure the collections that are named."""
    Named(__doc__).measure(measure)


if __name__ == "__main__":
    main()
