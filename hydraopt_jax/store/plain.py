"""Plain segments: factors stored as they are, every array in the leaf of the tasks that read it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from hydraopt_jax.deferred import joined, part_of
from hydraopt_jax.factors import Factors, LazyFactors
from hydraopt_jax.store.schema import PlainShape, Schema, plain_parts
from hydraopt_jax.store.store import renumber


def shape_of(term: Factors | LazyFactors) -> PlainShape:
    """The schema of a term.

    A diagonal core with another dtype than `b` is a scale.
    """
    a, b = term.a[0], term.b[0]
    core = ""
    if term.core is not None:
        first = term.core[0]
        core = "full" if np.ndim(first) == 2 else "diagonal" if first.dtype == b.dtype else "scale"
    a_of, b_of = (tuple(int(x) for x in of) for of in (term.a_of, term.b_of))
    low, high = (np.dtype(x.dtype).name for x in (a, b))
    return PlainShape(a_of, b_of, a.shape[0], a.shape[1], b.shape[1], low, high, core)


def to_leaves(
    modules: Mapping[str, Sequence[Factors | LazyFactors]],
) -> tuple[dict[str, tuple[PlainShape, ...]], dict[str, Any]]:
    """Terms as a schema and leaves; deferred arrays are not read."""
    shapes = {name: tuple(shape_of(x) for x in terms) for name, terms in modules.items()}
    rows, _, names = plain_parts(shapes)
    leaves: dict[str, list[Any]] = {}
    for (name, k, side, index), leaf in zip(rows, names, strict=True):
        leaves.setdefault(leaf, []).append(getattr(modules[name][k], side)[index])
    return shapes, {k: joined(v) for k, v in leaves.items()}


# (reference, module, term, "a" or "b") -> the factor that the reference's task uses
Borrow = Callable[[int, str, int, str], np.ndarray]
Kind = TypeVar("Kind", bound=Factors | LazyFactors)


def from_leaves(
    kind: type[Kind],
    modules: Schema,
    leaves: Mapping[str, Any],
    places: Sequence[int],
    borrow: Borrow | None = None,
) -> dict[str, tuple[Kind, ...]]:
    """Terms for the tasks at some places, from the parts of the leaves that these tasks need.

    Args:
      kind: `Factors`, or `LazyFactors`, whose arrays are deferred if the leaves are.
      modules: the schema.
      leaves: name -> bytes, at least those of `schema.leaves_of`; may be deferred.
      places: one per task of the result, -1 for a task that is not in the segment.
      borrow: returns factors of the references.

    Raises:
      ValueError: a leaf is shorter than the schema says.
    """
    rows, shapes, names = plain_parts(modules)
    lazy = kind is LazyFactors
    # row -> where its numbers go
    slots: dict[tuple[str, int, str, int], list[tuple[Any, int]]] = {}

    def room(name: str, k: int, side: str, shape: tuple[int, ...]) -> tuple[Any, np.ndarray]:
        term: Any = modules[name][k]
        kept, index = renumber(getattr(term, f"{side}_of"), places)
        elsewhere = getattr(term, f"{side}_from")
        if elsewhere >= 0 and len(kept):
            assert borrow is not None
            lent = [borrow(elsewhere, name, term.term, side) for _ in kept]
            return lent if lazy else np.stack(lent), index
        factors: Any = [None] * len(kept)
        if not lazy or not len(kept):
            factors = np.empty((len(kept), *shape), dtype_of(term, side))
        for i, factor in enumerate(kept):
            slots.setdefault((name, k, side, int(factor)), []).append((factors, i))
        return factors, index

    out = {}
    for name, terms in modules.items():
        made = []
        for k, term in enumerate(terms):
            assert isinstance(term, PlainShape)
            a, a_of = room(name, k, "a", (term.inputs, term.rank))
            b, b_of = room(name, k, "b", (term.rank, term.outputs))
            core = None
            if term.core:
                core = np.zeros((len(places), *term.core_shape), term.core_dtype)
                for t, place in enumerate(places):
                    if place >= 0 and term.a_of[place] >= 0:
                        slots.setdefault((name, k, "core", place), []).append((core, t))
            made.append(kind(a, b, a_of, b_of, core))
        out[name] = tuple(made)
    whole: dict[str, list[tuple[tuple[str, int, str, int], tuple[int, ...]]]] = {}
    for row, shape, leaf in zip(rows, shapes, names, strict=True):
        whole.setdefault(leaf, []).append((row, shape))
    for leaf, members in whole.items():
        if not any(row in slots for row, _ in members):
            continue
        # leaf by leaf: one that is on disk is read and compared with its checksum each time it is asked
        data, at = leaves[leaf] if lazy else np.asarray(leaves[leaf]), 0
        for row, shape in members:
            dtype = dtype_of(modules[row[0]][row[1]], row[2])
            for target, i in slots.get(row, ()):
                target[i] = part_of(data, at, shape, dtype)
            at += math.prod(shape) * np.dtype(dtype).itemsize
    return out


def dtype_of(term: Any, side: str) -> str:
    """The dtype of a term's "a", "b" or "core"."""
    return {"a": term.a_dtype, "b": term.b_dtype}.get(side, term.core_dtype)
