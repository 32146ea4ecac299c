"""Strangers' input: no traceback, no hang, no memory, no way out of a folder, no pickle."""

import contextlib
import copy
import json
import pickle
import resource
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydraopt_jax import compression, formats, store, synthetic
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import Hydra
from hydraopt_jax.store import tensors

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(2**63), 2**63, 1 << 40, 0, -1])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("name", "seed"), [(x.parent.name, x) for x in sorted(targets.CORPUS.rglob("*")) if x.is_file()]
)
def test_the_corpus(name, seed):
    targets.TARGETS[name](seed.read_bytes())


def test_the_seeds_are_good_input():
    seeds = targets.seeds()
    assert targets.read(seeds["config"], seeds["safetensors"]).a["q"].shape == (3, 2)
    assert targets.restore(seeds["index"]).tasks == ("one", "../two")
    assert all((targets.CORPUS / k / "valid").exists() for k in seeds)


@SETTINGS
@given(field=st.sampled_from([*targets.CONFIG, "rank_pattern", "alpha_pattern", "use_rslora"]), value=JSON)
def test_any_value_of_any_field(field, value):
    targets.config(json.dumps({**targets.CONFIG, field: value}).encode())


@SETTINGS
@given(
    side=st.sampled_from("AB"),
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=JSON | st.lists(NUMBERS, max_size=3),
)
def test_any_safetensors_header(side, field, value):
    size = struct.unpack("<Q", targets.weights()[:8])[0]
    fields = json.loads(targets.weights()[8 : 8 + size])
    fields[targets.KEY.format(side)][field] = value
    targets.safetensors(targets.header(fields))


def places(node, path=()):
    """Every place in a JSON value."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(p for k, v in inner for p in places(v, (*path, k)))]


@SETTINGS
@given(data=st.data(), value=JSON | st.sampled_from(["float64", "O", "../../x", [[[0, 0], [0, 0], None]]]))
def test_any_value_anywhere_in_an_index(data, value):
    index = copy.deepcopy(targets.small_store()[0])
    *path, last = data.draw(st.sampled_from(places(index)[1:]))
    node = index
    for step in path:
        node = node[step]
    node[last] = value
    targets.index(json.dumps(index).encode())


@SETTINGS
@given(
    data=st.data(),
    name=st.sampled_from(["segmented_store", "coded_store"]),
    value=JSON | NUMBERS | st.sampled_from([[0, 0], [-1, 1 << 40], [[0, 9]]]),
)
def test_any_value_anywhere_in_what_is_said_of_segments(data, name, value):
    index, bodies = getattr(targets, name)()
    assert len(targets.restore(json.dumps(index).encode(), bodies).segments) == 2
    index = copy.deepcopy(index)
    inside = [x for x in places(index) if x[:1] == ("headers",) or x[:2] == ("manifest", "segments")]
    *path, last = data.draw(st.sampled_from(inside))
    node = index
    for step in path:
        node = node[step]
    node[last] = value
    targets.index(json.dumps(index).encode(), bodies)


@SETTINGS
@given(data=st.data(), value=JSON | st.sampled_from(["state/data_1", [["", 9]], [], {}, "../../x"]))
def test_any_value_anywhere_in_a_manifest_of_several_arrays(data, value):
    path, said = targets.large_store()
    assert len(said["segments"][0]["arrays"]) > 1
    changed = copy.deepcopy(said)
    *steps, last = data.draw(st.sampled_from(places(said)[1:]))
    node = changed
    for step in steps:
        node = node[step]
    node[last] = value
    targets.guarded(lambda: targets.describe(path, changed))
    assert targets.describe(path, said).tasks == ("one", "../two")


@SETTINGS
@given(text=st.text(max_size=12) | st.from_regex(r"[0-9.]{1,4}(e[0-9]{1,4})?[KMGiB%]{0,3}", fullmatch=True))
def test_any_option_string(text):
    targets.options(text.encode(errors="replace"))


def test_headers_that_claim_a_terabyte(tmp_path):
    """No more than a few megabytes are taken before each is refused."""
    index = copy.deepcopy(targets.small_store()[0])
    index["headers"][0]["modules"][0][1][0][1] = 1 << 38
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(HydraOptError, match="more numbers than its bytes can hold"):
        targets.restore(json.dumps(index).encode())
    fields = {targets.KEY.format("A"): {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}
    with pytest.raises(HydraOptError, match="safetensors"):
        targets.read(json.dumps(targets.CONFIG).encode(), targets.header(fields))
    with pytest.raises(HydraOptError, match="safetensors"):
        targets.read(json.dumps(targets.CONFIG).encode(), struct.pack("<Q", 1 << 40) + b"{}")
    path, said = targets.large_store()
    changed = copy.deepcopy(said)
    (size, rest) = (x[1] for x in said["segments"][0]["arrays"])
    changed["segments"][0]["bytes"] = (1 << 40) + rest
    changed["segments"][0]["arrays"][0][1] = 1 << 40
    with pytest.raises(HydraOptError, match="claims what its files cannot hold"):
        targets.describe(path, changed)
    (array,) = path.glob("segments/*/state/data_0/.zarray")
    was = array.read_text()
    array.write_text(was.replace(f'"shape":[{size}]', f'"shape":[{1 << 40}]'))
    with pytest.raises(HydraOptError, match="is not the array that the manifest describes"):
        targets.describe(path, said)
    array.write_text(was)
    assert targets.describe(path, said).tasks == ("one", "../two")
    assert tensors.inflate_at_most(zlib.compress(bytes(1 << 24)), 100) == bytes(100)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000


@contextlib.contextmanager
def traced():
    """Refuses more than 24 MB."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24_000_000


@pytest.mark.parametrize("name", ["coded_store", "segmented_store"])
def test_leaves_with_bytes_changed_are_found_or_decode(name):
    """Sealed again, so that no checksum shields the decoder; memory stays what an untouched store takes."""
    index, bodies = getattr(targets, name)()
    text = json.dumps(index).encode()
    assert len(targets.restore(text, bodies).segments) == 2
    rng = np.random.default_rng(0)
    told = 0
    for n in range(300):
        data = bytearray(b"".join(bodies))
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        # tracing takes four times what decoding does
        with traced() if n % 5 == 0 else contextlib.nullcontext():
            try:
                targets.restore(text, targets.changed(bodies, bytes(data)))
            except HydraOptError as error:
                told += 1
                assert "damaged store" in str(error)  # noqa: PT017
    assert told > 150


def test_a_pattern_that_never_ended_ends():
    fields = {**targets.CONFIG, "rank_pattern": {"(a|a)*b": 2}}
    assert targets.read(json.dumps(fields).encode(), targets.weights()).a["q"].shape == (3, 2)


NAMES = ["../../x", "/etc/x", "..", ".", " ", "a\x00b", "con", "x" * 300, "a/../../b", "\\..\\x", "~", "a\nb"]


def test_task_names_never_lead_out_of_a_folder(tmp_path, capsys):
    from hydraopt_jax import cli

    made = synthetic.collection(tasks=NAMES, modules={"q": (6, 4)}, rank=1, dtype="float32")
    store.save(tmp_path / "in" / "store", compression.compress(made, form=Hydra()))
    with pytest.raises(SystemExit) as stop:
        cli.main(
            [
                "export",
                str(tmp_path / "in" / "store"),
                "--all",
                "--out",
                str(tmp_path / "in" / "out"),
                "--json",
            ]
        )
    assert stop.value.code == 0
    folders = json.loads(capsys.readouterr().out)["exported"]
    assert list(folders) == NAMES
    assert {x.name for x in tmp_path.iterdir()} == {"in"}
    assert {x.name for x in (tmp_path / "in").iterdir()} == {"store", "out"}
    assert len({x.name for x in (tmp_path / "in" / "out").iterdir()}) == len(NAMES)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_pickle_is_executed(tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(targets.CONFIG))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "done")))
    with pytest.raises(HydraOptError, match="pickle"):
        formats.read_adapter(folder)
    np.save(tmp_path / "array.npy", np.array([Bomb(tmp_path / "done")], object), allow_pickle=True)
    (folder / "adapter_model.bin").unlink()
    (folder / "adapter_model.safetensors").write_bytes((tmp_path / "array.npy").read_bytes())
    with pytest.raises(HydraOptError, match="safetensors"):
        formats.read_adapter(folder)
    assert not (tmp_path / "done").exists()
