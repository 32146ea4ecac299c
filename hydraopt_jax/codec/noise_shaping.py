"""Noise shaping: quantization errors that go where a quadratic form of them is small.

A form `e.T @ M @ e` of the errors of a vector, which are decided in order, is a sum of squares

    M = (I + C).T @ D @ (I + C),    e.T @ M @ e = sum_i d[i] (e[i] + sum_{j < i} C[i, j] e[j])^2

with C strictly lower triangular and D diagonal. So each value is quantized less the errors before it, weighed
by its row of C (GPTQ and LDLQ do so with a scalar quantizer), and the form then grows by `sum(D)` instead of
`trace(M)` times the quantizer's error. On the trellis every survivor of the Viterbi algorithm has errors of
its own (per-survivor processing): those of up to two blocks ago, then those of the best survivor. Readers
know nothing of it.

Reference: Frantar et al., GPTQ, arXiv 2210.17323; Chee et al., QuIP, arXiv 2307.13304; Raheli, Polydoros
and Tzou, Per-survivor processing, IEEE Trans. Communications 43(2/3/4), 1995.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hydraopt_jax.codec.trellis import (
    BRANCH,
    FINE,
    FROM,
    NEXT,
    STATES,
    magnitude_near,
    nearby,
    places_of,
)

# codes of a block, over which survivors keep errors of their own, and those of the block before
BLOCK = 32
# of them whose feedback is added in one turn of a loop
UNROLL = 8
# values beyond which float32 errors would not tell the codes
LARGEST = 2.0**22
# chunks that are quantized side by side
WIDTH = 32
# cost of a path that begins in another state than the first, above that of any other: weights are up to n
FORBIDDEN = 1e6
# the two ways into each state: parity times `STATES`, and where from
WAYS = [STATES * (BRANCH[:, i] & 1) + FROM[:, i] for i in range(2)]


class Filter(NamedTuple):
    """A quadratic form of errors, up to a factor.

    Attributes:
      feedback: `[n, n]` float32, C.
      weights: `[n]` float32, D over its mean.
    """

    feedback: np.ndarray
    weights: np.ndarray


class Vector(NamedTuple):
    """A vector of a stream.

    Attributes:
      length: n.
      filter: its errors' form; None for the sum of squares.
    """

    length: int
    filter: Filter | None


class Span(NamedTuple):
    """A vector, or what of it is in a chunk of codes.

    Attributes:
      start: position of its first entry, negative if that is in the chunk before.
      length: n.
      filter: its errors' form; None for the sum of squares.
    """

    start: int
    length: int
    filter: Filter | None


class Lane(NamedTuple):
    """Values that are quantized in order from the trellis' first state on.

    Attributes:
      values: `[N]` in steps.
      context: `[N]` of each.
      spans: the vectors they are of, in order.
    """

    values: np.ndarray
    context: np.ndarray
    spans: Sequence[Span]


def filter_of(form: np.ndarray) -> tuple[Filter, float]:
    """The filter of a positive definite form `[n, n]`, and `sum(D) / trace(M)`: what it leaves of the form.

    >>> found, left = filter_of(np.array([[2.0, 1.0], [1.0, 1.0]]))
    >>> found.feedback.tolist(), found.weights.tolist(), round(left, 3)
    ([[0.0, 0.0], [1.0, 0.0]], [1.0, 1.0], 0.667)
    """
    upper = np.linalg.cholesky(form[::-1, ::-1])[::-1, ::-1]
    root = np.diagonal(upper)
    feedback = np.tril((upper / root).T, -1)
    weights = root**2
    left = float(weights.sum() / np.trace(form))
    return Filter(feedback.astype(np.float32), (weights / weights.mean()).astype(np.float32)), left


class Survivors(NamedTuple):
    """The survivors of L lanes.

    Attributes:
      cost: `[STATES, L]` of each, in squared steps.
      errors: `[BLOCK, STATES, L]` of the block before.
    """

    cost: Array
    errors: Array


class Decided(NamedTuple):
    """What a block leaves behind.

    Attributes:
      origin: `[STATES, L]` the state at the block's begin of each survivor at its end.
      settled: `[BLOCK, L]` errors of the block before, of the best survivor.
    """

    origin: Array
    settled: Array


@jax.jit
def quantize_block(
    before: Survivors,
    values: Array,
    context: Array,
    weights: Array,
    far: Array,
    old: Array,
    new: Array,
    table: Array,
) -> tuple[Survivors, Decided]:
    """A block's survivors.

    Args:
      before: the survivors at its begin.
      values, context, weights: `[BLOCK, L]`.
      far: `[BLOCK, L]` feedback of what is older than the block before.
      old: `[BLOCK, BLOCK, L]` entries of C: code, code of the block before, lane.
      new: `[BLOCK, BLOCK, L]` likewise: code, one of the `BLOCK` codes before it, the oldest first, lane.
      table: see `trellis.prices`.
    """
    # barriers: each of what they separate would be computed again for all that follows from it
    apart = jax.lax.optimization_barrier
    lanes = values.shape[1]
    states = jnp.arange(STATES, dtype=jnp.int32)[:, None]
    quantizer, parity = states & 1, jnp.arange(2, dtype=jnp.int32)[:, None, None]

    fed = apart(far[:, None] + jnp.einsum("owl,wsl->osl", old, before.errors, precision="highest"))

    def step(carry: tuple[Array, Array, Array], each: Any) -> tuple[tuple[Array, Array, Array], None]:
        cost, errors, origin = carry
        value, context, weight, fed, new = apart(each)
        feedback = jnp.take_along_axis(fed, origin, 0, mode="promise_in_bounds")
        # a loop: on a CPU an einsum of this shape takes longer
        feedback = jax.lax.fori_loop(0, BLOCK, lambda w, x: x + new[w] * errors[w], feedback, unroll=UNROLL)
        wanted = apart(value - feedback)
        places = apart(places_of(jnp.abs(wanted), context))
        at, below, price, lower_price = nearby(places, quantizer, parity, table)
        squares = ((x * x).astype(jnp.float32) * (weight * 2.0**-18) for x in (at, below))
        first, second = (
            x + y.astype(jnp.float32) * 2.0**-FINE for x, y in zip(squares, (price, lower_price), strict=True)
        )
        magnitude = magnitude_near(places, quantizer, parity) - 2 * (second < first)
        found = jnp.maximum(2 * magnitude - quantizer, 0) * jnp.where(wanted < 0, -1, 1)
        error = found.astype(jnp.float32) - value
        total, error = (
            x.reshape(2 * STATES, lanes) for x in apart((cost + jnp.minimum(first, second), error))
        )
        ways = [total[x] for x in WAYS]
        other, cost = apart((ways[1] < ways[0], jnp.minimum(*ways)))
        latest = apart(jnp.where(other, error[WAYS[1]], error[WAYS[0]]))
        moved = apart(jnp.where(other, errors[1:, FROM[:, 1]], errors[1:, FROM[:, 0]]))
        errors = jnp.concatenate([moved, latest[None]])
        return (cost, errors, jnp.where(other, origin[FROM[:, 1]], origin[FROM[:, 0]])), None

    start = before.cost, jnp.zeros_like(before.errors), jnp.broadcast_to(states, (STATES, lanes))
    (cost, errors, origin), _ = jax.lax.scan(step, start, (values, context, weights, fed, new))
    best = jnp.take_along_axis(origin, jnp.argmin(cost, 0)[None], 0)
    settled = jnp.take_along_axis(before.errors, best[None], 1)[:, 0]
    # what is settled stays: later codes count on it
    cost = jnp.where(origin == best, cost - cost.min(0), FORBIDDEN)
    return Survivors(cost, errors), Decided(origin, settled)


class Rows(NamedTuple):
    """What the codes of filtered vectors need, one row each; row 0 is that of an unfiltered one.

    Attributes:
      near: `[rows, 2 * BLOCK]` entries of C, those before the diagonal.
      weights: `[rows]`.
      first: of each filter, by its `id`.
    """

    near: np.ndarray
    weights: np.ndarray
    first: dict[int, int]


def rows_of(filters: Sequence[Filter]) -> Rows:
    """The rows of all filters."""
    near, weights = [np.zeros((1, 2 * BLOCK), np.float32)], [np.ones(1, np.float32)]
    first, count = {}, 1
    for x in filters:
        if id(x) in first:
            continue
        n = len(x.weights)
        back = np.arange(n)[:, None] - 2 * BLOCK + np.arange(2 * BLOCK)
        band = np.take_along_axis(x.feedback, np.maximum(back, 0), 1)
        near.append(np.where(back < 0, 0, band))
        weights.append(x.weights)
        first[id(x)], count = count, count + n
    return Rows(np.concatenate(near), np.concatenate(weights), first)


def row_of_each(x: Lane, rows: Rows) -> np.ndarray:
    """The row of each code of a lane, `[N]`."""
    out = np.zeros(len(x.values), np.int64)
    for start, length, given in x.spans:
        if given is not None:
            low, high = max(start, 0), min(start + length, len(out))
            out[low:high] = rows.first[id(given)] + np.arange(low - start, high - start)
    return out


def far_feedback(span: Span, at: int, settled: np.ndarray) -> np.ndarray:
    """Feedback `[BLOCK]` of a span's errors before the block before, to its codes in the block."""
    start, length, given = span
    first, last = max(start, 0), at - BLOCK
    out = np.zeros(BLOCK, np.float32)
    if given is not None and first < last:
        rows = slice(at - start, min(at - start + BLOCK, length))
        fed = given.feedback[rows, first - start : last - start] @ settled[first:last]
        out[: len(fed)] = fed
    return out


def quantize(
    given: Sequence[Lane], rows: Rows, table: Array
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Codes of least `form of the errors + multiplier * bits`, approximately.

    Args:
      given: at most `WIDTH`; values are below `LARGEST`.
      rows: of all filters.
      table: costs, see `trellis.prices`.

    Returns:
      Magnitudes `[N]` int32 of each lane, the quantizer of each `[N]` uint8, and whether it is negative.
    """
    steps = -(-max(len(x.values) for x in given) // BLOCK) * BLOCK
    values, context = np.zeros((steps, WIDTH), np.float32), np.zeros((steps, WIDTH), np.int32)
    row = np.zeros((steps, WIDTH), np.int64)
    running = []
    for lane, x in enumerate(given):
        n = len(x.values)
        values[:n, lane], context[:n, lane], row[:n, lane] = x.values, x.context, row_of_each(x, rows)
        # the span that goes on at the begin of each block
        ends = [y.start + y.length for y in x.spans]
        running.append(np.searchsorted(ends, np.arange(0, n, BLOCK), "right").tolist())
    settled = np.zeros((WIDTH, steps), np.float32)
    cost = np.full((STATES, WIDTH), FORBIDDEN, np.float32)
    cost[0] = 0
    state = Survivors(jnp.asarray(cost), jnp.zeros((BLOCK, STATES, WIDTH), jnp.float32))
    blocks: list[tuple[Array, Array]] = []
    for at in range(0, steps, BLOCK):
        mine = slice(at, at + BLOCK)
        far = np.zeros((BLOCK, WIDTH), np.float32)
        for lane, x in enumerate(given):
            if at < len(x.values):
                far[:, lane] = far_feedback(x.spans[running[lane][at // BLOCK]], at, settled[lane])
        near = rows.near[row[mine]].swapaxes(1, 2)
        old = np.stack([near[k, BLOCK - k : 2 * BLOCK - k] for k in range(BLOCK)])
        state, done = quantize_block(
            state, values[mine], context[mine], rows.weights[row[mine]], far, old, near[:, BLOCK:], table
        )
        blocks.append((state.errors, done.origin))
        if at:
            settled[:, at - BLOCK : at] = np.asarray(done.settled).T
    found = np.zeros((steps, WIDTH), np.float32)
    first = np.zeros((len(blocks), WIDTH), np.int32)
    lanes, last = np.arange(WIDTH), np.asarray(state.cost).argmin(0)
    for n, (errors, origin) in reversed(list(enumerate(blocks))):
        found[n * BLOCK : (n + 1) * BLOCK] = np.asarray(errors)[:, last, lanes]
        first[n] = last = np.asarray(origin)[last, lanes]
    signed = np.rint(found + values).astype(np.int32)
    # both quantizers: 2 k, and 2 k - 1
    magnitude = np.abs(signed) + 1 >> 1
    quantizer = quantizers_of(magnitude, first)
    return [
        (magnitude[:n, lane], quantizer[:n, lane], signed[:n, lane] < 0)
        for lane, n in enumerate(len(x.values) for x in given)
    ]


def quantizers_of(magnitude: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The quantizers of codes `[n, L]`, from the state at the begin of each block `[n / BLOCK, L]`."""
    parity = (magnitude & 1).reshape(-1, BLOCK, magnitude.shape[1])
    out = np.zeros(parity.shape, np.uint8)
    state = first
    for k in range(BLOCK):
        out[:, k] = state & 1
        state = NEXT[state, parity[:, k]]
    return out.reshape(magnitude.shape)


def spans_of(vectors: Sequence[Vector], ends: np.ndarray, first: int, last: int) -> list[Span]:
    """The spans of the codes from `first` to `last` of a stream.

    Args:
      vectors: those of the stream.
      ends: positions behind each.
    """
    mine = range(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last)) + 1)
    return [Span(int(ends[k]) - vectors[k].length - first, *vectors[k]) for k in mine]
