"""The leaf of each part of a store: a rule that writer and reader both follow.

Every part (one factor, one core) is in the leaf of the set of tasks that read it: `shared` if all do,
`task_3` if one does, `head_0`, `head_1`, ... for the other sets.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

# sets of tasks beyond this many, or with less than this to store, share one leaf with everybody
MAX_GROUPS = 64
MIN_GROUP = 4096


def leaf_names(members: Sequence[frozenset[int]], sizes: Sequence[int], tasks: int) -> tuple[list[str], list]:
    """The leaf of each part, and the task sets of the `head_*` leaves.

    Args:
      members: the tasks that read each part.
      sizes: how much each part stores: its bytes, or its entries where they are coded.
      tasks: T.

    >>> leaf_names([frozenset({0, 1, 2}), frozenset({1}), frozenset({0, 2})], [8192, 4, 4096], 3)
    (['shared', 'task_1', 'head_0'], [[0, 2]])
    """
    weight: dict[frozenset[int], int] = {}
    for users, size in zip(members, sizes, strict=True):
        if 1 < len(users) < tasks:
            weight[users] = weight.get(users, 0) + size
    worth = [users for users, size in weight.items() if size >= MIN_GROUP]
    groups = sorted(sorted(worth, key=weight.__getitem__, reverse=True)[:MAX_GROUPS], key=sorted)
    number = {users: f"head_{k}" for k, users in enumerate(groups)}
    names = [
        "shared"
        if len(users) == tasks > 1
        else f"task_{min(users)}"
        if len(users) == 1
        else number.get(users, "shared")
        for users in members
    ]
    return names, [sorted(users) for users in groups]


# prediction mode of factors 1, 2, ... of a term: none, or integer coefficients along the vectors of factor 0
KINDS = ("coded", "projected")
PROJECTED = 1


class TermShape(NamedTuple):
    """The structure of one coded term: everything that a reader needs beside the bytes.

    Attributes:
      a_of, b_of: which factor each task uses, -1 where the task has no delta.
      inputs, rank, outputs: I, S, O.
      predicted: prediction mode of factors 1, 2, ... of both sides from factor 0, a position in `KINDS`.
        Factor 0 may be read by no task.
    """

    a_of: tuple[int, ...]
    b_of: tuple[int, ...]
    inputs: int
    rank: int
    outputs: int
    predicted: int

    def factors(self, side: int) -> int:
        """Number of factors of a side, 0 for the input side."""
        return max(self.b_of if side else self.a_of) + 1


class Piece(NamedTuple):
    """One coded factor: `rank` vectors of one length.

    Attributes:
      module, term, side, factor: its position; side 0 is the input side.
      length: entries of each vector, I or O.
      rank: number of vectors, S.
      base: position of the piece that it may be predicted from, or -1.
      leaf: name of its leaf.
    """

    module: str
    term: int
    side: int
    factor: int
    length: int
    rank: int
    base: int
    leaf: str


def pieces(modules: Mapping[str, Sequence[TermShape]]) -> tuple[list[Piece], list]:
    """Every coded factor in the canonical order, with its leaf; and the task sets of the `head_*` leaves."""
    rows: list[tuple[str, int, int, int, int, int, int]] = []
    members, sizes = [], []
    tasks = 0
    for name, terms in modules.items():
        for k, term in enumerate(terms):
            tasks = len(term.a_of)
            for side, (of, length) in enumerate(((term.a_of, term.inputs), (term.b_of, term.outputs))):
                first = len(rows)
                for factor, users in enumerate(users_of(of, term.factors(side))):
                    base = first if term.predicted and factor else -1
                    everyone = term.predicted and not factor
                    rows.append((name, k, side, factor, length, term.rank, base))
                    members.append(frozenset(range(tasks) if everyone else users))
                    sizes.append(length * term.rank)
    names, groups = leaf_names(members, sizes, tasks)
    return [Piece(*row, leaf) for row, leaf in zip(rows, names, strict=True)], groups


def users_of(of: Sequence[int], factors: int) -> list[list[int]]:
    """The tasks that use each factor.

    Args:
      of: which factor each task uses, -1 for none.
      factors: their number.

    >>> users_of([1, 0, -1, 1], 2)
    [[1], [0, 3]]
    """
    users: list[list[int]] = [[] for _ in range(factors)]
    for task, factor in enumerate(of):
        if factor >= 0:
            users[factor].append(task)
    return users


def by_leaf(rows: Sequence[Piece], leaves: Iterable[str]) -> dict[str, list[int]]:
    """Leaf -> positions of its pieces, for some leaves, in their order."""
    members: dict[str, list[int]] = {leaf: [] for leaf in leaves}
    for i, x in enumerate(rows):
        if x.leaf in members:
            members[x.leaf].append(i)
    return members
