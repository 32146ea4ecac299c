"""Dependent quantization: a 32-state trellis over two interleaved scalar quantizers.

Quantizer Q0 reconstructs `2 k`, Q1 `sign(k) (2 |k| - 1)` (0 for k = 0), in steps; the parity of k drives the
state, and the state says which quantizer is next. The union is a denser packing than either, with more
than 1 dB less error than a scalar quantizer at the same rate. The Viterbi algorithm picks the codes of least
`error + multiplier * bits`.

The quantizers follow from the parities p by Ungerboeck's code with the parity check polynomials (45, 10), in
octal, backwards: `q[i] = q[i - 3] xor q[i - 5] xor p[i - 2]`. The state holds what is known of the next five.
Decoding costs the same whatever the number of states.

Reference: Ungerboeck, Channel coding with multilevel/phase signals, IEEE Trans. Information Theory 28(1),
1982; Marcellin and Fischer, Trellis coded quantization, IEEE Trans. Communications 38(1), 1990; Schwarz et
al., Quantization and entropy coding in the versatile video coding standard, 2021.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hydraopt_jax.codec.contexts import COUNT, ESCAPE, ESCAPE_BITS, RAW_BITS, SYMBOLS, WIDE

STATES = 32


def following(state: int, parity: int) -> int:
    """The next state. Bit j of a state is what the codes so far add to the quantizer j symbols ahead.

    >>> following(0b00001, 0) == 0b10100, following(0b00000, 1) == 0b00010
    (True, True)
    """
    quantizer = state & 1
    return state >> 1 ^ parity << 1 ^ quantizer << 2 ^ quantizer << 4


# state x parity of the code -> next state; even states quantize with Q0, odd ones with Q1
NEXT = np.array([[following(s, p) for p in range(2)] for s in range(STATES)], np.int32)
# the two ways into each state: where from, and the branch (2 * quantizer + parity)
FROM = np.array(
    [[s for s in range(STATES) for p in range(2) if NEXT[s, p] == d] for d in range(STATES)], np.int32
)
BRANCH = np.array(
    [[2 * (s % 2) + p for s in range(STATES) for p in range(2) if NEXT[s, p] == d] for d in range(STATES)]
)


# steps whose parities the low bits of a path's cost hold, before they go to memory: one byte
TOGETHER = 8
# bits behind the point of costs of symbols and of paths; the largest cost of a symbol, in squared steps:
# paths of one step differ by less than five of them, which with those of `TOGETHER` steps fit 32 bits
FINE, FINER = 10, 14
DEAREST = 30.0
# integer parts of values whose magnitudes a context distinguishes
CELLS = 256
# cost of a path that begins in another state, above that of any path to a state
FORBIDDEN = 175


def costs(frequencies: np.ndarray) -> np.ndarray:
    """Bits of each symbol, `[COUNT, 2, SYMBOLS]` float32, from (possibly zero) frequencies.

    Middle bits, escapes and signs are counted in; the zero of a narrow context has no sign. In context 0,
    which fills up lanes, a zero costs nothing, and there is nothing else.
    """
    share = frequencies + 1e-3 * (frequencies.sum(-1, keepdims=True) + 1) / SYMBOLS
    bits = -np.log2(share / share.sum(-1, keepdims=True)) + RAW_BITS[:, None, None] + 1
    bits[..., ESCAPE:] += ESCAPE_BITS - RAW_BITS[:, None, None]
    bits[~WIDE, :, 0] -= 1
    bits[0] = 1e4
    bits[0, :, 0] = 0.0
    return bits.astype(np.float32)


@jax.jit
def prices(bits: Array, multiplier: Array | float) -> Array:
    """Costs of the magnitude next to a value and of the magnitude less by two, by branch, context, and cell.

    What is next to a value depends on its integer part alone, which tells its cell; a wide context has cells
    of `2^raw`. Costs are in units of `2^-FINE` squared steps and count from the least of each context; one
    word has both, 16 bits each. There is none below 0 and 1, the escapes, and in wide contexts, where the
    lower magnitude saves next to nothing.

    Args:
      bits: `[COUNT, 2, SYMBOLS]` cost of each symbol, see `costs`.
      multiplier: squared steps per bit.

    Returns:
      `[4 * COUNT * CELLS]` int32.
    """
    cost = multiplier * jnp.asarray(bits)
    cost = jnp.minimum(cost - cost.min((1, 2), keepdims=True), DEAREST)
    fixed = jnp.round(cost * 2**FINE).astype(jnp.int32)
    lower = jnp.concatenate([fixed[..., :2], fixed[..., : ESCAPE - 2], fixed[..., ESCAPE:]], -1)
    both = fixed << 16 | jnp.where(WIDE[:, None, None], fixed, lower)
    quantizer, parity = (np.array(x)[:, None, None] for x in ((0, 0, 1, 1), (0, 1, 0, 1)))
    raw, context = RAW_BITS[:, None], np.arange(COUNT)[:, None]
    value = (np.arange(CELLS) + 0.5) * 2.0**raw
    near = np.maximum(np.rint((value + quantizer - 2 * parity) / 4).astype(np.int64) * 2 + parity, parity)
    symbol = np.minimum(2 * (near >> (raw + 1)), ESCAPE) + parity
    return both[context, quantizer, np.where(raw > 0, symbol, np.minimum(near, ESCAPE + parity))].reshape(-1)


class Places(NamedTuple):
    """Where values are, int32: their integer parts, up to four; fourths of them modulo 1, in units of 2^-11;
    and their cells in the table of a branch."""

    whole: Array
    phase: Array
    cell: Array


def places_of(value: Array, context: Array) -> Places:
    """The `Places` of magnitudes in steps, and of their contexts."""
    whole, quarter = value.astype(jnp.int32), value * 0.25
    cell = jnp.minimum(whole >> jnp.asarray(RAW_BITS, jnp.int32)[context], CELLS - 1)
    # the middle of 2^-10: never on an edge between magnitudes
    phase = ((quarter - jnp.floor(quarter)) * 1024).astype(jnp.int32) * 2 + 1
    return Places(whole, phase, context * CELLS + cell)


def nearby(x: Places, quantizer: Array, parity: Array, table: Array) -> tuple[Array, Array, Array, Array]:
    """Of the magnitude of a parity whose reconstruction is next to each value, and of that below it: the
    errors, in units of 2^-9 steps, and the prices, in units of `2^-FINE` squared steps.

    Reconstructions of one parity are four steps apart, but for that of the zero of Q1, which would be at -1.
    """
    at = (2 * quantizer + parity) * (COUNT * CELLS) + x.cell
    # by itself, or what follows is computed one number at a time as well
    both = jax.lax.optimization_barrier(table.at[at].get(mode="promise_in_bounds"))
    zero = quantizer * (1 - parity)
    first, second = jnp.where(x.whole < 1, zero, 0), jnp.where((x.whole > 0) & (x.whole < 5), zero, 0)
    error = ((x.phase + 1024 - 512 * (2 * parity - quantizer)) & 2047) - 1024 - 512 * first
    lower = error + 2048 - 512 * second
    return error, lower, both >> 16, both & 0xFFFF


def candidates(x: Places, quantizer: Array, parity: Array, table: Array) -> tuple[Array, Array]:
    """Costs of the magnitude of a parity whose reconstruction is next to each value, and of that below it, in
    units of 2^-18 squared steps."""
    error, lower, price, lower_price = nearby(x, quantizer, parity, table)
    shift = 18 - FINE
    return error**2 + (price << shift), lower**2 + (lower_price << shift)


def magnitude_near(x: Places, quantizer: Array, parity: Array) -> Array:
    """The magnitude of a parity whose reconstruction is next to each value, as the table has it: rounding the
    value itself could differ at an edge."""
    return jnp.maximum((2 * x.whole + 5 + 2 * (quantizer - 2 * parity) >> 3) * 2 + parity, parity)


def history() -> np.ndarray:
    """What led to each state, `[STATES << TOGETHER]` int32: of a state and the parities of the `TOGETHER`
    codes before it, the first one in bit 0, the state before them and, from bit 8 on, the quantizers."""
    before = np.zeros((STATES, 2), np.int32)
    for state, parity in np.ndindex(STATES, 2):
        before[NEXT[state, parity], parity] = state
    state, parities = (x.ravel() for x in np.indices((STATES, 1 << TOGETHER)))
    quantizers = np.zeros_like(state)
    for k in reversed(range(TOGETHER)):
        state = before[state, parities >> k & 1]
        quantizers |= (state & 1) << k
    return (quantizers << 8 | state).astype(np.int32)


@jax.jit
def quantize(y: Array, context: Array, table: Array) -> tuple[Array, Array]:
    """Codes of least `sum (y - x)^2 + multiplier * bits` by the Viterbi algorithm, every lane on its own.

    A path's cost is an integer that has its latest parities in its low bits, so that a minimum finds both.

    Args:
      y: `[n, L]` values in steps; n consecutive symbols of L lanes.
      context: `[n, L]` context of each value.
      table: costs, see `prices`.

    Returns:
      Magnitudes `[n, L]` int32 and the quantizer of each `[n, L]` uint8; the sign is that of `y`.
    """
    n, lanes = y.shape
    more = -n % TOGETHER
    value, context = (
        jnp.pad(x, ((0, more), (0, 0))).reshape(-1, TOGETHER, 1, lanes)
        for x in (jnp.abs(y), context.astype(jnp.int32))
    )
    quantizer, parity = (jnp.asarray(x, jnp.int32)[:, None] for x in ((0, 0, 1, 1), (0, 1, 0, 1)))
    bits = parity << jnp.arange(TOGETHER, dtype=jnp.int32)[:, None, None]
    known = (1 << TOGETHER) - 1

    def step(total: Array, paid: Array) -> tuple[Array, None]:
        first = total[FROM[:, 0]] + paid[BRANCH[:, 0]]
        second = total[FROM[:, 1]] + paid[BRANCH[:, 1]]
        return jnp.minimum(first, second), None

    def forward(total: Array, paid: Array) -> tuple[Array, Array]:
        total, _ = jax.lax.scan(step, total, paid)
        parities = total & known
        # state 0 is always reached, and a row costs less to find than a minimum
        return total - parities - (total[0] & ~known), parities.astype(jnp.uint8)

    start = jnp.full((STATES, lanes), FORBIDDEN << FINER + TOGETHER, jnp.int32).at[0].set(0)
    # of all steps at once: a few microseconds for each piece of a loop would be half of the time
    places = places_of(value, context)
    cost = jnp.minimum(*candidates(places, quantizer, parity, table))
    total, paths = jax.lax.scan(forward, start, (cost >> (18 - FINER) << TOGETHER) + bits)
    lane, table_of_history = jnp.arange(lanes), jnp.asarray(history())

    def backward(state: Array, path: Array) -> tuple[Array, Array]:
        parities = path[state, lane].astype(jnp.int32)
        found = table_of_history[state << TOGETHER | parities]
        return found & 0xFF, found >> 8 << TOGETHER | parities

    end = jnp.argmin(total, 0).astype(jnp.int32)
    words = jax.lax.scan(backward, end, paths, reverse=True)[1][:, None, None]
    place = jnp.arange(TOGETHER, dtype=jnp.int32)[:, None, None]
    parity, quantizer = words >> place & 1, words >> TOGETHER >> place & 1
    at, below = candidates(places, quantizer, parity, table)
    near = magnitude_near(places, quantizer, parity)
    magnitude = near - 2 * (below < at).astype(jnp.int32)
    flat = (x.reshape(-1, lanes)[:n] for x in (magnitude, quantizer.astype(jnp.uint8)))
    return next(flat), next(flat)
