"""The store of a job, put together from the parts that its groups kept on disk.

Its index is that of the store without its numbers, which are read part by part as they are written: memory
holds what `container_writer.write` holds of a store, whatever its size.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax import container_writer, packing
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import Factors
from hydraopt_jax.layout import TermShape, leaf_names
from hydraopt_jax.store import Source, Store

Extras = Callable[[int], Mapping[str, np.ndarray]]


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


def outline(kept: Kept) -> Factors:
    """Factors of the right shapes and of no memory."""
    blank = lambda shape: np.broadcast_to(np.zeros((), kept.dtype), shape)  # noqa: E731
    index = (np.array(kept.a_of, np.int32), np.array(kept.b_of, np.int32))
    return Factors(blank(kept.a), blank(kept.b), *index, None if kept.core is None else blank(kept.core))  # type: ignore[arg-type]


def summary(
    tasks: Sequence[str], kept: Mapping[str, Kept], sources: Sequence[Source], report: Mapping[str, Any]
) -> Store:
    """The store without its numbers: what can be said of it without reading it."""
    errors = np.array([[np.nan if e is None else e for e in x.errors] for x in kept.values()], np.float32)
    modules = {name: (outline(x),) for name, x in kept.items()}
    return Store(tuple(tasks), modules, tuple(sources), report, errors)


class Place(NamedTuple):
    """Where a part lies."""

    file: str
    offset: int
    size: int


def write(
    folder: Path,
    content: Store,
    kept: Mapping[str, Kept],
    tables: Sequence[Sequence[Any]],
    extras: Extras,
    compress: bool,
) -> None:
    """Write a store's folder, the same bytes that `checkpoint.write` makes of the store in memory.

    Args:
      folder: the new store.
      content: the `summary`.
      kept: where the parts lie.
      tables: of each task's full tensors, `[name, dtype, shape]`.
      extras: task -> its full tensors.
      compress: whether Orbax compresses the chunks.
    """
    every = list(packing.parts(content.modules))
    sizes = [x.value.nbytes for x in every]
    names, groups = leaf_names([x.users for x in every], sizes, len(content.tasks))
    offsets = ((x.file, offset) for x in kept.values() for offset in x.offsets)
    leaves: dict[str, list[Place]] = {}
    for name, (file, offset), size in zip(names, offsets, sizes, strict=True):
        leaves.setdefault(name, []).append(Place(file, offset, size))
    description = packing.skeleton(content.modules)
    write_leaves(folder, content, description, groups, leaves, tables, extras, compress)


def write_leaves(
    folder: Path,
    content: Store,
    description: Mapping[str, Any],
    groups: list,
    leaves: Mapping[str, Sequence[Place]],
    tables: Sequence[Sequence[Any]],
    extras: Extras,
    compress: bool,
) -> None:
    """Write a store's folder from leaves whose parts lie in files.

    Args:
      folder, content, tables, extras, compress: as `write`.
      description, groups: as `packing.index_of`.
      leaves: name -> where its parts lie, in order.
    """
    errors = np.sqrt(content.errors).astype(np.float16).tobytes()
    lengths = {"errors": len(errors)} | {k: sum(x.size for x in v) for k, v in leaves.items()}
    for t, table in enumerate(tables):
        lengths[f"extras_{t}"] = packing.extras_size(table)
    written = {k: v for k, v in lengths.items() if v}
    index = packing.index_of(content, groups, description, tables, written)
    blobs = itertools.chain([errors], parts(itertools.chain(*leaves.values())), tensors(tables, extras))
    container_writer.write(folder, index, blobs, compress)


def parts(places: Iterable[Place]) -> Iterator[bytes]:
    """Parts, each read when it is asked for; a file is open while parts of it follow each other.

    Raises:
      HydraOptError: a file that is shorter than it was.
    """
    for file, run in itertools.groupby(places, key=lambda x: x.file):
        with open(file, "rb") as source:
            for place in run:
                source.seek(place.offset)
                data = source.read(place.size)
                if len(data) != place.size:
                    raise HydraOptError(f"{file}: is not whole: delete {Path(file).parent} and start again")
                yield data


def tensors(tables: Sequence[Sequence[Any]], extras: Extras) -> Iterator[bytes]:
    """Each task's full tensors, read when they are asked for.

    Raises:
      HydraOptError: they are not those of the table.
    """
    for t, table in enumerate(tables):
        found, blob = packing.pack_extras(extras(t)) if table else ([], b"")
        if found != [list(row) for row in table]:
            raise HydraOptError(f"the full tensors of adapter {t + 1} have changed meanwhile: run it again")
        yield blob


def disk_error(path: Path, error: OSError) -> HydraOptError:
    """One line for a file system that does not take what is written."""
    return HydraOptError(
        f"{path}: cannot be written: {error.strerror or error}; what was done is kept: make room and run the "
        "same command again"
    )


def outline_coded(term: TermShape, tasks: Sequence[int], total: int) -> Factors:
    """A coded term of a segment as a term of the store, of the right shapes and of no memory.

    Args:
      term: its structure, by the segment's tasks.
      tasks: their positions in the store.
      total: tasks of the store.
    """
    blank = lambda *shape: np.broadcast_to(np.zeros((), np.float32), shape)  # noqa: E731
    index = []
    for of in (term.a_of, term.b_of):
        row = np.full(total, -1, np.int32)
        row[list(tasks)] = of
        index.append(row)
    a = blank(max(term.a_of) + 1, term.inputs, term.rank)
    b = blank(max(term.b_of) + 1, term.rank, term.outputs)
    return Factors(a, b, index[0], index[1], blank(total, term.rank))  # type: ignore[arg-type]
