"""Devices of this process: as a named mesh, modules on one axis and tasks on the other, or each by itself."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MODULES, TASKS = "modules", "tasks"

Item = TypeVar("Item")


def make(modules: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh for groups of at most `modules` modules: modules are independent, so they are spread first; the
    devices that are left over share the tasks, whose sums then cost a `psum`.

    Args:
      modules: the most modules that are ever solved together.
      devices: this process's devices where None.
    """
    found = list(jax.local_devices() if devices is None else devices)
    rows = max(d for d in range(1, len(found) + 1) if len(found) % d == 0 and d <= max(modules, 1))
    grid = np.array(found).reshape(rows, len(found) // rows)
    return Mesh(grid, (MODULES, TASKS))


def put(mesh: Mesh, array: np.ndarray, spec: P) -> jax.Array:
    """A host array on the mesh."""
    return jax.device_put(array, NamedSharding(mesh, spec))


def spread(
    work: Callable[[Item], None], items: Iterator[Item], devices: Sequence[jax.Device] | None = None
) -> None:
    """Do `work` for every item: a thread a device takes the next one whenever it is done.

    Args:
      work: what an item needs, on JAX's default device.
      items: asked for by one thread at a time.
      devices: this process's devices where None.

    Raises:
      Exception: whatever `work` or `items` raise, when what was begun on other devices is done; nothing more
        is begun.
    """
    found = list(jax.local_devices() if devices is None else devices)
    turn, stop = threading.Lock(), threading.Event()

    def serve(device: jax.Device) -> None:
        try:
            while not stop.is_set():
                with turn:
                    item = next(items, None)
                if item is None:
                    return
                with jax.default_device(device):
                    work(item)
        except BaseException:
            stop.set()
            raise

    if len(found) == 1:
        # what was compiled before would be compiled again for a device that is named
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(len(found)) as pool:
        try:
            for served in [pool.submit(serve, device) for device in found]:
                served.result()
        finally:
            stop.set()


def together(calls: Sequence[Callable[[], Item]]) -> list[Item]:
    """Results of calls, in order: as many at once as the processor has cores, on the caller's device."""
    workers = min(len(calls), os.cpu_count() or 1)
    if workers < 2:
        return [call() for call in calls]
    device = jax.config.jax_default_device  # type: ignore[attr-defined]

    def here(call: Callable[[], Item]) -> Item:
        with jax.default_device(device):
            return call()

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(here, calls))


def padded(count: int, parts: int) -> int:
    """The least multiple of `parts` that holds `count`."""
    return -(-count // parts) * parts


def even(count: int, most: int) -> int:
    """Length of parts of at most `most`: as few as that, and all about alike.

    >>> even(10, 4), even(3, 4)
    (4, 3)
    """
    return -(-count // -(-count // most))
