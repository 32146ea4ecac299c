"""Contexts: the statistical model that encoder and decoder share.

The context of a vector encodes the rms of its codes, with three contexts per octave; each side of a module
has its own contexts. Context 0 is the zero vector, which has no codes. If the entries of a vector differ in
size between blocks, as between attention heads, each block has its own context, coded as an offset from that
of the vector.

A code is a magnitude `k >= 0` and a sign. Its level is `m = k`, but `k - 1` for a negative code in a wide
context, one with middle bits, so that none is spent on a negative zero. The level is split as

    m = high * 2^(raw + 1) + middle * 2 + low,        0 <= middle < 2^raw

where the context gives `raw`. The symbol `2 * high + low` is entropy-coded together with the sign, and the
`raw` middle bits, close to uniform, are stored as they are. The low bit stays in the symbol because the
parity of k drives the trellis. Where `raw` is 0 the symbol is the magnitude itself. The last two symbols are
escapes, one for each low bit: `m >> 1` follows in 32 bits.
"""

import math

import numpy as np

# entropy-coded symbols of a context; the last two are escapes
SYMBOLS = 128
ESCAPE = SYMBOLS - 2
ESCAPE_BITS = 32
# magnitudes that an escape can hold, with room for `2 k` in 32 bits
MAX_MAGNITUDE = (1 << 29) - 1
PER_OCTAVE = 3
# contexts per side: context 0, then rms 2^-3 to 2^21.67 codes
PER_SIDE = 76
COUNT = 2 * PER_SIDE
# entries of a block, and the largest offset of its context
BLOCK, FARTHEST = 64, 9
# bits that an offset costs, and each step of it; what the flag of a vector's offsets has to save
OFFSET_BITS, OFFSET_STEP_BITS, LEAST_SAVED = 0.9, 0.8, 8.0
# vectors whose offsets are found at once, to bound memory
TOGETHER = 256
# variance in squared steps that quantization adds to that of a block's codes, about
ROUNDING = 0.7
LN2 = math.log(2)


def rms(context: np.ndarray) -> np.ndarray:
    """The rms of the codes in each context."""
    return 2.0 ** ((context % PER_SIDE - 1) / PER_OCTAVE - 3)


# middle bits of each context: two octaves and more below its rms
RAW_BITS = np.maximum((np.arange(COUNT, dtype=np.int32) % PER_SIDE - 1) // PER_OCTAVE - 6, 0)
WIDE = RAW_BITS > 0


def classify(spread: np.ndarray, side: int | np.ndarray) -> np.ndarray:
    """Context of each vector from its rms in quantizer steps; a code is about two steps.

    Args:
      spread: `[S]` rms of the entries in steps; 0 for a vector that is not coded.
      side: 0 for the input side, 1 for the output side; of each vector, or of all.

    >>> classify(np.array([0.0, 2.0]), 0).tolist()
    [0, 10]
    """
    context = np.rint(PER_OCTAVE * (np.log2(np.maximum(spread, 1e-9) / 2) + 3)).astype(np.int64) + 1
    return np.where(spread > 0, np.clip(context, 1, PER_SIDE - 1) + side * PER_SIDE, 0)


def blocks(length: int) -> int:
    """Number of blocks of a vector that may have their own contexts; 0 for a vector of one block.

    >>> blocks(64), blocks(65)
    (0, 2)
    """
    return -(-length // BLOCK) if length > BLOCK else 0


def offsets(vectors: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Offsets of the contexts of each vector's blocks, `[S, blocks]` int64; all 0 where they save nothing.

    Gaussian entries of variance v cost `log2(w) / 2 + v / (2 ln 2 w)` bits each where w is expected.

    Args:
      vectors: `[S, n]` in steps.
      context: `[S]` of the vectors, 0 for one that is not coded.
    """
    length = vectors.shape[1]
    count = blocks(length)
    out = np.zeros((len(vectors), count), np.int64)
    entries = np.diff(np.arange(count) * BLOCK, append=length).astype(np.float32)
    tried = np.arange(-FARTHEST, FARTHEST + 1)
    side = (OFFSET_BITS + OFFSET_STEP_BITS * np.abs(tried)).astype(np.float32)
    for at in range(0, len(vectors) if count else 0, TOGETHER):
        mine = slice(at, at + TOGETHER)
        padded = np.pad(vectors[mine], ((0, 0), (0, -length % BLOCK))).reshape(-1, count, BLOCK)
        energy = np.einsum("sbe,sbe->sb", padded, padded)
        expected = (2 * rms(shifted(context[mine, None], tried[None]))) ** 2 + ROUNDING
        expected = expected.astype(np.float32)
        each = np.log2(expected)[:, None] * entries[:, None]
        cost = (each + (energy + ROUNDING * entries)[..., None] / (LN2 * expected[:, None])) / 2
        paid = cost + side
        best = paid.argmin(-1)
        saved = (cost[..., FARTHEST] - paid.min(-1)).sum(-1)
        out[mine] = np.where(((saved > LEAST_SAVED) & (context[mine] > 0))[:, None], tried[best], 0)
    return out


def shifted(context: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Contexts moved by offsets, among those of their side.

    >>> shifted(np.array([10, 75, 77]), np.array([-2, 5, -3])).tolist()
    [8, 75, 77]
    """
    first = context // PER_SIDE * PER_SIDE + 1
    return np.clip(context + offset, first, first + PER_SIDE - 2)


def level(magnitude: np.ndarray, negative: np.ndarray, context: np.ndarray) -> np.ndarray:
    """The level of each code, see the module."""
    return magnitude - (WIDE[context] & negative & (magnitude > 0))


def symbol(level: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """The entropy-coded symbol of each level, escapes included.

    >>> symbol(np.array([5, 125, 126, 201, 1001]), np.array([0, 0, 0, 1, 1])).tolist()
    [5, 125, 126, 101, 127]
    """
    low = level & 1
    found = ((level >> (raw + 1)) << 1) | low
    return np.where(found >= ESCAPE, ESCAPE + low, found)


def gaussian() -> np.ndarray:
    """First guess of the probabilities of the symbols, `[COUNT, 2, SYMBOLS]`: discretized Gaussians."""
    width = (2 << RAW_BITS)[:, None]
    high = np.arange(SYMBOLS // 2 + 1)
    deviation = rms(np.arange(COUNT))[:, None] + 0.15
    erf = np.vectorize(math.erf)
    table = np.repeat(np.diff(erf((high * width - 0.5).clip(0) / deviation / 2**0.5), axis=1) / 2, 2, 1)
    # where the symbol is the magnitude, each has its own share
    exact = erf((np.arange(SYMBOLS + 1) - 0.5).clip(0) / deviation / 2**0.5)
    table = np.where(WIDE[:, None], table, np.diff(exact, axis=1))
    table[:, ESCAPE:] = 0
    table += 1e-6
    return np.repeat((table / table.sum(-1, keepdims=True))[:, None], 2, 1)
