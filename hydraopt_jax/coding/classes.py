"""Scale classes: the statistical model that the coder and the decoder share.

A vector's class says the rms of its codes, three classes an octave; input and output sides have their own.
A code `k` is a magnitude and a sign; the magnitude is `high * 2**shift + low`, where the class gives `shift`:
the high part is entropy-coded, low bits and signs are close to uniform and stored raw. Class 0 is the zero
vector, which has no codes at all.
"""

import math

import numpy as np

# alphabet of the entropy-coded high part
HIGH = 64
PER_OCTAVE = 3
# classes a side: rms 2**-3 to 2**16 codes
SIDE = 58
COUNT = 2 * SIDE


def rms(index: np.ndarray) -> np.ndarray:
    """The rms of the codes that a class stands for."""
    return 2.0 ** ((index % SIDE - 1) / PER_OCTAVE - 3)


# raw low bits of each class
SHIFT = np.maximum(np.floor(np.log2(rms(np.arange(COUNT)))).astype(np.int32) - 2, 0)
# the largest magnitude a class can hold
TOP = (HIGH << SHIFT) - 1


def classify(spread: np.ndarray, peak: np.ndarray, side: int) -> np.ndarray:
    """Class of vectors from their rms and their largest entry, both in quantiser steps.

    >>> classify(np.array([0.0, 2.0]), np.array([0.0, 5.0]), 0).tolist()
    [0, 10]
    """
    index = np.rint(PER_OCTAVE * (np.log2(np.maximum(spread, 1e-9) / 2) + 3)).astype(np.int64) + 1
    index = np.clip(index, 1, SIDE - 1)
    need = np.searchsorted(HIGH << SHIFT[:SIDE], peak / 2 + 1)
    index = np.minimum(np.maximum(index, need), SIDE - 1)
    return np.where(spread > 0, index + side * SIDE, 0)


def gaussian() -> np.ndarray:
    """First guess of the probabilities of the high part, `[COUNT, 2, HIGH]`: discretised Gaussians."""
    edges = (np.arange(HIGH + 1) * (1 << SHIFT)[:, None] - 0.5) / (rms(np.arange(COUNT))[:, None] + 0.15)
    edges[:, 0] = 0
    table = np.diff(np.vectorize(math.erf)(edges / 2**0.5), axis=1) + 1e-5
    return np.repeat(table[:, None], 2, 1)
