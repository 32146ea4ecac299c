"""Decode lanes by JAX, bit for bit as `rans.decode` does in NumPy, for the lanes of many tasks at once.

It is one compiled scan over the symbols of all lanes in parallel, each with its own word pointer, in 32-bit
integers. Sizes are padded to four per octave, so that stores of different sizes share compilations.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hydraopt_jax.codec import rans
from hydraopt_jax.codec.bitstream import Damaged
from hydraopt_jax.codec.frequency_tables import SLOT_BITS, SLOTS, Lookup
from hydraopt_jax.codec.rans import LOW, PERIOD

# symbols of a lane that one turn of the compiled loop takes
UNROLL = 4


def padded(count: int) -> int:
    """The smallest size (four per octave, multiples of 8) that is at least `count`.

    >>> [padded(n) for n in (0, 3, 9, 33, 1000, 1025)]
    [8, 8, 16, 40, 1024, 1280]
    """
    step = max(8, 1 << max((count - 1).bit_length() - 3, 0))
    return max(step, -(-count // step) * step)


@jax.jit
def scan(
    state: Array,
    at: Array,
    lengths: Array,
    words: Array,
    context: Array,
    row: Array,
    entry: Array,
    value: Array,
) -> tuple[Array, Array, Array]:
    """Values `[n, L]` int16 of L lanes, their last states `[L]`, and where their word pointers ended `[L]`.

    Args:
      state: `[L]` uint32.
      at: `[L]` int32, where each lane's words begin.
      lengths: `[L]` int32, symbols of each lane.
      words: `[W]` uint16, the words of all lanes.
      context: `[n, L]` uint8.
      row, entry, value: `frequency_tables.Lookup`.
    """

    def step(carry: Any, each: tuple[Array, Array]) -> tuple[Any, Array]:
        x, at, *ahead = carry
        index, context = each
        # what is known of the quantizers of this step and of the four after it
        q0, q1, q2, q3, q4 = (jnp.where(index % PERIOD == 0, jnp.uint32(0), q) for q in ahead)
        slot = row[context] + ((x & (SLOTS - 1)) | q0).astype(jnp.int32)
        found = entry[slot]
        y = (x >> SLOT_BITS) * (found >> (SLOT_BITS + 1)) + (found & (SLOTS - 1))
        coded = index < lengths
        short = coded & (y < LOW)
        y = jnp.where(short, y << 16 | words.at[at].get(mode="clip").astype(jnp.uint32), y)
        kept = jnp.where(coded, y, x), at + short, q1, q2 ^ (found & SLOTS), q3 ^ q0, q4, q0
        return kept, jnp.where(coded, value[slot], jnp.int16(0))

    zero = jnp.zeros_like(state)
    steps = jnp.arange(len(context), dtype=jnp.int32)
    (x, at, *_), values = lax.scan(step, (state, at, *[zero] * 5), (steps, context), unroll=UNROLL)
    return values, x, at


def decode(
    state: np.ndarray,
    words: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    lengths: np.ndarray,
    context: np.ndarray,
    lookup: Lookup,
) -> np.ndarray:
    """Values `[n, L]` int16 of L lanes, computed on the default device; see `rans.decode`.

    Raises:
      Damaged: see `rans.decode`.
    """
    steps, lanes = context.shape
    if not context.size or len(words) >= 1 << 31:
        return rans.decode(state, words, first, last, lengths, context, lookup)
    if ((state < LOW) & (lengths > 0)).any():
        raise Damaged("a lane's state")
    fill = functools.partial(_filled, shape=(padded(lanes),))
    values, x, at = scan(
        fill(state),
        fill(first.astype(np.int32)),
        fill(lengths.astype(np.int32)),
        _filled(words, (padded(len(words) + 1),)),
        _filled(context, (padded(steps), padded(lanes))),
        np.maximum(lookup.row, 0),
        *(_filled(v, (2 * SLOTS * padded(len(v) // (2 * SLOTS)),)) for v in (lookup.entry, lookup.value)),
    )
    if not (
        np.array_equal(np.asarray(at)[:lanes], last) and (np.asarray(x)[:lanes] == LOW)[lengths > 0].all()
    ):
        raise Damaged("a lane that does not end where its words do")
    return np.asarray(values)[:steps, :lanes]


def _filled(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array with zeros after it."""
    return np.pad(x, [(0, n - k) for n, k in zip(shape, x.shape, strict=True)])
