"""Derivatives of the bits of coded factors by their unrounded entries.

A vector of n entries of mean magnitude m, in steps, has about

    n (h(m / 2) + p)   bits,    h(x) = (1 + x) log2(1 + x) - x log2(x),    p = (m / 2) / (1 + m / 2)

The magnitudes of a quantizer are two steps apart, so that their numbers have a mean of m / 2. h is the
entropy of the geometric distribution, the largest of all with this mean. p is its share of nonzero numbers,
each of which has a sign. The derivative by an entry x is

    (log2(1 + 2 / m) + (1 + m / 2)^-2) / 2   times the sign of x

Without it a refinement lets factors grow: Adam moves an entry that hardly changes the loss as far as any
other, and what it adds costs bits.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hydraopt_jax.codec import encode
from hydraopt_jax.codec.encode import Coded, TermInSteps

# magnitude in steps up to which a vector's entries are rounded to zero: the sign changes gradually there
NEAR_ZERO = 0.5


def slopes(rest: np.ndarray) -> np.ndarray:
    """Bits per step of each entry: the derivative of each vector's bits.

    Args:
      rest: `[S, n]` vectors in steps, less what is predicted of them; zero vectors have no bits.

    >>> slopes(np.array([[2.0, -2.0], [0.0, 0.0]])).tolist()
    [[0.625, -0.625], [0.0, 0.0]]
    """
    mean = np.abs(rest).mean(1, keepdims=True)
    each = (np.log2(1 + 2 / np.where(mean > 0, mean, 1)) + (1 + mean / 2) ** -2) / 2
    return each * np.clip(rest / NEAR_ZERO, -1, 1)


def rate_slopes(coded: Coded, modules: Mapping[str, list[TermInSteps]]) -> dict[str, Any]:
    """Bits per step of each entry of quantized factors: module -> `(a: [A, I, S], b: [B, S, O])` per term.

    What is predicted of a vector counts as fixed: a reference has the slopes of its own bits, not of those
    that it saves others. A basis that no task reads has none: as no loss depends on it, it would vanish.

    Args:
      coded: the quantized factors.
      modules: the unrounded ones.
    """
    found = {
        n: tuple((np.zeros_like(x.a), np.zeros_like(x.b)) for x in terms) for n, terms in modules.items()
    }
    for i, code in encode.all_codes(coded):
        row = coded.pieces[i]
        shape = coded.shapes[row.module][row.term]
        if row.factor not in (shape.b_of if row.side else shape.a_of):
            continue
        predicted = coded.values[i].T - code
        rest = encode.factor_of(row, modules) - predicted
        rest[coded.contexts[i] == 0] = 0
        found[row.module][row.term][row.side][row.factor] = slopes(rest).T
    return {n: tuple((a, b.swapaxes(1, 2)) for a, b in terms) for n, terms in found.items()}
