"""Range asymmetric numeral systems (rANS): the entropy decoder. NumPy and integers only; `lanes` encodes.

A lane is a sequence of symbols with a state of its own, 32 bits that move 16 at a time. Decoding a symbol of
frequency f whose slots begin at c, in a table of 2^12 slots:

    slot = x mod 2^12;   x <- f * floor(x / 2^12) + slot - c;   if x < 2^16: x <- 2^16 x + next word

Lanes are decoded in parallel, one symbol per lane and step, each with its own word pointer, so that lanes of
any number of streams share one loop. The table of a symbol depends on its context and quantizer. The
quantizer follows from the parities p before it (`trellis`), and starts again every `PERIOD` steps:

    q[i] = q[i - 3] xor q[i - 5] xor p[i - 2]

Reference: J. Duda, Asymmetric numeral systems, arXiv 1311.2540; F. Giesen, Interleaved entropy coders,
arXiv 1402.3392.
"""

from collections.abc import Callable, Iterator

import numpy as np

from hydraopt_jax.codec.bitstream import Damaged
from hydraopt_jax.codec.frequency_tables import SLOT_BITS, SLOTS, Lookup

LOW = 1 << 16
# steps after which the trellis starts again
PERIOD = 4096
# number of steps whose table rows are looked up at once
ROWS = 64

# type of `decode`, and of `lanes.decode`
DecodeLanes = Callable[..., np.ndarray]


def decode(
    state: np.ndarray,
    words: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    lengths: np.ndarray,
    context: np.ndarray,
    lookup: Lookup,
) -> np.ndarray:
    """Values `[n, L]` int16 of L lanes as `lookup.value` has them; entries beyond a lane's length are 0.

    Args:
      state: `[L]` uint32, where decoding starts.
      words: `[W]` uint16, the words of all lanes.
      first, last: `[L]` int64, where each lane's words begin and end.
      lengths: `[L]` symbols of each lane, in descending order.
      context: `[n, L]` uint8.
      lookup: tables of the contexts that occur.

    Raises:
      Damaged: a lane does not end where its words end, in the state where encoding begins.
    """
    out = np.zeros(context.shape, np.int16)
    x, at = state.astype(np.uint32), first.copy()
    if ((x < LOW) & (lengths > 0)).any():
        raise Damaged("a lane's state")
    padded = np.append(words, np.uint16(0)).astype(np.uint32)
    # rows of the tables that a damaged context would index lie inside them
    row = np.maximum(lookup.row, 0).astype(np.uint32)
    slot, entry, part = (np.empty(len(x), np.uint32) for _ in range(3))
    short = np.empty(len(x), bool)
    # what is known of the quantizers of this step and of the four after it, as a table's offset
    ahead = [np.zeros(len(x), np.uint32) for _ in range(5)]
    for step, lanes, rows in active(lengths, context, row):
        if step % PERIOD == 0:
            for q in ahead:
                q[:] = 0
        now, second, third = ahead[0][:lanes], ahead[2][:lanes], ahead[3][:lanes]
        s, e, p, y = slot[:lanes], entry[:lanes], part[:lanes], x[:lanes]
        np.bitwise_and(y, SLOTS - 1, out=s)
        np.bitwise_or(s, now, out=s)
        np.add(s, rows, out=s)
        lookup.entry.take(s, out=e, mode="clip")
        lookup.value.take(s, out=out[step, :lanes], mode="clip")
        np.right_shift(y, SLOT_BITS, out=y)
        np.right_shift(e, SLOT_BITS + 1, out=p)
        np.multiply(y, p, out=y)
        np.bitwise_and(e, SLOTS - 1, out=p)
        np.add(y, p, out=y)
        np.bitwise_and(e, SLOTS, out=p)
        np.bitwise_xor(second, p, out=second)
        np.bitwise_xor(third, now, out=third)
        ahead.append(ahead.pop(0))
        np.less(y, LOW, out=short[:lanes])
        (refill,) = short[:lanes].nonzero()
        where = at[refill]
        y[refill] = y[refill] << np.uint32(16) | padded.take(where, mode="clip")
        at[refill] = where + 1
    if not (np.array_equal(at, last) and (x == LOW)[lengths > 0].all()):
        raise Damaged("a lane that does not end where its words do")
    return out


def active(
    lengths: np.ndarray, context: np.ndarray, row: np.ndarray
) -> Iterator[tuple[int, int, np.ndarray]]:
    """For each step: its number, the number of lanes with a symbol there, and `row` of their contexts."""
    steps = int(lengths.max(initial=0))
    lanes = np.searchsorted(-lengths, -np.arange(steps), side="left")
    for first in range(0, steps, ROWS):
        block = row[context[first : first + ROWS, : lanes[first]]]
        for step in range(first, min(first + ROWS, steps)):
            yield step, int(lanes[step]), block[step - first, : lanes[step]]
