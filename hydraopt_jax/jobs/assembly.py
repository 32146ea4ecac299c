"""The store of a job before it is written: its numbers stay in the files that the groups kept.

The writer asks for one after another: memory holds what `container_writer.write` holds of a store, whatever
its size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax.deferred import Deferred
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import Factors
from hydraopt_jax.jobs.reading import Collection
from hydraopt_jax.store import Source
from hydraopt_jax.store.extras import Extras


class Kept(NamedTuple):
    """What a job knows of a module's stored factors: where they lie, not what they are.

    Attributes:
      a, b: shapes of the factor stacks.
      a_of, b_of: `[T]`.
      core: shape of the stack of cores, or None.
      dtype: of all.
      file: of the group.
      offsets: bytes at which each part begins, in `packing.parts`' order.
      errors: `[T]` relative squared errors.
      bound: of the form.
    """

    a: tuple[int, ...]
    b: tuple[int, ...]
    a_of: list[int]
    b_of: list[int]
    core: tuple[int, ...] | None
    dtype: str
    file: str
    offsets: list[int]
    errors: list[float | None]
    bound: float


def in_file(path: str, offset: int, shape: Sequence[int], dtype: Any) -> Deferred:
    """An array that lies in a file; one that has become shorter cannot be read."""

    def read(start: int, stop: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(offset + start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise HydraOptError(f"{path}: is not whole: delete {Path(path).parent} and start again")
        return data

    return Deferred(shape, dtype, read)


def stored(kept: Kept) -> Factors:
    """The factors of a module where they lie."""
    at = iter(kept.offsets)

    def part(shape: Sequence[int]) -> Deferred:
        return in_file(kept.file, next(at), shape, kept.dtype)

    a, b = ([part(shape) for _ in range(count)] for count, *shape in (kept.a, kept.b))
    cores = None
    if kept.core is not None:
        none = np.zeros(kept.core[1:], kept.dtype)
        cores = [part(none.shape) if k >= 0 else none for k in kept.a_of]
    return Factors(a, b, np.array(kept.a_of, np.int32), np.array(kept.b_of, np.int32), cores)  # type: ignore[arg-type]


def sources_of(found: Collection, heads: Sequence[Extras]) -> tuple[Source, ...]:
    """What the adapters brought along, their full tensors where they lie."""
    rows = zip(found.cards, heads, strict=True)
    return tuple(Source(x.dtype, x.config, x.layout, x.source, x.digest, own) for x, own in rows)


def disk_error(path: Path, error: OSError) -> HydraOptError:
    """One line for a file system that does not take what is written."""
    return HydraOptError(
        f"{path}: cannot be written: {error.strerror or error}; what was done is kept: make room and run the "
        "same command again"
    )
