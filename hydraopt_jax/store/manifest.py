"""The manifest of a store as JSON: tasks, sources, report, segments (`docs/format.md`, "Manifest")."""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from hydraopt_jax import strict_json
from hydraopt_jax.errors import HydraOptError, damaged, one_line
from hydraopt_jax.static import Static
from hydraopt_jax.store import checks
from hydraopt_jax.store.segment_data import SegmentEntry
from hydraopt_jax.store.store import Source, Store
from hydraopt_jax.store.tensors import DEFLATE

FORMAT = "hydraopt"
# versions 1 to 4 were never released
VERSION = 7


def as_json(store: Store, written: Sequence[Mapping[str, Any]], name: str = "") -> dict[str, Any]:
    """The manifest of a store.

    `written` has for each segment its `SegmentEntry` as a mapping, with fields of the container.

    Raises:
      HydraOptError: the report or a source cannot be written as JSON.
    """
    position = {t: k for k, t in enumerate(store.tasks)}
    rows = []
    for x, said in zip(store.segments, written, strict=True):
        tasks = [t if k in x.removed else position[t] for k, t in enumerate(x.tasks)]
        row: dict[str, Any] = {**said, "tasks": tasks}
        row |= {"references": x.references} if x.references else {}
        row |= {"tables": x.tables} if x.tables >= 0 else {}
        rows.append(row)
    report = {"form": "", "options": {}, "entries": 0, "bound": {}} | dict(store.report)
    whole = {
        "format": FORMAT,
        "version": VERSION,
        "tasks": list(store.tasks),
        "sources": merge_sources(store.sources),
        "report": report,
        "segments": rows,
    }
    fault = strict_json.fault(whole)
    if fault:
        raise HydraOptError(f"{name}: the report or a source cannot be written as JSON: {fault}")
    return whole


def to_text(said: Mapping[str, Any], name: str = "") -> bytes:
    """JSON in UTF-8."""
    try:
        return json.dumps(said, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise HydraOptError(f"{name}: the report or a source cannot be written as JSON: {error}") from None


def gzipped(text: bytes) -> bytes:
    """The text as a gzip file, without a time, so that equal texts give equal bytes."""
    return gzip.compress(text, 9, mtime=0)


def gunzipped(path: Any, data: bytes) -> bytes:
    """The inverse of `gzipped`.

    Raises:
      HydraOptError: not a gzip file, or one with a wrong checksum.
    """
    try:
        size = int.from_bytes(data[-4:], "little")
        if size > DEFLATE * len(data):
            raise ValueError("size")
        text = gzip.decompress(data)
    except (OSError, EOFError, ValueError, zlib.error):
        raise damaged(path, "its manifest does not match its checksum") from None
    return text


def parse_folder(path: Any, data: bytes) -> dict[str, Any]:
    """The manifest of a folder, in its stored bytes; see `gunzipped` and `parse`."""
    said = parse(path, gunzipped(path, data))
    with checks.believing(path, "its manifest"):
        for x in said["segments"]:
            checks.need(bool(x["arrays"]) and isinstance(x["files"], str), "arrays of a segment")
    return said


def check_written(said: Any, name: str) -> None:
    """Raise for a manifest that no reader would take."""
    try:
        checks.check_manifest(said)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise HydraOptError(f"{name}: this store cannot be written: wrong {one_line(error, 120)}") from None


def parse(path: Any, text: bytes) -> dict[str, Any]:
    """A manifest, checked.

    Raises:
      HydraOptError: not a manifest, a damaged one, or one of another version.
    """
    try:
        said = strict_json.loads(text)
        version = said["version"] if said["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError):
        raise damaged(path, "its manifest is not that of a store") from None
    if version is None:
        raise HydraOptError(f"{path}: not a store (its manifest describes something else)")
    if type(version) is not int or version < 1:
        raise damaged(path, f"its manifest has version {version!r}")
    if version > VERSION:
        raise HydraOptError(
            f"{path}: version {version} of the format is newer than this version reads ({VERSION}): upgrade "
            "hydraopt_jax"
        )
    if version < VERSION:
        raise old(path, version)
    with checks.believing(path, "its manifest"):
        checks.check_manifest(said)
    return said


def old(path: Any, version: Any) -> HydraOptError:
    """The error for a store of a version that was never released."""
    return HydraOptError(
        f"{path}: version {version} of the format is one before the first release: compress the adapters "
        "again"
    )


def entry_from_row(row: Mapping[str, Any]) -> SegmentEntry:
    """The `SegmentEntry` of a segment."""
    return SegmentEntry(row["id"], row["bytes"], (row["header"][0], row["header"][1]), row["sha256"])


def readable(path: str) -> str:
    """A path as text; bytes that are not UTF-8 are escaped."""
    return path.encode(errors="backslashreplace").decode()


def merge_sources(sources: Sequence[Source]) -> dict[str, Any]:
    """Sources as a common part and the differences of each task, so that 40 equal configurations cost one."""
    rows: list[dict[str, Any]] = [
        {"dtype": x.dtype, "origin": readable(x.origin), "digest": x.digest, "layout": dict(x.layout)}
        | {f"config.{k}": v for k, v in x.config.items()}
        for x in sources
    ]
    common = {k: v for k, v in rows[0].items() if all(k in r and same(r[k], v) for r in rows)} if rows else {}
    return {"common": common, "own": [{k: v for k, v in r.items() if k not in common} for r in rows]}


def same(one: Any, other: Any) -> bool:
    """Whether two values are one in JSON, where 1 is neither 1.0 nor true."""
    return one is other or (one == other and repr(one) == repr(other))


def split_sources(merged: Mapping[str, Any]) -> tuple[Source, ...]:
    """The inverse of `merge_sources`."""
    out = []
    for own in merged["own"]:
        row = {**merged["common"], **own}
        config = Static({k[7:]: v for k, v in row.items() if k.startswith("config.")})
        out.append(Source(row["dtype"], config, Static(row["layout"]), row["origin"], row["digest"]))
    return tuple(out)
