"""Stores elsewhere: byte ranges of one version, counted."""

import numpy as np
import pytest
from hub_server import Files, running
from plain_stores import plain_store

from hydraopt_jax import changes, compression, network, remote, store, synthetic
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.factors import Factors
from hydraopt_jax.formats import read_adapter
from hydraopt_jax.integrations import TaskFolders
from hydraopt_jax.integrations.model_card import bytes_of_tasks
from hydraopt_jax.store import files, sizes

pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def hundred():
    """A store of a hundred tasks: one input factor, an output factor each."""
    tasks = [f"task {k}" for k in range(100)]
    use = np.arange(100, dtype=np.int32)
    random = np.random.default_rng(0)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    modules = {
        f"layers.{n}.q": (Factors(draw(1, 128, 8), draw(100, 8, 128), 0 * use, use),) for n in range(24)
    }
    return plain_store(tasks, modules)


@pytest.fixture(scope="module")
def predicted():
    """A store of four coded tasks, and two that were added, which are predicted from them."""
    made = synthetic.collection(
        3,
        tasks=["a", "b", "c", "d", "e", "f"],
        modules=synthetic.transformer_modules(2, 64, 32),
        rank=4,
        likeness=0.8,
        dtype="float32",
    )
    found = compression.compress(made[:4], max_error=0.02)
    for x in made[4:]:
        found = changes.add(found, x)
    return found


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    with running(Files()) as found:
        yield found


def served(server, content, tmp_path, name="s.safetensors"):
    """Address of a store on the server, and its file's bytes."""
    store.save(tmp_path / name, content, overwrite=True)
    server.files[f"/{name}"] = (tmp_path / name).read_bytes()
    return f"http://127.0.0.1:{server.port}/{name}", server.files[f"/{name}"]


def same(one, two):
    return all(
        one.a[m].tobytes() == two.a[m].tobytes() and one.b[m].tobytes() == two.b[m].tobytes() for m in two.a
    )


def test_one_of_a_hundred_tasks_costs_the_header_and_its_bytes(server, hundred, tmp_path):
    address, data = served(server, hundred, tmp_path)
    header = 8 + int.from_bytes(data[:8], "little")
    found = store.open(address)
    opened = server.sent
    adapter = store.decode(found, "task 42")
    assert same(adapter, store.decode(hundred, "task 42"))
    needed = header + bytes_of_tasks(hundred)["task 42"]
    assert server.sent <= 1.05 * needed
    assert server.sent < len(data) / 25
    # the first request brings some bytes beyond the header
    assert 0 <= bytes_of_tasks(hundred)["task 42"] - (server.sent - opened) < remote.FIRST


@pytest.mark.parametrize("task", ["a", "d", "f"])
def test_a_task_costs_its_leaves_and_those_that_predict_it(server, predicted, tmp_path, task):
    assert any(x.references for x in predicted.segments)
    address, data = served(server, predicted, tmp_path)
    found = store.open(address)
    opened = server.sent
    assert same(store.decode(found, task), store.decode(predicted, task))
    # the first request may have brought some of them
    assert 0 < server.sent - opened <= bytes_of_tasks(predicted)[task] < len(data) / 2


def test_what_verbs_that_read_ask_for(server, predicted, tmp_path):
    address, data = served(server, predicted, tmp_path)
    assert sizes.size_on_disk(address) == len(data)
    assert store.verify(address) == store.verify(tmp_path / "s.safetensors")
    assert store.open(address).load().tasks == predicted.tasks
    store.save(tmp_path / "copy.safetensors", store.open(address))
    assert (tmp_path / "copy.safetensors").read_bytes() == data


def test_a_store_that_is_elsewhere_is_not_changed(tmp_path, monkeypatch, predicted):
    monkeypatch.chdir(tmp_path)
    for act in (
        lambda: store.save("hf:org/name", predicted),
        lambda: store.update("hf:org/name@v1", lambda x: x),
        lambda: files.check_output("https://me:secret@example.org/s.safetensors", True),
    ):
        with pytest.raises(HydraOptError, match="remote stores are read-only: pull it") as refused:
            act()
        assert "secret" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_changes_is_refused(server, hundred, predicted, tmp_path):
    address, data = served(server, hundred, tmp_path)
    found = store.open(address)
    changed = bytearray(data)
    changed[-40] ^= 1
    server.files["/s.safetensors"] = bytes(changed)
    with pytest.raises(HydraOptError, match=r"s\.safetensors: was changed while it was read: open it again"):
        store.decode(found, "task 3")
    # another size, no entity tag that is compared
    server.files["/s.safetensors"] = data + b"\0"
    with pytest.raises(HydraOptError, match="was changed while it was read"):
        store.decode(found, "task 3")


def test_a_connection_that_breaks_is_tried_again(server, hundred, tmp_path):
    address, _ = served(server, hundred, tmp_path)
    found = store.open(address)
    server.broken = 1
    assert same(store.decode(found, "task 3"), store.decode(hundred, "task 3"))
    server.broken = 100
    with pytest.raises(HydraOptError, match=r"s\.safetensors: cannot be read: .*") as refused:
        store.decode(found, "task 4")
    assert "\n" not in str(refused.value)


def half(server, data):
    server.files["/s.safetensors"] = data[: len(data) // 2]


def no_ranges(server, data):
    server.ranges = False


def gone(server, data):
    server.files.clear()


def away(server, data):
    server.status = 503


def forbidden(server, data):
    server.status = 403


def no_store(server, data):
    server.files["/s.safetensors"] = b"<html>" + bytes(9000)


def long_header(server, data):
    server.files["/s.safetensors"] = (1 << 60).to_bytes(8, "little") + data[8:]


def wild_offsets(server, data):
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].replace(b'"data_offsets":[0,', b'"data_offsets":[9,')
    server.files["/s.safetensors"] = data[:8] + text + data[8 + length :]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (half, "damaged store"),
        (no_ranges, "does not serve byte ranges: download the file"),
        (gone, "no such file"),
        (away, "the server says 503"),
        (forbidden, "not allowed"),
        (no_store, "not a complete safetensors file"),
        (long_header, "not a complete safetensors file"),
        (wild_offsets, "is no tensor of bytes"),
    ],
)
def test_what_is_no_store_is_refused_in_one_line(server, hundred, tmp_path, harm, said):
    address, data = served(server, hundred, tmp_path)
    harm(server, data)
    with pytest.raises(HydraOptError, match=said) as refused:
        store.open(address.replace("//", "//me:secret@") + "?X-Amz-Signature=secret")
    text = str(refused.value)
    assert address in text
    assert "secret" not in text
    assert "\n" not in text


def test_no_server(hundred):
    with running(Files()) as server:
        port = server.port
    with pytest.raises(HydraOptError, match="cannot be read: no connection: check the network"):
        store.open(f"http://127.0.0.1:{port}/s.safetensors")


def test_every_byte_of_a_damaged_file_is_noticed(server, predicted, tmp_path):
    address, data = served(server, predicted, tmp_path)
    for at in np.linspace(0, len(data) - 1, 60).astype(int):
        harmed = bytearray(data)
        harmed[at] ^= 1
        server.files["/s.safetensors"] = bytes(harmed)
        try:
            store.verify(address)
        except HydraOptError:
            continue
        # spaces that fill up the header are nobody's
        assert data[at] == ord(" ")


@pytest.mark.parametrize("text", ["hf:", "hf:name", "hf:org/", "hf:/name", "hf:org/name/file.bin", "hf:@v1"])
def test_what_is_no_address(text):
    with pytest.raises(HydraOptError, match="give hf:ORG/NAME"):
        remote.parse_address(text)


def test_addresses_without_the_client(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for address in ("hf:org/name", "https://example.org/s.safetensors"):
        with pytest.raises(HydraOptError, match="needs huggingface_hub: install the hub extra"):
            store.open(address)


def test_secrets_are_not_told(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-mine")
    found = network.redact(
        "Illegal header value b'Bearer hf_abcDEF123' a-token-of-mine https://u:p@h.org/x?sig=1#y hf_zzzzz"
    )
    assert found == "Illegal header value b'Bearer ***' *** https://h.org/x ***"


def test_an_address_and_its_parts():
    found = remote.parse_address("hf:org/name/sub/en.safetensors@v1")
    assert found.text == "hf:org/name/sub/en.safetensors@v1"
    assert (found.repository, found.file, found.revision) == ("org/name", "sub/en.safetensors", "v1")
    assert remote.parse_address("hf:org/name").text == "hf:org/name"


def test_looking_at_a_store_costs_its_headers(server, hundred, tmp_path):
    address, data = served(server, hundred, tmp_path)
    assert remote.find(address).size == len(data)
    assert server.sent == remote.FIRST
    store.open(address)
    assert server.sent < 2 * remote.FIRST + len(data) / 1000
    # a file that is smaller than the first request
    use = np.zeros(1, np.int32)
    one = Factors(np.ones((1, 4, 2), np.float32), np.ones((1, 2, 4), np.float32), use, use)
    small, data = served(server, plain_store(["x"], {"q": (one,)}), tmp_path, "one.safetensors")
    assert len(data) < remote.FIRST
    assert store.open(small).tasks == ("x",)


def test_folders_on_demand_fetch_the_tasks_asked_for(server, hundred, tmp_path):
    address, data = served(server, hundred, tmp_path)
    header = 8 + int.from_bytes(data[:8], "little")
    folders = TaskFolders(address, tmp_path / "cache")
    found = read_adapter(folders.folder("task 42"))
    wanted = store.decode(hundred, "task 42")
    for m in wanted.a:
        np.testing.assert_allclose(found.a[m] @ found.b[m], wanted.a[m] @ wanted.b[m], atol=1e-5)
    assert server.sent <= 1.05 * (header + bytes_of_tasks(hundred)["task 42"])
    sent = server.sent
    assert folders.folder("task 42").is_dir()
    assert server.sent == sent
    # another file there: the folders of before stay, others are of the new one
    changed = store.select(hundred, [f"task {k}" for k in range(50)])
    served(server, changed, tmp_path)
    assert folders.folder("task 42").is_dir()
    with pytest.raises(HydraOptError, match="no task 'task 77'"):
        folders.folder("task 77")
    assert read_adapter(folders.folder("task 7")).a.keys() == wanted.a.keys()
    folders.close()


@pytest.mark.parametrize(("harm", "said"), [(half, "damaged store"), (gone, "no such"), (away, "says 503")])
def test_folders_of_a_store_that_breaks_are_refused_in_one_line(server, hundred, tmp_path, harm, said):
    """Half a file, none, a server that is down: nothing is half written, and what comes back is served."""
    address, data = served(server, hundred, tmp_path)
    folders = TaskFolders(address, tmp_path / "cache")
    kept = folders.folder("task 1")
    harm(server, data)
    with pytest.raises(HydraOptError, match=said) as refused:
        folders.folder("task 3")
    assert "\n" not in str(refused.value)
    assert [x for x in (tmp_path / "cache").glob("*") if x.is_dir() and x.name != "users"] == [kept]
    server.files["/s.safetensors"], server.status = data, 0
    wanted = store.decode(hundred, "task 3")
    assert read_adapter(folders.folder("task 3")).a.keys() == wanted.a.keys()
    folders.close()
