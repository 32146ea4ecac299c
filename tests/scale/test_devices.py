"""Eight devices give what one gives: modules on one axis of the mesh, tasks on the other."""

import os
import subprocess
import sys

import numpy as np
import pytest

from hydraopt_jax.scale import mesh

SCRIPT = """
import sys
import jax, numpy as np
from hydraopt_jax import compression
from hydraopt_jax.scale import groups, mesh, streaming
assert len(jax.devices()) == 8
rng = np.random.default_rng(0)
rows, tasks, rank, inputs, outputs = 3, 13, 4, 24, 80
a = rng.standard_normal((rows, tasks, rank, inputs)).astype(np.float32)
b = rng.standard_normal((rows, tasks, outputs, rank)).astype(np.float32)
block = groups.Block(a, b, np.full((rows, tasks), 2.0, np.float32), np.full((rows, tasks), rank))
group = groups.Group(("x", "y", "z"), rows, (inputs, outputs), rank, ((0, tasks),))
streaming.SUM_BYTES["cpu"] = streaming.HEAD_BYTES["cpu"] = 1
from pathlib import Path
for side in ("in", "out"):
    seen = []
    for k, devices in enumerate((jax.devices()[:1], jax.devices())):
        grid = mesh.make(rows, devices)
        file = Path(sys.argv[1]) / f"{side}-{k}"
        options = compression.Options(rank=5, side=side)
        kept = streaming.solve(file, group, iter([block] * 2), tasks, options, "float32", grid)
        seen.append((dict(grid.shape), [x.errors for x in kept.values()], [x.bound for x in kept.values()]))
    assert [x[0] for x in seen] == [{"modules": 1, "tasks": 1}, {"modules": 2, "tasks": 4}], seen
    for _, errors, bounds in seen[1:]:
        np.testing.assert_allclose(errors, seen[0][1], rtol=1e-3)
        np.testing.assert_allclose(bounds, seen[0][2], rtol=1e-4)
    factors = [np.fromfile(Path(sys.argv[1]) / f"{side}-{k}", np.float32) for k in range(2)]
    short = inputs if side == "in" else outputs
    for values in factors:
        shared = values[: 3 * short * 5].reshape(3, -1)
        assert np.isfinite(values).all() and (np.linalg.norm(shared, axis=1) > 0).all()
    print(side, np.mean(seen[0][1]))
"""


def test_eight_devices_give_what_one_gives(tmp_path):
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
