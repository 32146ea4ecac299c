"""Add a task to one module of a plain store: use an existing head, add a head, or add own directions.

The shared factor is fixed, so a new head is a projection, `b = pinv(a) @ delta` (closed form), and so is a
core. The remainder is a delta again; its leading singular directions may be stored too. The options of a
module are reduced to the convex hull of error against entries stored. Modules share a budget, which is spent
in order of the error saved per entry.
"""

import heapq
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax.factors import Factors, LazyFactors, svd, times, to_dtype
from hydraopt_jax.store import plain
from hydraopt_jax.store.schema import PlainShape


class Term(NamedTuple):
    """A term of a store.

    Attributes:
      factors: decoded, for the live tasks of its segment.
      segment: position of its segment.
      position: position among the module's terms in that segment.
    """

    factors: LazyFactors
    segment: int
    position: int


class Way(NamedTuple):
    """One way to store a task in a module.

    Attributes:
      cost: number of added entries.
      error: relative squared error.
      term: index of the term that it joins, -1 for none.
      a, b: a position where it joins a factor, `[I, S]` or `[S, O]` where it opens one.
      core: `[S]` or `[S, S]` where the term has cores.
      own: a pair `[I, r]`, `[r, O]` on top.
    """

    cost: int
    error: float
    term: int = -1
    a: int | np.ndarray = 0
    b: int | np.ndarray = 0
    core: np.ndarray | None = None
    own: tuple[np.ndarray, np.ndarray] | None = None


def ways(terms: Sequence[Term], a: np.ndarray, b: np.ndarray) -> list[Way]:
    """Ways to store `a @ b`, in order of rising cost and falling error."""
    u, s, v = svd(a, b)
    energy = float((s**2).sum())
    if energy == 0:
        return [Way(0, 0.0, own=(a[:, :1], b[:1]))]
    starts = [Way(0, 1.0)]
    for k, term in enumerate(terms):
        starts += joins(k, term.factors, u * s, v)
    out = []
    for way in starts:
        lu, ls, lv = svd(*minus(terms, way, u * s, v))
        for rank in range(len(s) + 1):
            root = np.sqrt(ls[:rank])
            own = (lu[:, :rank] * root, root[:, None] * lv[:rank]) if rank else None
            cost = way.cost + rank * (len(a) + b.shape[1])
            out.append(way._replace(cost=cost, error=float((ls[rank:] ** 2).sum()) / energy, own=own))
    return hull(out)


def hull(found: Sequence[Way]) -> list[Way]:
    """Those ways that lie on the lower convex hull of error against cost."""
    out: list[Way] = []
    for way in sorted(found, key=lambda x: (x.cost, x.error)):
        if out and way.error >= out[-1].error:
            continue
        while len(out) > 1 and slope(out[-2], out[-1]) <= slope(out[-2], way):
            out.pop()
        out.append(way)
    return out


def slope(one: Way, two: Way) -> float:
    """Error saved per entry."""
    return (one.error - two.error) / max(two.cost - one.cost, 1)


def joins(k: int, term: LazyFactors, a: np.ndarray, b: np.ndarray) -> list[Way]:
    """Two ways to join a term: a new head, projected onto the shared factor, or the best existing head."""
    if min(len(term.a), len(term.b)) > 1:
        return []
    first_a, first_b = (np.asarray(x[0]).astype(np.float64) for x in (term.a, term.b))
    ones = None if term.core is None else np.ones(first_a.shape[1])
    if term.core is not None and np.ndim(term.core[0]) == 2:
        ones = np.diag(np.asarray(ones))
    extra = 0 if ones is None else ones.size
    out = []
    if len(term.a) == 1:
        out.append(Way(first_b.size + extra, 0.0, k, 0, np.linalg.pinv(first_a) @ a @ b, ones))
    if len(term.b) == 1:
        out.append(Way(first_a.size + extra, 0.0, k, a @ (b @ np.linalg.pinv(first_b)), 0, ones))
    best, least = None, np.inf
    for i in range(len(term.a)):
        left = first_a if i == 0 else np.asarray(term.a[i]).astype(np.float64)
        for j in range(len(term.b)):
            right = first_b if j == 0 else np.asarray(term.b[j]).astype(np.float64)
            own = core(term, left, right, a, b)
            if (found := change(left, own, right, a, b)) < least:
                best, least = Way(extra, 0.0, k, i, j, own), found
    assert best is not None
    return [*out, best]


def change(left: np.ndarray, own: Any, right: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Change of the squared error of `a @ b` through `x = left @ own @ right`: `|x|^2 - 2 <x, a b>`."""
    scaled = right if own is None else times(own, right)
    square = ((left.T @ left) * (scaled @ scaled.T)).sum()
    return float(square - 2 * ((left.T @ a) * (scaled @ b.T)).sum())


def core(term: LazyFactors, left: np.ndarray, right: np.ndarray, a: np.ndarray, b: np.ndarray) -> Any:
    """The core of least error between given factors, of the kind that the term has."""
    if term.core is None:
        return None
    if np.ndim(term.core[0]) == 2:
        return (np.linalg.pinv(left) @ a) @ (b @ np.linalg.pinv(right))
    gram = (left.T @ left) * (right @ right.T)
    return np.linalg.pinv(gram) @ ((left.T @ a) * (right @ b.T)).sum(1)


def minus(terms: Sequence[Term], way: Way, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the remainder of `a @ b` after joining."""
    if way.term < 0:
        return a, b
    term = terms[way.term].factors
    left = np.asarray(term.a[way.a]) if isinstance(way.a, int) else way.a
    right = np.asarray(term.b[way.b]) if isinstance(way.b, int) else way.b
    if way.core is not None:
        right = times(way.core, right)
    return np.concatenate([a, -left], 1), np.concatenate([b, right], 0)


def spend(found: Mapping[str, Sequence[Way]], budget: float) -> dict[str, Way]:
    """One way per module: steps along the hulls, by error saved per entry, until the budget is spent."""
    at = dict.fromkeys(found, 0)
    left = budget - sum(x[0].cost for x in found.values())
    steps = [(-slope(x[0], x[1]), n) for n, x in found.items() if len(x) > 1]
    heapq.heapify(steps)
    while steps:
        _, name = heapq.heappop(steps)
        here = found[name]
        price = here[at[name] + 1].cost - here[at[name]].cost
        if price > left:
            continue
        at[name], left = at[name] + 1, left - price
        if at[name] + 1 < len(here):
            heapq.heappush(steps, (-slope(here[at[name]], here[at[name] + 1]), name))
    return {n: x[at[n]] for n, x in found.items()}


def way_terms(
    terms: Sequence[Term], way: Way, name: str, dtype: str
) -> tuple[list[Factors], list[tuple[PlainShape, Any]]]:
    """The terms of a way: those of the task's own, and those that borrow a factor from the store.

    Returns:
      Terms whose factors are all new; and of a term that joins one of the store its shape, all but the
      references, with its new arrays by side.
    """
    own: list[Factors] = []
    zero: np.ndarray = np.zeros(1, np.int32)
    if way.own is not None:
        left, right = (to_dtype(name, x, dtype)[None] for x in way.own)
        own.append(Factors(left, right, zero, zero))
    if way.term < 0:
        return own, []
    term = terms[way.term]
    shape = plain.shape_of(term.factors)._replace(a_of=(0,), b_of=(0,), term=term.position)
    sides = {"a": way.a, "b": way.b}
    new = {k: to_dtype(name, x, dtype) for k, x in sides.items() if not isinstance(x, int)}
    if shape.core:
        new["core"] = to_dtype(name, way.core, shape.core_dtype)
    return own, [(shape, new)]
