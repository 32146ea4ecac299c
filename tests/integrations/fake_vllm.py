"""The part of vLLM that a resolver meets, recorded from its sources (0.9 to 0.32), without its engine.

Resolvers are asked where VLLM_ALLOW_RUNTIME_LORA_UPDATING is set at the time of a request; where it is set
when the routes are made, clients may load adapters by path. A name that was resolved once is kept with its
path, and the resolver is not asked again. The worker keeps so many adapters, drops the least
recently used, and reads the path again: where that fails the engine stops.
"""

import asyncio
import dataclasses
import json
import os
import types
from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


@dataclasses.dataclass
class LoRARequest:
    """vLLM's, in the order of its fields."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None

    def __post_init__(self):
        assert self.lora_int_id >= 1
        assert self.lora_path


class LoRAResolver(ABC):
    """vLLM's."""

    @abstractmethod
    async def resolve_lora(self, base_model_name, lora_name):
        """A request, or None."""


class Registry:
    """The methods of vLLM's LoRAResolverRegistry, an object."""

    def __init__(self):
        self.resolvers = {}

    def get_supported_resolvers(self):
        return self.resolvers.keys()

    def register_resolver(self, resolver_name, resolver):
        self.resolvers[resolver_name] = resolver

    def get_resolver(self, resolver_name):
        return self.resolvers[resolver_name]


def allowed():
    """Whether adapters may be loaded while the server runs."""
    return os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").strip().lower() in ("1", "true")


def modules():
    """Name -> module, as `sys.modules` has them."""
    found = {x: types.ModuleType(x) for x in ("vllm", "vllm.lora", "vllm.lora.request", "vllm.lora.resolver")}
    found["vllm.lora.request"].LoRARequest = LoRARequest
    found["vllm.lora.resolver"].LoRAResolver = LoRAResolver
    found["vllm.lora.resolver"].LoRAResolverRegistry = Registry()
    return found


def read_folder(path, max_rank):
    """Module -> delta `[O, I]`, read as vLLM reads it: no patterns, slots of one rank."""
    config = json.loads((Path(path) / "adapter_config.json").read_text())
    assert not config.get("modules_to_save")
    assert config.get("bias", "none") == "none"
    assert config["r"] <= max_rank
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    tensors = load_file(Path(path) / "adapter_model.safetensors")
    out = {}
    for key, low in tensors.items():
        if key.endswith(".lora_A.weight"):
            slot = np.zeros((max_rank, low.shape[1]), np.float32)
            slot[: low.shape[0]] = low
            high = tensors[key.replace("lora_A", "lora_B")]
            wide = np.zeros((high.shape[0], max_rank), np.float32)
            wide[:, : high.shape[1]] = high
            out[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = scale * wide @ slot
    return out


class Server:
    """vLLM's server and worker as one ASGI application.

    Args:
      registry: its resolvers.
      base: name of the base model.
      slots: adapters that the worker keeps.
      servers: of the same engine, as its arguments say.
    """

    def __init__(self, registry, base, slots, max_rank=8, servers=None):
        self.open, self.state = allowed(), types.SimpleNamespace()
        self.state.args = types.SimpleNamespace(api_server_count=servers)
        self.registry, self.base, self.slots, self.max_rank = registry, base, slots, max_rank
        self.known, self.worker, self.loads, self.dead = {}, OrderedDict(), 0, None
        self.locks = {}

    async def resolve(self, name):
        async with self.locks.setdefault(name, asyncio.Lock()):
            if name in self.known or not allowed():
                return self.known.get(name)
            for resolver in self.registry.resolvers.values():
                found = await resolver.resolve_lora(self.base, name)
                if found is not None:
                    self.load(found)
                    self.known[name] = found
                    return found
        return None

    def load(self, request):
        """The worker's part: touch an adapter, or read it."""
        name = request.lora_name
        if name not in self.worker:
            self.worker[name] = read_folder(request.lora_path, self.max_rank)
            self.loads += 1
        self.worker.move_to_end(name)
        if len(self.worker) > self.slots:
            self.worker.popitem(last=False)
        return self.worker[name]

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            return await send({"type": "lifespan.startup.complete"})
        parts = [await receive()]
        while parts[-1]["more_body"]:
            parts.append(await receive())
        body = json.loads(b"".join(x["body"] for x in parts))
        status, said = 200, {}
        if scope["path"].endswith("/unload_lora_adapter"):
            status = 200 if self.known.pop(body["lora_name"], None) else 404
            self.worker.pop(body["lora_name"], None)
        elif body["model"] != self.base:
            request = await self.resolve(body["model"])
            if request is None:
                status = 404
            else:
                # the engine comes to it later
                await asyncio.sleep(body.get("wait", 0))
                try:
                    deltas = self.load(request)
                except Exception as error:
                    self.dead = error
                    raise
                said = {name: float(x.sum()) for name, x in deltas.items()}
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(said).encode()})


async def start(app, server):
    """The answer of a server's application with its middleware to its start."""
    sent = []

    async def receive():
        return {"type": "lifespan.startup"}

    async def send(message):
        sent.append(message)

    await app({"type": "lifespan", "app": server}, receive, send)
    return sent[0]


async def post(app, path, said, kind=b"application/json", receive=None):
    """Status and object that an ASGI application answers."""
    sent, body = [], json.dumps(said).encode()
    half = len(body) // 2
    messages = [
        {"type": "http.request", "body": body[:half], "more_body": True},
        {"type": "http.request", "body": body[half:], "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def one():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-type", kind)]}
    await app(scope, receive or one, send)
    return sent[0]["status"], json.loads(sent[1]["body"])
