"""The verbs of the hub against one on this machine, in processes of their own: push, pull, and what reads."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import served
from copies import copies
from hub_server import ROUTES, FileHandler, Hub, HubHandler, running

from hydraopt_jax import formats, remote, store
from hydraopt_jax.integrations.model_card import BEGIN, bytes_of_tasks
from hydraopt_jax.store import sizes

pytest.importorskip("huggingface_hub")
TOKEN = "hf_secretSecretSecret"
# nothing of these verbs needs them
HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax")
STORES = f"import sys\nfor x in {HEAVY}: sys.modules[x] = None\n"
POISON = f"{STORES}sys.modules['tensorstore'] = None\n"


@pytest.fixture(scope="module")
def server():
    with running(Hub()) as hub, running(hub.kept):
        yield hub


@pytest.fixture(autouse=True)
def fresh(server):
    """A hub without anything on it."""
    server.repositories.clear()
    server.heads.clear()
    server.kept.files.clear()
    server.log.clear()
    server.kept.log.clear()
    server.token, server.kept.ranges = TOKEN, True


@pytest.fixture
def of_the_hub(server, tmp_path):
    """That of a process which takes the server for the hub."""
    known = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS"))}
    return known | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    with copies(tmp_path_factory.mktemp("said")) as call:
        yield call


@pytest.fixture
def run(copy, of_the_hub, tmp_path):
    """The command: `run(arguments, **environment)` gives exit status, output and errors."""
    known = of_the_hub

    def call(*arguments, poison=POISON, **environment):
        environment = {k: v for k, v in (known | environment).items() if v}
        status, said, error = copy(arguments, poison, environment, tmp_path)
        assert TOKEN not in said + error
        return status, said, error

    return call


@pytest.fixture
def ok(run):
    """The JSON object of a command that goes well and says nothing else."""

    def call(*arguments, **environment):
        status, said, error = run(*arguments, "--json", **environment)
        assert (status, error) == (0, ""), error
        return json.loads(said)

    return call


@pytest.fixture
def refused(run):
    """The line of a command that is refused."""

    def call(*arguments, **environment):
        status, said, error = run(*arguments, **environment)
        assert (status, said) == (2, ""), error
        assert error.count("\n") == 1, error
        assert error.startswith("hydraopt: ")
        return error

    return call


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A store of three tasks of one base, and one that was added; one of the folders has a card."""
    place = tmp_path_factory.mktemp("kept")
    served.write_trained(place)
    return place


@pytest.fixture
def pushed(server, kept, tmp_path):
    """A repository that has the store on it already, and its commit."""
    return server.commit("org/name", {"store.safetensors": (kept / "s.safetensors").read_bytes()})


def same(one, two):
    a, b = store.open(one), store.open(two)
    if not set(a.tasks) <= set(b.tasks):
        return False
    both = [(store.decode(a, t).a, store.decode(b, t).a) for t in a.tasks]
    return all((x[m] == y[m]).all() for x, y in both for m in a.shapes)


@pytest.mark.parametrize("name", ["s", "s.safetensors"])
def test_a_store_is_pushed_and_pulled(server, kept, ok, tmp_path, name):
    done = ok("push", kept / name, "org/name", poison=STORES)
    assert done["repository"] == "org/name"
    assert done["revision"] == server.heads["org/name", "main"]
    assert done["base_models"] == ["org/base-1b"]
    assert done["licenses"] == {"one": "apache-2.0"}
    on_hub = server.repositories["org/name"][done["revision"]]
    assert len(on_hub["store.safetensors"]) == done["bytes"]
    # where the adapters lay is nobody's business
    assert str(kept).encode() not in on_hub["store.safetensors"]
    back = ok("pull", "org/name", tmp_path / "back.safetensors")
    assert back["revision"] == done["revision"]
    assert back["source"] == f"hf:org/name@{done['revision']}"
    assert (tmp_path / "back.safetensors").read_bytes() == on_hub["store.safetensors"]
    assert same(tmp_path / "back.safetensors", kept / "s")


def test_the_card_says_what_is_there(server, kept, ok):
    from huggingface_hub import ModelCard

    revision = ok("push", kept / "s.safetensors", "org/name", "--license", "mit")["revision"]
    card = ModelCard(server.repositories["org/name"][revision]["README.md"].decode())
    assert card.data.base_model == "org/base-1b"
    assert card.data.license == "mit"
    assert {"lora", "peft", "hydraopt"} <= set(card.data.tags)
    content = store.open(kept / "s.safetensors")
    assert card.data.hydraopt["tasks"] == list(content.tasks)
    rows = [x for x in card.text.splitlines() if x.startswith("| <code>")]
    assert len(rows) == len(content.tasks)
    taken, errors = bytes_of_tasks(content), store.store.task_errors(content.errors)
    for row, task, error in zip(rows, content.tasks, errors, strict=True):
        cells = [x.strip() for x in row.strip("| ").split(" | ")]
        assert cells[1:3] == [f"{error:.2e}", f"{taken[task]:,}"]
    assert "<code>two&#124;&lt;b&gt;/three</code>" in rows[1]
    assert "apache-2.0" in rows[0]
    assert "not known" in rows[1]
    for text in ("hydraopt export hf:org/name --task one", "HYDRAOPT_STORE", "hydra.open('hf:org/name')"):
        assert text in card.text


def test_a_card_keeps_what_others_wrote(server, kept, ok):
    before = "---\nlicense: mit\ntags: [mine]\nlanguage: de\n---\n# Mine\n\nHand-written.\n"
    server.commit("org/name", {"README.md": before.encode()})
    once = ok("push", kept / "s.safetensors", "org/name")["revision"]
    text = server.repositories["org/name"][once]["README.md"].decode()
    head, _, tail = text.partition("<!-- hydraopt: end -->")
    assert tail.strip() == "# Mine\n\nHand-written."
    assert "license: mit" in head
    assert "language: de" in head
    assert re.findall(r"^- .*", head, re.M)[:2] == ["- mine", "- hydraopt"]
    twice = ok("push", kept / "s", "org/name", "--message", "again", poison="")["revision"]
    again = server.repositories["org/name"][twice]["README.md"].decode()
    assert again.count(BEGIN) == 1
    assert again == text


def test_a_branch_is_made_and_pinned(server, kept, ok, tmp_path, pushed):
    done = ok("push", kept / "s.safetensors", "org/name", "--revision", "draft", "--message", "second")
    assert server.heads["org/name", "main"] == pushed != done["revision"]
    for revision, expected in (("draft", done["revision"]), (pushed[:40], pushed), ("main", pushed)):
        found = ok("pull", f"hf:org/name@{revision}", tmp_path / f"{revision}.safetensors")
        assert found["revision"] == expected


def test_one_task_is_read_by_ranges(server, kept, ok, tmp_path, pushed):
    content = store.open(kept / "s.safetensors")
    length = int.from_bytes((kept / "s.safetensors").read_bytes()[:8], "little")
    done = ok("export", "hf:org/name", "--task", "four", "--out", tmp_path / "four")
    found = formats.read_adapter(done["exported"]["four"])
    wanted = store.decode(content, "four")
    assert all((found.a[m] == wanted.a[m]).all() for m in found.a)
    # segments' own headers and digests are a small part
    assert server.kept.sent <= 1.05 * (8 + length + bytes_of_tasks(content)["four"]) + 4096
    assert server.kept.sent < sizes.size_on_disk(kept / "s.safetensors")
    # the token is the hub's only, not the host's that keeps its files
    secret = lambda headers: f"Bearer {TOKEN}" in headers.values()  # noqa: E731
    assert all(secret(headers) for *_, headers, _ in server.log)
    assert not any(secret(headers) for *_, headers, _ in server.kept.log)
    # all requests are of one commit
    asked = {path for method, path, *_ in server.log if method == "GET"}
    assert asked == {f"/org/name/resolve/{pushed}/store.safetensors"}


def test_one_task_is_pulled_alone(server, kept, ok, tmp_path, pushed):
    ok("pull", "org/name", tmp_path / "some.safetensors", "--task", "four", "--base", "base-1b")
    assert store.open(tmp_path / "some.safetensors").tasks == ("four",)
    assert same(tmp_path / "some.safetensors", kept / "s")
    assert server.kept.sent < sizes.size_on_disk(kept / "s.safetensors")
    assert store.verify(tmp_path / "some.safetensors") > 0


def test_verbs_that_read_take_an_address(ok, kept, tmp_path, pushed):
    assert ok("inspect", "hf:org/name@main")["tasks"] == list(store.open(kept / "s").tasks)
    assert ok("verify", "hf:org/name")["checksums"] == "ok"
    ok("pack", f"hf:org/name@{pushed}", tmp_path / "p.safetensors")
    assert (tmp_path / "p.safetensors").read_bytes() == (kept / "s.safetensors").read_bytes()


def test_what_is_in_the_cache_needs_no_network(server, kept, ok, refused, tmp_path, pushed):
    ok("pull", "org/name", tmp_path / "a.safetensors")
    server.log.clear()
    server.kept.log.clear()
    offline = {"HF_HUB_OFFLINE": "1"}
    away = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for n, environment in enumerate((offline, away)):
        done = ok("pull", "org/name", tmp_path / f"b{n}.safetensors", **environment)
        assert done["revision"] == pushed
        assert same(tmp_path / f"b{n}.safetensors", kept / "s")
        assert ok("inspect", "hf:org/name", **environment)["tasks"]
    # a commit that is there is not asked for
    ok("inspect", f"hf:org/name@{pushed}")
    assert not server.log
    assert "offline (HF_HUB_OFFLINE is set), and it is not in the cache" in refused(
        "inspect", "hf:org/other", **offline
    )
    # a newer one is
    server.commit("org/name", {"store.safetensors": (kept / "s.safetensors").read_bytes()})
    assert ok("pull", "org/name", tmp_path / "c.safetensors")["revision"] != pushed


def test_a_broken_copy_in_the_cache_is_not_used(server, kept, ok, tmp_path, pushed):
    ok("pull", "org/name", tmp_path / "a.safetensors")
    (copy,) = (tmp_path / "home").rglob("snapshots/*/store.safetensors")
    blob = copy.resolve()
    blob.write_bytes(blob.read_bytes()[: blob.stat().st_size // 2])
    assert ok("inspect", "hf:org/name")["tasks"]
    ok("pull", "org/name", tmp_path / "b.safetensors")
    assert same(tmp_path / "b.safetensors", kept / "s")


REFUSED = [
    (
        ["pull", "org/name", "x.safetensors", "--base", "other/model"],
        {},
        "adapters are of 'org/base-1b', not of",
    ),
    (["pull", "org/name", "x.safetensors", "--task", "fuor"], {}, "did you mean 'four'"),
    (["pull", "org/name@v9", "x.safetensors"], {}, "no such revision"),
    (["pull", "org/none", "x.safetensors"], {}, "no such repository, or a private one"),
    (["pull", "org/name/other.safetensors", "x.safetensors"], {}, "no such file"),
    (["pull", "org/name", "x.safetensors"], {"HF_TOKEN": ""}, "HF_TOKEN"),
    (["pull", "org/name", "x.safetensors"], {"HF_TOKEN": "hf_wrongWrong"}, "HF_TOKEN"),
    (["pull", "org/name", "x.safetensors"], {"HF_TOKEN": f"{TOKEN}\x01"}, "cannot be"),
    (["pull", "org/name", "x.safetensors"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "no connection"),
    (["pull", "org/name", "x.safetensors"], {"HF_HUB_OFFLINE": "1"}, "offline (HF_HUB_OFFLINE is set)"),
    (["pull", "https://u:p@h.org/x", "x.safetensors"], {}, "https://h.org/x: give ORG/NAME"),
    (["pull", "name", "x.safetensors"], {}, "give hf:ORG/NAME"),
    (["pull", "org/name", "hf:org/other"], {}, "remote stores are read-only"),
    (["push", "{kept}/s.safetensors", "org/name@main"], {}, "--revision main"),
    (["push", "{kept}/none", "org/name"], {}, "no store there"),
    (["push", "{kept}/s.safetensors", "org/new"], {"HF_TOKEN": "hf_wrongWrong"}, "not allowed"),
    (["push", "{kept}/s.safetensors", "org/new"], {"HF_TOKEN": ""}, "not allowed"),
    (["push", "{kept}/s.safetensors", "org/new"], {"HF_HUB_OFFLINE": "1"}, "offline (HF_HUB_OFFLINE is set)"),
    (["push", "{kept}/s.safetensors", "org/new"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "no connection"),
    (["add", "hf:org/name", "{kept}/in0"], {}, "remote stores are read-only"),
    (["remove", "hf:org/name", "one"], {}, "remote stores are read-only"),
    (["compress", "{kept}/in0", "--out", "hf:org/name"], {}, "remote stores are read-only"),
]


@pytest.mark.parametrize(("arguments", "environment", "said"), REFUSED)
def test_what_is_refused(server, kept, refused, tmp_path, pushed, arguments, environment, said):
    before = set(tmp_path.iterdir())
    poison = "" if arguments[0] in ("add", "remove", "compress") else POISON
    error = refused(*(x.format(kept=kept) for x in arguments), poison=poison, **environment)
    assert said in error
    assert environment.get("HF_TOKEN", TOKEN)[:10] not in error or not environment.get("HF_TOKEN")
    assert {x for x in tmp_path.iterdir() if x.name != "home"} == {x for x in before if x.name != "home"}
    assert server.heads == {("org/name", "main"): pushed}


def test_a_download_that_ends_half_way(server, monkeypatch, ok, refused, tmp_path, pushed):
    before = FileHandler.do_GET

    def half(self):
        # the header comes whole
        server.kept.broken = int(not re.fullmatch(r"bytes=\d+-\d+", self.headers.get("Range", "")))
        return before(self)

    with monkeypatch.context() as patch:
        patch.setattr(FileHandler, "do_GET", half)
        error = refused("pull", "org/name", tmp_path / "x.safetensors")
    server.kept.broken = 0
    assert "cannot be downloaded" in error
    assert [x.name for x in tmp_path.iterdir()] == ["home"]
    ok("pull", "org/name", tmp_path / "x.safetensors")


def test_a_download_that_is_damaged(server, refused, ok, tmp_path, pushed):
    """It is noticed; what was there before stays."""
    ok("pull", "org/name", tmp_path / "x.safetensors", "--task", "one")
    before = (tmp_path / "x.safetensors").read_bytes()
    sha = next(iter(server.kept.files))
    whole = server.kept.files[sha]
    damaged = bytearray(whole)
    damaged[-1000] ^= 1
    server.repositories["org/name"][pushed]["store.safetensors"] = bytes(damaged)
    error = refused("pull", "org/name", tmp_path / "x.safetensors", "--overwrite")
    assert "damaged store" in error
    assert (tmp_path / "x.safetensors").read_bytes() == before
    assert not [x for x in tmp_path.iterdir() if x.name.startswith(".")]


def test_a_push_that_another_one_overtakes(server, kept, refused, monkeypatch, pushed):
    before = HubHandler.preupload

    def overtaken(self, repo, revision):
        server.commit(repo, {"x": b"1"})
        return before(self, repo, revision)

    routes = [(p, overtaken if m is before else m) for p, m in ROUTES["POST"]]
    monkeypatch.setitem(ROUTES, "POST", routes)
    assert "was changed meanwhile: try again" in refused("push", kept / "s.safetensors", "org/name")


def test_adapters_of_the_hub_are_of_one_commit(server, kept, ok, tmp_path):
    """Also with a revision, and their licenses are asked for when their store is pushed."""
    folder = kept / "in0"
    names = ("adapter_config.json", "adapter_model.safetensors")
    card = b"---\nlicense: gpl-3.0\n---\n"
    oid = server.commit("org/lora", {**{x: (folder / x).read_bytes() for x in names}, "README.md": card})
    server.commit("org/lora", {names[0]: b"{}"})
    store_file = tmp_path / "s.safetensors"
    ok("compress", f"one=hf:org/lora@{oid}", "--out", store_file, "--max-error", "0.1", poison="")
    done = ok("push", store_file, "org/store")
    assert done["licenses"] == {"one": "gpl-3.0"}
    assert b"license: gpl-3.0" in server.repositories["org/store"][done["revision"]]["README.md"]


VLLM = """
import asyncio, sys
import fake_vllm
sys.modules.update(fake_vllm.modules())
from hydraopt_jax.integrations import vllm
vllm.register()
resolver = sys.modules["vllm.lora.resolver"].LoRAResolverRegistry.get_resolver("hydraopt")
for task in sys.argv[1:]:
    found = asyncio.run(resolver.resolve_lora("org/base", task))
    print(found and found.lora_path)
resolver.close()
"""


def test_vllm_serves_tasks_of_a_store_on_the_hub(server, of_the_hub, tmp_path):
    """HYDRAOPT_STORE=hf:ORG/NAME: a request fetches its task alone; an unknown one is a line in the log."""
    tasks = [f"task {n}" for n in range(200)]
    content = served.make(tasks)
    store.save(tmp_path / "s.safetensors", content)
    data = (tmp_path / "s.safetensors").read_bytes()
    server.commit("org/name", {"store.safetensors": data})
    here = Path(__file__).parent
    environment = of_the_hub | {
        "HYDRAOPT_STORE": "hf:org/name",
        "HYDRAOPT_CACHE": str(tmp_path / "tasks"),
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), str(here.parents[1])]),
    }
    found = subprocess.run(
        [sys.executable, "-c", VLLM, "task 7", "task 500"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    path, none = found.stdout.splitlines()
    assert none == "None"
    assert "no task 'task 500' in the store: did you mean 'task 50'" in found.stderr
    folder, wanted = formats.read_adapter(path), store.decode(content, "task 7")
    for name in wanted.a:
        np.testing.assert_allclose(
            folder.a[name] @ folder.b[name], wanted.a[name] @ wanted.b[name], atol=1e-5
        )
    header = 8 + int.from_bytes(data[:8], "little")
    assert server.kept.sent < 1.05 * header + 3 * bytes_of_tasks(content)["task 7"] + remote.FIRST < len(data)
