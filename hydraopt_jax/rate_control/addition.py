"""One task added to a coded collection: coded on its own, predicted from what is there, nobody else touched.

The quantizer step is the collection's, so that a bit is spent where it would have been in a fit of all at
once. Each of the task's vectors is predicted by least squares from the vectors of a few earlier tasks, or
of the leaf that all tasks read; the codec codes what is left.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hydraopt_jax import adapters
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.codec import contexts, encode, prediction, tables
from hydraopt_jax.codec.bitstream import Reader
from hydraopt_jax.codec.layout import TermShape, pieces
from hydraopt_jax.codec.prediction import Prediction
from hydraopt_jax.forms import Factors
from hydraopt_jax.rate_control import encode_at_step
from hydraopt_jax.rate_control.terms import deserialize
from hydraopt_jax.store import Addition, Payload

# the leaf that all tasks read, as a reference
SHARED = -1
# tasks whose vectors predict a new one's: a reader of it reads their leaves too
MAX_REFERENCES = 4
# share of the bits that a further reference must save
WORTH = 0.02
# an entry, in steps, that keeps a vector alive of which the prediction leaves nothing
TRACE = 1e-3

# weights of the collection's own table and of a Gaussian in the table of additions
KNOWN, PRIOR = 16, 1024

# (module, side) -> `[n, D]` vectors in steps
Vectors = Mapping[tuple[str, int], np.ndarray]


def pack(found: Sequence[Prediction]) -> bytes:
    """Predictions as bytes: flags, then coefficients."""
    return b"".join(np.packbits(x.used).tobytes() for x in found) + prediction.pack(found)


def unpack(data: bytes, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
    """The inverse of `pack`, for predictions of widths and ranks `(D, S)`."""
    reader = Reader(data)
    used = [np.unpackbits(reader.array("u1", -(-rank // 8)))[:rank].astype(bool) for _, rank in sizes]
    counts = [width * int(mask.sum()) for (width, _), mask in zip(sizes, used, strict=True)]
    flat = np.split(prediction.unpack(reader, sum(counts)), np.cumsum(counts)[:-1]) if counts else []
    out = []
    for mask, part, (width, rank) in zip(used, flat, sizes, strict=True):
        coefficients: np.ndarray = np.zeros((width, rank), np.int64)
        coefficients[:, mask] = part.reshape(-1, width).T if width else 0
        out.append(Prediction(mask, coefficients))
    return out


def frequencies(payload: Payload) -> np.ndarray:
    """Integer frequencies for additions: the collection's own, and a little of every other symbol.

    Tables of its own would cost an addition some hundred bytes and say much the same. All counts are
    integers before they are scaled, so that every machine has the same tables.
    """
    known = tables.unpack(Reader(payload.leaves["shared"]))
    return tables.from_counts(known * KNOWN + np.rint(PRIOR * contexts.gaussian()) + 1)


def sides(term: Factors, task: int) -> tuple[np.ndarray, np.ndarray]:
    """A task's vectors of a term in steps: `[I, S]` and `[O, S]`."""
    a, b = np.asarray(term.a[int(term.a_of[task])]), np.asarray(term.b[int(term.b_of[task])])
    return a.astype(np.float32), b.T.astype(np.float32)


def vectors(modules: Mapping[str, Sequence[Factors]], task: int) -> dict[tuple[str, int], np.ndarray]:
    """The coded vectors of a task, the ones that are not zero."""
    out: dict[tuple[str, int], np.ndarray] = {}
    for name, terms in modules.items():
        here = [sides(x, task) for x in terms if x.a_of[task] >= 0]
        for side in (0, 1) if here else ():
            every = np.concatenate([x[side] for x in here], 1)
            out[name, side] = every[:, every.any(0)]
    return out


def shared_vectors(payload: Payload, modules: Mapping[str, Sequence[Factors]]) -> Vectors:
    """The coded vectors of the leaf that all tasks read."""
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    for x in pieces(payload.shapes)[0]:
        if x.leaf == "shared":
            term = modules[x.module][x.term]
            value = np.asarray(term.b[x.factor]).T if x.side else np.asarray(term.a[x.factor])
            found.setdefault((x.module, x.side), []).append(value[:, value.any(0)].astype(np.float32))
    return {k: np.concatenate(v, 1) for k, v in found.items()}


def base_of(
    known: Mapping[int, Vectors], references: Sequence[int], key: tuple[str, int]
) -> np.ndarray | None:
    """The vectors of some references for one side of a module, `[n, D]`; None where they have none."""
    parts = [known[r][key] for r in references if key in known[r]]
    return np.concatenate(parts, 1) if parts else None


def decode(payload: Payload, slots: Sequence[int]) -> tuple[dict[int, dict[str, tuple[Factors, ...]]], Any]:
    """Every wanted slot's terms, and those of the tasks that were compressed together.

    Args:
      payload: with at least the leaves that the slots and their references need.
      slots: wanted.

    Returns:
      Slot -> module -> terms of one task, for the additions; and module -> terms for all the others.
    """
    needed = closure(payload.additions, slots)
    together = [s for s in needed if s >= 0 and s not in payload.additions]
    modules = deserialize(payload.leaves, payload.shapes, together)
    known: dict[int, Vectors] = {}
    added: dict[int, dict[str, tuple[Factors, ...]]] = {}
    for slot in needed:
        if slot in payload.additions:
            x = payload.additions[slot]
            terms = deserialize(x.leaves, x.shapes, [0], frequencies(payload))
            added[slot] = restore(x, terms, known)
            known[slot] = vectors(added[slot], 0)
        else:
            known[slot] = shared_vectors(payload, modules) if slot == SHARED else vectors(modules, slot)
    return added, modules


def closure(additions: Mapping[int, Addition], slots: Sequence[int]) -> list[int]:
    """The slots and all that predict them, references first."""
    seen: set[int] = set()
    waiting = list(slots)
    while waiting:
        slot = waiting.pop()
        if slot not in seen:
            seen.add(slot)
            waiting += additions[slot].references if slot in additions else ()
    return sorted(seen)


def restore(
    x: Addition, terms: Mapping[str, tuple[Factors, ...]], known: Mapping[int, Vectors]
) -> dict[str, tuple[Factors, ...]]:
    """The terms of an addition, with what was predicted."""
    keys = [(n, side) for n, v in terms.items() for side in (0, 1) if v]
    bases = {key: base_of(known, x.references, key) for key in keys}
    keys = [k for k in keys if bases[k] is not None]
    ranks = {n: v[0].rank for n, v in x.shapes.items() if v}
    sizes = [(bases[k].shape[1], ranks[k[0]]) for k in keys]  # type: ignore[union-attr]
    guesses = {
        k: prediction.weigh(bases[k], found.coefficients)  # type: ignore[arg-type]
        for k, found in zip(keys, unpack(x.coefficients, sizes), strict=True)
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


def choose(goals: Mapping[str, Sequence[encode.Target]], known: Mapping[int, Vectors]) -> tuple[int, ...]:
    """The references that save the most bits, greedily."""
    targets = {(n, side): (v[0].b if side else v[0].a)[0] for n, v in goals.items() if v for side in (0, 1)}
    total = sum(
        float((len(x) / 2 * np.log2(np.maximum((x**2).mean(0) / encode.DISTORTION, 1))).sum())
        for x in targets.values()
    )
    chosen: tuple[int, ...] = ()
    best = 0.0
    while len(chosen) < MAX_REFERENCES:
        gains = {}
        for slot in known.keys() - set(chosen):
            trial_set = tuple(sorted((*chosen, slot)))
            bases = {k: base_of(known, trial_set, k) for k in targets}
            gains[slot] = sum(prediction.predict(targets[k], x)[2] for k, x in bases.items() if x is not None)
        following = max(gains, key=lambda s: (gains[s], -s), default=SHARED)
        if gains.get(following, 0.0) - best <= WORTH * total:
            break
        chosen, best = tuple(sorted((*chosen, following))), gains[following]
    return chosen


def add(adapter: Adapter, step: float, payload: Payload) -> tuple[Addition, np.ndarray, list[str]]:
    """Code one task at a collection's step.

    Args:
      adapter: the new task.
      step: the quantizer step, relative to the norm of a delta.
      payload: of the collection, all its leaves.

    Returns:
      Addition, relative squared error of each of its modules `[M]`, and the modules' names.
    """
    inputs = adapters.stack([adapter])
    problem = encode_at_step.prepare(inputs, tuple(adapter.a), np.ones(1), None, False)
    table = frequencies(payload)
    goals, _ = encode_at_step.aims(problem, step)
    slots = payload.slots or tuple(range(tasks_of(payload.shapes)))
    added, modules = decode(payload, (SHARED, *slots))
    known: dict[int, Vectors] = {SHARED: shared_vectors(payload, modules)}
    for slot in slots:
        known[slot] = vectors(added[slot], 0) if slot in added else vectors(modules, slot)
    references = choose(goals, known)
    rest: dict[str, tuple[encode.Target, ...]] = {}
    found: list[Prediction] = []
    guesses: dict[tuple[str, int], np.ndarray] = {}
    for name, terms in goals.items():
        left = []
        for side in (0, 1) if terms else ():
            target = (terms[0].b if side else terms[0].a)[0]
            base = base_of(known, references, (name, side))
            if base is not None:
                one, guesses[name, side], _ = prediction.predict(target, base)
                none = Prediction(np.zeros(target.shape[1], bool), np.zeros((base.shape[1], 0), np.int32))
                found.append(one or none)
            remains = target - guesses.get((name, side), np.float32(0))
            # a vector that the prediction meets exactly must not look like one that is not coded
            remains[0] += TRACE * (target.any(0) & ~remains.any(0))
            left.append(np.where(target.any(0), remains, 0).astype(np.float32))
        rest[name] = (terms[0]._replace(a=left[0][None], b=left[1][None]), *terms[1:]) if terms else ()
    coded = encode.quantize(rest, table.astype(np.float64))
    whole = []
    for x, value in zip(coded.pieces, coded.values, strict=True):
        whole.append(value + guesses.get((x.module, x.side), np.float32(0)) if x.term == 0 else value)
    gains, errors = encode_at_step.measure(problem, coded._replace(values=whole))
    leaves = encode.serialize(coded, gains, table)
    return Addition(leaves, coded.shapes, references, pack(found)), errors[:, 0], list(problem.order)


def tasks_of(shapes: Mapping[str, tuple[TermShape, ...]]) -> int:
    """How many tasks were compressed together."""
    return max((len(x.a_of) for terms in shapes.values() for x in terms), default=0)
