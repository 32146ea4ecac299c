"""Full tensors of a large collection: coded once, task by task, before anything is fitted.

What they take counts in a budget, and a budget that they alone exceed is refused before the work begins.
"""

import json
import os
from pathlib import Path

import numpy as np

from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.jobs import assembly
from hydraopt_jax.jobs.reading import Collection
from hydraopt_jax.store import extras
from hydraopt_jax.store.extras import Extras


def code(folder: Path, found: Collection, dtype: str | None, rank: int = 0, size: int = 1) -> None:
    """Code the full tensors of each `size`-th task that has any into a job's folder, where they are not yet.

    Raises:
      HydraOptError: tensors that are not those of the first look, or a value that overflows the dtype.
    """
    carriers = [t for t, x in enumerate(found.cards) if x.extras]
    for t in carriers[rank::size]:
        if file(folder, t).exists():
            continue
        one = extras.coded(tensors(found, t), dtype)
        new = file(folder, t).with_suffix(f".{os.getpid()}")
        with new.open("wb") as sink:
            sink.write(json.dumps(one.table).encode() + b"\n" + one.blob)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(new, file(folder, t))


def kept(folder: Path, found: Collection) -> tuple[Extras, ...]:
    """The coded full tensors of every task, which stay where they lie.

    Raises:
      FileNotFoundError: those of a task are not there.
    """
    out = []
    for t, card in enumerate(found.cards):
        if not card.extras:
            out.append(Extras([], b""))
            continue
        with file(folder, t).open("rb") as source:
            line = source.readline()
        table = json.loads(line)
        size = sum(map(extras.stored_size, table))
        out.append(Extras(table, assembly.in_file(str(file(folder, t)), len(line), (size,), np.uint8)))
    return tuple(out)


def file(folder: Path, task: int) -> Path:
    """Where a task's full tensors lie: their table in a line, then their bytes."""
    return folder / f"extras-{task}.bin"


def tensors(found: Collection, task: int) -> dict[str, np.ndarray]:
    """A task's full tensors, in the order of its card.

    Raises:
      HydraOptError: they are not what they were.
    """
    have = found.read_extras(task)
    out = {}
    for name, dtype, shape in found.cards[task].extras:
        x = have.get(name)
        if x is None or [x.dtype.name, list(x.shape)] != [dtype, list(shape)]:
            raise HydraOptError(
                f"the full tensors of adapter {task + 1} have changed meanwhile: run it again"
            )
        out[name] = x
    return out


def raw_bytes(found: Collection, dtype: str | None) -> int:
    """What they take at most, uncoded: for an estimate that reads nothing."""
    half = [
        [name, dtype if extras.narrows(kind, dtype) else kind, shape]
        for x in found.cards
        for name, kind, shape in x.extras
    ]
    return sum(map(extras.raw_size, half))
