"""vLLM's plugin, against its interface as recorded: first requests, changes, evictions, many at once."""

import asyncio
import logging
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import fake_vllm
import pytest
import served

from hydraopt_jax import store
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.integrations import hold_tasks, vllm

TASKS = served.names(8)
# for two folders and a half
LIMIT = "3300 B"


@pytest.fixture
def path(tmp_path):
    store.save(tmp_path / "s.safetensors", served.make(TASKS))
    return tmp_path / "s.safetensors"


@pytest.fixture
def registry(path, tmp_path, monkeypatch):
    """vLLM's, after it has loaded its plugins."""
    monkeypatch.setenv(vllm.ALLOW, "")
    monkeypatch.delenv(vllm.ALLOW)  # set by the middleware, and taken away again after the test
    for name, value in (("STORE", path), ("CACHE", tmp_path / "cache"), ("CACHE_LIMIT", LIMIT)):
        monkeypatch.setenv(f"HYDRAOPT_{name}", str(value))
    for name, module in fake_vllm.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    vllm.register()
    found = sys.modules["vllm.lora.resolver"].LoRAResolverRegistry
    yield found
    found.get_resolver("hydraopt").close()


def started(server):
    """A server with the middleware, after its start."""
    app = hold_tasks.HoldTasks(server)
    assert asyncio.run(fake_vllm.start(app, server)) == {"type": "lifespan.startup.complete"}
    return app


def resolve(registry, task, base=served.BASE):
    return asyncio.run(registry.get_resolver("hydraopt").resolve_lora(base, task))


def test_the_entry_point_is_vllms_and_is_called_in_every_process(registry):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for name, value in project["entry-points"]["vllm.general_plugins"].items():
        assert EntryPoint(name, value, "vllm.general_plugins").load() is vllm.register
    resolver = registry.get_resolver("hydraopt")
    assert isinstance(resolver, fake_vllm.LoRAResolver)
    vllm.register()
    assert list(registry.resolvers.items()) == [("hydraopt", resolver)]
    # a worker that is never asked opens nothing
    assert not Path(os.environ["HYDRAOPT_CACHE"]).exists()


def test_without_the_middleware_the_log_says_what_to_type(registry, path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    for before in (None, "1"):
        registry.resolvers.clear()
        monkeypatch.setattr(os, "environ", os.environ | ({vllm.ALLOW: before} if before else {}))
        vllm.register()
    (line,) = caplog.messages
    assert line.endswith("s.safetensors are served by name with --middleware " + vllm.MIDDLEWARE)
    module, name = vllm.MIDDLEWARE.rsplit(".", 1)
    assert getattr(sys.modules[module], name) is hold_tasks.HoldTasks


def test_without_a_store_nothing_is_registered(registry, monkeypatch):
    registry.resolvers.clear()
    monkeypatch.delenv("HYDRAOPT_STORE")
    vllm.register()
    assert not registry.resolvers
    with pytest.raises(HydraOptError, match=r"HoldTasks: set HYDRAOPT_STORE"):
        hold_tasks.HoldTasks(None)
    monkeypatch.setenv("HYDRAOPT_STORE", "/none")
    with pytest.raises(HydraOptError, match="/none: no store there"):
        vllm.register()
    registry.resolvers["hydraopt"] = vllm.StoreResolver()


def test_a_request_gets_a_folder_that_vllm_loads(registry, path):
    expected = served.answers(store.open(path))
    found = [resolve(registry, task) for task in TASKS[:2]]
    for task, request in zip(TASKS, found, strict=False):
        deltas = fake_vllm.read_folder(request.lora_path, 8)
        assert served.right({n: float(x.sum()) for n, x in deltas.items()}, expected[task])
        assert request.lora_name == task
    assert len({x.lora_int_id for x in found}) == 2
    assert resolve(registry, TASKS[0]) == found[0]


@pytest.mark.parametrize(
    ("task", "base", "words"),
    [
        ("task/00", served.BASE, "no task 'task/00' in the store: did you mean 'task/0'"),
        (TASKS[0], "org/other", "names 'org/base', but the model is 'org/other'"),
        ("../../etc", served.BASE, "no task '../../etc' in the store"),
    ],
)
def test_what_is_not_served_is_one_line_in_the_log(registry, caplog, task, base, words):
    with caplog.at_level(logging.WARNING):
        assert resolve(registry, task, base) is None
    (line,) = caplog.messages
    assert words in line
    assert "\n" not in line


def test_names_of_bases_need_not_be_compared(registry, monkeypatch):
    assert resolve(registry, TASKS[0], "other/base") is not None
    assert resolve(registry, TASKS[0], "/models/base-v1") is None
    monkeypatch.setenv("HYDRAOPT_ANY_BASE", "1")
    assert resolve(registry, TASKS[0], "/models/base-v1") is not None


def test_what_was_handed_out_stays_without_the_middleware(registry, monkeypatch):
    monkeypatch.setattr("hydraopt_jax.integrations.cache.PATIENCE", 0.1)
    paths = [Path(resolve(registry, task).lora_path) for task in TASKS[:2]]
    assert resolve(registry, TASKS[2]) is None
    assert all(x.is_dir() for x in paths)


def ask(app, *tasks, **said):
    """Answers to requests that come one after another."""

    async def every():
        return [await fake_vllm.post(app, "/v1/completions", {"model": x, **said}) for x in tasks]

    return asyncio.run(every())


def test_with_the_middleware_tasks_take_turns(registry, path):
    server = fake_vllm.Server(registry, served.BASE, slots=1)
    app = started(server)
    expected = served.answers(store.open(path))
    order = TASKS * 2
    for task, (status, found) in zip(order, ask(app, *order), strict=True):
        assert status == 200
        assert served.right(found, expected[task])
    assert (server.dead, server.loads) == (None, 16)
    assert ask(app, served.BASE, "unknown") == [(200, {}), (404, {})]
    assert not registry.get_resolver("hydraopt").folders.cache._holds


def test_the_middleware_allows_tasks_and_no_paths(registry, monkeypatch, caplog):
    """One variable and the middleware: vLLM asks for tasks, and has no request that loads any path."""
    server = fake_vllm.Server(registry, served.BASE, slots=1)
    assert ask(hold_tasks.HoldTasks(server), TASKS[0])[0][0] == 404
    app = started(server)
    assert ask(app, TASKS[0])[0][0] == 200
    assert not server.open
    assert not caplog.messages
    # what the user has said stays
    monkeypatch.setenv(vllm.ALLOW, "0")
    app = started(fake_vllm.Server(registry, served.BASE, slots=1))
    assert caplog.messages == [f"no task is served: {vllm.ALLOW}=0: leave it out"]
    assert ask(app, TASKS[0])[0][0] == 404
    monkeypatch.setenv(vllm.ALLOW, "true")
    server = fake_vllm.Server(registry, served.BASE, slots=1)
    assert ask(started(server), TASKS[0])[0][0] == 200
    assert server.open
    assert os.environ[vllm.ALLOW] == "true"


def test_several_servers_of_one_engine_are_refused(registry):
    """Each would number adapters by itself, which vLLM refuses where the variable is set from the first."""
    server = fake_vllm.Server(registry, served.BASE, slots=1, servers=2)
    said = asyncio.run(fake_vllm.start(hold_tasks.HoldTasks(server), server))
    assert said["type"] == "lifespan.startup.failed"
    assert "give --api-server-count 1" in said["message"]
    assert vllm.ALLOW not in os.environ


def test_the_middleware_leaves_other_requests_alone(registry):
    seen = []

    async def app(scope, receive, send):
        seen.append((scope["type"], receive))

    holding = hold_tasks.HoldTasks(app)
    for scope in (
        {"type": "lifespan"},
        {"type": "http", "method": "GET"},
        {"type": "http", "method": "POST", "headers": [(b"content-type", b"multipart/form-data")]},
    ):
        asyncio.run(holding(scope, "as it was", None))
    assert seen == [(x, "as it was") for x in ("lifespan", "http", "http")]
    server = hold_tasks.HoldTasks(fake_vllm.Server(registry, served.BASE, slots=1))
    with pytest.raises((TypeError, KeyError)):  # as without the middleware
        asyncio.run(fake_vllm.post(server, "/v1/completions", [1]))


def test_a_task_that_changed_is_refused_until_vllm_forgets_it(registry, path):
    server = fake_vllm.Server(registry, served.BASE, slots=1)
    app = started(server)
    ask(app, TASKS[0])
    changed = served.make(TASKS, seed=1)
    store.save(path, changed, overwrite=True)
    # as long as its folder is there, it is what vLLM knows
    assert ask(app, TASKS[0])[0][0] == 200
    ask(app, *TASKS[1:4])
    ((status, said),) = ask(app, TASKS[0])
    assert status == 409
    assert "has changed since it was loaded: start the server again, or" in said["error"]["message"]
    assert "POST its name to /v1/unload_lora_adapter" in said["error"]["message"]
    assert asyncio.run(fake_vllm.post(app, "/v1/unload_lora_adapter", {"lora_name": "none"}))[0] == 404
    assert ask(app, TASKS[0])[0][0] == 409
    assert asyncio.run(fake_vllm.post(app, "/v1/unload_lora_adapter", {"lora_name": TASKS[0]}))[0] == 200
    ((status, found),) = ask(app, TASKS[0])
    assert status == 200
    assert served.right(found, served.answers(changed)[TASKS[0]])
    store.save(path, served.make(TASKS[1:]), overwrite=True)
    ask(app, *TASKS[4:7])
    assert ask(app, TASKS[0])[0][0] == 409
    assert server.dead is None


def test_a_damaged_store_is_an_answer_and_no_end(registry, path):
    app = started(fake_vllm.Server(registry, served.BASE, slots=1))
    ask(app, *TASKS[:4])
    path.write_bytes(path.read_bytes()[:-40])
    ((status, said),) = ask(app, TASKS[0])
    assert status == 503
    assert "damaged store" in said["error"]["message"]


def test_a_store_that_is_gone_stops_nothing_else(registry, path, caplog):
    server = fake_vllm.Server(registry, served.BASE, slots=1)
    app = started(server)
    ask(app, *TASKS[:4])
    path.rename(path.with_name("moved"))
    assert ask(app, served.BASE, TASKS[3], TASKS[4])[::2] == [(200, {}), (404, {})]
    assert "s.safetensors: no store there" in caplog.messages[-1]
    assert ask(app, TASKS[3])[0][0] == 200
    ((status, said),) = ask(app, TASKS[0])
    assert (status, server.dead) == (503, None)
    assert "no store there" in said["error"]["message"]


def test_a_request_that_is_given_up_holds_on_for_a_while(registry, monkeypatch):
    monkeypatch.setattr(hold_tasks, "LINGER", 0.1)
    resolver = registry.get_resolver("hydraopt")

    async def app(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        raise RuntimeError("nobody listens")

    async def scenario():
        with pytest.raises(RuntimeError):
            await fake_vllm.post(hold_tasks.HoldTasks(app), "/v1/completions", {"model": TASKS[0]})
        counts = [resolver.requests[TASKS[0]].count]
        await asyncio.sleep(0.2)
        return [*counts, resolver.requests[TASKS[0]].count]

    assert asyncio.run(scenario()) == [1, 0]


@pytest.mark.parametrize(
    ("where", "said", "status", "counts"),
    [
        ("/v1/completions", True, 200, [0, 0]),
        ("/v1/responses", False, 200, [0, 0]),
        ("/v1/responses", True, 400, [0, 0]),
        ("/v1/responses", True, 200, [1, 0]),
        # vLLM's models read these as True
        ("/v1/responses", "true", 200, [1, 0]),
        ("/v1/responses", 1, 200, [1, 0]),
    ],
)
def test_a_background_request_holds_on_for_a_while(registry, monkeypatch, where, said, status, counts):
    monkeypatch.setattr(hold_tasks, "BACKGROUND", 0.05)
    resolver = registry.get_resolver("hydraopt")

    async def app(scope, receive, send):
        await hold_tasks.refuse(send, status, "")

    async def scenario():
        body = {"model": TASKS[0], "background": said}
        assert (await fake_vllm.post(hold_tasks.HoldTasks(app), where, body))[0] == status
        found = [resolver.requests[TASKS[0]].count]
        await asyncio.sleep(0.1)
        return [*found, resolver.requests[TASKS[0]].count]

    assert asyncio.run(scenario()) == counts


@pytest.mark.parametrize("body", [b"", b"[" * 200_000, b'{"model": ', b"\xff\xfe", b"[1]"])
def test_a_body_that_is_no_object_is_left_to_vllm(body):
    assert hold_tasks.parse_request(body) == {}


def test_a_request_that_is_cancelled_while_it_waits_lets_go(registry, monkeypatch):
    monkeypatch.setattr("hydraopt_jax.integrations.cache.PATIENCE", 1)
    server = fake_vllm.Server(registry, served.BASE, slots=1)
    app = started(server)
    resolver = registry.get_resolver("hydraopt")
    ask(app, *TASKS[:4])
    full = [resolver.folders.folder(x) for x in TASKS[2:4]]

    async def scenario():
        waiting = asyncio.create_task(fake_vllm.post(app, "/v1/completions", {"model": TASKS[0]}))
        await asyncio.sleep(0.2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(scenario())
    resolver.folders.release(TASKS[2])
    resolver.folders.release(TASKS[3])
    assert [x[0] for x in ask(app, *TASKS)] == [200] * 8
    assert resolver.requests[TASKS[0]].count == 0
    assert len(full) == 2


LOAD = """
import asyncio, json, os, random, sys
os.fsync = lambda handle: None
sys.modules |= {x: None for x in ("jax", "jaxlib", "flax", "optax", "orbax", "torch")}
import fake_vllm, served
sys.modules |= fake_vllm.modules()
from hydraopt_jax import store
from hydraopt_jax.integrations import hold_tasks, vllm

vllm.register()
registry = sys.modules["vllm.lora.resolver"].LoRAResolverRegistry
server = fake_vllm.Server(registry, served.BASE, slots=20)
app = hold_tasks.HoldTasks(server)
asyncio.run(fake_vllm.start(app, server))
content = store.open(os.environ["HYDRAOPT_STORE"])
expected = served.answers(content)
order = random.Random(int(sys.argv[1])).choices(content.tasks, k=200)

async def one(slots, task):
    async with slots:
        said = {"model": task, "wait": 0.01}
        status, found = await fake_vllm.post(app, "/v1/completions", said)
        return status == 200 and served.right(found, expected[task])

async def every():
    slots = asyncio.Semaphore(16)
    return await asyncio.gather(*(one(slots, x) for x in order))

good = sum(asyncio.run(every()))
print(good, len(order), server.dead, server.loads > 20)
"""


def test_two_servers_of_two_hundred_tasks_with_twenty_slots(tmp_path):
    store.save(tmp_path / "s.safetensors", served.make(served.names(200)))
    here = Path(served.__file__).parent
    places = os.pathsep.join([str(here), str(here.parent), *sys.path])
    environment = {
        **os.environ,
        "PYTHONPATH": places,
        "HYDRAOPT_STORE": str(tmp_path / "s.safetensors"),
        "HYDRAOPT_CACHE": str(tmp_path / "cache"),
        # twenty folders
        "HYDRAOPT_CACHE_LIMIT": "26KB",
    }
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(n)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for n in range(2)
    ]
    said = [x.communicate(timeout=300)[0].split() for x in servers]
    assert said == [["200", "200", "None", "True"]] * 2
    assert sum(x.stat().st_size for x in (tmp_path / "cache").glob("*-*/*")) <= 26_000
