"""Devices of this process as a named mesh: modules on one axis, tasks on the other."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MODULES, TASKS = "modules", "tasks"


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


def padded(count: int, parts: int) -> int:
    """The least multiple of `parts` that holds `count`."""
    return -(-count // parts) * parts


def even(count: int, most: int) -> int:
    """Length of parts of at most `most`: as few as that, and all about alike.

    >>> even(10, 4), even(3, 4)
    (4, 3)
    """
    return -(-count // -(-count // most))
