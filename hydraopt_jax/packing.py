"""A store as bytes: named leaves and an index that says how to read them, and back. No files here.

Every part, one factor or one core, plain or entropy-coded, lies in the leaf of the set of tasks that read it
(`layout`). The index has the structure of the terms, the sources and the report.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 and float8 with numpy)
import numpy as np

from hydraopt_jax.coding import addition, codec
from hydraopt_jax.forms import Factors
from hydraopt_jax.layout import KINDS, TermShape, leaf_names, pieces
from hydraopt_jax.store import Addition, Payload, Segment, Source, Store, count


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


def number(patterns: list[Any], use: Any) -> int:
    """Position of a pattern of use, which is written down where it is new."""
    if use not in patterns:
        patterns.append(use)
    return patterns.index(use)


def coded_skeleton(shapes: Mapping[str, tuple[TermShape, ...]]) -> dict[str, Any]:
    """As `skeleton`, of coded terms; the dtype says so, and whether factors are predicted from the first."""
    patterns: list[Any] = []
    rows = []
    for name, terms in shapes.items():
        row = []
        for x in terms:
            use = [list(x.a_of), list(x.b_of), "diagonal"]
            row.append([number(patterns, use), x.inputs, x.rank, x.outputs, KINDS[x.predicted]])
        rows.append([name, row])
    return {"patterns": patterns, "modules": rows, "coded": True}


def coded_shapes(index: Mapping[str, Any]) -> dict[str, tuple[TermShape, ...]]:
    """The inverse of `coded_skeleton`."""
    out = {}
    for name, row in index["modules"]:
        terms = []
        for pattern, inputs, rank, outputs, kind in row:
            a_of, b_of, _ = index["patterns"][pattern]
            terms.append(TermShape(tuple(a_of), tuple(b_of), inputs, rank, outputs, KINDS.index(kind)))
        out[name] = tuple(terms)
    return out


def skeleton(modules: Mapping[str, tuple[Factors, ...]]) -> dict[str, Any]:
    """Shapes and indices of the terms, JSON-able; equal patterns of use are written once."""
    patterns: list[Any] = []
    rows = []
    for name, terms in modules.items():
        row = []
        for term in terms:
            core = None if term.core is None else ("diagonal" if np.ndim(term.core[0]) == 1 else "full")
            use = [np.asarray(term.a_of).tolist(), np.asarray(term.b_of).tolist(), core]
            a, b = term.a[0], term.b[0]
            row.append([number(patterns, use), a.shape[0], a.shape[1], b.shape[1], np.asarray(a).dtype.name])
        rows.append([name, row])
    return {"patterns": patterns, "modules": rows}


def pack(store: Store) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The store as leaves of bytes, none empty, and the index, JSON-able."""
    leaves: dict[str, list[bytes]] = {"errors": [np.sqrt(store.errors).astype(np.float16).tobytes()]}
    if store.payload is not None:
        leaves |= {k: [v] for k, v in store.payload.leaves.items()}
        groups = pieces(store.payload.shapes)[1]
        description = coded_skeleton(store.payload.shapes)
        if store.payload.slots is not None:
            description |= {"slots": list(store.payload.slots), "additions": {}}
        for slot, x in store.payload.additions.items():
            description["additions"][str(slot)] = coded_skeleton(x.shapes) | {"references": x.references}
            leaves |= {f"added_{slot}_{k}": [v] for k, v in x.leaves.items()}
            leaves[f"added_{slot}_coefficients"] = [x.coefficients]
        if store.payload.segments:
            description["segments"] = segment_table(store.payload.segments)
        for n, segment in enumerate(store.payload.segments):
            leaves |= {f"segment_{n}_{k}": [v] for k, v in segment.leaves.items()}
    else:
        members, blobs = [], []
        for part in parts(store.modules):
            blobs.append(np.ascontiguousarray(part.value).tobytes())
            members.append(part.users)
        names, groups = leaf_names(members, [len(x) for x in blobs], len(store.tasks))
        for name, blob in zip(names, blobs, strict=True):
            leaves.setdefault(name, []).append(blob)
        description = skeleton(store.modules)
    extras = [pack_extras(x.extras) for x in store.sources]
    for t, (_, blob) in enumerate(extras):
        leaves[f"extras_{t}"] = [blob]
    packed = {k: b"".join(v) for k, v in leaves.items() if any(v)}
    sizes = {k: len(v) for k, v in packed.items()}
    return packed, index_of(store, groups, description, [table for table, _ in extras], sizes)


def index_of(
    store: Store,
    groups: list,
    description: Mapping[str, Any],
    tables: Sequence[Any],
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """The index of a store, for which its numbers need not be there.

    Args:
      store: what it is the index of.
      groups: task sets of the `head_*` leaves.
      description: `skeleton` or `coded_skeleton` of the modules.
      tables: of each task's full tensors, as `pack_extras` makes them.
      sizes: bytes of each leaf, none empty, in the order in which they are written.
    """
    return {
        "tasks": list(store.tasks),
        "groups": groups,
        **description,
        "sources": merge_sources(store.sources),
        "extras": list(tables),
        # a store made by hand may say nothing of itself
        "report": {"form": "", "options": {}, "entries": count(store), "bound": {}} | dict(store.report),
        "leaves": dict(sizes),
    }


def segment_table(segments: Iterable[Segment]) -> list[dict[str, Any]]:
    """Segments without their leaves, JSON-able."""
    return [
        coded_skeleton(x.shapes) | {"tasks": list(x.tasks), "groups": pieces(x.shapes)[1]} for x in segments
    ]


def segments_of(index: Mapping[str, Any], leaves: Mapping[str, bytes]) -> tuple[Segment, ...]:
    """The segments of an index, with those of their leaves that are given."""
    mine: list[dict[str, bytes]] = [{} for _ in index.get("segments", ())]
    for name, value in leaves.items():
        if name.startswith("segment_"):
            _, n, own = name.split("_", 2)
            mine[int(n)][own] = value
    rows = zip(mine, index.get("segments", ()), strict=True)
    return tuple(Segment(found, coded_shapes(x), tuple(x["tasks"])) for found, x in rows)


def segment_places(tasks: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The place of each wanted task of a store in a segment, -1 where it is not there."""
    place = {t: k for k, t in enumerate(tasks) if t >= 0}
    return [place.get(t, -1) for t in wanted]


def leaves_of(index: Mapping[str, Any], tasks: Iterable[int]) -> list[str]:
    """Names of the leaves that some tasks need, also those of the tasks that predict them."""
    tasks = list(tasks)
    names = {"shared", "errors"} | {f"extras_{t}" for t in tasks}
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
        out[int(key)] = Addition(mine, coded_shapes(x), tuple(x["references"]), coefficients)
    return out


def segmented_terms(segments: Iterable[Segment], wanted: Sequence[int]) -> dict[str, tuple[Factors, ...]]:
    """The terms of every module for some tasks of a store, one segment decoded at a time."""
    out: dict[str, list[Factors]] = {}
    for x in segments:
        places = segment_places(x.tasks, wanted)
        here = [k for k in places if k >= 0]
        found = codec.deserialise(x.leaves, x.shapes, here) if here else {}
        for name in x.shapes:
            terms = (select(term, places) for term in found.get(name, ()))
            out.setdefault(name, []).extend(term for term in terms if len(term.a))
    return {name: tuple(terms) for name, terms in out.items()}


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


def unpack(index: Mapping[str, Any], leaves: Mapping[str, np.ndarray], chosen: Sequence[int]) -> Store:
    """The inverse of `pack`, for the chosen tasks, from the leaves that they need (uint8 arrays)."""
    names, order = index["tasks"], [n for n, _ in index["modules"]]
    payload = None
    if index.get("coded"):
        shapes = coded_shapes(index)
        blobs = {k: v.tobytes() for k, v in leaves.items() if k != "errors" and not k.startswith("extras_")}
        additions = additions_of(index, blobs)
        segments = segments_of(index, blobs)
        blobs = {k: v for k, v in blobs.items() if not k.startswith(("added_", "segment_"))}
        slots = index.get("slots")
        payload = Payload(blobs, shapes, None if slots is None else tuple(slots), additions, segments)
        modules = coded_terms(payload, [t if slots is None else slots[t] for t in chosen])
        order = list(modules)
        if list(chosen) != list(range(len(names))):
            payload = None
    else:
        modules = unpack_terms(index, leaves, len(names), chosen)
    errors = leaves["errors"].view(np.float16).reshape(len(order), len(names))
    extras = [unpack_extras(index["extras"][t], leaves.get(f"extras_{t}")) for t in range(len(names))]
    sources = split_sources(index["sources"], extras)
    return Store(
        tuple(names[t] for t in chosen),
        modules,
        tuple(sources[t] for t in chosen),
        index["report"],
        errors[:, list(chosen)].astype(np.float32) ** 2,
        payload,
    )


def merge_sources(sources: Sequence[Source]) -> dict[str, Any]:
    """Sources as one common part and what each task differs in, so that 40 alike configs cost one."""
    rows: list[dict[str, Any]] = [
        {"dtype": x.dtype, "origin": x.origin, "digest": x.digest, "layout": dict(x.layout)}
        | {f"config.{k}": v for k, v in x.config.items()}
        for x in sources
    ]
    common = {k: v for k, v in rows[0].items() if all(k in r and r[k] == v for r in rows)}
    return {"common": common, "own": [{k: v for k, v in r.items() if k not in common} for r in rows]}


def split_sources(
    merged: Mapping[str, Any], extras: Sequence[Mapping[str, np.ndarray]]
) -> tuple[Source, ...]:
    """The inverse of `merge_sources`."""
    out = []
    for own, extra in zip(merged["own"], extras, strict=True):
        row = {**merged["common"], **own}
        config = {k[7:]: v for k, v in row.items() if k.startswith("config.")}
        out.append(Source(row["dtype"], config, row["layout"], row["origin"], row["digest"], extra))
    return tuple(out)


def pack_extras(extras: Mapping[str, np.ndarray]) -> tuple[list[Any], bytes]:
    """A table of (name, dtype, shape) and the bytes of a task's full tensors."""
    table = [[k, v.dtype.name, list(v.shape)] for k, v in extras.items()]
    return table, b"".join(np.ascontiguousarray(v).tobytes() for v in extras.values())


def extras_size(table: Sequence[Any]) -> int:
    """Bytes of the full tensors of a table."""
    return sum(math.prod(shape) * np.dtype(kind).itemsize for _, kind, shape in table)


def unpack_extras(table: Sequence[Any], blob: np.ndarray | None) -> dict[str, np.ndarray]:
    """The inverse of `pack_extras`; empty when the blob was not read."""
    out, start = {}, 0
    for name, dtype, shape in table if blob is not None else ():
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        out[name] = np.asarray(blob)[start : start + size].view(dtype).reshape(shape)
        start += size
    return out


def select(term: Factors, chosen: Sequence[int]) -> Factors:
    """A term for the chosen tasks: their factors alone, renumbered; -1 for a task that it has not."""
    out: list[Any] = []
    for stack, of in ((term.a, term.a_of), (term.b, term.b_of)):
        mine = np.array([np.asarray(of)[t] if t >= 0 else -1 for t in chosen], np.int32)
        kept = np.unique(mine[mine >= 0])
        out.append(
            (np.asarray(stack)[kept], np.where(mine >= 0, np.searchsorted(kept, mine), -1).astype(np.int32))
        )
    (a, a_of), (b, b_of) = out
    return Factors(a, b, a_of, b_of, None if term.core is None else np.asarray(term.core)[list(chosen)])  # type: ignore[arg-type]


def unpack_terms(
    index: Mapping[str, Any], leaves: Mapping[str, np.ndarray], tasks: int, chosen: Sequence[int]
) -> dict[str, tuple[Factors, ...]]:
    """Terms of every module from the leaves, for the chosen tasks."""
    uses: list[tuple[int, int]] = []
    members: list[frozenset[int]] = []
    sizes: list[tuple[int, tuple[int, ...], str]] = []
    for _, row in index["modules"]:
        for pattern, inputs, rank, outputs, kind in row:
            a_of, b_of, core = index["patterns"][pattern]
            shapes: list[tuple[int, ...]] = [(inputs, rank)] * (max(a_of) + 1) + [(rank, outputs)] * (
                max(b_of) + 1
            )
            users = [frozenset(t for t, x in enumerate(a_of) if x == k) for k in range(max(a_of) + 1)]
            users += [frozenset(t for t, x in enumerate(b_of) if x == k) for k in range(max(b_of) + 1)]
            if core is not None:
                present = [t for t in range(tasks) if a_of[t] >= 0]
                users += [frozenset([t]) for t in present]
                shapes += [(rank,) if core == "diagonal" else (rank, rank)] * len(present)
            uses.append((len(members), len(users)))
            members += users
            for shape in shapes:
                sizes.append((int(np.prod(shape)) * np.dtype(kind).itemsize, shape, kind))
    names, _ = leaf_names(members, [s for s, _, _ in sizes], tasks)
    offsets: dict[str, int] = {}
    values: list[Any] = []
    for name, (size, shape, kind) in zip(names, sizes, strict=True):
        start = offsets.get(name, 0)
        offsets[name] = start + size
        if name not in leaves:
            values.append(None)
            continue
        values.append(leaves[name][start : start + size].view(kind).reshape(shape))
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


def restrict(pattern: Sequence[Any], values: Sequence[Any], chosen: Sequence[int]) -> Factors:
    """One term for the chosen tasks: their factors alone, renumbered."""
    a_of, b_of, core = pattern
    na, nb = max(a_of) + 1, max(b_of) + 1
    pick_a = sorted({a_of[t] for t in chosen} - {-1})
    pick_b = sorted({b_of[t] for t in chosen} - {-1})
    present = [t for t, x in enumerate(a_of) if x >= 0]
    cores: Any = None
    if core is not None:
        by_task = dict(zip(present, values[na + nb :], strict=True))
        like = next(np.asarray(by_task[t]) for t in chosen if t in by_task)
        cores = [by_task.get(t, np.zeros_like(like)) for t in chosen]
    return Factors(
        [values[k] for k in pick_a],  # type: ignore[arg-type]
        [values[na + k] for k in pick_b],  # type: ignore[arg-type]
        np.array([pick_a.index(a_of[t]) if a_of[t] >= 0 else -1 for t in chosen], np.int32),  # type: ignore[arg-type]
        np.array([pick_b.index(b_of[t]) if b_of[t] >= 0 else -1 for t in chosen], np.int32),  # type: ignore[arg-type]
        cores,
    )
