"""Stores damaged: a bit flipped in each byte of each file, files cut short, files removed."""

import gzip
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from experiments.reliability import stores
from hydraopt_jax import store
from hydraopt_jax.deferred import bytes_of
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.store import files, folder

SEED = 1


def read(path: Path) -> Any:
    """Every number of every task, and what the tasks came with."""
    found = store.open(path)
    numbers = {
        name: [[np.asarray(x).tobytes() for x in (t.a, t.b) if x is not None] for t in terms]
        for name, terms in store.decode_terms(found).items()
    }
    tensors = {
        (n, k): bytes(bytes_of(v))
        for n, x in enumerate(found.segments)
        for k, v in x.leaves.items()
        if k.startswith("tensors_")
    }
    return found.tasks, numbers, tensors, found.sources, found.report, found.errors.tobytes()


def outcome(path: Path, file: Path, data: bytes | None, want: Any) -> tuple[str, str]:
    """What `open` and decoding, and what `verify`, make of a file with other bytes, or without it.

    Each is "named", where the error names the store and the segment or file; "no effect", where everything
    is read as it was; else what went wrong.
    """
    parts = file.relative_to(path).parts if path.is_dir() else ()
    name = parts[1] if parts[:1] == (folder.SEGMENTS,) else "manifest" if parts else path.name
    whole = file.read_bytes()
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)
    said = []
    for look in (read, store.verify):
        try:
            found = look(path)
        except HydraOptError as error:
            right = str(path) in str(error) and name in str(error)
            said.append("named" if right else f"{file}: does not name {name}: {error}")
        except Exception as error:
            said.append(f"{file}: {error!r}")
        else:
            same = look is store.verify or found == want
            said.append("no effect" if same else f"{file}: read with other numbers")
    file.write_bytes(whole)
    return said[0], said[1]


# between the bytes that are flipped in files that nobody reads
NOTES_STRIDE = 16
# the bytes of the manifest in which gzip says when, where and of what kind it was written
STAMP = range(3, 10)


def checked(path: Path, file: Path) -> bool:
    """Whether a file is the store's; what Orbax says beside the arrays, of when and where, is nobody's."""
    if file.name == folder.MANIFEST or files.is_file(path):
        return True
    arrays = {
        path / folder.SEGMENTS / row["id"] / array
        for row in folder.read_manifest(path)["segments"]
        for array, _ in row["arrays"]
    }
    return any(x in file.parents for x in arrays)


def unused(file: Path, data: bytes, changed: bytes, at: int) -> str:
    """What a changed byte of a manifest is to gzip, where the text is as it was; empty for any other byte."""
    if file.name != folder.MANIFEST:
        return ""
    try:
        same = gzip.decompress(changed) == gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return ""
    return "" if not same else ", gzip stamp" if at in STAMP else ", gzip padding"


# name -> what is damaged: two coded segments, plain factors beside full tensors, the first in one file
STORES = {"coded": stores.coded, "plain": stores.plain, "coded.safetensors": stores.coded}


def damage(root: Path, name: str) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Damage a store; returns how often, by what came of it, and what was not found.

    A change to a file of the store must be named by `verify`. Opening and decoding must name it, or give
    every number as it was. What gzip and Orbax say of when and where it was written is not the store's: no
    change there may have an effect.

    Args:
      root: an empty folder.
      name: of the store.
    """
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    path = root / name
    store.save(path, STORES[name](stores.SMALL))
    counts: dict[str, dict[str, int]] = {}
    lost: list[str] = []
    want = read(path)
    for file in sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else [path]:
        data = file.read_bytes()
        ours = checked(path, file)
        changes: list[tuple[str, bytes | None]] = []
        for at in range(0, len(data), 1 if ours else NOTES_STRIDE):
            changed = bytearray(data)
            changed[at] ^= 1 << int(rng.integers(8))
            changes.append((f"bits{unused(file, data, bytes(changed), at)}", bytes(changed)))
        changes += [("files cut short or removed", x) for x in (data[: len(data) // 2], data[:-1], None)]
        for kind, after in changes:
            opened, verified = outcome(path, file, after, want)
            needed = ours and not kind.startswith("bits, ")
            row = counts.setdefault(kind if ours else f"{kind}, Orbax's notes", {})
            for key in ("tried", f"open: {opened}", f"verify: {verified}"):
                key = key if key.endswith(("tried", "named", "no effect")) else "wrong"
                row[key] = row.get(key, 0) + 1
            good = ("named", "no effect")
            if opened not in good or verified not in good or (needed and verified != "named"):
                lost.append(f"{file}: open: {opened}; verify: {verified}")
                print(lost[-1], file=sys.stderr, flush=True)
    return counts, lost
