"""Segments that are predicted from earlier ones, as a P-frame is from its I-frame. NumPy only.

Each vector of such a segment is predicted by least squares from the vectors of its references for the same
module and side, concatenated in the order of the references. The codec codes the difference. Its symbols use
the tables of an earlier segment: tables of its own would cost some hundred bytes and be nearly equal.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from hydraopt_jax.codec import contexts, frequency_tables, prediction
from hydraopt_jax.codec.bitstream import Damaged, Reader, pack_integers, unpack_integers
from hydraopt_jax.codec.decode import Decoded
from hydraopt_jax.codec.prediction import Prediction
from hydraopt_jax.factors import Factors, parts_of_task
from hydraopt_jax.store.store import Reference

# weights of the earlier segment's table and of a Gaussian
KNOWN, PRIOR = 16, 1024
# the largest exponent of a coefficient's unit
LARGEST = int(prediction.units(np.array(contexts.PER_SIDE - 1)))

# (module, side) -> `[n, D]` vectors in steps
Vectors = Mapping[tuple[str, int], np.ndarray]
Terms = Mapping[str, Sequence[Factors]]


def to_leaf(found: Sequence[Prediction]) -> bytes:
    """Predictions as bytes: flags, then exponents of units, then coefficients."""
    flags = b"".join(np.packbits(x.used).tobytes() for x in found)
    units = np.concatenate([np.zeros(0, np.int64), *(x.units[x.used] for x in found)])
    return flags + (pack_integers(units) if len(units) else b"") + prediction.pack_coefficients(found)


def from_leaf(data: bytes, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
    """The inverse of `to_leaf`, for predictions of widths and ranks `(D, S)`."""
    reader = Reader(data)
    used = [np.unpackbits(reader.array("u1", -(-rank // 8)))[:rank].astype(bool) for _, rank in sizes]
    counts = [int(mask.sum()) for mask in used]
    exponents = unpack_integers(reader, sum(counts)) if any(counts) else np.zeros(0, np.int64)
    if exponents.max(initial=0) > LARGEST:
        raise Damaged("a unit of coefficients that is too large")
    total = sum(width * count for (width, _), count in zip(sizes, counts, strict=True))
    flat = prediction.unpack_coefficients(reader, total)
    out = []
    for mask, count, (width, rank) in zip(used, counts, sizes, strict=True):
        part, flat = np.split(flat, [width * count])
        coefficients: np.ndarray = np.zeros((width, rank), np.int64)
        coefficients[:, mask] = part.reshape(-1, width).T if width else 0
        units: np.ndarray = np.zeros(rank, np.int64)
        units[mask], exponents = np.split(exponents, [count])
        out.append(Prediction(mask, coefficients, units))
    return out


def frequencies(shared: bytes) -> np.ndarray:
    """Integer frequencies of a predicted segment: those of an earlier shared leaf, mixed with a Gaussian.

    All counts are integers before they are scaled, so that every machine has the same tables.
    """
    known = frequency_tables.unpack_tables(Reader(shared))
    return frequency_tables.from_counts(known * KNOWN + np.rint(PRIOR * contexts.gaussian()) + 1)


def task_vectors(modules: Terms, task: int) -> dict[tuple[str, int], np.ndarray]:
    """The coded nonzero vectors of a task, in steps."""
    out: dict[tuple[str, int], np.ndarray] = {}
    for name, terms in modules.items():
        sides: list[list[np.ndarray]] = [[], []]
        for a, b, _ in parts_of_task(terms, task):
            sides[0].append(a.astype(np.float32))
            sides[1].append(b.T.astype(np.float32))
        for side, found in enumerate(sides):
            if found:
                every = np.concatenate(found, 1)
                out[name, side] = every[:, every.any(0)]
    return out


def shared_vectors(decoded: Decoded) -> dict[tuple[str, int], np.ndarray]:
    """The coded vectors of the shared leaf."""
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    for x, value in zip(decoded.pieces, decoded.values, strict=True):
        if x.leaf == "shared" and value is not None:
            found.setdefault((x.module, x.side), []).append(value[:, value.any(0)])
    return {k: np.concatenate(v, 1) for k, v in found.items()}


def base_of(
    known: Mapping[Reference, Vectors], references: Sequence[Reference], key: tuple[str, int]
) -> np.ndarray | None:
    """The vectors of some references for one side of a module, `[n, D]`; None if there are none."""
    parts = [known[r][key] for r in references if key in known[r]]
    return np.concatenate(parts, 1) if parts else None


def add_predictions(
    terms: Mapping[str, tuple[Factors, ...]],
    packed: bytes,
    references: Sequence[Reference],
    known: Mapping[Reference, Vectors],
) -> dict[str, tuple[Factors, ...]]:
    """The terms of a predicted segment: decoded differences of its task plus its `packed` predictions."""
    keys = [(n, side) for n, v in terms.items() for side in (0, 1) if v and len(v[0].a)]
    bases = {k: base for k in keys if (base := base_of(known, references, k)) is not None}
    sizes = [(base.shape[1], terms[n][0].a.shape[2]) for (n, _), base in bases.items()]
    guesses = {
        key: prediction.apply_weights(prediction.scaled(base), found.coefficients, found.units)
        for (key, base), found in zip(bases.items(), from_leaf(packed, sizes), strict=True)
    }
    out = {}
    for name, (*first,) in terms.items():
        if first:
            term = first[0]
            a = term.a + guesses.get((name, 0), np.float32(0))
            b = term.b + np.asarray(guesses.get((name, 1), np.float32(0))).T
            first[0] = term._replace(a=a, b=b)
        out[name] = tuple(first)
    return out
