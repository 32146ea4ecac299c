"""Devices of this process: a mesh with a module axis and a task axis, or one device per work item."""

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MODULES, TASKS = "modules", "tasks"

Item = TypeVar("Item")
Arguments = ParamSpec("Arguments")


def make(modules: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh for groups of at most `modules` modules; without devices, of those of this process.

    Modules are independent, so they are spread over devices first. Remaining devices split the tasks, and
    sums over tasks then need a `psum`.
    """
    found = list(jax.local_devices() if devices is None else devices)
    rows = max(d for d in range(1, len(found) + 1) if len(found) % d == 0 and d <= max(modules, 1))
    grid = np.array(found).reshape(rows, len(found) // rows)
    return Mesh(grid, (MODULES, TASKS))


def put_on_mesh(mesh: Mesh, array: np.ndarray, spec: P) -> jax.Array:
    """A host array on the mesh."""
    return jax.device_put(array, NamedSharding(mesh, spec))


def spread(
    work: Callable[[Item], Callable[[], None] | None],
    items: Iterator[Item],
    devices: Sequence[jax.Device] | None = None,
) -> None:
    """Call `work` for every item. Each device has one thread, which takes the next item when it is free.

    Args:
      work: processes one item on JAX's default device. What it returns finishes the item: it is called on
        another thread, beside the work on the next item.
      items: iterated by one thread at a time.
      devices: None for the devices of this process.

    Raises:
      Exception: the first error of `work` or `items`, after running work has ended; no further item starts.
    """
    found = list(jax.local_devices() if devices is None else devices)
    turn, stop = threading.Lock(), threading.Event()

    def serve(device: jax.Device | None) -> None:
        finishing: Future[None] | None = None
        try:
            with ThreadPoolExecutor(1) as beside:
                while not stop.is_set():
                    with turn:
                        item = next(items, None)
                    if item is None:
                        break
                    finish = on(device, functools.partial(work, item))
                    del item
                    if finishing is not None:
                        finishing.result()
                    finishing = None if finish is None else beside.submit(on, device, finish)
                if finishing is not None:
                    finishing.result()
        except BaseException:
            stop.set()
            raise

    if len(found) == 1:
        # naming the device would recompile what was compiled without a name
        serve(current())
        return
    with ThreadPoolExecutor(len(found)) as pool:
        try:
            for served in [pool.submit(serve, device) for device in found]:
                served.result()
        finally:
            stop.set()


def current() -> jax.Device | None:
    """The device of this thread's computations; None for JAX's choice."""
    # JAX declares no type for its options
    return getattr(jax.config, "jax_default_device")  # noqa: B009


def platform() -> str:
    """The platform of this thread's computations: `"cpu"`, `"gpu"` or `"tpu"`."""
    device: jax.Device | str | None = current()
    return jax.default_backend() if device is None else getattr(device, "platform", str(device))


def not_on_gpu(call: Callable[Arguments, Item]) -> Callable[Arguments, Item]:
    """`call`, on the processor where this thread computes on a GPU.

    For scans of thousands of small steps, which a GPU starts one by one: an H200 encoded a collection eight
    times as slowly as the processor beside it (`experiments/accelerator`).
    """

    @functools.wraps(call)
    def placed(*args: Arguments.args, **options: Arguments.kwargs) -> Item:
        if platform() != "gpu":
            return call(*args, **options)
        try:
            processor = jax.local_devices(backend="cpu")[0]
        except RuntimeError:
            # this process was told to use the GPU alone
            return call(*args, **options)
        return on(processor, functools.partial(call, *args, **options))

    return placed


def on(device: jax.Device | None, call: Callable[[], Item]) -> Item:
    """The result of a call for which this is JAX's default device."""
    with jax.default_device(device):
        return call()


def together(calls: Sequence[Callable[[], Item]]) -> list[Item]:
    """Results of calls, in order: as many at once as the processor has cores, on the caller's device."""
    workers = min(len(calls), os.cpu_count() or 1)
    if workers < 2:
        return [call() for call in calls]
    device = current()
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(functools.partial(on, device), calls))


def round_up(count: int, parts: int) -> int:
    """The smallest multiple of `parts` that is at least `count`."""
    return -(-count // parts) * parts


def even(count: int, most: int) -> int:
    """Length of the parts when `count` is split into the fewest parts of at most `most`, evenly.

    >>> even(10, 4), even(3, 4)
    (4, 3)
    """
    return -(-count // -(-count // most))
