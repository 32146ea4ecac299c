"""Prediction of a factor's vectors from vectors decoded before, bit for bit equal on every machine.

A vector is predicted as

    sum_s c[s] * 2^-e[s] * v[s]        rounded to multiples of 1/16 step

where the `v[s]` are the decoded vectors of the base, the coefficients `c[s]` are integers, and `2^e[s]` is
about half the norm of `v[s]`, so that a unit of a coefficient is about two steps. The rounding error, `2^2 /
12` squared steps, costs less in the codes than finer coefficients would. All products and sums are multiples
of one power of two and fit the 53 bits of a float64, so their order does not matter.

These are the coordinates of joint diagonalization and of Share; here the remainder is coded too.

Reference: Gabrielsson et al., Compress then Serve, arXiv 2407.00066.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hydraopt_jax.codec.bitstream import Damaged, Reader, pack_planes, unpack_planes, unzigzag, zigzag

# side information of a vector beside its coefficients, in bits
VECTOR_BITS = 8
RIDGE = 1e-3
# unit of a coefficient in steps, as a power of two, and cost of its rounding in the codes, in bits
UNIT, ROUNDING_BITS = 1, 1.0
# decoded vectors are multiples of this many steps
GRID = 1 / 16
# bits that sums of products may take
EXACT_BITS = 52


class Prediction(NamedTuple):
    """The prediction of a factor's vectors.

    Attributes:
      used: `[S]` bool.
      coefficients: `[D, S]` int32, one per vector of the base that is coded.
    """

    used: np.ndarray
    coefficients: np.ndarray


def exponents(base: np.ndarray) -> np.ndarray:
    """`e: [D]` of the vectors `[n, D]`: `2^e` is half their length up to a factor of about 1.5.

    Taken from the sum of absolute values, an integer, so that every machine finds the same.
    """
    size = np.abs(np.rint(base.astype(np.float64) / GRID)).astype(np.int64).sum(0)
    # the mean square of a Gaussian is pi / 2 times the square of its mean magnitude
    square = [(int(x) ** 2 * 3 // (2 * len(base))).bit_length() for x in size]
    return np.array(square, np.int64) // 2 + int(np.log2(GRID)) - UNIT


class Base(NamedTuple):
    """Vectors that others are predicted from.

    Attributes:
      known: `[n, D]` float64, scaled to norms near 2.
      exponents: `[D]`.
      peaks: `[D]` largest magnitudes of `known`.
    """

    known: np.ndarray
    exponents: np.ndarray
    peaks: np.ndarray


def scaled(vectors: np.ndarray) -> Base:
    """The `Base` of decoded vectors `[n, D]`, in steps."""
    e = exponents(vectors)
    known = np.ldexp(vectors.astype(np.float64), -e)
    return Base(known, e, np.abs(known).max(0, initial=0))


def fits(base: Base, coefficients: np.ndarray) -> bool:
    """Whether sums of products are exact."""
    peak = base.peaks @ np.abs(coefficients.astype(np.float64)).max(1, initial=0)
    finest = float(base.exponents.max(initial=0)) - np.log2(GRID)
    return bool(np.log2(max(float(peak), 1.0)) + 1 + finest <= EXACT_BITS)


def apply_weights(base: Base, coefficients: np.ndarray) -> np.ndarray:
    """The predicted vectors `[n, S]` float32, in steps.

    Raises:
      Damaged: coefficients beyond what is exact.
    """
    if not fits(base, coefficients):
        raise Damaged("coefficients of a prediction that are too large")
    return (np.rint(base.known @ coefficients.astype(np.float64) / GRID) * GRID).astype(np.float32)


def coefficient_bits(energy: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Bits of `count` coefficients that explain some energy in squared steps, and of their vector.

    >>> print(coefficient_bits(np.array(0.0), np.array(0)))
    8.0
    """
    variance = energy / np.maximum(count, 1) / 4**UNIT
    each = 0.5 * np.log2(2 * np.pi * np.e * (variance + 1 / 12)) + ROUNDING_BITS
    return count * each + VECTOR_BITS


def spent(coefficients: np.ndarray) -> np.ndarray:
    """Bits of the coefficients `[D, S]` of each vector, and of the vector, `[S]`."""
    energy = 4**UNIT * (coefficients.astype(np.float64) ** 2).sum(0)
    return coefficient_bits(energy, np.array(len(coefficients)))


def predict(target: np.ndarray, base: Base) -> tuple[Prediction | None, np.ndarray, float]:
    """Least-squares prediction of those vectors for which it saves more bits than it costs.

    Args:
      target: `[n, S]` in steps.
      base: the coded vectors of the other factor.

    Returns:
      Prediction or None, the predicted part `[n, S]`, and the bits saved.
    """
    nothing: tuple[None, np.ndarray, float] = None, np.zeros_like(target), 0.0
    known = base.known
    if not base.peaks.any() or not target.any():
        return nothing
    gram = known.T @ known
    exact = np.linalg.solve(gram + RIDGE * np.eye(len(gram)), known.T @ target)
    rounded = np.clip(np.rint(exact), -(2**30), 2**30).astype(np.int32)
    if not fits(base, rounded):
        return nothing
    guess = apply_weights(base, rounded)
    before, after = (target**2).mean(0), ((target - guess) ** 2).mean(0)
    saved = len(target) / 2 * np.log2((before + 0.6) / (after + 0.6)) - spent(rounded)
    used = (saved > 0) & target.any(0)
    if not used.any():
        return nothing
    return Prediction(used, rounded), (guess * used).astype(np.float32), float(saved[used].sum())


def pack_coefficients(found: Sequence[Prediction | None]) -> bytes:
    """The bytes of the used coefficients, vector by vector; empty if there are none."""
    rows = [x.coefficients[:, x.used].T.ravel() for x in found if x is not None and x.used.any()]
    flat = np.concatenate([np.zeros(0, np.int32), *rows])
    return pack_planes(zigzag(flat)) if len(flat) else b""


def unpack_coefficients(reader: Reader, count: int) -> np.ndarray:
    """The inverse of `pack_coefficients`: all `count` coefficients in a row, int64.

    >>> x = Prediction(np.array([True, False]), np.array([[-3, 9], [300, 9]], np.int32))
    >>> unpack_coefficients(Reader(pack_coefficients([None, x])), 2).tolist()
    [-3, 300]
    """
    return unzigzag(unpack_planes(reader, count)) if count else np.zeros(0, np.int64)
