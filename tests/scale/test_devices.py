"""Eight devices give what the mathematics does: modules on one axis of the mesh, tasks on the other."""

import os
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from hydraopt_jax import devices as mesh

SCRIPT = """
import sys
from pathlib import Path
import jax, numpy as np
from hydraopt_jax import devices
from hydraopt_jax.explicit import groups, streaming
from hydraopt_jax.forms import Hydra
rng = np.random.default_rng(0)
rows, tasks, rank, inputs, outputs = 3, 13, 4, 24, 80
a = rng.standard_normal((rows, tasks, rank, inputs)).astype(np.float32)
b = rng.standard_normal((rows, tasks, outputs, rank)).astype(np.float32)
# a few directions of either side are common to all tasks
a += 3 * rng.standard_normal((rows, 1, rank, inputs)).astype(np.float32)
b += 3 * rng.standard_normal((rows, 1, outputs, rank)).astype(np.float32)
block = groups.GroupFactors(a, b, np.full((rows, tasks), 2.0, np.float32), np.full((rows, tasks), rank))
group = groups.Group(("x", "y", "z"), rows, (inputs, outputs), rank, ((0, tasks),))
streaming.SUM_BYTES["cpu"] = streaming.HEAD_BYTES["cpu"] = 1
grid = devices.make(rows)
assert dict(grid.shape) == {"modules": 2, "tasks": 4}, grid
deltas = np.einsum("mtri,mtor->mtio", a.astype(float), b.astype(float))
deltas /= np.linalg.norm(deltas, axis=(2, 3), keepdims=True)
for side, sided in (("in", deltas), ("out", deltas.swapaxes(2, 3))):
    file = Path(sys.argv[1]) / side
    form = Hydra(rank=5, side=side)
    kept = streaming.solve_group(file, group, iter([block] * 2), tasks, form, "float32", grid)
    for m, (_, errors, bound) in enumerate(kept.values()):
        u = np.linalg.svd(np.concatenate(sided[m], 1))[0][:, :5]
        expected = 1 - np.square(u.T @ sided[m]).sum((1, 2))
        np.testing.assert_allclose(errors, expected, rtol=1e-4)
        np.testing.assert_allclose(bound, expected.mean(), rtol=1e-4)
    assert np.isfinite(np.fromfile(file, np.float32)).all()
    print(side, np.mean([bound for _, _, bound in kept.values()]))
"""


CODED = """
import sys, threading
from pathlib import Path
import jax
from hydraopt_jax import formats, store, synthetic
from hydraopt_jax.formats import peft_collection
from hydraopt_jax.jobs import job
from hydraopt_jax.rate_control import engine, parts
from hydraopt_jax.rate_control.options import Options
folder = Path(sys.argv[1])
parts.DIRECTIONS = 12
modules = {f"layers.{n}.{p}": (48, 64) for n in range(2) for p in "qv"}
for x in synthetic.collection(tasks=7, modules=modules, rank=4):
    formats.write_adapter(folder / x.task, x, dtype="float16")
names = sorted(str(x) for x in folder.iterdir())
found = peft_collection.collection_of([peft_collection.open_adapter(n, None, {}) for n in names])
before, used, together = engine.quantize_at_step, set(), threading.Barrier(3)
def code(*arguments):
    # three devices at the least are at work at once
    if len(used) < 3:
        used.add(jax.config.jax_default_device)
        together.wait(60)
    return before(*arguments)
def leaves(path):
    return [{k: bytes(v) for k, v in x.leaves.items()} for x in store.open(path).load().segments]
def compress(found, **more):
    return engine.compress_to_target(found, Options(max_error=0.01), segment_bytes=1 << 12, **more)
def run(path):
    with job.alone(path):
        job.run_job(path, found, compress, {})
# each device compiles everything for itself: three of eight, not the first ones
every = jax.local_devices()
assert len(every) == 8
jax.local_devices = lambda: every[::3]
engine.quantize_at_step = code
run(folder / "three")
assert len(used) == 3, used
engine.quantize_at_step, jax.local_devices = before, lambda: every[:1]
run(folder / "one")
assert leaves(folder / "three") == leaves(folder / "one")
print(len(leaves(folder / "one")))
"""


def on_eight_devices(script, *arguments):
    """What a script prints."""
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        # each device compiles everything for itself
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_eight_devices_give_the_singular_vectors(tmp_path):
    assert [x.split()[0] for x in on_eight_devices(SCRIPT, tmp_path).splitlines()] == ["in", "out"]


def test_segments_coded_on_several_devices_are_those_of_one(tmp_path):
    assert int(on_eight_devices(CODED, tmp_path)) > 8


def test_a_failure_on_one_device_is_told_and_begins_nothing_more():
    begun = []

    def work(item):
        begun.append(item)
        if item == 2:
            raise ValueError("item 2")
        time.sleep(0.01)

    with pytest.raises(ValueError, match="item 2"):
        mesh.spread(work, iter(range(100)), jax.devices()[:1] * 3)
    assert len(begun) < 100


@pytest.mark.parametrize("devices", [1, 3])
def test_what_ends_an_item_runs_beside_the_next_one(devices):
    """All of it has run in the end, on another thread, and its failure is told as any other."""
    ended = []

    def work(item):
        begun = threading.get_ident()
        return lambda: ended.append((item, threading.get_ident() != begun))

    mesh.spread(work, iter(range(20)), jax.devices()[:1] * devices)
    assert sorted(ended) == [(n, True) for n in range(20)]

    def failing(item):
        return lambda: 1 // (item - 2) and None

    with pytest.raises(ZeroDivisionError):
        mesh.spread(failing, iter(range(100)), jax.devices()[:1] * devices)


@pytest.mark.parametrize(
    ("modules", "devices", "shape"), [(1, 8, (1, 8)), (3, 8, (2, 4)), (24, 8, (8, 1)), (5, 6, (3, 2))]
)
def test_devices_left_over_share_the_tasks(modules, devices, shape):
    assert mesh.make(modules, np.arange(devices)).devices.shape == shape
