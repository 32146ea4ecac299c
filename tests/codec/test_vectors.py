"""The vectors of docs/format.md: the reference decoder, and one written from the page alone, lane by lane."""

import base64
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from hydraopt_jax.codec.decode import decode_leaves
from hydraopt_jax.codec.layout import KINDS, TermShape

VECTORS = sorted((Path(__file__).parent / "vectors").glob("*.json"))


@pytest.fixture(params=VECTORS, ids=lambda x: x.stem)
def vector(request):
    return json.loads(request.param.read_text())


def test_the_reference_decoder(vector):
    shapes = {
        name: tuple(TermShape(*(tuple(v) if isinstance(v, list) else v for v in x.values())) for x in terms)
        for name, terms in vector["modules"].items()
    }
    shapes = {n: tuple(x._replace(predicted=KINDS.index(x.predicted)) for x in v) for n, v in shapes.items()}
    leaves = {k: base64.b64decode(v) for k, v in vector["leaves"].items()}
    found = decode_leaves(leaves, shapes, [int(t) for t in vector["gains"]])
    for piece, value, want in zip(found.pieces, found.values, vector["pieces"], strict=True):
        assert [piece.module, piece.term, piece.side, piece.factor, piece.leaf] == list(want.values())[:5]
        np.testing.assert_array_equal(value.T * 16, want["values_times_16"])
    for t, rows in vector["gains"].items():
        for mine, want in zip(found.gains[int(t)], rows, strict=True):
            np.testing.assert_array_equal(mine, np.array(want, np.float32))


class Bytes:
    """Bytes read as the page says."""

    def __init__(self, data):
        self.data = data

    def take(self, size):
        out, self.data = self.data[:size], self.data[size:]
        assert len(out) == size
        return out

    def number(self):
        byte = self.take(1)[0]
        return byte if byte < 128 else byte - 128 + 128 * self.number()

    def inflated(self, size):
        return zlib.decompress(self.take(size), -15)

    def integers(self, count):
        out = [0] * count
        form = self.number()
        if form > 4:
            k = form - 5
            size = self.number()
            low = "".join(f"{x:08b}" for x in self.take(-(-count * k // 8)))
            unary = "".join(f"{x:08b}" for x in self.take(size)).split("1")
            assert len(unary) == count + 1
            return [(len(unary[i]) << k) + int("0" + low[i * k : (i + 1) * k], 2) for i in range(count)]
        for k in range(form):
            for i, byte in enumerate(self.inflated(self.number())):
                out[i] += byte << 8 * k
        return out


def raw_of(context):
    return max((context % 76 - 1) // 3 - 6, 0)


def tables_of(data):
    size = data.number()
    body = Bytes(data.inflated(data.number()))
    assert len(body.data) == size
    rows = [(c, q) for c in range(1, 152) for q in range(1 if raw_of(c) else 2)]
    counts = [body.take(1)[0] for _ in rows]
    low = [body.take(n) for n in counts]
    out = {}
    for row, low_bytes, n in zip(rows, low, counts, strict=True):
        high_bytes = body.take(n)
        out[row] = [2 * (a + 256 * b) for a, b in zip(low_bytes, high_bytes, strict=True)]
        if raw_of(row[0]):
            out[row[0], 1] = out[row]
    return out


def runs(frequencies, wide):
    """(symbol, sign, first slot, slots) in order."""
    at = 0
    for symbol, f in enumerate(frequencies):
        whole = symbol == 0 and not wide
        for sign in (0,) if whole else (0, 1):
            slots = f if whole else f // 2
            if slots:
                yield symbol, sign, at, slots
            at += slots


def codes_of(data, contexts, tables):
    """Values in steps of a stream's codes."""
    lanes = data.number()
    if not lanes:
        return []
    escapes, least = data.number(), data.number()
    words_of = [least + x for x in data.integers(lanes)]
    states = struct.unpack(f"<{lanes}I", data.take(4 * lanes))
    lookup = {}
    for context in set(contexts):
        for q in range(2):
            lookup[context, q] = [None] * 4096
            for symbol, sign, first, slots in runs(tables[context, q], raw_of(context) > 0):
                lookup[context, q][first : first + slots] = [(symbol, sign, first, slots)] * slots
    found, n = [], -(-len(contexts) // lanes)
    for lane in range(lanes):
        words = list(struct.unpack(f"<{words_of[lane]}H", data.take(2 * words_of[lane])))
        x = states[lane]
        for i, context in enumerate(contexts[lane * n : (lane + 1) * n]):
            if i % 4096 == 0:
                q0 = q1 = q2 = q3 = q4 = 0
            symbol, sign, first, slots = lookup[context, q0][x % 4096]
            x = slots * (x // 4096) + x % 4096 - first
            if x < 65536:
                x = 65536 * x + words.pop(0)
            found.append((symbol, sign, q0))
            parity = (symbol + (sign if raw_of(context) else 0)) % 2
            q0, q1, q2, q3, q4 = q1, q2 ^ parity, q3 ^ q0, q4, q0
        assert (x, words) == (65536, [])
    total = sum(raw_of(c) for c in contexts)
    bits = "".join(f"{x:08b}" for x in data.take(-(-total // 8)))
    middle = [0] * len(contexts)
    for raw in sorted({raw_of(c) for c in contexts} - {0}):
        for i in (i for i, c in enumerate(contexts) if raw_of(c) == raw):
            middle[i], bits = int(bits[:raw], 2), bits[raw:]
    rest = list(struct.unpack(f"<{escapes}I", data.take(4 * escapes)))
    out = []
    for (symbol, sign, q), context, bits_between in zip(found, contexts, middle, strict=True):
        k = symbol // 2 * 2 ** (raw_of(context) + 1) + 2 * bits_between + symbol % 2
        if symbol >= 126:
            k = 2 * rest.pop(0) + symbol % 2
        k += sign if raw_of(context) else 0
        out.append((2 * k - q if k else 0) * (-1 if sign else 1))
    assert not rest
    return out


def signed(code):
    return -(code + 1) // 2 if code % 2 else code // 2


def context_of(context, offset):
    first = context // 76 * 76 + 1
    return min(max(context + offset, first), first + 74)


def contexts_of(data, pieces):
    """Contexts of a leaf's pieces, given the side and the number of vectors of each."""
    differences = [signed(x) for x in data.integers(len(pieces))]
    counts = [sum(differences[: i + 1]) for i in range(len(pieces))]
    flat = [signed(x) for x in data.integers(sum(counts))]
    out, first = {}, [0, 0]
    for (i, (side, rank)), n in zip(pieces.items(), counts, strict=True):
        mine, flat = flat[:n], flat[n:]
        found = [first[side] + sum(mine[: s + 1]) for s in range(n)] + [0] * (rank - n)
        first[side] = found[0] if n else first[side]
        out[i] = [x + 76 * side if x else 0 for x in found]
    return out


def gains_of(data, sums):
    """A task's gains, given the sums of the contexts of each direction's vectors."""
    if not sums:
        return []
    bits = data.take(1)[0]
    out, number, before = [], 0, 0
    for code, total in zip(data.integers(len(sums)), sums, strict=True):
        number += signed(code) + -(2**bits) * (total - before) // 6
        before = total
        out.append(struct.unpack("<f", struct.pack("<i", number << (23 - bits)))[0])
    return out


def test_a_decoder_written_from_the_page(vector):
    leaves = {k: Bytes(base64.b64decode(v)) for k, v in vector["leaves"].items()}
    tables = tables_of(leaves["shared"])
    contexts, values, flags, length, gains = {}, {}, {}, {}, {}
    for name in sorted(leaves, key=lambda x: (x != "shared", x)):
        mine = [i for i, x in enumerate(vector["pieces"]) if x["leaf"] == name]
        term = {
            i: vector["modules"][vector["pieces"][i]["module"]][vector["pieces"][i]["term"]] for i in mine
        }
        contexts |= contexts_of(
            leaves[name], {i: (vector["pieces"][i]["side"], term[i]["rank"]) for i in mine}
        )
        side = Bytes(leaves[name].inflated(leaves[name].number()))
        for i in mine:
            if term[i]["predicted"] == "projected" and vector["pieces"][i]["factor"]:
                bits = "".join(f"{x:08b}" for x in side.take(-(-term[i]["rank"] // 8)))
                flags[i] = [x == "1" for x in bits[: term[i]["rank"]]]
        length |= {i: term[i]["outputs" if vector["pieces"][i]["side"] else "inputs"] for i in mine}
        moved = []
        for i in (i for i in mine if length[i] > 64):
            bits = "".join(f"{x:08b}" for x in side.take(-(-term[i]["rank"] // 8)))
            moved += [(i, s) for s in range(term[i]["rank"]) if bits[s] == "1"]
        assert not side.data
        base = {i: i - vector["pieces"][i]["factor"] for i in mine if i in flags}
        counts = {i: sum(flags[i]) * sum(c > 0 for c in contexts[base[i]]) for i in base}
        flat = leaves[name].integers(sum(counts.values())) if sum(counts.values()) else []
        flat = [signed(x) for x in flat]
        blocks = {i: -(-length[i] // 64) for i in mine}
        shifts = leaves[name].integers(sum(blocks[i] for i, _ in moved)) if moved else []
        offsets = {}
        for i, s in moved:
            offsets[i, s], shifts = [signed(x) for x in shifts[: blocks[i]]], shifts[blocks[i] :]
        gains[name] = Bytes(leaves[name].take(leaves[name].number()))
        every = [
            context_of(c, offsets[i, s][n // 64]) if (i, s) in offsets else c
            for i in mine
            for s, c in enumerate(contexts[i])
            if c
            for n in range(length[i])
        ]
        codes = codes_of(leaves[name], every, tables)
        assert not leaves[name].data
        for i in mine:
            values[i] = [[0.0] * length[i] for _ in contexts[i]]
            for s, c in enumerate(contexts[i]):
                if c:
                    values[i][s], codes = [float(x) for x in codes[: length[i]]], codes[length[i] :]
            known = []
            if i in base:
                known = [v for v, c in zip(values[base[i]], contexts[base[i]], strict=True) if c]
            exponents = []
            for v in known:
                size = int(sum(abs(16 * x) for x in v))
                exponents.append((3 * size**2 // (2 * len(v))).bit_length() // 2 - 4)
            for s, used in enumerate(flags.get(i, [])):
                if used:
                    weights, flat = flat[: len(known)], flat[len(known) :]
                    unit = 2 ** max((contexts[i][s] % 76 - 1) // 3, 1)
                    for n in range(length[i]):
                        total = sum(
                            c * unit * 2.0**-e * v[n]
                            for c, e, v in zip(weights, exponents, known, strict=True)
                        )
                        values[i][s][n] += round(16 * total) / 16
                if not contexts[i][s]:
                    values[i][s] = [0.0] * length[i]
        assert not flat
    for i, piece in enumerate(vector["pieces"]):
        np.testing.assert_array_equal(np.array(values[i]) * 16, piece["values_times_16"])
    fields = ("module", "term", "side", "factor")
    place = {tuple(x[k] for k in fields): i for i, x in enumerate(vector["pieces"])}
    for task, rows in vector["gains"].items():
        sums = []
        for name, terms in vector["modules"].items():
            for k, x in enumerate(terms):
                used = x["a_of"][int(task)], x["b_of"][int(task)]
                if used[0] >= 0:
                    pair = (contexts[place[name, k, side, f]] for side, f in enumerate(used))
                    sums += [a % 76 + b % 76 for a, b in zip(*pair, strict=True) if a and b]
        found = gains_of(gains.get(f"task_{task}"), sums)
        np.testing.assert_array_equal(found, np.array([x for row in rows for x in row], np.float32))
