"""Encode lanes by JAX, and decode them bit for bit as `rans.decode` does in NumPy, many tasks at once.

Both are compiled scans over the symbols of all lanes in parallel, in 32-bit integers. Encoding goes block by
block, of one shape. A decoder's lanes have their own word pointers; sizes are padded to four per octave, so
that stores of different sizes share compilations.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hydraopt_jax import devices
from hydraopt_jax.codec import frequency_tables, rans, streams
from hydraopt_jax.codec.bitstream import Damaged
from hydraopt_jax.codec.contexts import ESCAPE, RAW_BITS, WIDE, level
from hydraopt_jax.codec.frequency_tables import SLOT_BITS, SLOTS, Lookup
from hydraopt_jax.codec.rans import LOW, PERIOD
from hydraopt_jax.codec.streams import Parsed, Symbols

# symbols of a lane that one turn of the compiled loop takes
UNROLL = 4
# steps that are encoded at once, and lanes; elsewhere all lanes
STEPS, WIDTHS = 512, {"cpu": 128}
BUG = "please report this collection as a bug"


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


@jax.jit
def encode_block(state: Array, lengths: Array, index: Array, both: Array) -> tuple[Array, Array]:
    """States `[L]` uint32 before a block of symbols, from those behind it, and words.

    From the last symbol of frequency f, whose slots begin at c, to the first, so that decoding runs forward:

        while x >= 2^20 f: words <- x mod 2^16, x <- floor(x / 2^16);   x <- 2^12 floor(x / f) + (x mod f) + c

    Args:
      state: `[L]` uint32.
      lengths: `[L]` int32, symbols of each lane in this block; further ones are passed over.
      index: `[n, L]` int32 of each symbol in the tables.
      both: `[symbols of all tables]` uint32, `f << SLOT_BITS | c`.

    Returns:
      States, 0 for a lane that a decoder would not take back symbol by symbol; words `[n, L]` uint32, 2^16
      where there is none.
    """

    def real(x: Array) -> Array:
        return x.astype(jnp.int32).astype(jnp.float32)

    def step(x: Array, each: tuple[Array, Array]) -> tuple[Array, Array]:
        place, found = each
        f, c = found >> SLOT_BITS, found & (SLOTS - 1)
        coded = place < lengths
        full = coded & (x > (f << (32 - SLOT_BITS)) - 1)
        y = jnp.where(full, x >> 16, x)
        # the quotient is below 2^20, and at most one away
        near = (real(y >> 16) * LOW + real(y & (LOW - 1))) / real(jnp.maximum(f, 1))
        q = near.astype(jnp.int32).astype(jnp.uint32)
        r = y - q * f
        less = r >> 31
        q, r = q - less, r + less * f
        more = (r >= f).astype(jnp.uint32)
        q, r = q + more, r - more * f
        new = (q << SLOT_BITS) + r + c
        # a decoder finds the symbol from r + c, and f q + r, and the next word where that is below 2^16
        new = jnp.where((r < f) & (x >= LOW) & (new >= LOW), new, jnp.uint32(0))
        return jnp.where(coded, new, x), jnp.where(full, x & (LOW - 1), jnp.uint32(LOW))

    places = jnp.arange(len(index), dtype=jnp.int32)
    return lax.scan(step, state, (places, both[index]), reverse=True)


@devices.not_on_gpu
def encode_lanes(
    index: np.ndarray, lengths: np.ndarray, frequency: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States and words of lanes.

    Args:
      index: `[n, L]` of each symbol in the tables.
      lengths: `[L]` symbols of each lane, in descending order.
      frequency: `[symbols of all tables]` slots of each; positive where one occurs.
      start: `[symbols of all tables]` first slot of each.

    Returns:
      States `[L]` uint32; words of all lanes, one lane after another, in the order of decoding; how many each
      lane has, `[L]`.

    Raises:
      RuntimeError: they do not decode, which is a fault of this package.
    """
    both = jax.device_put(frequency.astype(np.uint32) << np.uint32(SLOT_BITS) | start.astype(np.uint32))
    width = WIDTHS.get(devices.platform(), padded(len(lengths)))
    states, words, counts = [np.zeros(0, np.uint32)], [np.zeros(0, np.uint16)], [np.zeros(0, np.int64)]
    for at in range(0, len(lengths), width):
        mine = lengths[at : at + width]
        count, steps = len(mine), int(mine[0])
        left = np.pad(mine, (0, width - count))
        rows = streams.rows_of(count, steps, np.uint32)
        state: np.ndarray | jax.Array = np.full(width, LOW, np.uint32)
        for first in range((steps - 1) // STEPS * STEPS, -1, -STEPS):
            block = index[first : first + STEPS, at : at + count]
            block = np.pad(block, [(0, STEPS - len(block)), (0, width - count)])
            state, found = encode_block(state, np.clip(left - first, 0, STEPS).astype(np.int32), block, both)
            rows[:, first : first + STEPS] = np.asarray(found)[: steps - first, :count].T
        there = rows < LOW
        states.append(np.asarray(state)[:count])
        words.append(rows[there].astype(np.uint16))
        counts.append(np.count_nonzero(there, axis=1))
    last = np.concatenate(states)
    if (last < LOW).any():
        raise RuntimeError(f"a lane that does not decode: {BUG}")
    return last, np.concatenate(words), np.concatenate(counts)


def encode(coded: Sequence[Symbols], frequencies: np.ndarray) -> list[bytes]:
    """The bytes of each stream.

    Raises:
      RuntimeError: they do not decode, which is a fault of this package.
    """
    sizes = [(len(x.magnitude), x.lanes) for x in coded]
    places = streams.sort_lanes(sizes)
    slots = np.stack(
        [
            frequency_tables.halves(row, bool(wide))
            for table, wide in zip(frequencies, WIDE, strict=True)
            for row in table
        ]
    )
    state, words, count = encode_lanes(
        streams.gather([streams.signed_symbols(x) for x in coded], [x.lanes for x in coded], places),
        places.lengths,
        slots.ravel(),
        (np.cumsum(slots, -1) - slots).ravel(),
    )
    ends = np.cumsum(count)
    out = []
    for x, columns in zip(coded, places.columns, strict=True):
        mine = np.concatenate(
            [np.zeros(0, np.uint16), *(words[ends[c] - count[c] : ends[c]] for c in columns)]
        )
        special = np.flatnonzero((x.magnitude >= ESCAPE) | WIDE[x.context])
        raw = RAW_BITS[x.context[special]]
        levels = level(x.magnitude[special], x.negative[special], x.context[special])
        wide = raw > 0
        middle = (levels[wide] >> 1) & ((1 << raw[wide]) - 1) if wide.any() else None
        escaped = levels[levels >> (raw + 1) >= ESCAPE // 2] >> 1
        made = Parsed(x.lanes, state[columns], count[columns], mine, middle, escaped.astype(np.uint32))
        out.append(streams.pack(made, raw[wide]))
        back = streams.parse(out[-1], x.context)
        same = all(np.array_equal(a, b) for a, b in zip(made, back, strict=True))  # type: ignore[arg-type]
        if not same or (x.quantizer != streams.expected_quantizers(x)).any():
            raise RuntimeError(f"a stream that is read as another one: {BUG}")
    return out


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
