"""A store as bytes: named leaves and an index that says how to read them, and back. No files here.

Every part, one factor or one core, plain or entropy-coded, lies in the leaf of the set of tasks that read it
(`layout`). The index has the structure of the terms, the sources and the report.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax.codec.layout import TermShape, leaf_names, pieces
from hydraopt_jax.deferred import Deferred, part_of, size_of
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import Factors
from hydraopt_jax.rate_control import addition
from hydraopt_jax.rate_control.terms import deserialize
from hydraopt_jax.store import Addition, Payload, Segment, Store, count, extras, structure

# leaves of the errors: of weights, and of outputs where there was a calibration
TABLES = ("errors", "output_errors")


class Part(NamedTuple):
    """One stored array and the tasks that read it."""

    value: Any
    users: frozenset[int]


def parts(store_modules: Mapping[str, tuple[Factors, ...]]) -> Iterator[Part]:
    """Every part in the canonical order: module, term, inputs, outputs, cores."""
    for terms in store_modules.values():
        for term in terms:
            for stack, index in ((term.a, term.a_of), (term.b, term.b_of)):
                for k in range(len(stack)):
                    yield Part(stack[k], frozenset(np.flatnonzero(np.asarray(index) == k).tolist()))
            for t in np.flatnonzero(np.asarray(term.a_of) >= 0) if term.core is not None else ():
                yield Part(term.core[t], frozenset([int(t)]))  # type: ignore[index]


def pack(store: Store) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The store as leaves, and the index, JSON-able.

    Returns:
      Name -> parts of the leaf: arrays, which may be deferred, or bytes. None is empty.
      The index.
    """
    leaves: dict[str, list[Any]] = {"errors": [np.sqrt(store.errors).astype(np.float16)]}
    if store.output_errors is not None:
        leaves["output_errors"] = [np.sqrt(store.output_errors).astype(np.float16)]
    if store.payload is not None:
        leaves |= {k: [v] for k, v in store.payload.leaves.items()}
        groups = pieces(store.payload.shapes)[1]
        description = structure.coded_skeleton(store.payload.shapes)
        if store.payload.slots is not None:
            description |= {"slots": list(store.payload.slots), "additions": {}}
            description |= structure.removed_names(store.payload.removed)
        for slot, x in store.payload.additions.items():
            said = structure.coded_skeleton(x.shapes) | {"references": x.references}
            description["additions"][str(slot)] = said
            leaves |= {f"added_{slot}_{k}": [v] for k, v in x.leaves.items()}
            leaves[f"added_{slot}_coefficients"] = [x.coefficients]
        if store.payload.segments:
            description["segments"] = structure.segment_table(store.payload.segments)
        for n, segment in enumerate(store.payload.segments):
            leaves |= {f"segment_{n}_{k}": [v] for k, v in segment.leaves.items()}
    else:
        every = list(parts(store.modules))
        sizes = [x.value.nbytes for x in every]
        names, groups = leaf_names([x.users for x in every], sizes, len(store.tasks))
        for name, part in zip(names, every, strict=True):
            leaves.setdefault(name, []).append(part.value)
        description = structure.skeleton(store.modules)
    heads = [extras.coded(x.extras) for x in store.sources]
    leaves |= {f"extras_{t}": [x.blob] for t, x in enumerate(heads)}
    # a leaf of no bytes is none
    leaves = {k: v for k, v in leaves.items() if any(map(size_of, v))}
    index = {
        "tasks": list(store.tasks),
        "groups": groups,
        **description,
        "sources": structure.merge_sources(store.sources),
        "extras": [x.table for x in heads],
        # a store made by hand may say nothing of itself
        "report": {"form": "", "options": {}, "entries": count(store), "bound": {}} | dict(store.report),
        "leaves": {k: sum(map(size_of, v)) for k, v in leaves.items()},
    }
    return leaves, index


def index_size(index: Mapping[str, Any]) -> int:
    """Bytes of an index as it is written."""
    return len(zlib.compress(json.dumps(index, separators=(",", ":")).encode(), 9))


def segments_of(index: Mapping[str, Any], leaves: Mapping[str, bytes]) -> tuple[Segment, ...]:
    """The segments of an index, with those of their leaves that are given."""
    mine: list[dict[str, Any]] = [{} for _ in index.get("segments", ())]
    for name, value in leaves.items():
        if name.startswith("segment_"):
            _, n, own = name.split("_", 2)
            mine[int(n)][own] = value
    rows = zip(mine, index.get("segments", ()), strict=True)
    return tuple(
        Segment(found, structure.coded_shapes(x), tuple(x["tasks"]), structure.removed_of(x))
        for found, x in rows
    )


def segment_places(tasks: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The place of each wanted task of a store in a segment, -1 where it is not there."""
    place = {t: k for k, t in enumerate(tasks) if t >= 0}
    return [place.get(t, -1) for t in wanted]


def leaves_of(index: Mapping[str, Any], tasks: Iterable[int]) -> list[str]:
    """Names of the leaves that some tasks need, also those of the tasks that predict them."""
    tasks = list(tasks)
    names = {"shared", *TABLES} | {f"extras_{t}" for t in tasks}
    for n, x in enumerate(index.get("segments", ())):
        here = [k for k in segment_places(x["tasks"], tasks) if k >= 0]
        if here:
            names |= {f"segment_{n}_{k}" for k in payload_leaves(x["groups"], here)}
    slots = index.get("slots")
    wanted = set(
        tasks if slots is None else addition.closure(additions_of(index, {}), [slots[t] for t in tasks])
    )
    names |= payload_leaves(index["groups"], wanted)
    added = tuple(f"added_{s}_" for s in wanted)
    return [k for k in index["leaves"] if k in names or k.startswith(added)]


def runs(index: Mapping[str, Any], chosen: Sequence[int], limit: int) -> list[Sequence[int]]:
    """Tasks in runs whose factors took about `limit` bytes as they came, in float32.

    Of a store in segments whole ones, where they fit: each is decoded once, and all in one shape.
    """
    length = max(limit * len(index["tasks"]) // max(4 * index["report"]["entries"], 1), 1)
    span = max((len(x["tasks"]) for x in index.get("segments", ())), default=1)
    length -= length % span if length > span else 0
    return [chosen[at : at + length] for at in range(0, len(chosen), length)]


def payload_leaves(groups: Sequence[Sequence[int]], slots: Iterable[int]) -> set[str]:
    """Names of the leaves that some tasks read of those that were compressed together."""
    wanted = set(slots)
    names = {"shared"} | {f"task_{s}" for s in wanted}
    return names | {f"head_{k}" for k, users in enumerate(groups) if wanted & set(users)}


def additions_of(index: Mapping[str, Any], leaves: Mapping[str, bytes]) -> dict[int, Addition]:
    """The additions of an index, with those of their leaves that are given."""
    out = {}
    for key, x in index.get("additions", {}).items():
        mine = {
            k.removeprefix(f"added_{key}_"): v for k, v in leaves.items() if k.startswith(f"added_{key}_")
        }
        coefficients = mine.pop("coefficients", b"")
        out[int(key)] = Addition(mine, structure.coded_shapes(x), tuple(x["references"]), coefficients)
    return out


def segmented_terms(segments: Iterable[Segment], wanted: Sequence[int]) -> dict[str, tuple[Factors, ...]]:
    """The terms of every module for some tasks of a store, one segment decoded at a time; outlines of those
    whose leaves are deferred."""
    out: dict[str, list[Factors]] = {}
    for x in segments:
        places = segment_places(x.tasks, wanted)
        here = [k for k in places if k >= 0]
        if any(isinstance(v, Deferred) for v in x.leaves.values()):
            found = {name: tuple(outline(term, places) for term in terms) for name, terms in x.shapes.items()}
        else:
            decoded = deserialize(x.leaves, x.shapes, here) if here else {}
            found = {name: tuple(select(term, places) for term in v) for name, v in decoded.items()}
        for name in x.shapes:
            out.setdefault(name, []).extend(term for term in found.get(name, ()) if len(term.a))
    return {name: tuple(terms) for name, terms in out.items()}


def outline(term: TermShape, places: Sequence[int]) -> Factors:
    """A coded term of the right shapes whose factors cannot be read.

    Args:
      term: its structure.
      places: of each task of the store among the term's, -1 for none.
    """

    def refuse(*_: int) -> Any:
        raise HydraOptError("factors of an outline: restore the tasks that are wanted")

    index: list[Any] = []
    stacks: list[Any] = []
    for of, shape in ((term.a_of, (term.inputs, term.rank)), (term.b_of, (term.rank, term.outputs))):
        kept, mine = renumber(of, places)
        index.append(mine)
        stacks.append([Deferred(shape, "float32", refuse)] * len(kept))
    core = np.broadcast_to(np.zeros((), np.float32), (len(places), term.rank))
    return Factors(stacks[0], stacks[1], index[0], index[1], core)  # type: ignore[arg-type]


def module_order(shapes: Mapping[str, Any], additions: Mapping[int, Addition]) -> list[str]:
    """Modules of the tasks that were compressed together, then what additions brought."""
    return list(dict.fromkeys([*shapes, *(n for s in sorted(additions) for n in additions[s].shapes)]))


def coded_terms(payload: Payload, slots: Sequence[int]) -> dict[str, tuple[Factors, ...]]:
    """The terms of a coded store's modules for tasks in some slots."""
    if payload.segments:
        return segmented_terms(payload.segments, slots)
    added, together = addition.decode(payload, slots)
    places = [-1 if s in added else s for s in slots]
    out = {}
    for name in module_order(payload.shapes, payload.additions):
        terms = [select(x, places) for x in together.get(name, ())]
        if payload.slots is not None:
            terms = [x for x in terms if len(x.a)]
        for t, slot in enumerate(slots):
            for x in added.get(slot, {}).get(name, ()):
                of = np.full(len(slots), -1, np.int32)
                of[t] = 0
                core = np.zeros((len(slots), x.a.shape[2]), np.float32)
                core[t] = np.asarray(x.core)[0]
                terms.append(Factors(x.a, x.b, of, of, core))  # type: ignore[arg-type]
        out[name] = tuple(terms)
    return out


def unpack(index: Mapping[str, Any], leaves: Mapping[str, Any], chosen: Sequence[int]) -> Store:
    """The inverse of `pack`, for the chosen tasks, from the leaves that they need.

    Leaves are arrays of bytes, which may be deferred: what is made of them then is deferred, too.
    """
    names, order = index["tasks"], [n for n, _ in index["modules"]]
    payload = None
    if index.get("coded"):
        shapes = structure.coded_shapes(index)
        blobs: dict[str, Any] = {
            k: v if isinstance(v, Deferred) else v.tobytes()
            for k, v in leaves.items()
            if k not in TABLES and not k.startswith("extras_")
        }
        additions = additions_of(index, blobs)
        segments = segments_of(index, blobs)
        blobs = {k: v for k, v in blobs.items() if not k.startswith(("added_", "segment_"))}
        slots = index.get("slots")
        slots = None if slots is None else tuple(slots)
        payload = Payload(blobs, shapes, slots, additions, segments, structure.removed_of(index))
        modules = coded_terms(payload, [t if slots is None else slots[t] for t in chosen])
        order = list(modules)
        if list(chosen) != list(range(len(names))):
            payload = None
    else:
        modules = unpack_terms(index, leaves, len(names), chosen)
    tables = [
        np.asarray(part_of(leaves[k], 0, (len(order), len(names)), np.float16))[:, list(chosen)]
        if k in leaves
        else None
        for k in TABLES
    ]
    heads = [unpack_extras(index["extras"][t], leaves.get(f"extras_{t}")) for t in range(len(names))]
    sources = structure.split_sources(index["sources"], heads)
    return Store(
        tuple(names[t] for t in chosen),
        modules,
        tuple(sources[t] for t in chosen),
        index["report"],
        squared(tables[0]),  # type: ignore[arg-type]
        payload,
        squared(tables[1]),
    )


def squared(table: np.ndarray | None) -> np.ndarray | None:
    """A table of errors from the roots that are stored, which half precision has room for."""
    return None if table is None else table.astype(np.float32) ** 2


def unpack_extras(table: Sequence[Any], blob: Any) -> extras.Extras:
    """A task's full tensors from the bytes of its leaf; none when it was not read."""
    if blob is None:
        # tensors of no bytes need no leaf
        table = [row for row in table if not extras.stored_size(row)]
    return extras.Extras(table, b"" if blob is None else blob)


def renumber(of: Any, chosen: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which factors of a stack the chosen tasks read, and the place of each task's own among them.

    Args:
      of: `[T]` which factor a task reads, -1 for none.
      chosen: tasks; -1 for one that is not there.

    >>> [x.tolist() for x in renumber([5, 0, -1, 5], [3, 2, -1, 1])]
    [[0, 5], [1, -1, -1, 0]]
    """
    at = np.array(chosen, np.int64)
    mine = np.where(at >= 0, np.asarray(of)[at], -1)
    kept = np.unique(mine[mine >= 0])
    return kept, np.where(mine >= 0, np.searchsorted(kept, mine), -1).astype(np.int32)


def select(term: Factors, chosen: Sequence[int]) -> Factors:
    """A term for the chosen tasks: their factors alone, renumbered; -1 for a task that it has not."""
    (a, a_of), (b, b_of) = (renumber(of, chosen) for of in (term.a_of, term.b_of))
    core = None if term.core is None else take(term.core, chosen)
    return Factors(take(term.a, a), take(term.b, b), a_of, b_of, core)  # type: ignore[arg-type]


def take(stack: Any, chosen: Sequence[int] | np.ndarray) -> Any:
    """Some entries of a stack; of a list, whose entries may be deferred, none is read."""
    return [stack[k] for k in chosen] if isinstance(stack, list) else np.asarray(stack)[list(chosen)]


def unpack_terms(
    index: Mapping[str, Any], leaves: Mapping[str, Any], tasks: int, chosen: Sequence[int]
) -> dict[str, tuple[Factors, ...]]:
    """Terms of every module from the leaves, for the chosen tasks."""
    uses: list[tuple[int, int]] = []
    members: list[frozenset[int]] = []
    sizes: list[tuple[int, tuple[int, ...], str]] = []
    for _, row in index["modules"]:
        for pattern, inputs, rank, outputs, kind in row:
            a_of, b_of, core = index["patterns"][pattern]
            left, right = (kind.split(" ") * 2)[:2]
            shapes: list[tuple[tuple[int, ...], str]] = [((inputs, rank), left)] * (max(a_of) + 1)
            shapes += [((rank, outputs), right)] * (max(b_of) + 1)
            users = [frozenset(t for t, x in enumerate(a_of) if x == k) for k in range(max(a_of) + 1)]
            users += [frozenset(t for t, x in enumerate(b_of) if x == k) for k in range(max(b_of) + 1)]
            if core is not None:
                present = [t for t in range(tasks) if a_of[t] >= 0]
                users += [frozenset([t]) for t in present]
                own = (rank, rank) if core == "full" else (rank,)
                shapes += [(own, "float32" if core == "scale" else right)] * len(present)
            uses.append((len(members), len(users)))
            members += users
            for shape, dtype in shapes:
                sizes.append((int(np.prod(shape)) * np.dtype(dtype).itemsize, shape, dtype))
    names, _ = leaf_names(members, [s for s, _, _ in sizes], tasks)
    offsets: dict[str, int] = {}
    values: list[Any] = []
    for name, (size, shape, kind) in zip(names, sizes, strict=True):
        start = offsets.get(name, 0)
        offsets[name] = start + size
        if name not in leaves:
            values.append(None)
            continue
        values.append(part_of(leaves[name], start, shape, kind))
    spans = iter(uses)
    out = {}
    for module, row in index["modules"]:
        terms = []
        for pattern, *_ in row:
            start, size = next(spans)
            use = index["patterns"][pattern]
            if any(use[0][t] >= 0 for t in chosen):
                terms.append(restrict(use, values[start : start + size], chosen))
        out[module] = tuple(terms)
    return out


def restrict(pattern: Sequence[Any], values: list[Any], chosen: Sequence[int]) -> Factors:
    """One term for the chosen tasks: their factors alone, renumbered."""
    a_of, b_of, core = pattern
    na, nb = max(a_of) + 1, max(b_of) + 1
    present = [t for t, x in enumerate(a_of) if x >= 0]
    cores: Any = None
    if core is not None:
        by_task = dict(zip(present, values[na + nb :], strict=True))
        like = next(by_task[t] for t in chosen if t in by_task)
        none = np.zeros(like.shape, like.dtype)
        cores = [by_task.get(t, none) for t in chosen]
    (a, mine_a), (b, mine_b) = (renumber(of, chosen) for of in (a_of, b_of))
    return Factors(take(values[:na], a), take(values[na : na + nb], b), mine_a, mine_b, cores)  # type: ignore[arg-type]
