"""Quantize streams of vectors, many chunks of their codes side by side."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hydraopt_jax import devices
from hydraopt_jax.codec import noise_shaping, streams, trellis
from hydraopt_jax.codec.contexts import RAW_BITS, WIDE
from hydraopt_jax.codec.noise_shaping import Vector
from hydraopt_jax.codec.rans import PERIOD
from hydraopt_jax.codec.streams import Symbols

# chunks that are quantized side by side, of few widths, for few compilations: the trellis keeps some thirty
# bytes of every symbol until it has decided, so a CPU takes a few chunks at a time
WIDTHS = {"cpu": (32,)}
ELSEWHERE = (128, 1 << 11)
# least steps of a trellis, so that few shapes are compiled
LEAST_STEPS = 1024


class Chunk(NamedTuple):
    """Consecutive codes of a lane that the trellis quantizes from its first state on.

    Attributes:
      length: number of codes, at most `PERIOD`.
      stream: their stream.
      first: position of the first one in the stream.
    """

    length: int
    stream: int
    first: int


def context_bits(frequencies: np.ndarray) -> np.ndarray:
    """Mean bits of a code in each context, `[COUNT]`: symbols at their entropy given the quantizer, signs,
    middle bits."""
    total = frequencies.sum(-1)
    share = frequencies / np.where(total > 0, total, 1)[..., None]
    bits = -(share * np.log2(np.where(share > 0, share, 1))).sum(-1) + RAW_BITS[:, None]
    bits += np.where(WIDE[:, None], 1, 1 - share[..., 0])
    return (bits * total).sum(1) / np.maximum(total.sum(1), 1e-9)


@devices.not_on_gpu
def quantize_streams(
    values: Sequence[np.ndarray],
    context: Sequence[np.ndarray],
    frequencies: np.ndarray,
    multiplier: float,
    vectors: Sequence[Sequence[Vector]] = (),
) -> list[Symbols]:
    """Codes of streams, with noise shaping where a chunk has a vector with a filter.

    Args:
      values: of each stream, `[N]` in steps.
      context: of each value, `[N]`.
      frequencies: `[COUNT, 2, SYMBOLS]`, the rate model.
      multiplier: squared steps per bit.
      vectors: those of each stream; empty if none has a filter.
    """
    table = trellis.prices(trellis.costs(frequencies), multiplier)
    per_code = context_bits(frequencies)
    lanes = [streams.lane_count(len(c), float(per_code[c].sum())) for c in context]
    magnitude = [np.zeros(len(x), np.int32) for x in values]
    quantizer = [np.zeros(len(x), np.uint8) for x in values]
    negative = [x < 0 for x in values]

    def plain(chunks: Sequence[Chunk], width: int) -> None:
        """Quantize chunks side by side."""
        steps = max(1 << (chunks[0].length - 1).bit_length(), LEAST_STEPS)
        y, of = streams.rows_of(width, steps, np.float32), streams.rows_of(width, steps, np.uint8)
        for row, (length, k, first) in enumerate(chunks):
            y[row, :length] = values[k][first : first + length]
            of[row, :length] = context[k][first : first + length]
        found = trellis.quantize(*(np.ascontiguousarray(x.T) for x in (y, of)), table)
        m, q = streams.rows_of(width, steps, np.int32), streams.rows_of(width, steps, np.uint8)
        m[:], q[:] = (np.asarray(x).T for x in found)
        for row, (length, k, first) in enumerate(chunks):
            magnitude[k][first : first + length] = m[row, :length]
            quantizer[k][first : first + length] = q[row, :length]

    filters = [x.filter for found in vectors for x in found if x.filter is not None]
    rows = noise_shaping.rows_of(filters)
    ends = [np.cumsum([x.length for x in found]) for found in vectors]

    def shaped(chunks: Sequence[Chunk]) -> None:
        """The same with filters."""
        given = [
            noise_shaping.Lane(
                values[k][first : first + length], context[k][first : first + length], spans[k, first]
            )
            for length, k, first in chunks
        ]
        found = noise_shaping.quantize(given, rows, table)
        for (length, k, first), (m, q, sign) in zip(chunks, found, strict=True):
            mine = slice(first, first + length)
            magnitude[k][mine], quantizer[k][mine], negative[k][mine] = m, q, sign

    # the longest first, so that those of about one length are side by side
    order = [x for k, (v, n) in enumerate(zip(values, lanes, strict=True)) for x in chunks_of(len(v), n, k)]
    order.sort(reverse=True)
    spans = {
        (k, first): noise_shaping.spans_of(vectors[k], ends[k], first, first + length)
        for length, k, first in order
        if filters
    }
    filtered = [
        any(x.filter for x in spans.get((k, first), ()))
        and np.abs(values[k][first : first + length]).max() < noise_shaping.LARGEST
        for length, k, first in order
    ]
    without, having = (
        [x for x, has in zip(order, filtered, strict=True) if has == wanted] for wanted in (False, True)
    )
    widths = WIDTHS.get(devices.platform(), ELSEWHERE)
    width = next((x for x in widths if x >= len(without)), widths[-1])
    jobs = [functools.partial(plain, x, width) for x in batches(without, width)]
    jobs += [functools.partial(shaped, x) for x in batches(having, noise_shaping.WIDTH)]
    devices.together(jobs)
    return [
        Symbols(m, q, c.astype(np.uint8), s, n)
        for m, q, c, s, n in zip(magnitude, quantizer, context, negative, lanes, strict=True)
    ]


def batches(chunks: Sequence[Chunk], width: int) -> list[Sequence[Chunk]]:
    """The chunks, at most `width` at a time."""
    return [chunks[at : at + width] for at in range(0, len(chunks), width)]


def chunks_of(count: int, lanes: int, stream: int) -> list[Chunk]:
    """The chunks of a stream of `count` codes in `lanes` lanes.

    >>> chunks_of(6000, 1, 0)
    [Chunk(length=4096, stream=0, first=0), Chunk(length=1904, stream=0, first=4096)]
    """
    ends = np.cumsum(streams.lane_lengths(count, lanes)).tolist()
    return [
        Chunk(min(PERIOD, end - first), stream, first)
        for start, end in itertools.pairwise([0, *ends])
        for first in range(start, end, PERIOD)
    ]
