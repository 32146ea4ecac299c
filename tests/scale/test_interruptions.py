"""Real processes of the command, killed, stopped, out of room, and in company."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from hydraopt_jax import checkpoint, formats, synthetic

# the command, which gets a signal at the given step of the job: as something is kept, or put together
DRIVER = """
import os, resource, signal, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["ROOM"]), -1))
from hydraopt_jax import cli
from hydraopt_jax.scale import groups, jobs, assembly
groups.GROUP_BYTES = 1
jobs.run.__kwdefaults__["group_bytes"] = 1
where, what = sys.argv[1].split(":")
seen = 0
def spy(function, name):
    def call(*a, **k):
        global seen
        if name == where.rstrip("0123456789"):
            seen += 1
            if seen == int(where[len(name):]):
                os.kill(os.getpid(), getattr(signal, what))
        return function(*a, **k)
    return call
jobs.write_json = spy(jobs.write_json, "keep")
assembly.gather = spy(assembly.gather, "gather")
assembly.place = spy(assembly.place, "place")
cli.main(sys.argv[2:])
"""
SHAPES = {"l.q": (24, 16), "l.k": (24, 16), "l.v": (24, 16)}


@pytest.fixture
def folders(tmp_path):
    out = []
    for adapter in synthetic.collection(1, tasks=5, modules=SHAPES, rank=4, dtype="float32"):
        formats.write_adapter(tmp_path / adapter.task, adapter)
        out.append(str(tmp_path / adapter.task))
    return out


def start(arguments, point="none0:SIGKILL", **more):
    environment = (
        os.environ | {"JAX_PLATFORMS": "cpu", "ROOM": "-1", "JAX_ENABLE_COMPILATION_CACHE": "1"} | more
    )
    command = [sys.executable, "-c", DRIVER, point, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process, timeout=240):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def leaves(path):
    """Every leaf of a store, index included: the store but for Orbax's time of writing."""
    metadata = checkpoint.read_metadata(path)
    index = checkpoint.read_leaves(path, {"index": metadata["index"]})
    sizes = json.loads(index["index"].tobytes())["leaves"]
    return {k: v.tobytes() for k, v in (index | checkpoint.read_leaves(path, sizes)).items()}


def compress(folders, out, *more):
    return ["compress", *folders, "--out", out, "--rank", "3", "--side", "in", "--force", "--json", *more]


def test_a_killed_job_goes_on_and_ends_with_the_same_store(folders, tmp_path):
    code, _, err = finish(start(compress(folders, tmp_path / "whole")))
    assert (code, err) == (0, "")
    # keep1 is the job's mark, keep2 to keep4 the groups
    out = tmp_path / "killed"
    assert finish(start(compress(folders, out), "keep3:SIGKILL"))[0] == -signal.SIGKILL
    code, _, err = finish(start(compress(folders, out), "gather1:SIGKILL"))
    assert code == -signal.SIGKILL
    assert "going on: 1 of 3 modules" in err
    assert not out.exists()
    code, _, err = finish(start(compress(folders, out)))
    assert code == 0
    assert "going on: 3 of 3 modules" in err
    assert leaves(out) == leaves(tmp_path / "whole")
    assert not out.with_name("killed.partial").exists()


def test_sigterm_ends_a_job_with_a_message(folders, tmp_path):
    out = tmp_path / "store"
    code, said, err = finish(start(compress(folders, out), "keep4:SIGTERM"))
    assert (code, said) == (143, "")
    assert err.startswith("hydraopt: stopped by SIGTERM")
    assert err.count("\n") == 1
    kept = out.with_name("store.partial")
    assert len(list(kept.glob("group-*.json"))) == 2
    code, _, err = finish(start(["compress", *folders, "--out", out, "--rank", "2", "--side", "in"]))
    assert code == 2
    assert "unfinished job with other adapters or options" in err


def test_a_full_disk_is_one_clear_line_and_keeps_what_is_done(folders, tmp_path):
    out = tmp_path / "store"
    kept = tmp_path / "store.partial"
    assert finish(start(compress(folders, out), "keep3:SIGKILL"))[0] == -signal.SIGKILL
    code, _, err = finish(start(compress(folders, out), ROOM="1000", JAX_ENABLE_COMPILATION_CACHE="0"))
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("hydraopt: ")
    assert "cannot be written" in last
    assert "run the same command again" in last
    assert len(list(kept.glob("group-*.json"))) == 1
    assert finish(start(compress(folders, out)))[0] == 0


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def company(folders, out, points=("none0:SIGKILL", "none0:SIGKILL")):
    port = free_port()
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    where = ["--coordinator", f"localhost:{port}", "--processes", "2"]
    return [
        start(compress(folders, out, *where, "--process-id", n), point, **flags)
        for n, point in enumerate(points)
    ]


def test_two_processes_of_four_devices_write_the_store_of_one(folders, tmp_path):
    done = [finish(x) for x in company(folders, tmp_path / "two")]
    assert [x[0] for x in done] == [0, 0], done
    assert json.loads(done[0][1])["tasks"] == [f"task-0{t}" for t in range(5)]
    assert done[1][1] == ""
    assert finish(start(compress(folders, tmp_path / "one")))[0] == 0
    one, two = (checkpoint.restore(tmp_path / x) for x in ("one", "two"))
    np.testing.assert_allclose(two.errors, one.errors, rtol=2e-3)
    assert list(two.modules) == list(one.modules)
    for name, (term,) in one.modules.items():
        (other,) = two.modules[name]
        delta, again = (np.asarray(x.a)[0] @ np.asarray(x.b) for x in (term, other))
        np.testing.assert_allclose(again, delta, atol=1e-4 * np.abs(delta).max())


def test_the_others_stop_when_a_process_dies(folders, tmp_path):
    out = tmp_path / "store"
    alive, dead = company(folders, out, ("none0:SIGKILL", "keep1:SIGKILL"))
    assert finish(dead)[0] == -signal.SIGKILL
    begun = time.monotonic()
    code, _, err = finish(alive, timeout=90)
    assert time.monotonic() - begun < 60
    assert code != 0
    assert err
    assert not out.exists()
    assert list((tmp_path / "store.partial").glob("group-*.json"))
