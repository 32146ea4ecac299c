"""Full tensors of adapters beside their factors, coded before any fit.

Their bytes count in a budget. A budget that they alone exceed is refused before the work begins.
"""

from collections.abc import Mapping

import numpy as np

from hydraopt_jax.collection import Collection
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.rate_control.work import Place, Processes
from hydraopt_jax.store import tensors
from hydraopt_jax.store.store import Segment, make_segment
from hydraopt_jax.store.tensors import Tensors

# raw bytes of full tensors that are coded into one segment
TENSOR_BYTES = 1 << 26


def full_tensors(
    found: Collection, dtype: str | None, place: Place, processes: Processes, apart: bool
) -> tuple[list[Segment], list[Tensors]]:
    """The coded full tensors of all tasks: in separate segments, or for the segment of the factors.

    Raises:
      HydraOptError: tensors that have changed since they were first read, or a value that overflows the
        dtype.
    """
    carriers = [t for t, x in enumerate(found.cards) if x.extras]
    if not apart:
        return [], [
            tensors.encode_tensors(task_tensors(found, t), dtype) if t in carriers else Tensors((), b"")
            for t in range(len(found.cards))
        ]
    groups: list[list[int]] = []
    room = 0
    for t in carriers:
        size = sum(map(tensors.raw_size, found.cards[t].extras))
        if size > room:
            groups.append([])
            room = TENSOR_BYTES
        groups[-1].append(t)
        room -= size
    for n in range(processes.rank, len(groups), processes.size):
        if place.note(f"tensors-{n}") is None:
            own = [tensors.encode_tensors(task_tensors(found, t), dtype) for t in groups[n]]
            names = [found.cards[t].task for t in groups[n]]
            place.keep(f"tensors-{n}", make_segment(names, {}, {}, tensors=own))
            place.keep_note(f"tensors-{n}", {})
    if groups:
        processes.wait("full tensors")
    return [kept_segment(place, f"tensors-{n}") for n in range(len(groups))], []


def task_tensors(found: Collection, task: int) -> Mapping[str, np.ndarray]:
    """A task's full tensors, in the order of its card."""
    have = found.read_extras(task)
    if isinstance(have, Tensors):
        return have
    out = {}
    for name, dtype, shape in found.cards[task].extras:
        x = have.get(name)
        if x is None or [np.asarray(x).dtype.name, list(np.shape(x))] != [dtype, list(shape)]:
            raise HydraOptError(
                f"the full tensors of adapter {task + 1} have changed meanwhile: run it again"
            )
        out[name] = np.asarray(x)
    return out


def kept_segment(place: Place, name: str) -> Segment:
    """A segment that a process has finished.

    Raises:
      HydraOptError: the segment is missing.
    """
    found = place.segment(name)
    if found is None:
        raise HydraOptError(
            f"{place.path}: {name} of another process is not there: the folder must be on a file system that "
            "all processes share"
        )
    return found
