"""What an index says of terms, segments and sources, JSON-able, and back."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hydraopt_jax.codec.layout import KINDS, TermShape, pieces
from hydraopt_jax.forms import Factors
from hydraopt_jax.store import Segment, Source


def table(modules: Mapping[str, Sequence[tuple[Any, list[Any]]]]) -> dict[str, Any]:
    """Terms as patterns of use, equal ones written once, and rows that name their pattern.

    Args:
      modules: name -> pattern of use and other columns of each term.
    """
    patterns: list[Any] = []

    def number(use: Any) -> int:
        if use not in patterns:
            patterns.append(use)
        return patterns.index(use)

    rows = [[name, [[number(use), *columns] for use, columns in terms]] for name, terms in modules.items()]
    return {"patterns": patterns, "modules": rows}


def coded_skeleton(shapes: Mapping[str, tuple[TermShape, ...]]) -> dict[str, Any]:
    """As `skeleton`, of coded terms; the dtype says so, and whether factors are predicted from the first."""

    def term(x: TermShape) -> tuple[Any, list[Any]]:
        return [list(x.a_of), list(x.b_of), "diagonal"], [x.inputs, x.rank, x.outputs, KINDS[x.predicted]]

    return table({name: [term(x) for x in terms] for name, terms in shapes.items()}) | {"coded": True}


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
    """Shapes and indices of the terms, JSON-able; a core that is a "scale" is a diagonal one in float32."""

    def term(x: Factors) -> tuple[Any, list[Any]]:
        a, b = x.a[0], x.b[0]
        core = None if x.core is None else ("diagonal" if np.ndim(x.core[0]) == 1 else "full")
        if core == "diagonal" and x.core[0].dtype != b.dtype:  # type: ignore[index]
            core = "scale"
        use = [np.asarray(x.a_of).tolist(), np.asarray(x.b_of).tolist(), core]
        # one dtype as a rule; adapters kept as they came may have two
        kinds = " ".join(dict.fromkeys([a.dtype.name, b.dtype.name]))
        return use, [a.shape[0], a.shape[1], b.shape[1], kinds]

    return table({name: [term(x) for x in terms] for name, terms in modules.items()})


def segment_table(segments: Iterable[Segment]) -> list[dict[str, Any]]:
    """Segments without their leaves, JSON-able."""
    return [
        coded_skeleton(x.shapes)
        | {"tasks": list(x.tasks), "groups": pieces(x.shapes)[1]}
        | removed_names(x.removed)
        for x in segments
    ]


def removed_names(removed: Mapping[int, str]) -> dict[str, Any]:
    """Names of removed tasks by place, JSON-able; nothing where there is none."""
    return {"removed": {str(k): v for k, v in removed.items()}} if removed else {}


def removed_of(index: Mapping[str, Any]) -> dict[int, str]:
    """The inverse of `removed_names`."""
    return {int(k): v for k, v in index.get("removed", {}).items()}


def readable(path: str) -> str:
    """A path as text: bytes of a file's name that are no UTF-8 are spelled out."""
    return path.encode(errors="backslashreplace").decode()


def merge_sources(sources: Sequence[Source]) -> dict[str, Any]:
    """Sources as one common part and what each task differs in, so that 40 alike configs cost one."""
    rows: list[dict[str, Any]] = [
        {"dtype": x.dtype, "origin": readable(x.origin), "digest": x.digest, "layout": dict(x.layout)}
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
