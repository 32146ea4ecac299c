"""The schema of a segment: a JSON-able description of its leaves.

Every module has terms. A term says which factor each task uses, and the sizes of the factors. `TermShape` (of
the codec) describes a coded term, `PlainShape` a plain one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from hydraopt_jax.codec.layout import KINDS, Piece, TermShape, leaf_names, pieces
from hydraopt_jax.static import Static


class PlainShape(NamedTuple):
    """A plain term: its factors are stored as arrays.

    Attributes:
      a_of, b_of: `[T]` which factor each task uses, -1 where the task has no delta.
      inputs, rank, outputs: I, S, O.
      a_dtype, b_dtype: of the factors.
      core: "" for none, "diagonal" `[S]` or "full" `[S, S]` in the dtype of `b`, "scale" `[S]` in float32.
      a_from, b_from: position of the reference whose task's factor is the only `a` or `b` of this term; -1 if
        the factor is stored here.
      term: position of the term that this factor is taken from, among the module's terms in that segment.
    """

    a_of: tuple[int, ...]
    b_of: tuple[int, ...]
    inputs: int
    rank: int
    outputs: int
    a_dtype: str
    b_dtype: str
    core: str = ""
    a_from: int = -1
    b_from: int = -1
    term: int = 0

    @property
    def core_shape(self) -> tuple[int, ...]:
        """Shape of one task's core."""
        return {"": (), "full": (self.rank, self.rank)}.get(self.core, (self.rank,))

    @property
    def core_dtype(self) -> str:
        """Dtype of the cores."""
        return "float32" if self.core == "scale" else self.b_dtype


Shape = TermShape | PlainShape
# module -> its terms, all coded or all plain
Schema = Mapping[str, tuple[Shape, ...]]
CodedSchema = Mapping[str, tuple[TermShape, ...]]


def is_coded(modules: Schema) -> TypeGuard[CodedSchema]:
    """Whether the terms of a segment are entropy-coded."""
    return any(isinstance(x, TermShape) for terms in modules.values() for x in terms)


def plain_parts(modules: Schema) -> tuple[list[tuple[str, int, str, int]], list[tuple[int, ...]], list[str]]:
    """All stored arrays of a plain segment in canonical order: module, term, inputs, outputs, cores.

    Returns:
      (module, term, "a", "b" or "core", its index), the shape of each, and the leaf that holds it.
    """
    rows: list[tuple[str, int, str, int]] = []
    shapes: list[tuple[int, ...]] = []
    members, sizes = [], []
    tasks = 0
    for name, terms in modules.items():
        for k, x in enumerate(terms):
            assert isinstance(x, PlainShape)
            tasks = len(x.a_of)
            for side, of, shape, dtype, elsewhere in (
                ("a", x.a_of, (x.inputs, x.rank), x.a_dtype, x.a_from),
                ("b", x.b_of, (x.rank, x.outputs), x.b_dtype, x.b_from),
            ):
                if elsewhere >= 0:
                    continue
                size = math.prod(shape) * np.dtype(dtype).itemsize
                for index, users in enumerate(users_of(of)):
                    rows.append((name, k, side, index))
                    shapes.append(shape)
                    members.append(frozenset(users))
                    sizes.append(size)
            for t in (t for t, f in enumerate(x.a_of) if f >= 0 and x.core):
                rows.append((name, k, "core", t))
                shapes.append(x.core_shape)
                members.append(frozenset([t]))
                sizes.append(math.prod(x.core_shape) * np.dtype(x.core_dtype).itemsize)
    return rows, shapes, leaf_names(members, sizes, tasks)[0]


def users_of(of: Sequence[int]) -> list[list[int]]:
    """The tasks that use each factor, from the factor that each task uses.

    >>> users_of([1, 0, -1, 1])
    [[1], [0, 3]]
    """
    out: list[list[int]] = [[] for _ in range(max(of, default=-1) + 1)]
    for t, f in enumerate(of):
        if f >= 0:
            out[f].append(t)
    return out


def head_groups(modules: Schema) -> list[list[int]]:
    """The tasks that read each `head_*` leaf, by place."""
    if is_coded(modules):
        return pieces(modules)[1]
    rows, _, leaves = plain_parts(modules)
    groups: dict[int, list[int]] = {}
    for (name, k, side, index), leaf in zip(rows, leaves, strict=True):
        if leaf.startswith("head_"):
            of = getattr(modules[name][k], f"{side}_of")
            groups[int(leaf[5:])] = users_of(of)[index]
    return [groups[k] for k in sorted(groups)]


def leaves_of(modules: Schema, places: Sequence[int]) -> set[str]:
    """Names of the leaves that tasks at some places read for their factors."""
    wanted = set(places)
    names = {"shared"} | {f"task_{k}" for k in wanted}
    return names | {f"head_{k}" for k, users in enumerate(head_groups(modules)) if wanted & set(users)}


def readers(modules: Schema, x: Piece) -> set[int]:
    """Places of the tasks that read a coded piece as their own factor."""
    term = modules[x.module][x.term]
    of = term.b_of if x.side else term.a_of
    return {t for t, k in enumerate(of) if k == x.factor}


def as_json(modules: Schema) -> dict[str, Any]:
    """A JSON-able schema: patterns of use, each written once, and rows that refer to them."""
    patterns: list[Any] = []

    def number(use: Any) -> int:
        if use not in patterns:
            patterns.append(use)
        return patterns.index(use)

    def row(x: Shape) -> list[Any]:
        use = number([list(x.a_of), list(x.b_of), "coded" if isinstance(x, TermShape) else x.core])
        sizes: list[Any] = [use, x.inputs, x.rank, x.outputs]
        if isinstance(x, TermShape):
            return [*sizes, KINDS[x.predicted]]
        # usually one dtype; lossless adapters may have two
        sizes.append(" ".join(dict.fromkeys([x.a_dtype, x.b_dtype])))
        return sizes if max(x.a_from, x.b_from) < 0 else [*sizes, x.a_from, x.b_from, x.term]

    rows = [[name, [row(x) for x in terms]] for name, terms in modules.items()]
    return {"patterns": patterns, "modules": rows}


def from_json(said: Mapping[str, Any]) -> Static:
    """The inverse of `as_json`; `checks.check_schema` validates the input."""
    out = Static()
    for name, row in said["modules"]:
        terms: list[Shape] = []
        for pattern, inputs, rank, outputs, kind, *elsewhere in row:
            a_of, b_of, core = said["patterns"][pattern]
            use = (tuple(a_of), tuple(b_of), inputs, rank, outputs)
            if core == "coded":
                terms.append(TermShape(*use, KINDS.index(kind)))
            else:
                left, right = (kind.split(" ") * 2)[:2]
                terms.append(PlainShape(*use, left, right, core, *elsewhere))
        dict.__setitem__(out, name, tuple(terms))
    return out
