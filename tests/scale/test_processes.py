"""Two real processes of one job, of several devices each."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from stores import work

from hydraopt_jax import formats, store, synthetic
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.explicit import group_loop
from hydraopt_jax.formats import peft_collection
from hydraopt_jax.forms import Hydra
from hydraopt_jax.rate_control import engine
from hydraopt_jax.rate_control.options import Options
from hydraopt_jax.store.decoding import decode_terms

# the command, a module a group, killed as it keeps the file that the first argument names
DRIVER = """
import os, signal, sys
from hydraopt_jax import cli
from hydraopt_jax.explicit import group_loop
from hydraopt_jax.jobs import hosts, place
from hydraopt_jax.rate_control import engine
hosts.SILENCE = 10
group_loop.compress_in_form.__kwdefaults__["group_bytes"] = 1
engine.compress_to_target.__kwdefaults__["segment_bytes"] = 1
write = place.write_json
def keep(path, content):
    if path.name == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
place.write_json = keep
cli.main(sys.argv[2:])
"""


@pytest.fixture
def sources(tmp_path):
    out = []
    for adapter in synthetic.collection(
        1, tasks=5, modules={f"l.{x}": (24, 16) for x in "qkv"}, rank=4, dtype="float32"
    ):
        formats.write_adapter(tmp_path / adapter.task, adapter)
        out.append(str(tmp_path / adapter.task))
    return out


def collection(sources):
    return peft_collection.collection_of([peft_collection.open_adapter(x, None, {}) for x in sources])


FORM = ["--form", "hydra", "--rank", "3", "--side", "in"]


def company(sources, out, last="", form=FORM, devices=4):
    """Exit status, standard output and standard error of each of two processes, of so many devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    form = [*form, "--force", "--json"]
    where = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process-id"]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, last, "compress", *sources, "--out", out, *form, *where, str(n)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    try:
        said = [x.communicate(timeout=300) for x in running]
    finally:
        for x in running:
            x.kill()
    return [(x.returncode, *y) for x, y in zip(running, said, strict=True)]


def test_two_processes_stop_when_one_is_killed_and_go_on_to_the_store_of_one(sources, tmp_path):
    out = tmp_path / "store"
    # groups 0 and 2 are the first process's, 1 is the second's
    alive, dead = company(sources, out, "group-1.json")
    assert dead[0] == -signal.SIGKILL
    assert alive[0] not in (0, -signal.SIGKILL)
    assert (alive[1], bool(alive[2])) == ("", True)
    with pytest.raises(HydraOptError, match="unfinished job"):
        store.open(out)
    assert sorted(x.name for x in (out / "job").glob("group-?.json")) == ["group-0.json", "group-2.json"]
    first, second = company(sources, out)
    assert (first[0], second[:2]) == (0, (0, "")), (first, second)
    assert "going on: 2 of 2 modules" in first[2]
    assert json.loads(first[1])["tasks"] == [f"task-0{t}" for t in range(5)]
    assert {x.name for x in out.iterdir()} == {"manifest.json.gz", "segments"}
    assert store.verify(out) > 1
    compress = functools.partial(group_loop.compress_in_form, form=Hydra(rank=3, side="in"), group_bytes=1)
    one, two = work(tmp_path / "alone", collection(sources), compress, {}), store.open(out)
    np.testing.assert_allclose(two.errors, one.errors, rtol=2e-3)
    assert list(two.shapes) == list(one.shapes)
    other_terms = decode_terms(two)
    for name, (term,) in decode_terms(one).items():
        (other,) = other_terms[name]
        delta, again = (np.asarray(x.a)[0] @ np.asarray(x.b) for x in (term, other))
        np.testing.assert_allclose(again, delta, atol=1e-4 * np.abs(delta).max())


def test_the_death_of_the_first_process_ends_the_other_with_a_message(sources, tmp_path):
    begun = time.monotonic()
    dead, alive = company(sources, tmp_path / "store", "group-0.json")
    assert time.monotonic() - begun < 60
    assert dead[0] == -signal.SIGKILL
    assert alive[0] not in (0, -signal.SIGKILL)
    # who says it depends on who notices first: JAX's client, which ends the process, or the barrier
    assert "died" in alive[2] or "another process of this job has stopped" in alive[2]
    with pytest.raises(HydraOptError, match="unfinished job"):
        store.open(tmp_path / "store")


def test_two_processes_code_the_segments_of_one(sources, tmp_path):
    few, error = sources[:3], 0.01
    first, second = company(few, tmp_path / "two", form=["--max-error", str(error)], devices=2)
    assert (first[0], second[:2]) == (0, (0, "")), (first, second)
    compress = functools.partial(engine.compress_to_target, options=Options(max_error=error), segment_bytes=1)
    one, two = work(tmp_path / "one", collection(few), compress, {}), store.open(tmp_path / "two")
    assert len(two.segments) == 9
    assert store.verify(tmp_path / "two") > 9
    assert 0.0 < np.mean(two.errors) <= error
    np.testing.assert_allclose(two.errors, one.errors, rtol=2e-3)
