"""Solve a group's modules in two passes over chunks of tasks, and write heads as they are computed.

A step takes as many modules as the mesh has rows. The devices compute the sums of the next step while the
host writes the heads of this one.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hydraopt_jax.deferred import in_file
from hydraopt_jax.devices import MODULES, TASKS, even, put_on_mesh, round_up
from hydraopt_jax.explicit import fitting, streaming_gram
from hydraopt_jax.explicit.groups import Group, GroupFactors, applied
from hydraopt_jax.explicit.streaming_gram import BOTH, LOCAL, Basis, Grams
from hydraopt_jax.factors import LazyFactors, overflow
from hydraopt_jax.forms import Hydra
from hydraopt_jax.rate_control import distortion

# float32 bytes of a chunk of tasks on one device: the size of the caches on a CPU, enough work elsewhere
SUM_BYTES = {"cpu": 1 << 23}
HEAD_BYTES = {"cpu": 1 << 24}
ELSEWHERE = 1 << 28
# minimum of rows that a chunk adds to a sum, which is read and written as a whole for each chunk
SUM_ROWS = 512


def piece_tasks(limit: dict[str, int], width: int, grid: Mesh, least: int = 1) -> int:
    """Number of tasks of `width` numbers per chunk of a device: within `limit` bytes, at least `least`."""
    return max(limit.get(grid.devices.flat[0].platform, ELSEWHERE) // (4 * width), least)


def sum_tasks(rank: int, shape: tuple[int, int], grid: Mesh) -> int:
    """Number of tasks that a device adds to a sum at once."""
    return piece_tasks(SUM_BYTES, rank * sum(shape), grid, -(-SUM_ROWS // rank))


def head_tasks(rank: int, shape: tuple[int, int], width: int, grid: Mesh) -> int:
    """Number of tasks that a device projects at once onto a factor of rank `width`."""
    return piece_tasks(HEAD_BYTES, rank * sum(shape) + 2 * width * max(shape), grid)


def chunks(
    arrays: Sequence[np.ndarray], size: int, grid: Mesh
) -> Iterator[tuple[int, tuple[jax.Array, ...]]]:
    """Real count of tasks, and chunk of `[M, T, ...]` arrays on the mesh, padded with zeros to one size."""
    rows, tasks = grid.shape[MODULES], arrays[0].shape[1]
    for at in range(0, tasks, size):
        out = []
        for array in arrays:
            part = array[:, at : at + size]
            lack = (rows - part.shape[0], size - part.shape[1])
            if any(lack):
                part = np.pad(part, [(0, lack[0]), (0, lack[1]), *[(0, 0)] * (part.ndim - 2)])
            out.append(put_on_mesh(grid, part, BOTH))
        yield min(size, tasks - at), tuple(out)


def ranks_of(form: Hydra, shape: tuple[int, int], rank: int, tasks: int) -> dict[str, int]:
    """Side -> rank of its shared factor; for side "auto" both sides, at the entries of the cheaper one."""
    wanted = form.rank or rank
    if form.side != "auto":
        size = shape[0] if form.side == "in" else shape[1]
        return {form.side: min(wanted, size, tasks * rank)}
    cost = min(fitting.entries(tasks, wanted, shape, s) for s in ("in", "out"))
    out = {}
    for side, size in zip(("in", "out"), shape, strict=True):
        width = min(fitting.rank_at(cost, tasks, shape, side), wanted)
        out[side] = min(width, size, tasks * rank)
    return out


# factors of a module, relative squared errors `[T]`, lower bound of the form's error
Solved = tuple[LazyFactors, np.ndarray, float]


class First(NamedTuple):
    """Results of the first pass over a step's modules, on the devices.

    Attributes:
      rows: the modules of the group.
      bases: side -> leading directions.
      grams: real count of tasks and Gram matrices of every chunk or span.
      ranks: `[M, T]` ranks of the adapters, on the host.
    """

    rows: slice
    bases: dict[str, Basis]
    grams: list[tuple[int, Grams]]
    ranks: np.ndarray


Passes = Callable[[], Iterator[tuple[int, GroupFactors]]]


def passes_of(group: Group, parts: Iterator[GroupFactors]) -> Passes:
    """A function whose calls iterate over the spans: first task, block."""
    starts = [start for start, _ in group.spans]
    if len(starts) > 1:
        return lambda: ((start, next(parts)) for start in starts)
    held = [next(parts)]
    return lambda: iter([(0, held[0])])


def rows_of(block: GroupFactors, rows: slice) -> tuple[np.ndarray, ...]:
    """Factors and scales of the modules `rows` of a block."""
    return block.a[rows], block.b[rows], block.scale[rows]


def first_pass(
    group: Group, rows: slice, passes: Passes, tasks: int, ranks: dict[str, int], grid: Mesh
) -> First:
    """`First` of a step: leading directions per side, computed asynchronously; `ranks` are their numbers."""
    sizes = dict(zip(("in", "out"), group.shape, strict=True))
    direct = tuple(s for s in ranks if not applied(tasks, group.rank, sizes[s]))
    sums = blank(tuple(sizes[s] for s in direct), mesh=grid)
    found: dict[str, Basis] = {}
    grams: list[tuple[int, Grams]] = []
    present: list[np.ndarray] = []
    size = sum_tasks(group.rank, group.shape, grid)
    length = round_up(group.length, grid.shape[TASKS])
    for _, block in passes():
        present.append(block.ranks[rows])
        if direct:
            a, b, scale = rows_of(block, rows)
            wide = streaming_gram.bits(a), streaming_gram.bits(b), scale
            for count, arrays in chunks(wide, length, grid):
                sums, part = streaming_gram.accumulate(
                    sums, *arrays, mesh=grid, sides=direct, dtype=a.dtype.name, size=size
                )
                grams.append((count, part))
        if len(direct) < len(ranks):
            # the only span: `applied` sides need all tasks at once; they are small enough
            every = next(chunks(rows_of(block, rows), round_up(tasks, grid.shape[TASKS]), grid))[1]
            for side in ranks:
                if side not in direct:
                    basis, part = streaming_gram.of_factors(*every, mesh=grid, rank=ranks[side], side=side)
                    found[side] = basis
                    grams = grams if direct else [(tasks, part)]
    if direct:
        trace = trace_of(tuple(x.energy for _, x in grams))
        for side, total in zip(direct, sums, strict=True):
            found[side] = streaming_gram.of_sum(
                total, trace, mesh=grid, rank=ranks[side], columns=tasks * group.rank
            )
    return First(rows, found, grams, np.concatenate(present, 1))


@functools.partial(jax.jit, static_argnames=("sizes", "mesh"))
def blank(sizes: tuple[int, ...], *, mesh: Mesh) -> tuple[streaming_gram.Strips, ...]:
    """Sums of zeros, one for each size n."""
    lead = (mesh.shape[MODULES], mesh.shape[TASKS])
    zeros = lambda *shape: jax.lax.with_sharding_constraint(  # noqa: E731
        jnp.zeros(lead + shape), jax.sharding.NamedSharding(mesh, BOTH)
    )
    return tuple(
        tuple(zeros(end - at, n - at) for at, end in streaming_gram.rows_of_strips(n)) for n in sizes
    )


@jax.jit
def trace_of(energies: tuple[jax.Array, ...]) -> jax.Array:
    """Trace `[M]` of a weighted sum: the number of deltas that are not zero."""
    return jnp.stack([(x > 0).sum(-1) for x in energies]).sum(0).astype(jnp.float32)


def solve_group(
    file: Path,
    group: Group,
    parts: Iterator[GroupFactors],
    tasks: int,
    form: Hydra,
    dtype: str,
    grid: Mesh,
) -> dict[str, Solved]:
    """Factors, errors and bounds of a group's modules; the factors are written to `file` in the stored dtype.

    `parts` are the blocks of the group's spans, in order, twice; the form is one with a head per task.

    Raises:
      HydraOptError: values overflow the stored dtype.
    """
    ranks = ranks_of(form, group.shape, group.rank, tasks)
    passes = passes_of(group, parts)
    step, count = grid.shape[MODULES], len(group.modules)
    steps = (slice(at, min(at + step, count)) for at in range(0, count, step))
    kept: dict[str, Solved] = {}
    with file.open("wb") as sink:
        for first in one_ahead(first_pass(group, x, passes, tasks, ranks, grid) for x in steps):
            kept |= second_pass(sink, group, first, passes, tasks, dtype, grid)
        sink.flush()
        os.fsync(sink.fileno())
    return kept


class Chosen(NamedTuple):
    """Shared factors of one side for a step's modules.

    Attributes:
      stored: `[M, n, S]` in the stored dtype.
      loss: `[M]` lost share of the tasks' unit energies, summed over the tasks.
      sure: `[M]` the loss minus its uncertainty: the lower bound of the form.
    """

    stored: np.ndarray
    loss: np.ndarray
    sure: np.ndarray


def second_pass(
    sink: BinaryIO,
    group: Group,
    first: First,
    passes: Passes,
    tasks: int,
    dtype: str,
    grid: Mesh,
) -> dict[str, Solved]:
    """Project a step's tasks onto its bases and write the heads; factors, errors and bounds by module."""
    names = group.modules[first.rows]
    grams = [np.concatenate([np.asarray(x[k])[:, :n] for n, x in first.grams], 1) for k in (0, 1)]
    energy = (grams[0] * grams[1]).sum((-2, -1))[: len(names)]
    present = (energy > 0).sum(-1)
    sides: dict[str, Chosen] = {}
    for side, basis in first.bases.items():
        vectors, values = (np.asarray(x)[: len(names)] for x in basis)
        gain = streaming_gram.gains(values, energy)
        with np.errstate(over="ignore"):
            stored = (vectors * gain[:, None, :]).astype(dtype)
        loss = np.maximum(present - values.sum(-1, dtype=np.float64), 0.0)
        reach = min(vectors.shape[1], tasks * group.rank)
        sure = loss - streaming_gram.uncertainty(values, reach, present)
        sides[side] = Chosen(stored, loss, np.maximum(sure, 0.0))
    order = list(sides)
    chosen = [order[k] for k in np.stack([x.loss for x in sides.values()]).argmin(0)]
    shared_at = []
    for m, (name, side) in enumerate(zip(names, chosen, strict=True)):
        shared = sides[side].stored[m]
        check_finite(name, shared, dtype)
        shared_at.append(sink.tell())
        sink.write(np.ascontiguousarray(shared if side == "in" else shared.T).tobytes())
    squares = np.zeros((len(names), tasks))
    heads: list[list[tuple[int, int]]] = [[] for _ in names]
    wanted = {x: sides[x] for x in dict.fromkeys(chosen)}
    for at, count, side, out in one_ahead(projected(group, first.rows, passes, wanted, grams, grid, dtype)):
        values, error = np.asarray(out.values), np.asarray(out.error)
        for m in (m for m in range(len(names)) if chosen[m] == side):
            squares[m, at : at + count] = error[m, :count]
            check_finite(names[m], values[m, :count], dtype)
            here = np.flatnonzero(energy[m, at : at + count] > 0)
            start, length = sink.tell(), values[m, 0].nbytes
            rows = values[m, :count] if len(here) == count else values[m, here]
            sink.write(np.ascontiguousarray(rows).view(np.uint8).data)
            heads[m] += [(at + int(t), start + length * k) for k, t in enumerate(here)]
    kept = {}
    for m, (name, side) in enumerate(zip(names, chosen, strict=True)):
        width = sides[side].stored.shape[-1]
        if not heads[m]:
            # a module with zero deltas only has one head of zeros
            heads[m].append((0, sink.tell()))
            sink.write(bytes(np.dtype(dtype).itemsize * width * max(group.shape)))
        kept[name] = (
            where(sink.name, side, group, tasks, width, dtype, shared_at[m], heads[m]),
            np.where(first.ranks[m] > 0, distortion.relative(squares[m], energy[m]), np.nan),
            float(sides[side].sure[m]) / max(int(present[m]), 1),
        )
    return kept


def projected(
    group: Group,
    rows: slice,
    passes: Passes,
    sides: dict[str, Chosen],
    grams: Sequence[np.ndarray],
    grid: Mesh,
    dtype: str,
) -> Iterator[tuple[int, int, str, streaming_gram.Heads]]:
    """First task, count of tasks, side and heads of every chunk of the second pass."""
    lack, lanes = grid.shape[MODULES] - (rows.stop - rows.start), grid.shape[TASKS]
    on_mesh = {}
    for side, x in sides.items():
        found = streaming_gram.range_of(x.stored.astype(np.float32))
        wide = (np.pad(y, [(0, lack), *[(0, 0)] * (y.ndim - 1)]) for y in found)
        on_mesh[side] = streaming_gram.Range(*(put_on_mesh(grid, y, LOCAL) for y in wide))
    widest = max(x.stored.shape[-1] for x in sides.values())
    most = head_tasks(group.rank, group.shape, widest, grid) * lanes
    size = round_up(even(group.length, most), lanes)
    for start, block in passes():
        at = start
        length = block.a.shape[1]
        small = tuple(x[: len(block.a[rows]), start : start + length] for x in grams)
        for count, arrays in chunks((*rows_of(block, rows), *small), size, grid):
            for side, basis in on_mesh.items():
                out = streaming_gram.project(
                    basis, *arrays[:3], Grams(*arrays[3:]), mesh=grid, side=side, dtype=dtype
                )
                yield at, count, side, out
            at += count


def one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, one late: the device computes the next item while the host uses this one."""
    waiting: list[Any] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def check_finite(name: str, values: np.ndarray, dtype: str) -> None:
    """Raise HydraOptError if values overflow the stored dtype."""
    if dtype == "float16" and not np.isfinite(values).all():
        raise overflow(name, dtype)


def where(
    file: str,
    side: str,
    group: Group,
    tasks: int,
    rank: int,
    dtype: str,
    shared_at: int,
    heads: list[tuple[int, int]],
) -> LazyFactors:
    """Factors of a module as deferred arrays in a file."""
    inputs, outputs = group.shape
    zero, of = np.full(tasks, -1, np.int32), np.full(tasks, -1, np.int32)
    for k, (t, _) in enumerate(heads):
        zero[t], of[t] = 0, k
    one, many = ((inputs, rank), (rank, outputs)) if side == "in" else ((rank, outputs), (inputs, rank))
    shared = [in_file(file, shared_at, one, dtype)]
    own = [in_file(file, at, many, dtype) for _, at in heads]
    return LazyFactors(shared, own, zero, of) if side == "in" else LazyFactors(own, shared, of, zero)
