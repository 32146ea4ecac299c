"""Stores in buckets, against services on this machine: every verb, what is fetched, who writes at once."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from bucket_server import SERVICES
from commands import run

import hydraopt_jax as hydra
from hydraopt_jax import buckets, formats, synthetic
from hydraopt_jax.integrations import TaskFolders
from hydraopt_jax.store import bucket, files, select, sizes

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NAMES = ("store", "store.safetensors")


@pytest.fixture(scope="module", params=SERVICES)
def service(request):
    """The address of a bucket, and the proxy in front of its service: one per process, as clients keep it."""
    with pytest.MonkeyPatch.context() as patch, SERVICES[request.param](patch) as found:
        yield found


@pytest.fixture
def place(service, request, monkeypatch, tmp_path):
    """An address to write below, and the proxy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = hashlib.sha256(request.node.name.encode()).hexdigest()[:8]
    service[1].log.clear()
    return f"{service[0]}/{own}", service[1]


@pytest.fixture(scope="module")
def several():
    modules = {"layers.0.q": (192, 128), "layers.1.q": (192, 128)}
    return synthetic.collection(0, tasks=["a", "b", "c", "d"], modules=modules, rank=4, likeness=0.9)


@pytest.fixture(scope="module")
def kept(several):
    return hydra.compress(several[:3], budget=0.5)


def same(one, two, tasks):
    for task in tasks:
        x, y = hydra.decode(one, task), hydra.decode(two, task)
        assert list(x.a) == list(y.a)
        for name in x.a:
            np.testing.assert_array_equal(x.a[name], y.a[name])
            np.testing.assert_array_equal(x.b[name], y.b[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_store_goes_into_a_bucket_changes_there_and_comes_back(place, several, kept, tmp_path, name):
    at = f"{place[0]}/some/{name}"
    hydra.save(at, kept)
    same(hydra.open(at), kept, "abc")
    assert hydra.verify(at) == sum(len(x.leaves) for x in kept.segments)
    grown = hydra.update(at, lambda store: hydra.add(store, several[3]))
    same(grown, hydra.add(kept, several[3]), "abcd")
    less = hydra.update(at, lambda store: hydra.remove(store, "b"))
    assert less.tasks == ("a", "c", "d")
    same(hydra.open(at), hydra.add(kept, several[3]), "acd")
    hydra.verify(at)
    with pytest.raises(hydra.HydraOptError, match=r"replace what is there \(--overwrite, overwrite=True\)"):
        hydra.save(at, kept)
    hydra.save(at, kept, overwrite=True)
    same(hydra.open(at), kept, "abc")
    # nothing is left of what was replaced
    hydra.save(tmp_path / name, hydra.open(at))
    here = [x for x in [tmp_path / name, *(tmp_path / name).rglob("*")] if x.is_file()]
    assert len(buckets.keys(f"{place[0]}/some/")) == len(here)


@pytest.mark.parametrize("name", NAMES)
def test_every_verb_takes_an_address(place, several, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    for x in several:
        formats.write_adapter(tmp_path / "adapters" / x.task, x)
    at, other = f"{place[0]}/one/{name}", f"{place[0]}/two/{NAMES[1 - NAMES.index(name)]}"
    adapters = [f"adapters/{t}" for t in "abc"]
    for words in (
        ["compress", *adapters, "--out", at, "--budget", "0.5"],
        ["add", at, "adapters/d"],
        ["remove", at, "b"],
        ["verify", at, "adapters/a", "adapters/c", "adapters/d"],
        ["inspect", at],
        ["export", at, "--task", "d", "--out", "d-again"],
        ["unpack" if at.endswith("s") else "pack", at, other],
        ["pack" if at.endswith("s") else "unpack", other, f"here-{name}"],
        ["verify", other],
        ["compress", *adapters, "--out", at, "--budget", "0.5", "--overwrite"],
        ["verify", at, *adapters],
    ):
        status, said, error = run(capsys, *words, "--json")
        assert status == 0, (words, error)
        assert json.loads(said)
    assert hydra.open(f"here-{name}").tasks == ("a", "c", "d")
    assert json.loads(run(capsys, "inspect", at, "--json")[1])["store"] == at
    # what was made on this machine to be uploaded is gone
    assert not list((tmp_path / "cache").rglob("*.gz")) + list((tmp_path / "cache").rglob("*.safetensors"))
    status, _, error = run(capsys, "compress", *adapters, "--out", at)
    assert status == 2
    # the service on this machine writes there, too
    said = "exists: choose another path, or replace what is there (--overwrite, overwrite=True)"
    assert f"hydraopt: {at}: {said}" in error.splitlines()


def test_one_task_fetches_its_bytes_and_no_other(place, tmp_path):
    modules = synthetic.transformer_modules(2, 64, 64)
    tasks = [f"task {n}" for n in range(40)]
    kept = hydra.compress(
        synthetic.collection(1, tasks=tasks, modules=modules, rank=8, likeness=0.5), budget=0.5
    )
    at, server = f"{place[0]}/store.safetensors", place[1]
    hydra.save(at, kept)
    whole = sizes.size_on_disk(at)
    assert whole == len(buckets.read_object(at).data)
    server.log.clear()
    found = hydra.open(at)
    same(found, kept, ["task 7"])
    sent = sum(n for *_, n in server.log)
    assert sent < 0.25 * whole
    assert not any(x[0] in ("PUT", "POST", "DELETE") for x in server.log)


@pytest.mark.parametrize("name", NAMES)
def test_who_is_overtaken_writes_nothing(place, several, kept, name, monkeypatch):
    at, new = f"{place[0]}/{name}", f"{place[0]}/new/{name}"
    hydra.save(at, kept)
    publish, others = bucket.publish, [lambda: hydra.update(at, lambda x: hydra.remove(x, "a"))]

    def overtaken(*given):
        while others:
            others.pop()()
        publish(*given)

    monkeypatch.setattr(bucket, "publish", overtaken)
    said = "another process has changed it meanwhile: nothing was written: try again"
    with pytest.raises(hydra.HydraOptError, match=f"{at}: {said}"):
        hydra.update(at, lambda x: hydra.add(x, several[3]))
    assert hydra.open(at).tasks == ("b", "c")
    assert hydra.verify(at)
    rows = {x["id"] for x in files.read_manifest(at)["segments"]}
    assert set(bucket.segment_keys(at)) == (rows if name == "store" else set())
    # nor does who makes one where there was none
    others.append(lambda: hydra.save(new, kept))
    with pytest.raises(hydra.HydraOptError, match=f"{new}: {said}"):
        hydra.save(new, select(kept, ["a", "b"]))
    same(hydra.open(new), kept, "abc")


def test_what_a_dead_writer_left_goes_after_a_day(place, several, kept, monkeypatch):
    at = f"{place[0]}/store"
    hydra.save(at, kept)

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(buckets, "write", dies)
        patched.setattr(buckets, "remove_objects", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            hydra.update(at, lambda store: hydra.add(store, several[3]))
    same(hydra.open(at), kept, "abc")
    left = set(bucket.segment_keys(at))
    hydra.update(at, lambda store: hydra.add(store, several[3]))
    # it may be one that is writing
    assert left <= set(bucket.segment_keys(at))
    monkeypatch.setattr(bucket, "DEAD", -1)
    hydra.update(at, lambda store: hydra.remove(store, "a"))
    assert set(bucket.segment_keys(at)) == {x["id"] for x in files.read_manifest(at)["segments"]}
    hydra.verify(at)


def test_damage_is_found_and_named(place, kept):
    at = f"{place[0]}/store"
    hydra.save(at, kept)
    chunk = next(x for x in bucket.segment_keys(at).items())
    key = next(x for x in chunk[1] if re.fullmatch(r".*/data/\d+", x))
    where = f"{at}/segments/{chunk[0]}/{key}"
    data = bytearray(buckets.read_object(where).data)
    data[len(data) // 2] ^= 1
    buckets.write(where, bytes(data))
    with pytest.raises(hydra.HydraOptError, match="damaged store"):
        hydra.verify(at)
    with pytest.raises(hydra.HydraOptError, match=f"{place[0]}/nothing: no store there"):
        hydra.open(f"{place[0]}/nothing")
    with pytest.raises(hydra.HydraOptError, match=r"nothing.safetensors: no store there"):
        hydra.open(f"{place[0]}/nothing.safetensors")
    with pytest.raises(hydra.HydraOptError, match=r"give (s3|gs)://BUCKET/NAME"):
        hydra.open(place[0].rpartition("/")[0])


def test_folders_for_servers_come_from_a_bucket(place, kept, tmp_path):
    at = f"{place[0]}/store"
    hydra.save(at, kept)
    folders = TaskFolders(at, tmp_path / "tasks")
    assert formats.read_adapter(folders.folder("b")).a.keys() == hydra.decode(kept, "b").a.keys()
    folders.close()
    shutil.rmtree(tmp_path / "tasks")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_no_connection_and_no_credentials_are_one_line(scheme, tmp_path):
    """TensorStore's libraries would log where they looked for credentials."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "GOOGLE_"))}
    nobody = "http://127.0.0.1:9"
    environment |= {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    environment |= {"AWS_ENDPOINT_URL": nobody, "TENSORSTORE_GCS_HTTP_URL": nobody}
    command = [sys.executable, "-m", "hydraopt_jax.cli", "inspect", f"{scheme}://bucket/store"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    said = f"hydraopt: {scheme}://bucket/store/manifest.json.gz: cannot be read: no connection to the service"
    assert (found.returncode, found.stdout, found.stderr) == (2, "", f"{said}\n")
