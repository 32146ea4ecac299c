"""A store as one safetensors file: the manifest in its header, and one tensor of bytes per segment.

It has the content of a folder, for hubs, phones and servers. Reading a task takes the header and a few byte
ranges.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hydraopt_jax import remote, strict_json
from hydraopt_jax.durable import sync
from hydraopt_jax.errors import HydraOptError, TooLarge, damaged, one_line, system_error
from hydraopt_jax.store import manifest, segment_data
from hydraopt_jax.store.folder import SUFFIX, from_manifest
from hydraopt_jax.store.segment_data import SegmentEntry
from hydraopt_jax.store.store import Store

# keys of the manifest in the header's metadata, and of its checksum
KEY, SEAL = "hydraopt", "hydraopt_sha256"
# maximum bytes of a header, set by the format
MAX_HEADER = 100_000_000
# maximum bytes of a file whose server does not say its size
MAX_BYTES = 1 << 43


def named(path: Any) -> bool:
    """Whether a path or an address in a bucket has the name of a single-file store."""
    return str(path).endswith(SUFFIX)


def source_of(path: Path) -> remote.RemoteFile:
    """A file of this machine, to be read as one of a server is.

    Raises:
      HydraOptError: no such file, or no right to it.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise HydraOptError(f"{path}: no store there: look for a wrong name") from None
    except OSError as error:
        raise system_error(path, "read", error) from None
    return remote.RemoteFile(str(path), size, "", remote.reader_of(str(path), path), path)


def open_source(source: remote.RemoteFile) -> Store:
    """A store in one version of a file: its header is read now, byte ranges on demand.

    Raises:
      HydraOptError: no network, not a store, or a store that changed while it was read.
    """
    said, places = read_header(source)

    def reader(row: Any) -> Callable[[int, int], np.ndarray]:
        begin = places[row["id"]][0]

        def part(start: int, stop: int) -> np.ndarray:
            data = source.read(begin + start, begin + stop)
            if len(data) != stop - start:
                raise damaged(source.label, "it ends too early")
            return np.frombuffer(data, np.uint8)

        return part

    return from_manifest(source.label, said, reader)


def remote_bytes(source: remote.RemoteFile) -> int:
    """Size in bytes of a version of a file; computed from its header if the server does not say it."""
    if source.size is not None:
        return source.size
    rows, _, length = header_rows(source)
    return 8 + length + max((row["data_offsets"][1] for row in rows.values()), default=0)


def read_header(source: remote.RemoteFile) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """The manifest, and tensor name -> position of its bytes in the file.

    Raises:
      HydraOptError: not a safetensors file, or not a store.
    """
    rows, said, length = header_rows(source)
    text, label = said.get(KEY), source.label
    if text is None:
        raise HydraOptError(f"{label}: not a store (a safetensors file without a manifest of one)")
    if hashlib.sha256(text.encode()).hexdigest() != said.get(SEAL):
        raise damaged(label, "its manifest does not match its checksum")
    parsed = manifest.parse(label, text.encode())
    places = {name: tuple(8 + length + x for x in row["data_offsets"]) for name, row in rows.items()}
    for x in parsed["segments"]:
        low, high = places.get(x["id"], (0, 0))
        if high - low != x["bytes"]:
            raise damaged(label, f"segment {x['id']} is missing or of another size")
    return parsed, places


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
        reach = 0
        for name, row in rows.items():
            low, high = row["data_offsets"]
            if not (type(low) is type(high) is int and 0 <= low <= high <= end):
                raise ValueError(f"the offsets of {name}")
            said_of = {"dtype": "U8", "shape": [high - low], "data_offsets": [low, high]}
            if row != said_of and text is not None:
                raise ValueError(f"{name} is no tensor of bytes")
            reach = max(reach, high)
        if source.size is not None and reach != end:
            raise ValueError(f"{reach} bytes of tensors, {end} after the header")
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise damaged(label, f"not a complete safetensors file ({one_line(error, 120)})") from None
    return rows, said, length


def header(store: Store, entries: list[SegmentEntry], name: str) -> bytes:
    """The header of the file, preceded by its length, padded to eight bytes as the format requires."""
    whole = manifest.as_json(store, [x._asdict() for x in entries], name)
    manifest.check_written(whole, name)
    text = manifest.to_text(whole, name).decode()
    seal = hashlib.sha256(text.encode()).hexdigest()
    rows: dict[str, Any] = {"__metadata__": {KEY: text, SEAL: seal}}
    at = 0
    for x in entries:
        rows[x.id] = {"dtype": "U8", "shape": [x.bytes], "data_offsets": [at, at + x.bytes]}
        at += x.bytes
    body = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    if len(body) > MAX_HEADER:
        raise HydraOptError(
            f"{name}: its header would take {len(body):,} bytes, the format allows {MAX_HEADER:,}: "
            "save it as a folder"
        )
    return len(body).to_bytes(8, "little") + body


def write_portable(path: Path, store: Store, limit: int | None = None) -> None:
    """Write the file completely or not at all. Deferred leaves are read twice.

    Raises:
      HydraOptError: the file cannot be written.
      TooLarge: the file would exceed `limit` bytes.
    """
    entries: dict[str, SegmentEntry] = {}
    for x in store.segments:
        entry = segment_data.entry_of(x)
        name = segment_data.free_id(entry.id, entries)
        entries[name] = entry._replace(id=name)
    head = header(store, list(entries.values()), path.name)
    total = len(head) + sum(x.bytes for x in entries.values())
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
