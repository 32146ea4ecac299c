"""The store of a job, put together from the parts that its groups kept on disk.

A small one is loaded and written as every store is. A larger one is written a leaf at a time in the first
schema, an array a leaf: Orbax's partial saving takes a few leaves at a time, so that memory holds those and
not the store.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from orbax.checkpoint import v1 as ocp

from hydraopt_jax import container, packing
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import Factors
from hydraopt_jax.layout import TermShape, leaf_names
from hydraopt_jax.scale.reading import Collection
from hydraopt_jax.store import Source, Store

# bytes of a store that is written as every store is, for which the writer holds it a few times over
IN_MEMORY = 1 << 26
# bytes of leaves in one partial save
BATCH = 1 << 26


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


def size(content: Store, found: Collection) -> int:
    """Bytes of a store's factors and full tensors, from its `summary`."""
    factors = sum(x.value.nbytes for x in packing.parts(content.modules))
    extras = [np.prod(shape) * np.dtype(kind).itemsize for x in found.cards for _, kind, shape in x.extras]
    return factors + int(sum(extras))


def load(content: Store, kept: Mapping[str, Kept], extras: Extras) -> Store:
    """The store with its numbers.

    Args:
      content: the `summary`.
      kept: where the parts lie.
      extras: task -> its full tensors.
    """
    modules = {}
    for name, x in kept.items():
        (term,) = content.modules[name]
        blanks = [part.value for part in packing.parts({name: (term,)})]
        values = []
        with open(x.file, "rb") as source:
            for blank, offset in zip(blanks, x.offsets, strict=True):
                source.seek(offset)
                values.append(np.frombuffer(source.read(blank.nbytes), blank.dtype).reshape(blank.shape))
        inputs, outputs = x.a[0], x.b[0]
        core: Any = None
        if x.core is not None:
            core = np.zeros(x.core, x.dtype)
            core[np.array(x.a_of) >= 0] = values[inputs + outputs :]
        a: Any = np.stack(values[:inputs])
        b: Any = np.stack(values[inputs : inputs + outputs])
        modules[name] = (term._replace(a=a, b=b, core=core),)
    sources = tuple(x._replace(extras=extras(t)) for t, x in enumerate(content.sources))
    return content._replace(modules=modules, sources=sources)


def write(
    folder: Path, work: Path, content: Store, kept: Mapping[str, Kept], extras: Extras, compress: bool
) -> None:
    """Write a store's folder in the first schema.

    Args:
      folder: the new store.
      work: a folder for the leaves while they are put together.
      content: the `summary`.
      kept: where the parts lie.
      extras: task -> its full tensors.
      compress: whether Orbax compresses the leaves.
    """
    tables = []
    every = list(packing.parts(content.modules))
    sizes = [x.value.nbytes for x in every]
    names, groups = leaf_names([x.users for x in every], sizes, len(content.tasks))
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    gather(work, names, sizes, kept)
    (work / "errors").write_bytes(np.sqrt(content.errors).astype(np.float16).tobytes())
    for t in range(len(content.tasks)):
        table, blob = packing.pack_extras(extras(t))
        tables.append(table)
        if blob:
            (work / f"extras_{t}").write_bytes(blob)
    files = sorted(x for x in work.iterdir() if x.stat().st_size)
    index = {
        "groups": groups,
        **packing.skeleton(content.modules),
        "sources": packing.merge_sources(content.sources),
        "extras": tables,
        "report": content.report,
        "leaves": {x.name: [x.stat().st_size, container.digest(x.read_bytes())] for x in files},
    }
    text = json.dumps(index, separators=(",", ":"), allow_nan=False).encode()
    last = np.frombuffer(text, np.uint8)
    metadata = {
        "format": "hydraopt",
        "schema": 1,
        "tasks": list(content.tasks),
        "index": [len(text), container.digest(last)],
    }
    context = ocp.Context()
    context.array.saving.use_compression = compress
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = False
    with context, container.quiet_orbax():
        for batch in batches(files):
            ocp.partial.save(folder, {x.name: np.fromfile(x, np.uint8) for x in batch})
            for x in batch:
                x.unlink()
        ocp.partial.save(folder, {"index": last}, custom_metadata=metadata)
        ocp.partial.finalize(folder)
    marker = folder / "commit_success.txt"
    if marker.exists():
        marker.write_text("committed\n")


def gather(work: Path, names: Sequence[str], sizes: Sequence[int], kept: Mapping[str, Kept]) -> None:
    """Copy every part to the end of its leaf's file; a few files are open at a time."""
    at = 0
    for module in kept.values():
        waiting: dict[str, list[bytes]] = {}
        with open(module.file, "rb") as source:
            for offset in module.offsets:
                source.seek(offset)
                waiting.setdefault(names[at], []).append(source.read(sizes[at]))
                at += 1
        for name, blobs in waiting.items():
            with (work / name).open("ab") as leaf:
                leaf.writelines(blobs)


def batches(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Files in batches of about `BATCH` bytes."""
    batch: list[Path] = []
    total = 0
    for x in files:
        batch.append(x)
        total += x.stat().st_size
        if total >= BATCH:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


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
