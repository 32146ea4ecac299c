"""Frequency tables: probabilities of symbols per context and quantizer, as integers that sum to 2^12.

A table covers 2^12 slots. Every symbol that occurs has an even number of them, half for each sign; the zero
of a narrow context has no sign. Tables of wide contexts serve both quantizers.
"""

from typing import NamedTuple

import numpy as np

from hydraopt_jax.codec.bitstream import Damaged, Reader, deflate, inflate, number
from hydraopt_jax.codec.contexts import COUNT, ESCAPE, SYMBOLS, WIDE

SLOT_BITS = 12
SLOTS = 1 << SLOT_BITS
# maximum bytes of all tables before they are deflated
LIMIT = 2 * COUNT * (1 + 2 * SYMBOLS)
# values of the decoding table from here on are escapes: base + 4 * quantizer + 2 * sign + low bit
ESCAPED = 1 << 14


def from_counts(counts: np.ndarray) -> np.ndarray:
    """Integer frequencies `[COUNT, 2, SYMBOLS]` of counts: even, summing to 2^12, zero where nothing occurs.

    The same on every machine.
    """
    counts = np.asarray(counts, np.float64).copy()
    counts[WIDE] = counts[WIDE].sum(1, keepdims=True)
    counts[:: COUNT // 2] = 0
    rows = counts.reshape(-1, SYMBOLS)
    out = np.zeros(rows.shape, np.int64)
    used = np.flatnonzero(rows.sum(1))
    for k in used:
        out[k] = 2 * apportion(rows[k], SLOTS // 2)
    return out.reshape(counts.shape)


def apportion(counts: np.ndarray, total: int) -> np.ndarray:
    """Integers that sum to `total` of least cross entropy with `counts`, at least 1 where a count is not 0.

    >>> apportion(np.array([3.0, 1.0, 0.0]), 8).tolist()
    [6, 2, 0]
    """
    seen = counts > 0
    share = counts / counts.sum() * total
    out = np.where(seen, np.maximum(np.rint(share), 1), 0).astype(np.int64)
    while (rest := total - int(out.sum())) != 0:
        # log(1 + 1 / n) is about 1 / (n + 1/2); divisions round alike on every machine, logarithms do not
        if rest > 0:
            gain = np.where(seen, counts / (out + 0.5), -np.inf)
        else:
            gain = np.where(out > 1, -counts / (out - 0.5), -np.inf)
        best = np.argsort(-gain, kind="stable")[: max(1, min(abs(rest), int(seen.sum()) // 4))]
        out[best[np.isfinite(gain[best])]] += np.sign(rest)
    return out


def pack_tables(frequencies: np.ndarray) -> bytes:
    """Tables as bytes: for each context and quantizer the symbols up to the last used, deflated."""
    low, high, used = bytearray(), bytearray(), bytearray()
    for context in range(1, COUNT):
        for row in frequencies[context][: 1 if WIDE[context] else 2]:
            count = int(np.max(np.flatnonzero(row), initial=-1)) + 1
            used.append(count)
            half = (row[:count] // 2).astype("<u2").view(np.uint8)
            low += half[::2].tobytes()
            high += half[1::2].tobytes()
    body = bytes(used + low + high)
    packed = deflate(body)
    return number(len(body)) + number(len(packed)) + packed


def unpack_tables(reader: Reader) -> np.ndarray:
    """The inverse of `pack_tables`.

    Raises:
      Damaged: tables that `pack_tables` does not write.
    """
    size = reader.number()
    if size > LIMIT:
        raise Damaged(f"tables of {size} bytes")
    raw = Reader(inflate(reader.take(reader.number()), size))
    rows = [(c, q) for c in range(1, COUNT) for q in range(1 if WIDE[c] else 2)]
    used = raw.array("u1", len(rows)).astype(np.int64)
    total = int(used.sum())
    half = raw.array("u1", total).astype(np.int64)
    half = half | raw.array("u1", total).astype(np.int64) << 8
    if used.max(initial=0) > SYMBOLS or raw.rest():
        raise Damaged("tables of more symbols than there are")
    out = np.zeros((COUNT, 2, SYMBOLS), np.int64)
    at = 0
    for (context, quantizer), count in zip(rows, used.tolist(), strict=True):
        out[context, quantizer, :count] = 2 * half[at : at + count]
        at += count
    out[WIDE, 1] = out[WIDE, 0]
    sums = out.sum(-1)
    if not np.isin(sums, (0, SLOTS)).all():
        raise Damaged("a table that does not sum to its slots")
    return out


def halves(row: np.ndarray, wide: bool) -> np.ndarray:
    """Slots of each signed symbol `[2 * SYMBOLS]`, plus before minus."""
    out = np.repeat(row // 2, 2)
    if not wide:
        out[:2] = row[0], 0
    return out


class Lookup(NamedTuple):
    """Decoding tables: for each context that occurs, `SLOTS` entries per quantizer.

    Attributes:
      entry: uint32, `frequency << (SLOT_BITS + 1) | parity << SLOT_BITS | offset in the symbol's slots`.
      value: int16. In a narrow context the value in steps; in a wide one `4 * symbol + 2 * quantizer + sign`;
        from `ESCAPED` on an escape.
      row: `[COUNT]` int32, the first entry of each context; -1 where it does not occur.
    """

    entry: np.ndarray
    value: np.ndarray
    row: np.ndarray


def lookup(frequencies: np.ndarray, present: np.ndarray) -> Lookup:
    """Decoding tables of the contexts `present: [COUNT]` bool.

    Raises:
      Damaged: a context that occurs has no table.
    """
    wanted = np.flatnonzero(present)
    if not (frequencies[wanted].sum(-1) == SLOTS).any(-1).all():
        raise Damaged("a context without a table")
    entry = np.zeros((len(wanted), 2, SLOTS), np.uint32)
    value = np.zeros((len(wanted), 2, SLOTS), np.int16)
    for k, context in enumerate(wanted.tolist()):
        for quantizer in range(2):
            row = frequencies[context, quantizer]
            if not row.any():
                continue
            slots = halves(row, bool(WIDE[context]))
            pair = np.repeat(np.arange(2 * SYMBOLS), slots)
            start = np.cumsum(slots) - slots
            symbol, sign = pair >> 1, pair & 1
            low = symbol & 1
            parity = low ^ (sign & WIDE[context])
            offset = np.arange(SLOTS) - start[pair]
            entry[k, quantizer] = slots[pair] << (SLOT_BITS + 1) | parity << SLOT_BITS | offset
            if WIDE[context]:
                found = 4 * symbol + 2 * quantizer + sign
            else:
                found = (2 * symbol - quantizer * (symbol > 0)) * (1 - 2 * sign)
            value[k, quantizer] = np.where(symbol >= ESCAPE, ESCAPED + 4 * quantizer + 2 * sign + low, found)
    row = np.full(COUNT, -1, np.int32)
    row[wanted] = np.arange(len(wanted), dtype=np.int32) * 2 * SLOTS
    return Lookup(entry.ravel(), value.ravel(), row)
