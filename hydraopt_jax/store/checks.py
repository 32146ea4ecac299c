"""Validation of manifests and segment headers, before anything is allocated for them.

The files may come from anybody. Counts, positions and shapes must agree with each other and with the sizes on
disk. Other damage is found when the leaves are read.
"""

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydraopt_jax.codec.layout import KINDS
from hydraopt_jax.errors import HydraOptError, damaged, one_line
from hydraopt_jax.factors import FLOATS
from hydraopt_jax.store.store import ERRORS, Reference
from hydraopt_jax.store.tensors import DEFLATE, raw_size

# limit on the numbers that a segment decodes to: a constant, plus so many per byte of the segment
ROOM, EXPANSION = 1 << 22, 4096
FLOAT_NAMES = {x.name for x in FLOATS}
LARGEST = 1 << 50


class Unbelievable(ValueError):
    """A manifest or header is invalid; the message says why."""


def need(holds: bool, what: str) -> None:
    """Raise `Unbelievable` if a condition is false."""
    if not holds:
        raise Unbelievable(what)


def is_whole(x: Any, low: int, high: int) -> bool:
    """Whether x is an integer from low to high."""
    return type(x) is int and low <= x <= high


@contextmanager
def believing(path: Any, what: str) -> Iterator[None]:
    """Turn errors that an invalid description causes into the error for a damaged store.

    Other errors pass: out of memory on the host or a device, a missing package, an interruption.
    """
    try:
        yield
    except HydraOptError:
        raise
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        zlib.error,
        struct.error,
    ) as error:
        said = one_line(error, 120) or type(error).__name__
        raise damaged(path, f"{what} cannot be right ({said})") from None


def check_manifest(said: Any) -> None:
    """Check a manifest, except for its format and version.

    Raises:
      Unbelievable: or any error that a part of a wrong type causes.
    """
    tasks = said["tasks"]
    need(isinstance(tasks, list) and bool(tasks) and all(isinstance(t, str) for t in tasks), "task names")
    need(len(set(tasks)) == len(tasks), "task names")
    check_sources(said["sources"], len(tasks))
    report = said["report"]
    need(isinstance(report["form"], str) and isinstance(report["options"], dict), "report")
    need(is_whole(report["entries"], 0, 1 << 60) and isinstance(report["bound"], dict), "report")
    own = report.get("task_entries", {})
    need(all(is_whole(x, 0, 1 << 60) for x in own.values()), "entries of a report")
    options = report["options"]
    need(isinstance(report.get("forms", {}), dict), "forms of a report")
    need(isinstance(options.get("weights", {}), dict), "weights of a report")
    need(all(isinstance(x, int | float) for x in options.get("weights", {}).values()), "weights of a report")
    check_provenance(report.get("provenance", {}))
    ids = set()
    for n, x in enumerate(said["segments"]):
        need(isinstance(x["id"], str) and x["id"] not in ids, "ids of segments")
        need(all(c.isalnum() or c in "-_" for c in x["id"]) and 0 < len(x["id"]) <= 80, "ids of segments")
        ids.add(x["id"])
        need(is_whole(x["bytes"], 1, LARGEST) and isinstance(x["sha256"], str), "sizes of segments")
        need(len(x["header"]) == 2 and all(is_whole(k, 1, LARGEST) for k in x["header"]), "sizes of headers")
        live = [t for t in x["tasks"] if not isinstance(t, str)]
        need(bool(x["tasks"]) and all(is_whole(t, 0, len(tasks) - 1) for t in live), "tasks of a segment")
        need(len(set(live)) == len(live), "tasks of a segment")
        need(is_whole(x.get("tables", -1), -1, n - 1), "tables of a segment")
        for segment, place in x.get("references", ()):
            need(is_whole(segment, 0, n - 1), "references of a segment")
            need(is_whole(place, -1, len(said["segments"][segment]["tasks"]) - 1), "references of a segment")
        need(isinstance(x.get("files", ""), str), "checksums of segments")
        for name, size in x.get("arrays", ()):
            need(isinstance(name, str) and ".." not in name and name[:1] != "/", "arrays of a segment")
            need(is_whole(size, 1, 2 * x["bytes"] + 1), "arrays of a segment")


def check_provenance(said: Any) -> None:
    """Check the provenance of a store; it may be missing."""
    for x in said.values():
        need(all(isinstance(x[k], str) for k in ("verb", "version", "date")), "provenance")
        need(all(isinstance(k, str) for k in x["options"]), "provenance")
        need(isinstance(x["options"], dict), "provenance")


def check_sources(merged: Mapping[str, Any], tasks: int) -> None:
    """Check the sources of the tasks."""
    need(isinstance(merged["common"], dict) and len(merged["own"]) == tasks, "sources")
    for own in merged["own"]:
        row = {**merged["common"], **own}
        need(row["dtype"] in FLOAT_NAMES, "dtype of a source")
        need(all(isinstance(row[k], str) for k in ("origin", "digest")), "origin of a source")
        layout = row["layout"]
        need(isinstance(layout, dict) and all(isinstance(v, dict) for v in layout.values()), "layout")


def check_segment(
    said: Mapping[str, Any],
    leaves: Sequence[tuple[str, int]],
    places: int,
    references: Sequence[Reference],
) -> None:
    """Check the header of a segment against the manifest.

    Raises:
      Unbelievable: see `check_manifest`.
    """
    sizes = dict(leaves)
    need(len(sizes) == len(leaves), "names of leaves")
    need(said["places"] == places, "count of tasks")
    entries, kinds = check_schema(said, places, len(references))
    need(len(kinds) <= 1, "coded and plain terms in one segment")
    need(not references or places == 1, "references")
    need(entries <= ROOM + EXPANSION * sum(sizes.values()), "more numbers than its bytes can hold")
    for name in ERRORS:
        need(sizes.get(name, 0) in (0, 2 * len(said["modules"]) * places), "tables of errors")
    for key, table in said["tensors"].items():
        need(key.isdecimal() and int(key) < places, "tensors")
        for name, dtype, shape, size in table:
            need(isinstance(name, str) and isinstance(dtype, str), "tensors")
            need("O" not in dtype and all(is_whole(n, 0, 1 << 40) for n in shape), "tensors")
            need(is_whole(size, 0, LARGEST) and raw_size([name, dtype, shape]) <= DEFLATE * size, "tensors")
        need(sum(size for *_, size in table) == sizes.get(f"tensors_{key}", 0), "tensors")


def check_schema(said: Mapping[str, Any], tasks: int, references: int) -> tuple[int, set[bool]]:
    """Check patterns and modules; return the number of factor entries, and whether they are coded."""
    counts, kinds = [], set()
    for a_of, b_of, core in said["patterns"]:
        need(len(a_of) == len(b_of) == tasks, "patterns")
        need(core in ("", "diagonal", "scale", "full", "coded"), "patterns")
        need(all(is_whole(k, -1, 2 * tasks) for k in (*a_of, *b_of)), "patterns")
        need(all((a < 0) == (b < 0) for a, b in zip(a_of, b_of, strict=True)), "patterns")
        counts.append((max(a_of) + 1, max(b_of) + 1, len(a_of), core))
    entries, seen = 0, set()
    for name, row in said["modules"]:
        need(isinstance(name, str) and name not in seen, "module names")
        seen.add(name)
        for pattern, inputs, rank, outputs, kind, *elsewhere in row:
            need(len(elsewhere) in (0, 3) and all(is_whole(x, -1, 1 << 20) for x in elsewhere), "terms")
            need(all(x < references for x in elsewhere[:2]) and elsewhere[2:] != [-1], "terms")
            need(is_whole(pattern, 0, len(counts) - 1), "terms")
            need(all(is_whole(n, 1, 1 << 40) for n in (inputs, rank, outputs)), "shapes")
            a, b, users, core = counts[pattern]
            coded = core == "coded"
            kinds.add(coded)
            need(kind in KINDS if coded else set(kind.split(" ")) <= FLOAT_NAMES, "dtypes of terms")
            entries += rank * (a * inputs + b * outputs + users * (rank if core == "full" else 1))
    return entries, kinds
