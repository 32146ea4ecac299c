"""A collection of PEFT folders: names and shapes in memory, factors in the files.

A pickle cannot be read in parts, so it is kept in memory.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hydraopt_jax.adapters import check_headers
from hydraopt_jax.collection import Card, Collection, ModuleEntry, Pair
from hydraopt_jax.deferred import Deferred, bytes_of
from hydraopt_jax.errors import HydraOptError, one_line, system_error
from hydraopt_jax.formats import lora_keys, peft
from hydraopt_jax.formats.tensor_files import read_tensors
from hydraopt_jax.formats.weights_file import Contents, check_file, contents_of, header_of, read_places
from hydraopt_jax.store.lossless import Raw


def open_adapter(
    source: str,
    task: str | None,
    known: Mapping[str, Sequence[Any]],
    seen: dict[Any, Contents] | None = None,
) -> Card:
    """The card of an adapter, after one pass that checks all values and computes the checksum.

    Args:
      source: see `formats.read_adapter`.
      task: its name; None for the folder's.
      known: file -> stamp and checksum of an earlier check, valid while the stamp is unchanged; an empty
        checksum to skip the check of values.
      seen: cache of contents by header, size and configuration, so that equal files are analyzed once.

    Raises:
      HydraOptError: as `formats.read_adapter`; or NaN or infinite values.
    """
    seen = {} if seen is None else seen
    config, file, name = peft.look_into(source)
    name = name if task is None else task
    stat = file.stat()
    stamp = (stat.st_size, stat.st_mtime_ns)
    try:
        header = header_of(file)
    except OSError as error:
        raise system_error(file, "read", error) from None
    key = (header, stat.st_size, json.dumps(config, sort_keys=True, default=str)) if header else None
    held = seen.get(key) or contents_of(file, header, config)
    if key is not None:
        seen[key] = held
    before = known.get(str(file), (None, ""))
    digest = before[1] if tuple(before[0] or ()) == stamp else check_file(source, file, held, len(header))
    return Card(
        name,
        held.modules,
        held.extras,
        held.dtype,
        config,
        held.layout,
        source,
        digest,
        str(file),
        stamp,
        held.places,
    )


def check_cards(cards: Sequence[Card]) -> dict[str, tuple[int, int]]:
    """Check that adapters can be stored together; see `adapters.check_headers`."""
    sizes = ({n: (e.inputs, e.outputs) for n, e in x.modules.items()} for x in cards)
    return check_headers((x.task, x.source, {}, own) for x, own in zip(cards, sizes, strict=True))


def collection_of(cards: Sequence[Card]) -> Collection:
    """A collection of PEFT adapters, from their cards."""
    shapes = check_cards(cards)
    held = {x.file: dict(read_tensors(Path(x.file))) for x in cards if not x.file.endswith(".safetensors")}
    # equal adapters share one table: a thousand adapters must not have a thousand tables
    tables: dict[Any, Mapping[str, ModuleEntry]] = {}
    shared = [x._replace(modules=tables.setdefault(tuple(x.modules.items()), x.modules)) for x in cards]

    def fetch(card: Card, keys: Sequence[str]) -> list[np.ndarray]:
        if card.file in held:
            return [held[card.file][k] for k in keys]
        try:
            return read_places(card.file, card.stamp, card.places, keys)
        except OSError as error:
            raise HydraOptError(
                f"{card.file}: cannot be read ({one_line(error)}), though it could be before: has it changed?"
            ) from None

    def read(task: int, modules: Sequence[str]) -> list[Pair]:
        entries = [shared[task].modules[m] for m in modules]
        tensors = fetch(shared[task], [k for e in entries for k in e[:2]])
        return [
            (a.reshape(e.rank, e.inputs), b.reshape(e.outputs, e.rank), e.scale)
            for e, a, b in zip(entries, tensors[::2], tensors[1::2], strict=True)
        ]

    def read_extras(task: int) -> Mapping[str, np.ndarray]:
        card, names = shared[task], {row[0] for row in shared[task].extras}
        rows = held[card.file].items() if card.file in held else read_tensors(Path(card.file))
        return {k: x for k, x in rows if k in names} if names else {}

    # both factors of a module are requested one after the other
    pair = functools.lru_cache(1)(lambda task, module: read(task, [module])[0][:2])

    def raw(task: int, module: str) -> Raw:
        entry, places = shared[task].modules[module], shared[task].places
        low, high = (places[k].dtype for k in entry[:2]) if places else (x.dtype for x in pair(task, module))

        def part(side: int, start: int, stop: int) -> Any:
            # files have PEFT's orientation, stores ours
            return bytes_of(np.ascontiguousarray(pair(task, module)[side].T))[start:stop]

        a = Deferred((entry.inputs, entry.rank), low, functools.partial(part, 0))
        b = Deferred((entry.rank, entry.outputs), high, functools.partial(part, 1))
        return Raw(a, b, float(np.float32(entry.scale)))

    return Collection(tuple(shared), shapes, read, read_extras, raw, folder_bytes(shared))


def folder_bytes(cards: Sequence[Card]) -> int:
    """Sum of the file sizes of the adapters' folders and LoRA files, in bytes."""
    files = (
        [Path(c.file)] if lora_keys.DIALECT in c.config else Path(c.file).parent.iterdir() for c in cards
    )
    return sum(x.stat().st_size for every in files for x in every if x.is_file())
