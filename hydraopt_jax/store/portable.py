"""A store as one safetensors file: the manifest in its header, and one tensor of bytes per segment.

It has the content of a folder, for hubs, phones and servers. Reading a task takes the header and a few byte
ranges.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from hydraopt_jax import remote, strict_json
from hydraopt_jax.durable import sync
from hydraopt_jax.errors import HydraOptError, TooLarge, damaged, one_line, system_error
from hydraopt_jax.store import manifest, segment_data
from hydraopt_jax.store.folder import from_manifest
from hydraopt_jax.store.segment_data import SegmentEntry
from hydraopt_jax.store.store import Store

SUFFIX = ".safetensors"
# keys of the manifest in the header's metadata, and of its checksum
KEY, SEAL = "hydraopt", "hydraopt_sha256"
# maximum bytes of a header, set by the format
MAX_HEADER = 100_000_000
# maximum bytes of a file whose server does not say its size
MAX_BYTES = 1 << 43


def named(path: Any) -> bool:
    """Whether a path or an address in a bucket has the name of a single-file store."""
    return str(path).endswith(SUFFIX)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """The manifest, and tensor name -> position of its bytes in the file.

    Raises:
      HydraOptError: no such file, not a safetensors file, or not a store.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            said = file.metadata() or {}
            text = said.get(KEY)
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            rows = strict_json.loads(raw.read(length))
    except FileNotFoundError:
        raise HydraOptError(f"{path}: no store there: look for a wrong name") from None
    except OSError as error:
        raise system_error(path, "read", error) from None
    except (safetensors.SafetensorError, ValueError) as error:
        raise damaged(path, f"not a complete safetensors file ({one_line(error, 120)})") from None
    return manifest_of(path, text, said.get(SEAL), rows, length)


def manifest_of(
    path: Any, text: str | None, seal: str | None, rows: Mapping[str, Any], length: int
) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """The result of `read_header`, from the manifest's text and checksum and the header's rows and length."""
    if text is None:
        raise HydraOptError(f"{path}: not a store (a safetensors file without a manifest of one)")
    places = {
        name: (8 + length + row["data_offsets"][0], 8 + length + row["data_offsets"][1])
        for name, row in rows.items()
        if name != "__metadata__"
    }
    if hashlib.sha256(text.encode()).hexdigest() != seal:
        raise damaged(path, "its manifest does not match its checksum")
    parsed = manifest.parse(path, text.encode())
    for x in parsed["segments"]:
        if x["id"] not in places or places[x["id"]][1] - places[x["id"]][0] != x["bytes"]:
            raise damaged(path, f"segment {x['id']} is missing or of another size")
    return parsed, places


def open_portable(path: Path) -> Store:
    """A store whose leaves are read from the file on demand."""
    return opened_at(path, *read_header(path), remote.reader_of(str(path), path))


def open_source(source: remote.RemoteFile) -> Store:
    """A store that is one version of a remote file: its header is read now, byte ranges on demand.

    Raises:
      HydraOptError: no such file, no network, not a store, or a store that changed while it was read.
    """
    return opened_at(source.label, *source_header(source), source.read)


def remote_bytes(source: remote.RemoteFile) -> int:
    """Size in bytes of a version of a file; computed from its header if the server does not say it."""
    if source.size is not None:
        return source.size
    rows, _, length = header_rows(source)
    return 8 + length + max((row["data_offsets"][1] for row in rows.values()), default=0)


def source_header(source: remote.RemoteFile) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """The result of `read_header`, for a version of a remote file."""
    rows, said, length = header_rows(source)
    return manifest_of(source.label, said.get(KEY), said.get(SEAL), rows, length)


def header_rows(source: remote.RemoteFile) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The rows of the header, checked; its metadata; its length."""
    label = source.label
    length = int.from_bytes(source.read(0, 8), "little")
    most = MAX_HEADER if source.size is None else min(source.size - 8, MAX_HEADER)
    if not 2 <= length <= most:
        raise damaged(label, "not a complete safetensors file (no header)")
    end = MAX_BYTES if source.size is None else source.size - 8 - length
    try:
        rows = strict_json.loads(source.read(8, 8 + length))
        said = rows.pop("__metadata__", {})
        text = said.get(KEY)
        if not isinstance(text, str | None):
            raise ValueError("metadata that is no text")
        for name, row in rows.items():
            low, high = row["data_offsets"]
            if not (type(low) is type(high) is int and 0 <= low <= high <= end):
                raise ValueError(f"the offsets of {name}")
            if (
                row != {"dtype": "U8", "shape": [high - low], "data_offsets": [low, high]}
                and text is not None
            ):
                raise ValueError(f"{name} is no tensor of bytes")
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise damaged(label, f"not a complete safetensors file ({one_line(error, 120)})") from None
    return rows, said, length


def opened_at(
    path: Any,
    said: Mapping[str, Any],
    places: Mapping[str, tuple[int, int]],
    read: Callable[[int, int], bytes],
) -> Store:
    """A store from its manifest, the positions of its segments, and a reader of the file."""

    def reader(row: Any) -> Callable[[int, int], np.ndarray]:
        begin = places[row["id"]][0]

        def part(start: int, stop: int) -> np.ndarray:
            data = read(begin + start, begin + stop)
            if len(data) != stop - start:
                raise damaged(path, "it ends too early")
            return np.frombuffer(data, np.uint8)

        return part

    return from_manifest(path, said, reader)


def header(store: Store, entries: list[SegmentEntry], name: str) -> bytes:
    """The header of the file, preceded by its length, padded to eight bytes as the format requires."""
    text = manifest.to_text(manifest.as_json(store, [x._asdict() for x in entries], name), name).decode()
    seal = hashlib.sha256(text.encode()).hexdigest()
    rows: dict[str, Any] = {"__metadata__": {KEY: text, SEAL: seal}}
    at = 0
    for x in entries:
        rows[x.id] = {"dtype": "U8", "shape": [x.bytes], "data_offsets": [at, at + x.bytes]}
        at += x.bytes
    body = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body


def write_portable(path: Path, store: Store, limit: int | None = None) -> None:
    """Write the file completely or not at all. Deferred leaves are read twice.

    Raises:
      HydraOptError: the file cannot be written.
      TooLarge: the file would exceed `limit` bytes.
    """
    entries = [segment_data.entry_of(x) for x in store.segments]
    head = header(store, entries, path.name)
    total = len(head) + sum(x.bytes for x in entries)
    if limit is not None and total > limit:
        raise TooLarge(f"{path}: the store would take {total:,} bytes, its input takes {limit:,}")
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(head)
            for x in store.segments:
                for piece in segment_data.run_pieces(x, lambda entry: None):
                    file.write(piece)
        sync(new)
        os.replace(new, path)
        sync(path.parent)
    finally:
        new.unlink(missing_ok=True)
