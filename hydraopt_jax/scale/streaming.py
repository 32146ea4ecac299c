"""A group of modules solved in two passes over its tasks, chunk by chunk, its heads written as they come."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from hydraopt_jax import compression
from hydraopt_jax.compression import Options
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.scale import closed
from hydraopt_jax.scale.assembly import Kept
from hydraopt_jax.scale.closed import BOTH, LOCAL, Basis
from hydraopt_jax.scale.groups import Block, Group, applied
from hydraopt_jax.scale.mesh import MODULES, TASKS, padded, put

# float32 bytes of a chunk of tasks on one device: what its caches hold on a CPU, what keeps others busy
SUM_BYTES = {"cpu": 1 << 25}
HEAD_BYTES = {"cpu": 1 << 23}
ELSEWHERE = 1 << 28


def chunk_tasks(limit: dict[str, int], tasks: int, width: int, rows: int, grid: Mesh) -> int:
    """Tasks of a chunk of about so many bytes a device; a multiple of the devices that share the tasks."""
    room = limit.get(grid.devices.flat[0].platform, ELSEWHERE)
    each = max(room // (4 * width * rows), 1)
    lanes = grid.shape[TASKS]
    return min(each * lanes, padded(tasks, lanes))


def chunks(block: Block, size: int, grid: Mesh) -> Iterator[tuple[int, tuple[jax.Array, ...]]]:
    """Chunks of a block on the mesh, all of one size, filled up with zero tasks; with the real count."""
    rows = padded(block.a.shape[0], grid.shape[MODULES])
    for at in range(0, block.a.shape[1], size):
        out = []
        for array in (block.a, block.b, block.scale):
            part = array[:, at : at + size]
            lack = (rows - part.shape[0], size - part.shape[1])
            if any(lack):
                part = np.pad(part, [(0, lack[0]), (0, lack[1]), *[(0, 0)] * (part.ndim - 2)])
            out.append(put(grid, part, BOTH))
        yield min(size, block.a.shape[1] - at), tuple(out)


def ranks_of(options: Options, shape: tuple[int, int], rank: int, tasks: int) -> dict[str, int]:
    """Side -> width of its shared factor; with side "auto" both at the entries of the cheaper one."""
    wanted = options.rank or rank
    if options.side != "auto":
        size = shape[0] if options.side == "in" else shape[1]
        return {options.side: min(wanted, size, tasks * rank)}
    cost = min(compression.entries(tasks, tasks, wanted, shape, s) for s in ("in", "out"))
    out = {}
    for side, size in zip(("in", "out"), shape, strict=True):
        width = min(compression.rank_at(cost, tasks, tasks, shape, side), wanted)
        out[side] = min(width, size, tasks * rank)
    return out


def bases(
    group: Group, parts: Iterator[Block], tasks: int, ranks: dict[str, int], grid: Mesh
) -> tuple[dict[str, Basis], np.ndarray, np.ndarray]:
    """First pass: the leading directions of each side, on the host; energies and ranks `[M, T]`."""
    rows = padded(group.room, grid.shape[MODULES])
    sizes = dict(zip(("in", "out"), group.shape, strict=True))
    direct = tuple(s for s in ranks if not applied(tasks, group.rank, sizes[s]))
    lanes = grid.shape[TASKS]
    spec = P(MODULES, TASKS)
    sums: tuple[Any, ...] = tuple(
        jax.jit(
            lambda n=sizes[s]: jnp.zeros((rows, lanes, n, n)),
            out_shardings=jax.sharding.NamedSharding(grid, spec),
        )()
        for s in direct
    )
    found: dict[str, Basis] = {}
    energy: list[jax.Array] = []
    present: list[np.ndarray] = []
    local = rows // grid.shape[MODULES]
    size = chunk_tasks(SUM_BYTES, tasks, group.rank * sum(group.shape), local, grid)
    for _ in group.spans:
        block = next(parts)
        present.append(block.ranks)
        if direct:
            for count, arrays in chunks(block, size, grid):
                sums, part = closed.accumulate(sums, *arrays, mesh=grid, sides=direct)
                energy.append(part[:, :count])
        if len(direct) < len(ranks):
            # the only span: `applied` sides need every task at once, and are small for it
            every = next(chunks(block, padded(tasks, lanes), grid))[1]
            for side in ranks:
                if side not in direct:
                    basis, part = closed.of_factors(*every, mesh=grid, rank=ranks[side], side=side)
                    found[side] = jax.device_get(basis)
                    energy = energy if direct else [part[:, :tasks]]
    norms = np.concatenate([np.asarray(x) for x in energy], 1)
    trace = put(grid, (norms > 0).sum(-1).astype(np.float32), LOCAL)
    for side, total in zip(direct, sums, strict=True):
        found[side] = jax.device_get(
            closed.of_sum(total, trace, mesh=grid, rank=ranks[side], columns=tasks * group.rank)
        )
    return found, norms, np.concatenate(present, 1)


def solve(
    file: Path,
    group: Group,
    parts: Iterator[Block],
    tasks: int,
    options: Options,
    dtype: str,
    grid: Mesh,
) -> dict[str, Kept]:
    """Solve a group and write its factors to `file`; say where they lie.

    Args:
      file: to write.
      group: the modules.
      parts: the blocks of its spans, twice over.
      tasks: T.
      options: the form; a head a task.
      dtype: of what is stored.
      grid: the devices.

    Raises:
      HydraOptError: values that overflow the stored dtype.
    """
    ranks = ranks_of(options, group.shape, group.rank, tasks)
    found, energy, own_ranks = bases(group, parts, tasks, ranks, grid)
    present = (energy > 0).sum(-1)
    losses = {
        s: np.maximum(present - np.asarray(b.values, np.float64).sum(-1), 0.0) for s, b in found.items()
    }
    order = list(ranks)
    chosen = np.stack([losses[s] for s in order]).argmin(0).tolist()
    stored: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for side, basis in found.items():
        gain = closed.gains(np.asarray(basis.values), energy)
        with np.errstate(over="ignore"):
            shared = (np.asarray(basis.vectors) * gain[:, None, :]).astype(dtype)
        stored[side] = (np.asarray(basis.vectors), shared, gain)
    squares = np.zeros((len(group.modules), tasks))
    heads: list[list[tuple[int, int]]] = [[] for _ in group.modules]
    shared_at = []
    local = padded(group.room, grid.shape[MODULES]) // grid.shape[MODULES]
    width = group.rank * sum(group.shape) + max(ranks.values()) * max(group.shape)
    size = chunk_tasks(HEAD_BYTES, tasks, width, local, grid)
    sides = [s for k, s in enumerate(order) if k in chosen[: len(group.modules)]]
    on_mesh = {
        s: tuple(put(grid, x, LOCAL) for x in (stored[s][0], stored[s][1].astype(np.float32), stored[s][2]))
        for s in sides
    }
    with file.open("wb") as sink:
        for m, name in enumerate(group.modules):
            shared = stored[order[chosen[m]]][1][m]
            check_finite(name, shared, dtype)
            shared = shared if order[chosen[m]] == "in" else shared.T
            shared_at.append(sink.tell())
            sink.write(np.ascontiguousarray(shared).tobytes())
        for at, count, side, out in ahead(projected(group, parts, sides, on_mesh, size, grid, dtype)):
            values, error = np.asarray(out.values), np.asarray(out.error)
            for m in (m for m in range(len(group.modules)) if order[chosen[m]] == side):
                squares[m, at : at + count] = error[m, :count]
                check_finite(group.modules[m], values[m, :count], dtype)
                for t in np.flatnonzero(energy[m, at : at + count] > 0):
                    heads[m].append((at + int(t), sink.tell()))
                    sink.write(values[m, t].tobytes())
        for m in (m for m, rows in enumerate(heads) if not rows):
            # a module whose deltas are all zero is one head of zeros
            heads[m].append((0, sink.tell()))
            sink.write(bytes(np.dtype(dtype).itemsize * ranks[order[chosen[m]]] * max(group.shape)))
        sink.flush()
        os.fsync(sink.fileno())
    kept = {}
    for m, name in enumerate(group.modules):
        side = order[chosen[m]]
        kept[name] = describe(
            file, side, group, tasks, stored[side][1].shape[-1], dtype, shared_at[m], heads[m]
        )._replace(
            errors=relative(squares[m], energy[m], own_ranks[m]),
            bound=float(losses[side][m]) / max(int(present[m]), 1),
        )
    return kept


def projected(
    group: Group,
    parts: Iterator[Block],
    sides: list[str],
    on_mesh: dict[str, tuple[jax.Array, ...]],
    size: int,
    grid: Mesh,
    dtype: str,
) -> Iterator[tuple[int, int, str, closed.Heads]]:
    """Second pass: first task, count of tasks, side and heads of every chunk."""
    for start, _ in group.spans:
        at = start
        for count, arrays in chunks(next(parts), size, grid):
            for side in sides:
                yield (
                    at,
                    count,
                    side,
                    closed.project(*on_mesh[side], *arrays, mesh=grid, side=side, dtype=dtype),
                )
            at += count


def ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each only when the next one has been asked for: the device works on that meanwhile."""
    waiting: list[Any] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def check_finite(name: str, values: np.ndarray, dtype: str) -> None:
    """Refuse an overflow of the stored dtype."""
    if dtype == "float16" and not np.isfinite(values).all():
        raise HydraOptError(f"{name}: values overflow {dtype}; give --dtype bfloat16 or float32")


def relative(square: np.ndarray, energy: np.ndarray, ranks: np.ndarray) -> list[float | None]:
    """Relative squared errors; None for a task without the module."""
    rows = zip(compression.relative(square, energy), ranks, strict=True)
    return [float(x) if rank else None for x, rank in rows]


def describe(
    file: Path,
    side: str,
    group: Group,
    tasks: int,
    rank: int,
    dtype: str,
    shared_at: int,
    heads: list[tuple[int, int]],
) -> Kept:
    """Where the parts of a module lie, in `packing.parts`' order, which is by side and then by factor."""
    inputs, outputs = group.shape
    zero, of = [-1] * tasks, [-1] * tasks
    for k, (t, _) in enumerate(heads):
        zero[t], of[t] = 0, k
    count = max(len(heads), 1)
    spots = [at for _, at in heads] or [shared_at]
    if side == "in":
        shapes, uses, offsets = ((1, inputs, rank), (count, rank, outputs)), (zero, of), [shared_at, *spots]
    else:
        shapes, uses, offsets = ((count, inputs, rank), (1, rank, outputs)), (of, zero), [*spots, shared_at]
    return Kept(*shapes, *uses, None, dtype, str(file), offsets, [], 0.0)
