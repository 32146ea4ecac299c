"""Estimates of a job's time, memory and bytes."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hydraopt_jax import devices
from hydraopt_jax.collection import Collection
from hydraopt_jax.explicit import fitting, streaming, streaming_gram
from hydraopt_jax.explicit.groups import Group, applied, groups_of, host_dtype, is_streamed
from hydraopt_jax.forms import Hydra
from hydraopt_jax.forms.hyperparameters import check_form
from hydraopt_jax.rate_control import parts, search
from hydraopt_jax.rate_control.options import Options
from hydraopt_jax.store import tensors
from hydraopt_jax.store.tensors import check_dtype

# assumed bytes per second of reading, checking and writing, and share of a matmul's rate
READ_RATE = 3e8
EFFICIENCY = 0.4
# of subspace iteration
ROUNDS = 20
# compiled code, its compiler, and the store's writer
FIXED = 300_000_000
# of coded segments: passes over the collection as a rule, half-precision bytes that a process on two cores
# codes in a second, seconds before the first one, and memory over the bytes of a segment, with the code that
# each device has of its own
PASSES = 1
CODING_RATE = 1.2e7
PILOT = 8.0
CODING_MEMORY = 72
CLASSES = ((60, "seconds"), (3600, "minutes"), (86400, "hours"), (float("inf"), "days"))


class Costs(NamedTuple):
    """Estimates.

    Attributes:
      groups: number of groups of modules.
      memory: bytes in addition to those of Python and JAX.
      flops: of the products; a multiplication and an addition count as two.
      read: bytes read from the adapters' files.
      store: bytes of the store's leaves, uncompressed.
      seconds: on one process of this machine.
    """

    groups: int
    memory: int
    flops: int
    read: int
    store: int
    seconds: float

    @property
    def time_class(self) -> str:
        """The order of magnitude of a time: seconds, minutes, hours or days."""
        return next(name for limit, name in CLASSES if self.seconds < limit)


def matmul_rate(size: int = 1024, repeats: int = 3) -> float:
    """FLOP/s of a float32 product of two square matrices, the best of a few."""
    x = jnp.ones((size, size))
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def group_flops(group: Group, tasks: int, ranks: dict[str, int]) -> int:
    """FLOPs of a group: the sums (or their applications), the heads, the errors."""
    total = 0
    wide = tasks * group.rank
    for side, size in zip(("in", "out"), group.shape, strict=True):
        if side in ranks:
            block = ranks[side] + max(ranks[side], 8)
            n = min(wide, size)
            own = applied(tasks, group.rank, size)
            total += 2 * wide * (size * wide if own else streaming_gram.entries_of_strips(size))
            total += 4 * n**2 * block * ROUNDS
    total += 2 * wide * max(ranks.values()) * sum(group.shape)
    return total * len(group.modules)


def group_memory(group: Group, tasks: int, ranks: dict[str, int], itemsize: int) -> int:
    """Memory of a group in bytes: its block and the next one, sums, pieces and their results."""
    block = itemsize * group.room * group.length * group.rank * sum(group.shape)
    grid = devices.make(group.room)
    each = 4 * grid.shape[devices.MODULES] * group.rank * sum(group.shape)
    sums, taken = 0, streaming.sum_tasks(group.rank, group.shape, grid) * grid.shape[devices.TASKS]
    for side, size in zip(("in", "out"), group.shape, strict=True):
        if side in ranks:
            if applied(tasks, group.rank, size):
                taken = tasks
            else:
                # with copies in the order that products like
                sums += 3 * 4 * grid.size * streaming_gram.entries_of_strips(size)
    return FIXED + 2 * block + sums + 3 * each * min(taken, tasks)


def form_costs(found: Collection, form: Hydra, dtype: str | None = None) -> Costs:
    """Estimate a job of an explicit form. Forms other than a head per task are counted as if they were; they
    take longer."""
    tasks = len(found.cards)
    form = check_form(form, tasks)
    check_dtype(dtype)
    stored = np.dtype(dtype or found.dtype).itemsize
    itemsize = np.dtype(host_dtype(found)).itemsize
    groups = groups_of(found, form)
    flops = memory = store = read = 0
    for group in groups:
        ranks = streaming.ranks_of(form, group.shape, group.rank, tasks)
        flops += group_flops(group, tasks, ranks)
        memory = max(memory, group_memory(group, tasks, ranks, itemsize))
        heads = form.heads or tasks
        cheapest = min(fitting.entries(heads, r, group.shape, side) for side, r in ranks.items())
        store += stored * len(group.modules) * cheapest
        passes = 2 if len(group.spans) > 1 and is_streamed(form, tasks) else 1
        per_module = sum(found.rank(m, t) for m in group.modules for t in range(tasks)) * sum(group.shape)
        read += (passes + 2) * itemsize * per_module
    store += 2 * len(found.shapes) * tasks
    seconds = flops / (EFFICIENCY * matmul_rate()) + (read + store) / READ_RATE
    return Costs(len(groups), memory, flops, read, store, seconds)


def target_costs(found: Collection, options: Options) -> Costs:
    """Estimate a job to a budget or an error target; the store that an error asks for is not known before,
    and counted as what comes in."""
    goal = search.target_of(found, options, raw_tensors(found, options.extras_dtype))
    entries = found.entries()
    rank = max(e.rank for x in found.cards for e in x.modules.values())
    itemsize = np.dtype(host_dtype(found)).itemsize
    store = goal.heads + (int(goal.limit) if goal.sign < 0 else itemsize * entries)
    read = (1 + PASSES) * itemsize * entries
    # QRs of both factors and small SVDs, and the gains
    flops = PASSES * 8 * rank * entries
    count = len(parts.parts_of(found))
    memory = CODING_MEMORY * min(parts.SEGMENT_BYTES, 2 * entries) * min(count, jax.local_device_count())
    seconds = PILOT + PASSES * 2 * entries / CODING_RATE + (read + store) / READ_RATE
    return Costs(count, memory, flops, read, store, seconds)


def raw_tensors(found: Collection, dtype: str | None) -> int:
    """Upper bound of the full tensors' bytes, uncoded, for an estimate that reads nothing."""
    half = [
        [name, dtype if tensors.narrows(kind, dtype) else kind, shape]
        for x in found.cards
        for name, kind, shape in x.extras
    ]
    return sum(map(tensors.raw_size, half))


def as_dict(plan: Costs) -> dict[str, Any]:
    """JSON-able."""
    return plan._asdict() | {"seconds": float(f"{plan.seconds:.2g}"), "time_class": plan.time_class}
