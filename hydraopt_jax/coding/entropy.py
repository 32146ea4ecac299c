"""Range asymmetric numeral systems (rANS): entropy coding with integer tables, every lane on its own.

A lane's state is 32 bits and moves 16 bits at a time; `x -> (x // f) * 2^14 + x % f + c` for a symbol of
frequency f and cumulative frequency c. All arithmetic is in integers, so that what one machine wrote every
machine reads. The table of a symbol depends on the trellis state, which decoding carries along.

Reference: J. Duda, Asymmetric numeral systems, arXiv 1311.2540; F. Giesen, Interleaved entropy
coders, arXiv 1402.3392.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hydraopt_jax.coding import classes, trellis

FREQUENCY_BITS = 14
LOW = 1 << 16


class Encoded(NamedTuple):
    """What the coder leaves of L lanes.

    Attributes:
      state: `[L]` uint32, where decoding starts.
      words: `[n, L]` uint16, the word a lane takes in after symbol n, where it takes one.
      taken: `[n, L]` bool, whether it does.
    """

    state: Array
    words: Array
    taken: Array


def integer_frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts `[..., HIGH]` as integers that sum to 2^14, zero where a symbol never occurs.

    >>> integer_frequencies(np.array([3.0, 1.0, 0.0])).tolist()
    [12289, 4095, 0]
    """
    total = 1 << FREQUENCY_BITS
    seen = counts > 0
    sums = counts.sum(-1, keepdims=True)
    share = counts / np.where(sums > 0, sums, 1) * (total - seen.sum(-1, keepdims=True))
    out = np.where(seen, np.maximum(np.floor(share), 1), 0).astype(np.int64)
    rest = np.where(sums[..., 0] > 0, total - out.sum(-1), 0)
    most = np.argmax(out, -1)[..., None]
    np.put_along_axis(out, most, np.take_along_axis(out, most, -1) + rest[..., None], -1)
    return out


@jax.jit
def encode(symbols: Array, tables: Array, frequencies: Array) -> Encoded:
    """Encode lanes from their last symbol to the first, so that decoding runs forward.

    Args:
      symbols: `[n, L]` high parts.
      tables: `[n, L]` the row of `frequencies` each symbol is coded with.
      frequencies: `[tables, HIGH]`, rows that sum to 2^14 and are positive where a symbol occurs.
    """
    below = jnp.cumsum(frequencies, -1) - frequencies
    flat_f, flat_c = frequencies.astype(jnp.uint32).ravel(), below.astype(jnp.uint32).ravel()

    def step(x: Array, now: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        at = now[1] * classes.HIGH + now[0]
        f = flat_f[at]
        full = (x >> (32 - FREQUENCY_BITS)) >= f
        word = (x & 0xFFFF).astype(jnp.uint16)
        x = jnp.where(full, x >> 16, x)
        quotient = x // f
        return (quotient << FREQUENCY_BITS) + (x - quotient * f) + flat_c[at], (word, full)

    start = jnp.full(symbols.shape[1], LOW, jnp.uint32)
    state, (words, taken) = jax.lax.scan(step, start, (symbols, tables), reverse=True)
    return Encoded(state, words, taken)


@jax.jit
def decode(
    state: Array, words: Array, begin: Array, stream: Array, index: Array, low: Array, frequencies: Array
) -> tuple[Array, Array]:
    """Decode magnitudes and quantisers; the trellis state picks the table of each symbol.

    Args:
      state: `[L]` uint32 start of every lane.
      words: `[W]` uint16, the streams' words one after another, each in the order its lanes take them.
      begin: `[streams]` int32, where each stream's words begin.
      stream: `[L]` int32, the stream of every lane, ascending.
      index: `[n, L]` class of each symbol.
      low: `[n, L]` raw low bits of each symbol.
      frequencies: `[COUNT * 2, HIGH]`.

    Returns:
      Magnitudes `[n, L]` and quantisers `[n, L]`, int32.
    """
    cumulative = jnp.cumsum(frequencies, -1)
    flat_f, flat_c = frequencies.ravel(), (cumulative - frequencies).ravel()
    slots = jnp.arange(1 << FREQUENCY_BITS)
    symbol_of = jax.vmap(lambda row: jnp.searchsorted(row, slots, side="right"))(cumulative)
    symbol_of = jnp.minimum(symbol_of, classes.HIGH - 1).astype(jnp.uint8).ravel()
    shift = jnp.asarray(classes.SHIFT, jnp.int32)
    first = jnp.searchsorted(stream, jnp.arange(begin.shape[0]))
    # words are read at most once a symbol and lane: positions stay in range for a whole stream
    padded = jnp.concatenate([words.astype(jnp.uint32), jnp.zeros(1, jnp.uint32)])

    def step(carry: tuple[Array, Array, Array], now: tuple[Array, Array]) -> tuple[tuple, tuple]:
        x, trellis_state, at = carry
        cls, low = now
        quantiser = trellis_state % 2
        table = cls * 2 + quantiser
        slot = (x & ((1 << FREQUENCY_BITS) - 1)).astype(jnp.int32)
        symbol = symbol_of[(table << FREQUENCY_BITS) + slot].astype(jnp.int32)
        j = table * classes.HIGH + symbol
        x = flat_f[j].astype(jnp.uint32) * (x >> FREQUENCY_BITS) + (slot - flat_c[j]).astype(jnp.uint32)
        need = (x < LOW).astype(jnp.int32)
        before = jnp.cumsum(need) - need
        where = at[stream] + before - before[first][stream]
        word = padded[jnp.clip(where, 0, padded.shape[0] - 1)]
        x = jnp.where(need > 0, (x << 16) | word, x)
        at = at + jax.ops.segment_sum(need, stream, begin.shape[0], indices_are_sorted=True)
        magnitude = (symbol << shift[cls]) + low
        trellis_state = jnp.asarray(trellis.NEXT)[trellis_state, magnitude % 2]
        return (x, trellis_state, at), (magnitude, quantiser)

    carry = (state, jnp.zeros(state.shape, jnp.int32), begin)
    _, (magnitude, quantiser) = jax.lax.scan(step, carry, (index, low))
    return magnitude, quantiser
