"""The precision of vectors that others are predicted from, as video coders have for their reference frames.

A base vector of n entries that is known up to a distortion d per entry, in squared steps, costs

    n / 2 * (own * 2 d + multiplier * (sum_i log2(rest_i + w_i d) - log2(d)))        + constants

where `own` says whether a task reads the vector itself, `rest_i` is the variance that prediction leaves of
vector i, quantization included, and `w_i d` what the noise of the base adds to it: `w_i` is the energy of
vector i along the base vector, over the energy of the base vector. With `D = multiplier / (2 ln 2)` the
distortion of a vector that nothing is predicted from, the least cost is where

    d * (own / D + sum_i w_i / (rest_i + w_i d)) = 1

Vectors are quantized in steps, so one that is to be known up to d is coded `sqrt(D / d)` times as large. What
a task reads is made smaller again by its gains; coefficients are relative to the vectors in any case.

Reference: Wiegand, Girod, Lagrange multiplier selection in hybrid video coder control, 2001.
"""

import numpy as np

from hydraopt_jax.codec.encode import DISTORTION
from hydraopt_jax.codec.prediction import coefficient_bits

# limits of the factor, and steps of the iteration
LEAST, MOST, STEPS = 0.35, 2.5, 8


def base_scales(along: np.ndarray, rest: np.ndarray, center: np.ndarray, *, own: bool) -> np.ndarray:
    """Factors `[S]` by which base vectors are coded larger than by their energies.

    Args:
      along: `[N, S]` energies of the vectors that are predicted, along each base vector.
      rest: `[N]` variances that prediction leaves of them, without quantization; in squared steps.
      center: `[S]` energies of the base vectors.
      own: whether a task reads the base vectors themselves.

    >>> base_scales(np.zeros((2, 1)), np.ones(2), np.ones(1), own=True).tolist()
    [1.0]
    """
    share = along / np.where(center > 0, center, 1)
    noise = np.full(along.shape[1], DISTORTION)
    for _ in range(STEPS):
        needed = own / DISTORTION + (share / (rest[:, None] + DISTORTION + share * noise)).sum(0)
        noise = np.sqrt(noise / np.maximum(needed, 1e-9))
    return np.clip(np.sqrt(DISTORTION / noise), LEAST, MOST)


def reference_scales(
    energy: np.ndarray, cosines: np.ndarray, live: np.ndarray, task: int, count: int
) -> np.ndarray:
    """`base_scales` of one side of a reference's directions, `[R]`, at least 1.

    Args:
      energy: `[T, R]` of all directions, in squared steps.
      cosines: `[T, R, R]` squared, of all vectors with those of the reference.
      live: `[T, R]` bool, directions that are coded.
      task: position of the reference.
      count: entries of a vector.
    """
    others = live.copy()
    others[task] = False
    base = live[task]
    along = cosines[others][:, base] * energy[others][:, None]
    explained = along.sum(1)
    rest = np.maximum(energy[others] - explained, 0) / count
    saved = count / 2 * np.log2((energy[others] / count + DISTORTION) / (rest + DISTORTION))
    used = saved > coefficient_bits(explained, np.array(along.shape[1]), rest)
    out = np.ones(len(base))
    out[base] = np.maximum(base_scales(along[used], rest[used], energy[task][base], own=True), 1)
    return out
