"""Whether an index can be believed, before anything is allocated for what it describes.

An index comes from a file that anybody may have written. Counts, positions and shapes must fit each other and
the bytes that are there; what remains is caught when the leaves are read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hydraopt_jax.codec import layout
from hydraopt_jax.formats.tensor_files import FLOATS
from hydraopt_jax.store.container import DEFLATE
from hydraopt_jax.store.extras import raw_size

# numbers that a coded store may decode to: so many, and so many for each byte that it holds
ROOM, EXPANSION = 1 << 22, 4096
KINDS = {*layout.KINDS, *(x.name for x in FLOATS)}


class Unbelievable(ValueError):
    """What is wrong with an index."""


def need(holds: bool, what: str) -> None:
    """Raise `Unbelievable` where something does not hold."""
    if not holds:
        raise Unbelievable(what)


def whole(x: Any, low: int, high: int) -> bool:
    """Whether x is an integer from low to high."""
    return type(x) is int and low <= x <= high


def check_index(index: Any) -> None:
    """Check an index.

    Raises:
      Unbelievable: it is none.
    """
    try:
        check_parts(index)
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        # a part of another type than the checks ask about
        raise Unbelievable(" ".join(str(error).split()) or type(error).__name__) from None


def check_parts(index: Any) -> None:
    """As `check_index`; raises whatever a wrong type leads to."""
    tasks, leaves = index["tasks"], index["leaves"]
    need(isinstance(tasks, list) and bool(tasks) and all(isinstance(t, str) for t in tasks), "task names")
    need(len(set(tasks)) == len(tasks), "task names")
    need(all(whole(x, 1, 1 << 50) for x in leaves.values()), "sizes of leaves")
    slots, additions = index.get("slots"), index.get("additions", {})
    together = len(tasks) if slots is None else 1 << 20
    entries = check_structure(index, together)
    for part in (index, *index.get("segments", ())):
        for key, name in part.get("removed", {}).items():
            need(key.isdecimal() and isinstance(name, str), "removed tasks")
    for key, x in additions.items():
        need(key.isdecimal() and slots is not None, "an addition's slot")
        need(all(whole(r, -1, int(key) - 1) for r in x["references"]), "an addition's references")
        entries += check_structure(x, 1)
    for x in index.get("segments", ()):
        count = len(x["tasks"])
        need(slots is None and all(whole(t, -1, len(tasks) - 1) for t in x["tasks"]), "a segment's tasks")
        need(len({t for t in x["tasks"] if t >= 0}) == sum(t >= 0 for t in x["tasks"]), "a segment's tasks")
        need(all(whole(t, 0, count - 1) for users in x["groups"] for t in users), "a segment's groups")
        entries += check_structure(x, count)
    if slots is not None:
        need(len(slots) == len(tasks) and all(whole(s, 0, together) for s in slots), "slots")
    need(entries <= ROOM + EXPANSION * sum(leaves.values()), "more numbers than its bytes can hold")
    need(isinstance(index["groups"], list), "groups")
    check_sources(index["sources"], len(tasks))
    need(len(index["extras"]) == len(tasks), "extras")
    for table in index["extras"]:
        for name, dtype, shape, *size in table:
            need(isinstance(name, str) and isinstance(dtype, str), "extras")
            need("O" not in dtype and all(whole(n, 0, 1 << 40) for n in shape), "extras")
            need(not size or (len(size) == 1 and whole(size[0], 1, 1 << 50)), "extras")
            need(not size or raw_size([name, dtype, shape]) <= DEFLATE * size[0], "extras")
    report = index["report"]
    need(isinstance(report["form"], str) and isinstance(report["options"], dict), "report")
    need(whole(report["entries"], 0, 1 << 60) and isinstance(report["bound"], dict), "report")


def check_structure(x: Mapping[str, Any], tasks: int) -> int:
    """Check patterns and modules; returns how many numbers the factors have."""
    counts = []
    for a_of, b_of, core in x["patterns"]:
        need(len(a_of) == len(b_of) <= tasks and core in (None, "diagonal", "scale", "full"), "patterns")
        need(all(whole(k, -1, 2 * len(a_of)) for k in (*a_of, *b_of)), "patterns")
        counts.append((max(a_of, default=-1) + 1, max(b_of, default=-1) + 1, len(a_of)))
    entries = 0
    for name, row in x["modules"]:
        need(isinstance(name, str), "module names")
        for pattern, inputs, rank, outputs, kind in row:
            need(whole(pattern, 0, len(counts) - 1) and set(kind.split(" ")) <= KINDS, "terms")
            need(all(whole(n, 1, 1 << 40) for n in (inputs, rank, outputs)), "shapes")
            a, b, users = counts[pattern]
            entries += rank * (a * inputs + b * outputs + users)
    return entries


def check_sources(merged: Mapping[str, Any], tasks: int) -> None:
    """Check what tasks came with."""
    need(isinstance(merged["common"], dict) and len(merged["own"]) == tasks, "sources")
    floats: Sequence[str] = [x.name for x in FLOATS]
    for own in merged["own"]:
        row = {**merged["common"], **own}
        need(row["dtype"] in floats, "dtype of a source")
        need(all(isinstance(row[k], str) for k in ("origin", "digest")), "origin of a source")
        layout = row["layout"]
        need(isinstance(layout, dict) and all(isinstance(v, dict) for v in layout.values()), "layout")
