"""Streams: the codes of a leaf as lanes, and as bytes. NumPy only.

The N codes of a leaf's vectors are concatenated and cut into L lanes of n = ceil(N / L) codes; the last lanes
are shorter. A lane has consecutive codes because neighbors share a context: interleaving the codes of strong
and weak vectors in one trellis would cost some per cent at low rates. A stream is

    lanes, escapes             numbers (`bitstream.number`); lanes is 0 where there are no codes
    words of each lane         less the least count, which comes first as a number
    states                     uint32 for each lane
    words                      uint16, lane after lane
    middle bits                most significant first, codes with one of them, then codes with two, ...
    escapes                    uint32 each, `level >> 1`

all little-endian.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from hydraopt_jax.codec import frequency_tables, rans
from hydraopt_jax.codec.bitstream import Damaged, Reader, number, pack_integers, unpack_integers
from hydraopt_jax.codec.contexts import COUNT, ESCAPE, MAX_MAGNITUDE, RAW_BITS, SYMBOLS, WIDE, level, symbol

# coded bytes and number of codes per lane, and the maximum lanes of a stream
LANE_BYTES, LANE_CODES = 3200, 8192
# contexts that are counted at once
BLOCK = 1 << 18
MAX_LANES = 4096


class Symbols(NamedTuple):
    """The codes of one stream, in order.

    Attributes:
      magnitude: `[N]` int32.
      quantizer: `[N]` uint8, which of the two quantizers each code belongs to.
      context: `[N]` uint8.
      negative: `[N]` bool.
      lanes: L.
    """

    magnitude: np.ndarray
    quantizer: np.ndarray
    context: np.ndarray
    negative: np.ndarray
    lanes: int

    @property
    def level(self) -> np.ndarray:
        """`[N]`, see `contexts`."""
        return level(self.magnitude, self.negative, self.context)


def lane_count(count: int, bits: float) -> int:
    """Number of lanes for `count` codes of an expected total of `bits` bits; 0 for no codes."""
    wanted = min(bits / 8 / LANE_BYTES, count / LANE_CODES)
    return int(np.clip(round(wanted), min(count, 1), min(count, MAX_LANES)))


def as_lanes(flat: np.ndarray, lanes: int) -> np.ndarray:
    """A stream's entries `[N]` as lanes `[n, L]`, filled up with zeros.

    >>> as_lanes(np.array([1, 2, 3]), 2).tolist()
    [[1, 3], [2, 0]]
    """
    steps = -(-len(flat) // max(lanes, 1))
    rows = rows_of(lanes, steps, flat.dtype)
    whole, rest = divmod(len(flat), max(steps, 1))
    rows[:whole] = flat[: whole * steps].reshape(whole, steps)
    rows[whole : whole + 1, :rest] = flat[whole * steps :]
    return np.ascontiguousarray(rows.T)


def rows_of(count: int, length: int, dtype: DTypeLike) -> np.ndarray:
    """Zeros `[count, length]`, whose rows do not begin a power of two apart: a cache would hold few of their
    columns at once, and transposing takes six times as long."""
    return np.zeros((count, -(-length // 1024) * 1024 + 64), dtype)[:, :length]


def from_lanes(matrix: np.ndarray, count: int) -> np.ndarray:
    """The inverse of `as_lanes`: the first `count` entries of lanes `[n, L]`."""
    return np.ascontiguousarray(matrix.T).ravel()[:count]


def lane_lengths(count: int, lanes: int) -> np.ndarray:
    """Codes of each lane, `[L]`.

    >>> lane_lengths(5, 4).tolist()
    [2, 2, 1, 0]
    """
    steps = -(-count // max(lanes, 1))
    return np.clip(count - steps * np.arange(lanes), 0, steps)


def signed_symbols(x: Symbols) -> np.ndarray:
    """`2 * symbol + sign` of each code within its context and quantizer, in one numbering, `[N]` int32."""
    row = (x.context.astype(np.int32) << 1 | x.quantizer) * SYMBOLS
    special = np.flatnonzero((x.magnitude >= ESCAPE) | WIDE[x.context])
    if len(special):
        raw = RAW_BITS[x.context[special]]
        mine = symbol(level(*(y[special] for y in (x.magnitude, x.negative, x.context))), raw)
        special_row = row[special]
        row += x.magnitude
        row[special] = special_row + mine
    else:
        row += x.magnitude
    # no zero is coded as negative
    return row << 1 | (x.negative & (x.magnitude > 0))


def histogram(streams: Sequence[Symbols]) -> np.ndarray:
    """Counts of symbols, `[COUNT, 2, SYMBOLS]` float64; wide contexts have those of both quantizers twice."""
    out = np.zeros(2 * COUNT * 2 * SYMBOLS)
    for x in streams:
        out += np.bincount(signed_symbols(x), minlength=len(out))
    table = out.reshape(COUNT, 2, SYMBOLS, 2).sum(-1)
    table[WIDE] = table[WIDE].sum(1, keepdims=True)
    return table


def expected_quantizers(x: Symbols) -> np.ndarray:
    """The quantizer of each code as the codes before it decide, `[N]` uint8, see `rans`."""
    parity, quantizer = (x.magnitude & 1).astype(np.uint8), x.quantizer
    out = np.zeros_like(parity)
    out[2:] = parity[:-2]
    out[3:] ^= quantizer[:-3]
    out[5:] ^= quantizer[:-5]
    # where the trellis starts again, nothing is before
    lengths = lane_lengths(len(parity), x.lanes)
    starts = np.cumsum(lengths) - lengths
    runs = [np.arange(at, at + n, rans.PERIOD) for at, n in zip(starts, lengths, strict=True)]
    for first in np.concatenate(runs).tolist() if runs else ():
        p, q = parity[first : first + 3], quantizer[first : first + 2]
        out[first : first + 5] = 0
        out[first + 2 : first + 5] = p[: len(out) - first - 2]
        out[first + 3 : first + 5] ^= q[: max(len(out) - first - 3, 0)]
    return out


class Places(NamedTuple):
    """Positions of the lanes of several streams, sorted together by descending length.

    Attributes:
      lengths: `[L]` of all lanes, sorted.
      columns: of each stream the sorted positions of its lanes.
    """

    lengths: np.ndarray
    columns: list[np.ndarray]


def sort_lanes(sizes: Sequence[tuple[int, int]]) -> Places:
    """Sort the lanes of streams of `(codes, lanes)`."""
    lengths = np.concatenate([np.zeros(0, np.int64), *(lane_lengths(*x) for x in sizes)])
    order = np.argsort(-lengths, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return Places(lengths[order], np.split(place, np.cumsum([k for _, k in sizes])[:-1]))


def gather(flats: Sequence[np.ndarray], lanes: Sequence[int], places: Places) -> np.ndarray:
    """The entries of streams in sorted lanes, `[n, L]`; zeros beyond a lane's end."""
    if len(flats) == 1 and lanes[0]:
        return as_lanes(flats[0], lanes[0])
    out = np.zeros((int(places.lengths.max(initial=0)), len(places.lengths)), flats[0].dtype)
    for flat, count, columns in zip(flats, lanes, places.columns, strict=True):
        if count:
            matrix = as_lanes(flat, count)
            out[: len(matrix), columns] = matrix
    return out


def pack(x: "Parsed", raw: np.ndarray) -> bytes:
    """The bytes of a stream; `raw` has the numbers of middle bits of the codes that have any, in order."""
    if not x.lanes:
        return number(0)
    least = int(x.taken.min())
    return (
        number(x.lanes)
        + number(len(x.escaped))
        + number(least)
        + pack_integers(x.taken - least)
        + x.state.astype("<u4").tobytes()
        + x.words.astype("<u2").tobytes()
        + (b"" if x.middle is None else pack_middle(x.middle, raw))
        + x.escaped.astype("<u4").tobytes()
    )


def pack_middle(middle: np.ndarray, raw: np.ndarray) -> bytes:
    """Middle bits of the codes that have any, and their numbers."""
    parts = []
    for bits in range(1, int(raw.max(initial=0)) + 1):
        mine = middle[raw == bits]
        parts.append(((mine[:, None] >> np.arange(bits - 1, -1, -1)) & 1).astype(np.uint8).ravel())
    return np.packbits(np.concatenate(parts)).tobytes()


def unpack_middle(data: bytes, raw: np.ndarray) -> np.ndarray:
    """The inverse of `pack_middle`: those of the codes that have any, in order, int32."""
    wide = raw[raw > 0]
    out = np.zeros(wide.shape, np.int32)
    packed, at = np.frombuffer(data, np.uint8), 0
    for width in range(1, int(raw.max(initial=0)) + 1):
        chosen = wide == width
        count = int(np.count_nonzero(chosen)) * width
        first = at // 8
        bits = np.unpackbits(packed[first : -(-(at + count) // 8)])[at - 8 * first :][:count]
        planes = bits.reshape(-1, width)
        found = np.zeros(len(planes), np.int32)
        for plane in planes.T:
            found = found << 1 | plane
        out[chosen] = found
        at += count
    return out


class Parsed(NamedTuple):
    """A stream whose lanes have not been decoded.

    Attributes:
      lanes: L.
      state: `[L]` uint32.
      taken: `[L]` words of each lane.
      words: uint16 of all lanes.
      middle: middle bits of the codes that have any, in order, int32; None where no code has.
      escaped: `level >> 1` of the escapes.
    """

    lanes: int
    state: np.ndarray
    taken: np.ndarray
    words: np.ndarray
    middle: np.ndarray | None
    escaped: np.ndarray


def parse(data: bytes, context: np.ndarray) -> Parsed:
    """The parts of a stream's bytes.

    Args:
      data: of the stream.
      context: `[N]` of its codes.

    Raises:
      Damaged: bytes that `pack` does not write.
    """
    reader = Reader(data)
    lanes = reader.number()
    if lanes > min(len(context), MAX_LANES) or (lanes == 0) != (len(context) == 0):
        raise Damaged(f"{lanes} lanes for {len(context)} codes")
    if not lanes:
        if reader.rest():
            raise Damaged("bytes after an empty stream")
        return Parsed(0, np.zeros(0, "u4"), np.zeros(0, "i8"), np.zeros(0, "u2"), None, np.zeros(0, "u4"))
    escapes, least = reader.number(), reader.number()
    steps = -(-len(context) // lanes)
    count = unpack_integers(reader, lanes) + least
    if escapes > len(context) or count.max() > steps:
        raise Damaged("more words or escapes than codes")
    state = reader.array("<u4", lanes)
    words = reader.array("<u2", int(count.sum()))
    middle = None
    if (wide := occurrences(context) @ RAW_BITS) > 0:
        middle = unpack_middle(reader.take(-(-int(wide) // 8)), RAW_BITS.astype(np.uint8)[context])
    escaped = reader.array("<u4", escapes)
    if reader.rest():
        raise Damaged("bytes after the end of a stream")
    return Parsed(lanes, state, count, words, middle, escaped)


def decode(
    data: Sequence[bytes],
    contexts: Sequence[np.ndarray],
    frequencies: np.ndarray,
    decode_lanes: rans.DecodeLanes = rans.decode,
) -> "list[Values]":
    """The `Values` of each stream.

    Args:
      data: bytes of each stream.
      contexts: of its codes, `[N]` uint8.
      frequencies: `[COUNT, 2, SYMBOLS]`.
      decode_lanes: `rans.decode`, or `lanes.decode` for JAX's default device.

    Raises:
      Damaged: bytes that `pack` does not write.
    """
    present = np.zeros(COUNT, bool)
    for context in contexts:
        present |= occurrences(context) > 0
        if len(context) and context.max() >= COUNT:
            raise Damaged(f"context {context.max()}")
    lookup = frequency_tables.lookup(frequencies, present)
    parsed = [parse(blob, context) for blob, context in zip(data, contexts, strict=True)]
    lanes = [x.lanes for x in parsed]
    places = sort_lanes([(len(c), k) for c, k in zip(contexts, lanes, strict=True)])
    if not len(places.lengths):
        return [Values(np.zeros(0, np.int16), c, x) for c, x in zip(contexts, parsed, strict=True)]
    place = np.concatenate(places.columns)
    # words stay stream by stream; lanes say where theirs begin
    count, begin = np.concatenate([x.taken for x in parsed]), np.zeros(len(place), np.int64)
    begin[1:] = np.cumsum(count)[:-1]
    state, first, last = (np.empty_like(x) for x in (np.concatenate([x.state for x in parsed]), begin, begin))
    state[place] = np.concatenate([x.state for x in parsed])
    first[place], last[place] = begin, begin + count
    matrix = decode_lanes(
        state,
        np.concatenate([x.words for x in parsed]),
        first,
        last,
        places.lengths,
        gather([np.asarray(c, np.uint8) for c in contexts], lanes, places),
        lookup,
    )
    del first, last, begin, count
    flat = []
    for x, context, columns in zip(parsed, contexts, places.columns, strict=True):
        whole = len(columns) == matrix.shape[1]
        mine = matrix if whole else matrix[: -(-len(context) // max(x.lanes, 1)), columns]
        flat.append(from_lanes(mine, len(context)))
    return [Values(*each) for each in zip(flat, contexts, parsed, strict=True)]


def occurrences(context: np.ndarray) -> np.ndarray:
    """Codes of each context, `[COUNT]`; some at a time, as `bincount` takes eight bytes for each."""
    parts = (context[at : at + BLOCK] for at in range(0, len(context), BLOCK))
    return sum((np.bincount(x, minlength=COUNT)[:COUNT] for x in parts), np.zeros(COUNT, np.int64))


class Values:
    """The values of a stream, taken in order: as a whole they are larger than what they are made of.

    Attributes:
      coded: `[N]` entries of the decoding tables.
      context: `[N]` of the codes.
      middle, escaped: of a `Parsed` stream.
      at, seen, escapes: codes, middle bits and escapes that have been taken.

    Raises:
      Damaged: another number of escapes than the stream has.
    """

    def __init__(self, coded: np.ndarray, context: np.ndarray, parsed: Parsed) -> None:
        self.coded, self.context, self.escaped = coded, context, parsed.escaped
        self.middle = np.zeros(0, np.int32) if parsed.middle is None else parsed.middle
        self.at = self.seen = self.escapes = 0
        if int(np.count_nonzero(coded >= frequency_tables.ESCAPED)) != len(self.escaped):
            raise Damaged("another number of escapes")

    def take(self, count: int) -> np.ndarray:
        """The next values, int32 in steps, with wide contexts and escapes resolved."""
        value = self.coded[self.at : self.at + count].astype(np.int32)
        context = self.context[self.at : self.at + count]
        self.at += count
        special, wide = value >= frequency_tables.ESCAPED, WIDE[context]
        middle = self.middle[self.seen : self.seen + np.count_nonzero(wide)][~special[wide]]
        self.seen += int(np.count_nonzero(wide))
        wide &= ~special
        found = value[wide]
        coded = found >> 2
        high = (coded >> 1) << (RAW_BITS[context[wide]] + 1)
        negative = found & 1
        value[wide] = signed((high | middle << 1 | coded & 1) + negative, (found >> 1) & 1, negative)
        escaped = self.escaped[self.escapes : self.escapes + np.count_nonzero(special)]
        self.escapes += len(escaped)
        if escaped.max(initial=0) > MAX_MAGNITUDE >> 1:
            raise Damaged("an escape beyond the largest magnitude")
        found = value[special]
        negative = (found >> 1) & 1
        magnitude = (escaped.astype(np.int32) << 1 | found & 1) + (WIDE[context[special]] & (negative > 0))
        value[special] = signed(magnitude, (found >> 2) & 1, negative)
        return value


def signed(magnitude: np.ndarray, quantizer: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Values in steps of magnitudes, int32.

    >>> signed(np.array([0, 1, 1]), np.array([1, 0, 1]), np.array([0, 1, 0])).tolist()
    [0, -2, 1]
    """
    value = magnitude.astype(np.int32)
    nonzero = value > 0
    value <<= 1
    value -= nonzero & (quantizer > 0)
    # two's complement of those below zero
    flip = -(negative > 0).astype(np.int32)
    value ^= flip
    value -= flip
    return value


def values(x: Symbols) -> np.ndarray:
    """The values of a stream's codes, `[N]` int32 in steps."""
    return signed(x.magnitude, x.quantizer, x.negative)
