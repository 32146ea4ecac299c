"""Streams: the vectors of a leaf laid out in lanes, and a leaf's bytes.

A leaf's vectors follow one another; the row is cut into lanes of at most `LANE` symbols, which the trellis
and the coder treat side by side. What fills up the last lane has class 0, which costs nothing.
"""

import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hydraopt_jax.coding import classes, entropy, trellis

LANE = 4096
# lanes that are quantised side by side: the trellis keeps some thirty bytes of every symbol until it has
# decided, so a CPU takes a few lanes at a time
BLOCK = {"cpu": 128}
ELSEWHERE = 1 << 14


class Symbols(NamedTuple):
    """Symbols of several streams side by side.

    Attributes:
      magnitude, quantiser, cls: `[n, L]` int32; `cls` is the class.
      negative: `[n, L]` bool.
      lanes: lanes of each stream; their sum may fall short of L, the rest is padding.
      lengths: symbols of each stream.
    """

    magnitude: np.ndarray
    quantiser: np.ndarray
    cls: np.ndarray
    negative: np.ndarray
    lanes: tuple[int, ...]
    lengths: tuple[int, ...]


def shape(lengths: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
    """Lanes of each stream, and the `[n, L]` of all: rounded up, for few compilations."""
    lanes = tuple(-(-n // LANE) for n in lengths)
    height = max((-(-n // max(k, 1)) for n, k in zip(lengths, lanes, strict=True)), default=1)
    total = max(sum(lanes), 1)
    unit = 1 << max(total.bit_length() - 2, 0)
    return lanes, 1 << max(height - 1, 63).bit_length(), -(-total // unit) * unit


def arrange(flats: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """1-D streams as lanes `[n, L]`, filled up with zeros."""
    lanes, height, width = shape([len(x) for x in flats])
    out: np.ndarray = np.zeros((width, height), dtype)
    at = 0
    for flat, count in zip(flats, lanes, strict=True):
        run = -(-len(flat) // max(count, 1))
        padded: np.ndarray = np.zeros(count * run, dtype)
        padded[: len(flat)] = flat
        out[at : at + count, :run] = padded.reshape(count, run)
        at += count
    return np.ascontiguousarray(out.T)


def flatten(table: np.ndarray, lanes: Sequence[int], lengths: Sequence[int]) -> list[np.ndarray]:
    """The inverse of `arrange`."""
    out, at = [], 0
    for count, length in zip(lanes, lengths, strict=True):
        run = -(-length // max(count, 1))
        out.append(table[:run, at : at + count].T.ravel()[:length])
        at += count
    return out


def quantise(
    values: Sequence[np.ndarray], index: Sequence[np.ndarray], frequencies: np.ndarray, multiplier: float
) -> Symbols:
    """Quantise streams: 1-D values in steps, and the class of every value."""
    lengths = tuple(len(x) for x in values)
    y, cls = arrange(values, np.float32), arrange(index, np.int32)
    bits = trellis.costs(frequencies)
    bits[0] = trellis.FORBIDDEN
    bits[0, :, 0] = 0.0
    magnitude, quantiser = np.empty(y.shape, np.int32), np.empty(y.shape, np.int32)
    block = min(BLOCK.get(jax.default_backend(), ELSEWHERE), y.shape[1])
    for at in range(0, y.shape[1], block):
        part = slice(at, at + block)
        room = ((0, 0), (0, block - y[:, part].shape[1]))
        found = trellis.quantise(
            jnp.asarray(np.pad(y[:, part], room)),
            jnp.asarray(np.pad(cls[:, part], room)),
            jnp.asarray(bits),
            multiplier,
        )
        width = block - room[1][1]
        magnitude[:, part], quantiser[:, part] = (np.asarray(x)[:, :width] for x in found)
    return Symbols(magnitude, quantiser, cls, y < 0, shape(lengths)[0], lengths)


def values(symbols: Symbols) -> list[np.ndarray]:
    """What the symbols stand for: 1-D int32 values in steps of each stream."""
    table = trellis.reconstruct(symbols.magnitude, symbols.quantiser, symbols.negative)
    return flatten(table, symbols.lanes, symbols.lengths)


def histogram(symbols: Symbols) -> np.ndarray:
    """Counts of high parts, `[COUNT, 2, HIGH]`; classes with raw low bits count both quantisers as one."""
    high = np.minimum(symbols.magnitude >> classes.SHIFT[symbols.cls], classes.HIGH - 1)
    at = (symbols.cls * 2 + symbols.quantiser) * classes.HIGH + high
    out = np.bincount(at.ravel(), minlength=classes.COUNT * 2 * classes.HIGH)
    out = out.reshape(classes.COUNT, 2, classes.HIGH).astype(np.float64)
    out[0] = 0
    wide = classes.SHIFT > 0
    out[wide] = out[wide].sum(1, keepdims=True)
    return out


def tables(counts: np.ndarray) -> np.ndarray:
    """Integer frequencies `[COUNT, 2, HIGH]` of counts; class 0 knows one symbol."""
    out = entropy.integer_frequencies(counts)
    out[0] = 0
    out[0, :, 0] = 1 << entropy.FREQUENCY_BITS
    return out


def pack_tables(frequencies: np.ndarray) -> bytes:
    """Tables as bytes: trailing zeros cut, wide classes once, deflated."""
    out = bytearray()
    for cls in range(1, classes.COUNT):
        for row in frequencies[cls][: 1 if classes.SHIFT[cls] else 2]:
            used = int(np.max(np.flatnonzero(row), initial=-1)) + 1
            out += bytes([used]) + row[:used].astype("<u2").tobytes()
    return zlib.compress(bytes(out), 9)


def unpack_tables(data: bytes) -> np.ndarray:
    """The inverse of `pack_tables`."""
    raw, at = zlib.decompress(data), 0
    out = np.zeros((classes.COUNT, 2, classes.HIGH), np.int64)
    out[0, :, 0] = 1 << entropy.FREQUENCY_BITS
    for cls in range(1, classes.COUNT):
        for quantiser in range(1 if classes.SHIFT[cls] else 2):
            used = raw[at]
            out[cls, quantiser, :used] = np.frombuffer(raw, "<u2", used, at + 1)
            at += 1 + 2 * used
        if classes.SHIFT[cls]:
            out[cls, 1] = out[cls, 0]
    return out


def pack_low(magnitude: np.ndarray, shift: np.ndarray) -> bytes:
    """Raw low bits, bit plane by bit plane."""
    planes = [(magnitude[shift > b] >> b) & 1 for b in range(int(shift.max(initial=0)))]
    return np.packbits(np.concatenate(planes).astype(np.uint8)).tobytes() if planes else b""


def unpack_low(data: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The inverse of `pack_low`."""
    low = np.zeros(shift.shape, np.int32)
    bits, at = np.unpackbits(data), 0
    for b in range(int(shift.max(initial=0))):
        chosen = shift > b
        count = int(chosen.sum())
        low[chosen] |= bits[at : at + count].astype(np.int32) << b
        at += count
    return low


def encode(symbols: Symbols, frequencies: np.ndarray) -> list[bytes]:
    """The bytes of each stream: low bits, signs, lane states, words."""
    high = symbols.magnitude >> classes.SHIFT[symbols.cls]
    table = frequencies.reshape(-1, classes.HIGH).astype(np.int32)
    coded = entropy.encode(
        jnp.asarray(high), jnp.asarray(symbols.cls * 2 + symbols.quantiser), jnp.asarray(table)
    )
    state, words, taken = jax.device_get(coded)
    rows = [
        flatten(x, symbols.lanes, symbols.lengths) for x in (symbols.magnitude, symbols.cls, symbols.negative)
    ]
    out, at = [], 0
    for k, count in enumerate(symbols.lanes):
        magnitude, index, negative = (row[k] for row in rows)
        low = pack_low(magnitude, classes.SHIFT[index])
        signs = np.packbits(negative[magnitude > 0]).tobytes()
        lanes = slice(at, at + count)
        body = words[:, lanes][taken[:, lanes]].astype("<u2").tobytes()
        out.append(struct.pack("<I", len(signs)) + low + signs + state[lanes].astype("<u4").tobytes() + body)
        at += count
    return out


def decode(data: Sequence[bytes], index: Sequence[np.ndarray], frequencies: np.ndarray) -> list[np.ndarray]:
    """Values in steps of each stream from its bytes and the classes of its symbols."""
    lengths = [len(x) for x in index]
    lanes, _, width = shape(lengths)
    lows, signs, states, words = [], [], [], []
    for blob, cls, count in zip(data, index, lanes, strict=True):
        (size,) = struct.unpack_from("<I", blob)
        low = 4 + (int(classes.SHIFT[cls].sum()) + 7) // 8
        lows.append(unpack_low(np.frombuffer(blob, np.uint8, low - 4, 4), classes.SHIFT[cls]))
        signs.append(np.unpackbits(np.frombuffer(blob, np.uint8, size, low)))
        states.append(np.frombuffer(blob, "<u4", count, low + size))
        words.append(np.frombuffer(blob, "<u2", offset=low + size + 4 * count))
    spare = width - sum(lanes)
    state = np.concatenate([*states, np.full(spare, entropy.LOW, np.uint32)])
    stream = np.concatenate([np.repeat(np.arange(len(data)), lanes), np.full(spare, len(data))])
    sizes = np.array([len(x) for x in words], np.int64)
    flat = np.concatenate([*words, np.zeros(0, np.uint16)])
    room = np.zeros(1 << max(len(flat), 1).bit_length(), np.uint16)
    room[: len(flat)] = flat
    magnitude, quantiser = entropy.decode(
        jnp.asarray(state),
        jnp.asarray(room),
        jnp.asarray(np.append(np.cumsum(sizes) - sizes, len(flat)).astype(np.int32)),
        jnp.asarray(stream.astype(np.int32)),
        jnp.asarray(arrange(index, np.int32)),
        jnp.asarray(arrange(lows, np.int32)),
        jnp.asarray(frequencies.reshape(-1, classes.HIGH).astype(np.int32)),
    )
    out = []
    for m, q, bits in zip(
        flatten(np.asarray(magnitude), lanes, lengths),
        flatten(np.asarray(quantiser), lanes, lengths),
        signs,
        strict=True,
    ):
        negative = np.zeros(len(m), bool)
        negative[m > 0] = bits[: np.count_nonzero(m)].astype(bool)
        out.append(trellis.reconstruct(m, q, negative))
    return out
