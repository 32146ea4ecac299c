"""What an index says of terms, segments and sources, JSON-able, and back."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hydraopt_jax.forms import Factors
from hydraopt_jax.layout import KINDS, TermShape, pieces
from hydraopt_jax.store import Segment, Source


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
            row.append([number(patterns, use), a.shape[0], a.shape[1], b.shape[1], a.dtype.name])
        rows.append([name, row])
    return {"patterns": patterns, "modules": rows}


def segment_table(segments: Iterable[Segment]) -> list[dict[str, Any]]:
    """Segments without their leaves, JSON-able."""
    return [
        coded_skeleton(x.shapes) | {"tasks": list(x.tasks), "groups": pieces(x.shapes)[1]} for x in segments
    ]


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
