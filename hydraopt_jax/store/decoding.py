"""Decode a store to factors and adapters, with NumPy and integers only.

Decoding a task reads its own leaves, the leaves that it shares, and the leaves that predict them.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.codec import bitstream, rans
from hydraopt_jax.codec.decode import Decoded, decode_leaves
from hydraopt_jax.codec.layout import Piece, TermShape
from hydraopt_jax.codec.syntax import live_directions
from hydraopt_jax.deferred import bytes_of
from hydraopt_jax.errors import HydraOptError, damaged, one_line
from hydraopt_jax.factors import Factors, balanced, task_pair
from hydraopt_jax.store import lossless, plain, references, schema
from hydraopt_jax.store.store import (
    SHARED,
    Reference,
    Segment,
    Store,
    closure,
    places_of,
    renumber,
    select_term,
    task_index,
    tensors_of,
)

Terms = dict[str, tuple[Factors, ...]]


def terms_of(found: Decoded, shapes: Mapping[str, tuple[TermShape, ...]], places: Sequence[int]) -> Terms:
    """Terms in quantizer steps with diagonal cores, from decoded pieces, for the tasks at some places.

    Args:
      found: decoded pieces of the leaves that these tasks read.
      shapes: module -> its coded terms.
      places: one for each task of the result, -1 for a task that is not in the segment.
    """
    position = {(x.module, x.term, x.side, x.factor): i for i, x in enumerate(found.pieces)}
    # (module, term) -> the directions that a task has, and their gains
    gains = {k: directions_of(found, shapes, k) for k in set(places) if k >= 0}
    out = {}
    for name, terms in shapes.items():
        made = []
        for k, x in enumerate(terms):
            (a, a_of), (b, b_of) = (renumber(of, places) for of in (x.a_of, x.b_of))
            core = np.zeros((len(places), x.rank), np.float32)
            for t, place in enumerate(places):
                if place >= 0 and (name, k) in gains[place]:
                    live, own = gains[place][name, k]
                    core[t, live] = own
            values = [
                stack_pieces([found.values[position[name, k, side, f]] for f in kept], (length, x.rank))
                for side, kept, length in ((0, a, x.inputs), (1, b, x.outputs))
            ]
            made.append(Factors(values[0], values[1].swapaxes(1, 2), a_of, b_of, core))
        out[name] = tuple(made)
    return out


def directions_of(
    found: Decoded, shapes: Mapping[str, tuple[TermShape, ...]], place: int
) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """(module, term) -> the directions that the task at a place has, `[S]` bool, and their gains."""
    live = live_directions(shapes, found.contexts, place)
    return {k: (x, own) for (k, x), own in zip(live.items(), found.gains[place], strict=True)}


def stack_pieces(values: Sequence[np.ndarray | None], shape: tuple[int, int]) -> np.ndarray:
    """Values of pieces in one array; a missing piece means a damaged store."""
    found = [x for x in values if x is not None]
    if len(found) < len(values):
        raise bitstream.Damaged("a factor whose leaf is not there")
    if len(found) == 1:
        # no copy of what is all of a task's own
        return found[0][None]
    return np.stack(found) if found else np.zeros((0, *shape), np.float32)


def all_terms(
    shapes: Mapping[str, tuple[TermShape, ...]], rows: Sequence[Piece], values: Sequence[np.ndarray]
) -> dict[str, list[Factors]]:
    """All coded pieces as terms in quantizer steps, without cores: `a: [A, I, S]`, `b: [B, S, O]`."""
    of: dict[tuple[str, int, int], list[np.ndarray]] = {}
    for piece, value in zip(rows, values, strict=True):
        of.setdefault((piece.module, piece.term, piece.side), []).append(value)
    return {
        name: [
            Factors(
                stack_pieces(of.get((name, k, 0), []), (term.inputs, term.rank)),
                stack_pieces(of.get((name, k, 1), []), (term.outputs, term.rank)).swapaxes(1, 2),
                np.array(term.a_of, np.int32),
                np.array(term.b_of, np.int32),
            )
            for k, term in enumerate(terms)
        ]
        for name, terms in shapes.items()
    }


def decode_segment(
    segment: Segment,
    places: Sequence[int],
    table: np.ndarray | None = None,
    decode_lanes: rans.DecodeLanes = rans.decode,
) -> Decoded:
    """Decoded terms of a coded segment for the tasks at some places.

    `table` has the frequencies of an earlier segment, if the segment uses them.

    Raises:
      Damaged: leaves that no encoder writes.
    """
    wanted = schema.leaves_of(segment.modules, places)
    blobs = {k: bytes(bytes_of(v)) for k, v in segment.leaves.items() if k in wanted}
    return decode_leaves(blobs, segment.modules, places, table, decode_lanes)


def decode_segments(
    store: Store, wanted: Mapping[int, Sequence[int]], decode_lanes: rans.DecodeLanes = rans.decode
) -> dict[int, Terms]:
    """Segment -> its terms, for the tasks at some places (-1 for none) in the order of the places."""
    needed = closure(store.segments, {n: {k for k in v if k >= 0} for n, v in wanted.items()})
    out: dict[int, Terms] = {}
    known: dict[Reference, references.Vectors] = {}
    referenced = {r for n in needed for r in store.segments[n].references}
    for n in sorted(needed):
        x, mine = store.segments[n], [r for r in referenced if r.segment == n]
        if not x.coded:
            out[n] = plain.from_leaves(Factors, x.modules, x.leaves, wanted.get(n, ()), borrowing(store, n))
            continue
        if n not in wanted and not mine:
            # only the tables of this segment are needed
            continue
        table = None
        if x.tables >= 0:
            table = references.frequencies(bytes(bytes_of(store.segments[x.tables].leaves["shared"])))
        own = sorted(k for k in needed[n] if k != SHARED)
        found = decode_segment(x, own, table, decode_lanes)
        out[n] = terms_of(found, x.modules, wanted.get(n, own))
        every = {k: terms_of(found, x.modules, [k]) for k in own} if mine or x.references else {}
        if x.references:
            packed = bytes(bytes_of(x.leaves.get("prediction", b"")))
            every = {k: references.add_predictions(v, packed, x.references, known) for k, v in every.items()}
            # a predicted segment has one task
            chosen = [min(k, 0) for k in wanted.get(n, own)]
            first = every[own[0]]
            out[n] = {name: tuple(select_term(term, chosen) for term in v) for name, v in first.items()}
        for r in mine:
            known[r] = (
                references.shared_vectors(found)
                if r.place == SHARED
                else references.task_vectors(every[r.place], 0)
            )
        # as large as the terms that are kept
        del found, every
    return out


def borrowing(store: Store, n: int) -> plain.Borrow:
    """A function that gives a plain segment the factors that it shares with earlier segments."""

    @functools.lru_cache
    def lent(reference: int) -> Terms:
        segment, place = store.segments[n].references[reference]
        return decode_segments(store, {segment: [place]})[segment]

    def borrow(reference: int, name: str, k: int, side: str) -> np.ndarray:
        (factor,) = getattr(lent(reference)[name][k], side)
        return factor

    return borrow


@contextmanager
def trusting_checksums() -> Iterator[None]:
    """A context in which errors of leaves that no encoder writes become `HydraOptError`s."""
    try:
        yield
    except HydraOptError:
        raise
    except bitstream.Damaged as error:
        raise damaged(None, str(error)) from None
    except (LookupError, TypeError, OverflowError) as error:
        # checksums and schema are valid: this is a forgery or a fault of this package
        what = f"{type(error).__name__}: {one_line(error, 120)}"
        raise HydraOptError(
            f"the store cannot be read ({what}), though its checksums hold: report this as a fault of "
            "hydraopt_jax if it was written by this version"
        ) from error
    except ValueError as error:
        raise damaged(None, f"its leaves do not fit its schema ({one_line(error, 120)})") from None


def named_tasks(store: Store, tasks: Sequence[str] | None) -> tuple[str, ...]:
    """Names of some tasks of a store, of all if None.

    Raises:
      HydraOptError: no store, no sequence of names, or an unknown one.
    """
    if not isinstance(store, Store):
        said = one_line(repr(store), 60)
        raise HydraOptError(f"{said}: not a Store: hydraopt_jax.open opens a folder or file")
    if isinstance(tasks, str):
        raise HydraOptError(f"tasks = {tasks!r}: one name, not a sequence: give [{tasks!r}]")
    if tasks is None:
        return store.tasks
    names = tuple(tasks)
    for task in names:
        task_index(store.tasks, task)
    return names


def decode_terms(
    store: Store, tasks: Sequence[str] | None = None, *, decode_lanes: rans.DecodeLanes = rans.decode
) -> Terms:
    """The factors of some tasks (all if None) of a store: module -> terms, tasks in the order given.

    A delta is the sum of its terms' `a @ core @ b`. Modules that none of the tasks has are left out.
    `decode_lanes` decodes the symbols, see `codec.streams.decode`.

    Raises:
      HydraOptError: an unknown task, or leaves that cannot be decoded.
    """
    names = named_tasks(store, tasks)
    wanted = places_of(store, names)
    with trusting_checksums():
        found = decode_segments(store, wanted, decode_lanes)
    out: dict[str, list[Factors]] = {}
    for n in wanted:
        for name, terms in found[n].items():
            out.setdefault(name, []).extend(x for x in terms if len(x.a))
    order = [name for name in store.shapes if name in out]
    return {name: tuple(out[name]) for name in order if out[name]}


def task_factors(store: Store, task: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """One task's factors, module -> `(a: [I, S], b: [S, O])` in float32, terms concatenated, cores folded in.

    Raises:
      HydraOptError: the store has no such task (near names are listed).
    """
    pairs = {name: task_pair(terms, 0) for name, terms in decode_terms(store, [task]).items()}
    return {name: x for name, x in pairs.items() if x is not None}


def decode(store: Store, task: str) -> Adapter:
    """One task as an `Adapter`, ready for any writer in `formats`.

    Only the leaves of the task are read. The factors are balanced; those of a lossless store are bit for bit
    those of the input. A task whose delta is zero has rank 1, of zeros, in the store's modules.

    Raises:
      HydraOptError: the store has no such task, or its leaves cannot be decoded.
    """
    return next(decode_all(store, [task]))


def decode_all(store: Store, tasks: Sequence[str] | None = None) -> Iterator[Adapter]:
    """Some tasks (all if None) as `decode` returns them; leaves that several tasks read are decoded once.

    The factors of all these tasks are in memory at once, see `files.batches`.

    Raises:
      HydraOptError: see `decode`.
    """
    names = named_tasks(store, tasks)
    terms = decode_terms(store, names)
    for k, task in enumerate(names):
        yield adapter_of(store, task, terms, k, last=k + 1 == len(names))


def adapter_of(store: Store, task: str, terms: Terms, place: int, last: bool) -> Adapter:
    """The adapter of the task at one place of some terms; the last one takes them out, module by module."""
    source = store.sources[task_index(store.tasks, task)]
    came: dict[str, Any] = {
        "dtype": source.dtype,
        "extras": tensors_of(store, task),
        "config": source.config,
        "layout": source.layout,
        "source": source.origin,
        "digest": source.digest,
    }
    raw = lossless.raw_factors(terms, place) if store.report.get("form") == lossless.FORM else None
    if raw is not None:
        return Adapter(task, *lossless.folded(raw), **came, raw=raw)
    a, b = {}, {}
    for name in list(terms):
        pair = task_pair(terms.pop(name) if last else terms[name], place)
        if pair is not None:
            a[name], b[name] = balanced(*pair)
            if not (np.isfinite(a[name]).all() and np.isfinite(b[name]).all()):
                raise damaged(None, f"factors of {name} that no encoder writes")
    if not a:
        # nothing is stored of a delta that is zero
        a = {n: np.zeros((inputs, 1), np.float32) for n, (inputs, _) in store.shapes.items()}
        b = {n: np.zeros((1, outputs), np.float32) for n, (_, outputs) in store.shapes.items()}
    return Adapter(task, a, b, **came)
