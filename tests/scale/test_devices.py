"""Eight devices give what the mathematics does: modules on one axis of the mesh, tasks on the other."""

import os
import subprocess
import sys

import numpy as np
import pytest

from hydraopt_jax.scale import mesh

SCRIPT = """
import sys
from pathlib import Path
import jax, numpy as np
from hydraopt_jax import compression
from hydraopt_jax.scale import groups, mesh, streaming
rng = np.random.default_rng(0)
rows, tasks, rank, inputs, outputs = 3, 13, 4, 24, 80
a = rng.standard_normal((rows, tasks, rank, inputs)).astype(np.float32)
b = rng.standard_normal((rows, tasks, outputs, rank)).astype(np.float32)
# a few directions of either side are common to all tasks
a += 3 * rng.standard_normal((rows, 1, rank, inputs)).astype(np.float32)
b += 3 * rng.standard_normal((rows, 1, outputs, rank)).astype(np.float32)
block = groups.Block(a, b, np.full((rows, tasks), 2.0, np.float32), np.full((rows, tasks), rank))
group = groups.Group(("x", "y", "z"), rows, (inputs, outputs), rank, ((0, tasks),))
streaming.SUM_BYTES["cpu"] = streaming.HEAD_BYTES["cpu"] = 1
grid = mesh.make(rows)
assert dict(grid.shape) == {"modules": 2, "tasks": 4}, grid
deltas = np.einsum("mtri,mtor->mtio", a.astype(float), b.astype(float))
deltas /= np.linalg.norm(deltas, axis=(2, 3), keepdims=True)
for side, sided in (("in", deltas), ("out", deltas.swapaxes(2, 3))):
    file = Path(sys.argv[1]) / side
    options = compression.Options(rank=5, side=side)
    kept = streaming.solve(file, group, iter([block] * 2), tasks, options, "float32", grid)
    for m, x in enumerate(kept.values()):
        u = np.linalg.svd(np.concatenate(sided[m], 1))[0][:, :5]
        expected = 1 - np.square(u.T @ sided[m]).sum((1, 2))
        np.testing.assert_allclose(x.errors, expected, rtol=1e-4)
        np.testing.assert_allclose(x.bound, expected.mean(), rtol=1e-4)
    assert np.isfinite(np.fromfile(file, np.float32)).all()
    print(side, np.mean([x.bound for x in kept.values()]))
"""


def test_eight_devices_give_the_singular_vectors(tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [x.split()[0] for x in done.stdout.splitlines()] == ["in", "out"]


@pytest.mark.parametrize(
    ("modules", "devices", "shape"), [(1, 8, (1, 8)), (3, 8, (2, 4)), (24, 8, (8, 1)), (5, 6, (3, 2))]
)
def test_devices_left_over_share_the_tasks(modules, devices, shape):
    assert mesh.make(modules, np.arange(devices)).devices.shape == shape
