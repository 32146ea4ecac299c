"""The codec: factors in quantiser steps become leaves of bytes, and come back.

A factor's vectors are classified, predicted from another factor where that pays, quantised on the trellis
and entropy-coded. A diagonal core a task, the gains, scales the steps back. The shared leaf is coded
first, because others may be predicted from what it decodes to.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax.coding import classes, prediction, streams
from hydraopt_jax.coding.prediction import Prediction
from hydraopt_jax.forms import Factors
from hydraopt_jax.layout import PROJECTED, Piece, TermShape, pieces

# squared steps a bit, and the squared error of a well-coded coefficient in squared steps
MULTIPLIER = 0.38
DISTORTION = 0.26


class Target(NamedTuple):
    """A term to be coded.

    Attributes:
      shape: its structure.
      a: `[A, I, S]` input-side vectors in steps; a zero vector is not coded.
      b: `[B, O, S]` output-side vectors in steps, likewise.
    """

    shape: TermShape
    a: np.ndarray
    b: np.ndarray


class Coded(NamedTuple):
    """A quantised collection, not yet in bytes.

    Attributes:
      shapes: module name -> its terms' structure.
      pieces: every factor in canonical order.
      groups: task sets of the `head_*` leaves.
      classes: class of each vector of each piece, `[S]`.
      predictions: of each piece, or None.
      values: what each piece decodes to, `[length, S]` float32 in steps.
      leaves: names of the leaves, the shared one first.
      symbols: symbols of the shared leaf, and of all others.
      counts: `[COUNT, 2, HIGH]` histogram of all symbols.
    """

    shapes: Mapping[str, tuple[TermShape, ...]]
    pieces: list[Piece]
    groups: list[list[int]]
    classes: list[np.ndarray]
    predictions: list[Prediction | None]
    values: list[np.ndarray]
    leaves: tuple[str, ...]
    symbols: tuple[streams.Symbols, streams.Symbols]
    counts: np.ndarray


def quantise(
    modules: Mapping[str, Sequence[Target]], frequencies: np.ndarray, multiplier: float = MULTIPLIER
) -> Coded:
    """Quantise every factor of a collection; `frequencies` is what the coder is expected to charge."""
    shapes = {name: tuple(x.shape for x in terms) for name, terms in modules.items()}
    rows, groups = pieces(shapes)
    leaves = ("shared", *sorted({x.leaf for x in rows} - {"shared"}))
    index: list[Any] = [None] * len(rows)
    predictions: list[Prediction | None] = [None] * len(rows)
    values: list[Any] = [None] * len(rows)
    symbols = []
    for now in (leaves[:1], leaves[1:]):
        flat, cls, bases = [], [], {}
        for leaf in now:
            members = [i for i, x in enumerate(rows) if x.leaf == leaf]
            for i in members:
                piece = rows[i]
                term = modules[piece.module][piece.term]
                target = (term.b if piece.side else term.a)[piece.factor]
                guess = np.zeros_like(target)
                if piece.base >= 0:
                    coded = values[piece.base][:, index[piece.base] > 0]
                    predictions[i], guess, _ = prediction.predict(target, coded)
                rest = np.where(target.any(0), target - guess, 0.0)
                spread, peak = np.sqrt((rest**2).mean(0)), np.abs(rest).max(0, initial=0)
                # a vector wholly predicted still needs a class: the least one
                spread = np.where(target.any(0), np.maximum(spread, 1e-6), 0.0)
                index[i] = classes.classify(spread, peak, piece.side)
                bases[i] = guess, rest
            flat.append(join([bases[i][1][:, index[i] > 0].T.ravel() for i in members], np.float32))
            cls.append(spell([rows[i] for i in members], [index[i] for i in members]))
        symbols.append(streams.quantise(flat, cls, frequencies, multiplier))
        for leaf, codes in zip(now, streams.values(symbols[-1]), strict=True):
            at = 0
            for i in (i for i, x in enumerate(rows) if x.leaf == leaf):
                values[i], at = place(codes, at, rows[i], index[i], bases[i][0])
    counts = streams.histogram(symbols[0]) + streams.histogram(symbols[1])
    return Coded(shapes, rows, groups, index, predictions, values, leaves, (symbols[0], symbols[1]), counts)


def join(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """Concatenation, also of nothing."""
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)


def spell(rows: Sequence[Piece], index: Sequence[np.ndarray]) -> np.ndarray:
    """The class of every symbol of a leaf."""
    return join([np.repeat(x[x > 0], row.length) for row, x in zip(rows, index, strict=True)], np.int32)


def place(
    codes: np.ndarray, at: int, piece: Piece, index: np.ndarray, guess: np.ndarray | float
) -> tuple[np.ndarray, int]:
    """A piece's values from its leaf's codes, the prediction added; and where the next piece begins."""
    live = np.flatnonzero(index > 0)
    out = np.zeros((piece.length, piece.rank), np.float32)
    end = at + piece.length * len(live)
    out[:, live] = codes[at:end].reshape(len(live), piece.length).T
    return np.where(index > 0, out + guess, 0).astype(np.float32), end


def factors(coded: Coded, values: Sequence[np.ndarray | None] | None = None) -> dict[str, list[Factors]]:
    """The terms of every module in steps, cores left out: `a: [A, I, S]`, `b: [B, S, O]`."""
    return assemble(coded.shapes, coded.pieces, coded.values if values is None else values)


def assemble(
    shapes: Mapping[str, tuple[TermShape, ...]], rows: Sequence[Piece], values: Sequence[np.ndarray | None]
) -> dict[str, list[Factors]]:
    """Pieces as terms; a piece that was not read counts as zeros."""
    of: dict[tuple[str, int, int], list[np.ndarray]] = {}
    for piece, value in zip(rows, values, strict=True):
        blank = np.zeros((piece.length, piece.rank), np.float32)
        of.setdefault((piece.module, piece.term, piece.side), []).append(blank if value is None else value)
    out: dict[str, list[Factors]] = {}
    for name, terms in shapes.items():
        out[name] = [
            Factors(
                np.stack(of[name, k, 0]),  # type: ignore[arg-type]
                np.stack(of[name, k, 1]).swapaxes(1, 2),  # type: ignore[arg-type]
                np.array(term.a_of, np.int32),  # type: ignore[arg-type]
                np.array(term.b_of, np.int32),  # type: ignore[arg-type]
            )
            for k, term in enumerate(terms)
        ]
    return out


def live_directions(
    shapes: Mapping[str, tuple[TermShape, ...]], rows: Sequence[Piece], index: Sequence[np.ndarray], task: int
) -> dict[tuple[str, int], np.ndarray]:
    """For each (module, term) the directions that a task has on both sides, and so a gain for: `[S]` bool."""
    of = {(x.module, x.term, x.side, x.factor): i for i, x in enumerate(rows)}
    out = {}
    for name, terms in shapes.items():
        for k, term in enumerate(terms):
            if term.a_of[task] >= 0:
                a, b = index[of[name, k, 0, term.a_of[task]]], index[of[name, k, 1, term.b_of[task]]]
                out[name, k] = (a > 0) & (b > 0)
    return out


def pack_gains(gains: Sequence[np.ndarray]) -> bytes:
    """Gains of one task in half precision times one unit: the largest gain over 2^14."""
    flat = join(gains, np.float64)
    unit = np.float32(max(np.abs(flat).max(initial=0.0), 1e-30) / 2**14)
    return unit.tobytes() + (flat / unit).astype("<f2").tobytes()


def round_gains(gains: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The gains as they will be read."""
    flat = unpack_gains(pack_gains(gains))
    return np.split(flat, np.cumsum([len(x) for x in gains])[:-1]) if gains else []


def unpack_gains(data: bytes) -> np.ndarray:
    """The inverse of `pack_gains`, float32."""
    return np.frombuffer(data, "<f2", offset=4).astype(np.float32) * np.frombuffer(data, "<f4", 1)


def side_information(coded: Coded, leaf: str, gains: Mapping[int, Sequence[np.ndarray]]) -> bytes:
    """Classes, predictions and gains of a leaf, deflated."""
    members = [i for i, x in enumerate(coded.pieces) if x.leaf == leaf]
    index = b"".join(coded.classes[i].astype(np.uint8).tobytes() for i in members)
    flags = b""
    conditional = [i for i in members if coded.pieces[i].base >= 0]
    for i in conditional:
        found = coded.predictions[i]
        flags += np.packbits(np.zeros(coded.pieces[i].rank, bool) if found is None else found.used).tobytes()
    coefficients = prediction.pack([coded.predictions[i] for i in conditional])
    tail = b""
    if leaf.startswith("task_") and int(leaf[5:]) in gains:
        tail = pack_gains(gains[int(leaf[5:])])
    body = zlib.compress(index + flags, 9)
    return struct.pack("<II", len(body), len(tail)) + body + coefficients + tail


def sizes(coded: Coded, gains: Mapping[int, Sequence[np.ndarray]]) -> float:
    """Bytes that `serialise` will make, but for the last half per cent: no coding is done."""
    leaves = set(coded.leaves) | {f"task_{t}" for t in gains}
    # lengths, and the last bytes and words of a leaf that are not full
    side = sum(len(side_information(coded, x, gains)) + 14 for x in leaves)
    raw = sum(
        float(classes.SHIFT[x.cls].sum() + np.count_nonzero(x.magnitude)) / 8 + 4 * sum(x.lanes)
        for x in coded.symbols
    )
    return side + raw + entropy_bytes(coded.counts) + len(streams.pack_tables(streams.tables(coded.counts)))


def module_bits(coded: Coded) -> np.ndarray:
    """About what each module takes, `[M]`: the mean bits of a symbol of each class, and the coefficients."""
    number = coded.counts.sum((1, 2))
    counts = coded.counts.sum(1)
    share = counts / np.maximum(number, 1)[:, None]
    # a sign where the magnitude is not zero, low bits as they are
    each = -(share * np.log2(np.where(share > 0, share, 1))).sum(-1) + classes.SHIFT + 1 - share[:, 0]
    each[0] = 0
    position = {n: m for m, n in enumerate(coded.shapes)}
    out = np.zeros(len(position))
    for row, index, found in zip(coded.pieces, coded.classes, coded.predictions, strict=True):
        out[position[row.module]] += row.length * each[index].sum() + 4 * np.count_nonzero(index)
        if found is not None:
            energy = (found.coefficients[:, found.used].astype(np.float64) ** 2).sum(0)
            bits = prediction.coefficient_bits(energy, np.array(len(found.coefficients)))
            out[position[row.module]] += bits.sum()
    return out


def entropy_bytes(counts: np.ndarray) -> float:
    """Entropy of the high parts under their own tables, in bytes."""
    sums = counts.sum(-1, keepdims=True)
    bits = -(counts * np.log2(np.where(counts > 0, counts, 1) / np.where(sums > 0, sums, 1)))
    bits[classes.SHIFT > 0, 1] = 0
    return float(bits.sum()) / 8


def serialise(coded: Coded, gains: Mapping[int, Sequence[np.ndarray]]) -> dict[str, bytes]:
    """Leaves of bytes.

    Args:
      coded: the quantised collection.
      gains: task -> its gains, one `[live directions]` array for each (module, term) it has, in order.

    Returns:
      Leaf name -> bytes.
    """
    table = streams.tables(coded.counts)
    packed = streams.pack_tables(table)
    bodies = dict(zip(coded.leaves[:1], streams.encode(coded.symbols[0], table), strict=True))
    bodies |= dict(zip(coded.leaves[1:], streams.encode(coded.symbols[1], table), strict=True))
    out = {}
    for leaf in (*coded.leaves, *(f"task_{t}" for t in gains if f"task_{t}" not in coded.leaves)):
        side = side_information(coded, leaf, gains)
        head = struct.pack("<I", len(packed)) + packed if leaf == "shared" else b""
        out[leaf] = head + struct.pack("<I", len(side)) + side + bodies.get(leaf, b"")
    return out


def deserialise(
    leaves: Mapping[str, bytes], shapes: Mapping[str, tuple[TermShape, ...]], tasks: Sequence[int]
) -> dict[str, tuple[Factors, ...]]:
    """Terms of every module for some tasks, from the leaves that they read; the inverse of `serialise`.

    Args:
      leaves: at least the shared leaf and those of the tasks.
      shapes: structure of the terms.
      tasks: positions of the tasks wanted; others come back with zero gains.

    Returns:
      Module -> terms with diagonal cores `[T, S]`.
    """
    rows, _ = pieces(shapes)
    (size,) = struct.unpack_from("<I", leaves["shared"])
    table = streams.unpack_tables(leaves["shared"][4 : 4 + size])
    rest = {k: v[4 + size :] if k == "shared" else v for k, v in leaves.items()}
    index: list[Any] = [None] * len(rows)
    values: list[Any] = [None] * len(rows)
    gains: dict[int, np.ndarray] = {}
    names = ("shared", *sorted(set(rest) - {"shared"}))
    for now in (names[:1], names[1:]):
        bodies, spelled = [], []
        guesses: dict[int, np.ndarray] = {}
        for leaf in now:
            members = [i for i, x in enumerate(rows) if x.leaf == leaf]
            (length,) = struct.unpack_from("<I", rest[leaf])
            tail = read_side(rest[leaf][4 : 4 + length], rows, members, index, values, guesses)
            if tail:
                gains[int(leaf[5:])] = unpack_gains(tail)
            bodies.append(rest[leaf][4 + length :] or struct.pack("<I", 0))
            spelled.append(spell([rows[i] for i in members], [index[i] for i in members]))
        for leaf, codes in zip(now, streams.decode(bodies, spelled, table), strict=True):
            at = 0
            for i in (i for i, x in enumerate(rows) if x.leaf == leaf):
                values[i], at = place(codes, at, rows[i], index[i], guesses.get(i, 0.0))
    known = [np.zeros(x.rank, int) if i is None else i for x, i in zip(rows, index, strict=True)]
    terms = assemble(shapes, rows, values)
    cores = {
        (n, k): np.zeros((len(x.a_of), x.rank), np.float32)
        for n, v in shapes.items()
        for k, x in enumerate(v)
    }
    for task in tasks:
        at = 0
        for key, live in live_directions(shapes, rows, known, task).items():
            count = int(live.sum())
            cores[key][task, live] = gains[task][at : at + count] if count else 0.0
            at += count
    return {n: tuple(x._replace(core=cores[n, k]) for k, x in enumerate(v)) for n, v in terms.items()}  # type: ignore[arg-type]


def read_side(
    data: bytes,
    rows: Sequence[Piece],
    members: Sequence[int],
    index: list[Any],
    values: Sequence[np.ndarray],
    guesses: dict[int, np.ndarray],
) -> bytes:
    """Read a leaf's side information into `index` and `guesses`; return the packed gains."""
    body, gains = struct.unpack_from("<II", data)
    head, at = zlib.decompress(data[8 : 8 + body]), 0
    tail = data[8 + body :]
    for i in members:
        index[i] = np.frombuffer(head, np.uint8, rows[i].rank, at).astype(np.int64)
        at += rows[i].rank
    used = {}
    for i in members:
        if rows[i].base >= 0:
            width = -(-rows[i].rank // 8)
            flags = np.unpackbits(np.frombuffer(head, np.uint8, width, at))[: rows[i].rank]
            at += width
            used[i] = np.flatnonzero(flags)
    middle = tail[: len(tail) - gains]
    if any(rows[i].kind == PROJECTED for i in used):
        sizes = {i: int(np.count_nonzero(index[rows[i].base])) * len(x) for i, x in used.items()}
        coefficients, at = prediction.unpack(middle, sum(sizes.values())), 0
        for i, vectors in used.items():
            guesses[i] = np.zeros((rows[i].length, rows[i].rank), np.float32)
            if sizes[i]:
                weights = coefficients[at : at + sizes[i]].reshape(len(vectors), -1).T
                guesses[i][:, vectors] = prediction.weigh(known_vectors(rows[i], index, values), weights)
            at += sizes[i]
    else:
        read_scaled(middle, rows, used, index, values, guesses)
    return tail[len(tail) - gains :]


def known_vectors(row: Piece, index: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> np.ndarray:
    """The coded vectors of the piece that another is predicted from, `[length, D]`."""
    return values[row.base][:, index[row.base] > 0]


def read_scaled(
    data: bytes,
    rows: Sequence[Piece],
    used: Mapping[int, np.ndarray],
    index: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    guesses: dict[int, np.ndarray],
) -> None:
    """Predictions as early stores hold them: coefficients of one byte, a half-precision scale a vector."""
    total = sum(map(len, used.values()))
    scales, at, first = np.frombuffer(data, "<f2", total).astype(np.float32), 2 * total, 0
    for i, vectors in used.items():
        guesses[i] = np.zeros((rows[i].length, rows[i].rank), np.float32)
        if len(vectors):
            known = known_vectors(rows[i], index, values)
            rounded = np.frombuffer(data, np.int8, len(vectors) * known.shape[1], at)
            at += rounded.size
            weights = rounded.reshape(len(vectors), -1).T * scales[first : first + len(vectors)]
            guesses[i][:, vectors] = known @ weights
        first += len(vectors)
