"""Which tasks of a coded store are predicted from which: counts of vectors, and groups of tasks. NumPy only.

It takes contexts and flags, which lie before the codes of each leaf: leaves are read, codes are not decoded,
but those of tasks that later ones are predicted from.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hydraopt_jax.codec.decode import read_sides
from hydraopt_jax.codec.layout import pieces
from hydraopt_jax.deferred import bytes_of
from hydraopt_jax.store import references, schema
from hydraopt_jax.store.decoding import decode_segment, decode_segments, trusting_checksums
from hydraopt_jax.store.store import SHARED, Reference, Store

# share of the vectors that a source could predict from which a task belongs to it
BELONGS = 0.75


class Source(NamedTuple):
    """What one source does for a task.

    Attributes:
      possible: number of the task's vectors that the source comes before.
      predicted: number of those that are predicted from it.
    """

    possible: int
    predicted: int


class Predicted(NamedTuple):
    """The coded vectors of one task.

    Attributes:
      vectors: their number, of both sides of all modules.
      sources: task, or label of a removed one or of a basis of several tasks -> what it does; the one that
        predicts most first.
    """

    vectors: int
    sources: dict[str, Source]


@trusting_checksums()
def predicted(store: Store) -> dict[str, Predicted]:
    """Task -> its coded vectors, and from which tasks these are predicted; for tasks of coded segments.

    Raises:
      HydraOptError: leaves that cannot be decoded.
    """
    totals: Counter[str] = Counter()
    known: dict[str, dict[str, Source]] = {}
    for n, x in enumerate(store.segments):
        rows = within(store, n) if x.coded else []
        for place, _, coded, _ in rows:
            totals[x.tasks[place]] += coded
        found = [(x.tasks[place], source, coded, used) for place, source, coded, used in rows if source]
        if x.coded and x.references and x.live:
            found += [(x.tasks[0], *row) for row in from_others(store, n, sum(row[2] for row in rows))]
        for task, source, possible, used in found:
            before = known.setdefault(task, {}).get(source, Source(0, 0))
            known[task][source] = Source(before.possible + possible, before.predicted + used)
    return {
        t: Predicted(totals[t], dict(sorted(known.get(t, {}).items(), key=lambda x: -x[1].predicted)))
        for t in store.tasks
        if t in totals
    }


def within(store: Store, n: int) -> list[tuple[int, str | None, int, int]]:
    """Of each factor of a segment: place of its task, what it may be predicted from in the segment, its coded
    vectors, and how many of them are."""
    x = store.segments[n]
    wanted = schema.leaves_of(x.modules, x.live)
    blobs = {k: bytes(bytes_of(v)) for k, v in x.leaves.items() if k in wanted}
    assert schema.is_coded(x.modules)
    # tables of an earlier segment are not needed, as no code is decoded
    _, members, sides = read_sides(blobs, x.modules, None if x.tables < 0 else np.zeros(0))
    rows, _ = pieces(x.modules)
    users = [schema.readers(x.modules, row) for row in rows]
    out: list[tuple[int, str | None, int, int]] = []
    for leaf, positions in members.items():
        for i, context, used in zip(positions, sides[leaf].contexts, sides[leaf].used, strict=True):
            coded = context > 0
            source, taken = None, 0
            if used is not None:
                base = min(users[rows[i].base], default=-1)
                source, taken = basis(n) if base < 0 else task_at(store, n, base), int((used & coded).sum())
            out += [(place, source, int(coded.sum()), taken) for place in users[i] & set(x.live)]
    return out


def from_others(store: Store, n: int, vectors: int) -> list[tuple[str, int, int]]:
    """What the task of a later segment is predicted from: source, and as in `Source`, of so many vectors.

    A vector counts for the reference with the largest coefficients. As all references come before all
    vectors, those that are not predicted are divided among the references as the predicted ones are.
    """
    x = store.segments[n]
    known = {r: vectors_of(store, r) for r in x.references}
    # a module whose delta is zero has a term without factors
    own = [name for name, terms in x.modules.items() if terms and max(terms[0].a_of) >= 0]
    keys = [(name, side) for name in own for side in (0, 1)]
    bases = {k: base for k in keys if (base := references.base_of(known, x.references, k)) is not None}
    sizes = [(base.shape[1], x.modules[name][0].rank) for (name, _), base in bases.items()]
    found = references.from_leaf(bytes(bytes_of(x.leaves.get("prediction", b""))), sizes)
    counts: Counter[str] = Counter()
    for key, one in zip(bases, found, strict=True):
        widths = [known[r][key].shape[1] if key in known[r] else 0 for r in x.references]
        parts = np.split(np.abs(one.coefficients[:, one.used]), np.cumsum(widths)[:-1])
        strongest = np.argmax([part.sum(0) for part in parts], 0)
        for k, count in enumerate(np.bincount(strongest, minlength=len(widths)).tolist()):
            counts[name_of(store, x.references[k], key)] += count
    return [(k, round(v * vectors / counts.total()), v) for k, v in counts.items() if v]


def basis(n: int) -> str:
    """The name of vectors of a segment that are of several tasks."""
    return f"basis of segment {n + 1}"


def task_at(store: Store, n: int, place: int) -> str:
    """The task at a place of a segment; a removed one has another label, as a task may come back."""
    x = store.segments[n]
    return f"{x.tasks[place]} (removed, in segment {n + 1})" if place in x.removed else x.tasks[place]


def name_of(store: Store, r: Reference, key: tuple[str, int]) -> str:
    """The task that a reference's vectors for one side of a module are of, or the name of a basis."""
    x = store.segments[r.segment]
    if r.place != SHARED:
        return task_at(store, r.segment, r.place)
    assert schema.is_coded(x.modules)
    rows = [row for row in pieces(x.modules)[0] if row.leaf == "shared" and (row.module, row.side) == key]
    (*users,) = set().union(*(schema.readers(x.modules, row) for row in rows))
    return task_at(store, r.segment, users[0]) if len(users) == 1 else basis(r.segment)


def vectors_of(store: Store, r: Reference) -> references.Vectors:
    """The vectors of a reference."""
    if r.place == SHARED:
        # a shared leaf is in a segment that is not predicted itself
        x = store.segments[r.segment]
        return references.shared_vectors(decode_segment(x, x.live))
    return references.task_vectors(decode_segments(store, {r.segment: [r.place]})[r.segment], 0)


def groups(found: Mapping[str, Predicted]) -> list[list[str]]:
    """Groups of tasks, the largest first: a task belongs to what predicts most of the vectors that it could
    predict, and to the other tasks that belong to it.

    >>> a, b = Predicted(12, {"x": Source(10, 9)}), Predicted(12, {"x": Source(10, 2)})
    >>> groups({"x": Predicted(12, {}), "y": a, "z": b})
    [['x', 'y'], ['z']]
    """
    leader = {k: k for t, x in found.items() for k in (t, *x.sources)}

    def root(t: str) -> str:
        return t if leader[t] == t else root(leader[t])

    for t, x in found.items():
        for source, y in x.sources.items():
            if y.possible and y.predicted >= BELONGS * y.possible:
                leader[root(t)] = root(source)
    rows: dict[str, list[str]] = {}
    for t in found:
        rows.setdefault(root(t), []).append(t)
    return sorted(rows.values(), key=lambda x: -len(x))
