"""Prediction of a factor's vectors from vectors decoded before, bit for bit equal on every machine.

A vector is predicted as

    sum_s c[s] * 2^(u - e[s]) * v[s]        rounded to multiples of 1/16 step

where the `v[s]` are the decoded vectors of the base, the coefficients `c[s]` are integers, and `2^e[s]` is
about the norm of `v[s]`, so that a unit of a coefficient is about `2^u` steps. A rounding error of d squared
steps raises the codes' bits by `d / (2 ln 2 r)`, where r is the variance of the remainder, and the bits of a
coefficient fall by `log2(d) / 2`: the best d is r, the unit `sqrt(12 r)`. So u follows from the context of
the vector. All products and sums are multiples of one power of two and fit the 53 bits of a float64, so
their order does not matter.

These are the coordinates of joint diagonalization and of Share; here the remainder is coded too.

Reference: Gabrielsson et al., Compress then Serve, arXiv 2407.00066.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hydraopt_jax.codec.bitstream import Damaged, Reader, pack_integers, unpack_integers, unzigzag, zigzag
from hydraopt_jax.codec.contexts import PER_OCTAVE, PER_SIDE, classify

# side information of a vector beside its coefficients, in bits
VECTOR_BITS = 4
RIDGE = 1e-3
# the least unit of a coefficient in steps, as a power of two, and cost of its rounding in the codes, in bits
UNIT, ROUNDING_BITS = 1, 1.0
# what is added to a magnitude of a coefficient before its fraction is cut off
ROUND_UP = 0.5
# decoded vectors are multiples of this many steps
GRID = 1 / 16
# bits that sums of products may take
EXACT_BITS = 52
# entries that are predicted at once: many small factors take as long as few large ones
TOGETHER = 1 << 18


class Prediction(NamedTuple):
    """The prediction of a factor's vectors.

    Attributes:
      used: `[S]` bool.
      coefficients: `[D, S]` int32, one per vector of the base that is coded.
      units: `[S]` exponents of their units.
    """

    used: np.ndarray
    coefficients: np.ndarray
    units: np.ndarray


def none(width: int, rank: int) -> Prediction:
    """The prediction of `rank` vectors, none of which is predicted, from `width` vectors."""
    return Prediction(np.zeros(rank, bool), np.zeros((width, rank), np.int32), np.zeros(rank, np.int64))


def units(context: np.ndarray) -> np.ndarray:
    """Exponents of the units of coefficients, from the contexts of the predicted vectors.

    A unit is about 3.5 times the rms of the remainder.

    >>> units(np.array([1, 9, 10, 13])).tolist()
    [1, 2, 3, 4]
    """
    return np.maximum((context % PER_SIDE - 1) // PER_OCTAVE, UNIT)


def units_of(found: Prediction | None, rank: int) -> np.ndarray:
    """Exponents of the units of `rank` vectors, -1 for one that is not predicted."""
    return np.full(rank, -1) if found is None else np.where(found.used, found.units, -1)


def agreeing(context: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The contexts of vectors, moved to the nearest ones that have the units that `units_of` says.

    >>> agreeing(np.array([8, 8, 8]), np.array([-1, 1, 3])).tolist()
    [8, 6, 10]
    """
    side = context // PER_SIDE * PER_SIDE
    low = np.where(units > UNIT, units * PER_OCTAVE + 1, 1)
    high = np.minimum((units + 1) * PER_OCTAVE, PER_SIDE - 1)
    return np.where(units < 0, context, side + np.clip(context % PER_SIDE, low, high))


def exponents(base: np.ndarray) -> np.ndarray:
    """`e: [D]` of the vectors `[n, D]`: `2^e` is their length up to a factor of about 1.5.

    Taken from the sum of absolute values, an integer, so that every machine finds the same.
    """
    size = np.abs(np.rint(base.astype(np.float64) / GRID)).astype(np.int64).sum(0)
    # the mean square of a Gaussian is pi / 2 times the square of its mean magnitude
    square = [(int(x) ** 2 * 3 // (2 * len(base))).bit_length() for x in size]
    return np.array(square, np.int64) // 2 + int(np.log2(GRID))


class Base(NamedTuple):
    """Vectors that others are predicted from.

    Attributes:
      known: `[n, D]` float64, scaled to norms near 1.
      exponents: `[D]`.
      peaks: `[D]` largest magnitudes of `known`.
    """

    known: np.ndarray
    exponents: np.ndarray
    peaks: np.ndarray

    def solver(self) -> np.ndarray:
        """`[D, n]`, which turns vectors into their coefficients of least squares, in float64."""
        gram = self.known.T @ self.known
        return np.linalg.solve(gram + RIDGE * np.eye(len(gram)), self.known.T)


def scaled(vectors: np.ndarray) -> Base:
    """The `Base` of decoded vectors `[n, D]`, in steps."""
    e = exponents(vectors)
    known = np.ldexp(vectors.astype(np.float64), -e)
    return Base(known, e, np.abs(known).max(0, initial=0))


def fits(base: Base, weights: np.ndarray) -> bool:
    """Whether sums of products with weights in float64 are exact."""
    peak = base.peaks @ np.abs(weights).max(1, initial=0)
    finest = float(base.exponents.max(initial=0)) - np.log2(GRID)
    return bool(np.log2(max(float(peak), 1.0)) + 1 + finest <= EXACT_BITS)


def apply_weights(base: Base, coefficients: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The predicted vectors `[n, S]` float32, in steps, from coefficients `[D, S]` and their units `[S]`.

    Raises:
      Damaged: coefficients beyond what is exact.
    """
    weights = np.ldexp(coefficients.astype(np.float64), units)
    if not fits(base, weights):
        raise Damaged("coefficients of a prediction that are too large")
    return weighted_sums(base, weights)


def weighted_sums(base: Base, weights: np.ndarray) -> np.ndarray:
    """The predicted vectors from coefficients times their units, which must fit (`fits`).

    In memory one vector follows another, as their codes do.
    """
    found = weights.T @ base.known.T
    found /= GRID
    return (np.rint(found, out=found) * GRID).astype(np.float32).T


def coefficient_bits(energy: np.ndarray, count: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Bits of `count` coefficients that explain some energy in squared steps, and of their vector.

    Args:
      energy: in squared steps.
      count: of coefficients.
      rest: variance of the remainder in squared steps.

    >>> print(coefficient_bits(np.array(0.0), np.array(0), np.array(0.0)))
    4.0
    """
    # the unit is `sqrt(12 rest)`, but no less than the least one
    ratio = energy / np.maximum(count, 1) / np.maximum(rest, 4**UNIT / 12)
    return count * (np.log2(1 + ratio) / 2 + ROUNDING_BITS * ratio / (1 + ratio)) + VECTOR_BITS


def spent(coefficients: np.ndarray) -> np.ndarray:
    """Bits of the coefficients `[D, S]` of each vector, and of the vector, `[S]`."""
    # over the variance of rounding
    ratio = 12 * (coefficients.astype(np.float64) ** 2).sum(0) / max(len(coefficients), 1)
    return len(coefficients) * (np.log2(1 + ratio) / 2 + ratio / (1 + ratio) / 4) + VECTOR_BITS


def predict(
    target: np.ndarray, base: Base, solver: np.ndarray | None = None
) -> tuple[Prediction | None, np.ndarray, float]:
    """Least-squares prediction of those vectors for which it saves more bits than it costs.

    Args:
      target: `[n, S]` in steps.
      base: the coded vectors of the other factor.
      solver: of the base, where it is known.

    Returns:
      Prediction or None, the predicted part `[n, S]`, and the bits saved.
    """
    nothing: tuple[None, np.ndarray, float] = None, np.zeros(target.T.shape, np.float32).T, 0.0
    if not base.peaks.any() or not target.any():
        return nothing
    rows = np.ascontiguousarray(target.T, np.float64)
    exact = (base.solver() if solver is None else solver) @ rows.T
    before = mean_squares(rows)
    # what rounding adds to each entry is about its variance over their number
    rest = mean_squares(rows - exact.T @ base.known.T) * (1 + len(exact) / len(target))
    step = units(classify(np.sqrt(rest), 0))
    exact = np.ldexp(exact, -step)
    rounded = (np.sign(exact) * np.floor(np.abs(exact) + ROUND_UP)).clip(-(2**30), 2**30).astype(np.int32)
    weights = np.ldexp(rounded.astype(np.float64), step)
    if not fits(base, weights):
        return nothing
    guess = weighted_sums(base, weights)
    after = mean_squares(rows - guess.T)
    saved = len(target) / 2 * np.log2((before + 0.6) / (after + 0.6)) - spent(rounded)
    used = (saved > 0) & (before > 0)
    if not used.any():
        return nothing
    guess[:, ~used] = 0
    return Prediction(used, rounded, step), guess, float(saved[used].sum())


def predict_each(targets: Sequence[np.ndarray], base: Base) -> Iterator[tuple[Prediction | None, np.ndarray]]:
    """`predict` for each of several factors from one base, some of them at once, without the bits saved."""
    solver = base.solver() if base.peaks.any() else None
    size = max(max((x.size for x in targets), default=1), 1)
    count = max(TOGETHER // size, 1)
    for some in (targets[at : at + count] for at in range(0, len(targets), count)):
        found, guess, _ = predict(np.concatenate([x.T for x in some]).T, base, solver)
        if found is None and len(some) > 1:
            # perhaps one of them has coefficients that are too large
            yield from (predict(x, base, solver)[:2] for x in some)
            continue
        ends = np.cumsum([x.shape[1] for x in some]).tolist()
        for mine in itertools.starmap(slice, itertools.pairwise([0, *ends])):
            used = found is not None and found.used[mine].any()
            own = Prediction(*(x[..., mine] for x in found)) if found is not None and used else None
            yield own, guess[:, mine]


def mean_squares(rows: np.ndarray) -> np.ndarray:
    """Of the entries of each row."""
    return np.einsum("sn,sn->s", rows, rows) / rows.shape[1]


def pack_coefficients(found: Sequence[Prediction | None]) -> bytes:
    """The bytes of the used coefficients, vector by vector; empty if there are none."""
    rows = [x.coefficients[:, x.used].T.ravel() for x in found if x is not None and x.used.any()]
    flat = np.concatenate([np.zeros(0, np.int32), *rows])
    return pack_integers(zigzag(flat)) if len(flat) else b""


def unpack_coefficients(reader: Reader, count: int) -> np.ndarray:
    """The inverse of `pack_coefficients`: all `count` coefficients in a row, int64.

    >>> x = Prediction(np.array([True, False]), np.array([[-3, 9], [300, 9]], np.int32), np.array([1, 1]))
    >>> unpack_coefficients(Reader(pack_coefficients([None, x])), 2).tolist()
    [-3, 300]
    """
    return unzigzag(unpack_integers(reader, count)) if count else np.zeros(0, np.int64)
