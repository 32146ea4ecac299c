"""Middleware of vLLM's server: lets it ask for tasks, and keeps those of running requests in the cache.

It sees requests that the resolver (`vllm`) does not see: those for an adapter that vLLM has loaded before and
may have dropped since.

vLLM asks resolvers only where VLLM_ALLOW_RUNTIME_LORA_UPDATING is set, and adds requests by which clients
load any path if it is set when the server makes its routes. Middleware begins later, so that it can allow the
one without the other.
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.integrations.vllm import ALLOW, LOG, NAME, STORE, UNLOAD, Changed

# seconds that a folder stays after a cancelled request: the engine may not know yet
LINGER = 5.0
# the same after the answer to a background request, which the engine may begin only then
BACKGROUND = 3600.0
# path of vLLM's only requests that may go on in the background
RESPONSES = "/v1/responses"

# vLLM's own check of this comes before the middleware
SEVERAL = (
    "HoldTasks: several API servers give different adapters the same number, and answers would be of another "
    "task: give --api-server-count 1"
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class HoldTasks:
    """ASGI middleware `--middleware hydraopt_jax.integrations.hold_tasks.HoldTasks`.

    Raises:
      HydraOptError: HYDRAOPT_STORE is not set, or the plugin was not loaded.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        from vllm.lora.resolver import LoRAResolverRegistry

        if NAME not in LoRAResolverRegistry.get_supported_resolvers():
            raise HydraOptError(f"HoldTasks: set {STORE}, and let VLLM_PLUGINS name {NAME} where it is set")
        self.app, self.resolver = app, LoRAResolverRegistry.get_resolver(NAME)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; when the server starts, allow vLLM to ask for tasks."""
        if scope["type"] == "lifespan":
            if servers(scope) > 1:
                await receive()
                return await send({"type": "lifespan.startup.failed", "message": SEVERAL})
            if os.environ.setdefault(ALLOW, "1").strip().lower() not in ("1", "true"):
                LOG.warning("no task is served: %s=%s: leave it out", ALLOW, os.environ[ALLOW])
        if scope["type"] != "http" or scope["method"] != "POST" or not is_json(scope):
            return await self.app(scope, receive, send)
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        asked = parse_request(b"".join(x.get("body", b"") for x in messages))
        given_up = False

        async def again() -> MutableMapping[str, Any]:
            nonlocal given_up
            message = messages.pop(0) if messages else await receive()
            given_up |= message["type"] == "http.disconnect"
            return message

        task = asked.get("model")
        try:
            known = isinstance(task, str) and await self.begin(task)
        except HydraOptError as error:
            return await refuse(send, 409 if isinstance(error, Changed) else 503, str(error))
        if not known:
            unloads = scope["path"].endswith(UNLOAD)
            return await self.app(scope, again, self.unloading(asked, send) if unloads else send)
        # vLLM reads 1 and "true" as True, and refuses background requests unless it stores responses
        accepted, background = False, bool(asked.get("background")) and scope["path"].endswith(RESPONSES)
        seconds = LINGER

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal accepted
            accepted |= message.get("status") == 200
            await send(message)

        try:
            await self.app(scope, again, noting)
            seconds = LINGER if given_up else 0.0
        finally:
            if background and accepted:
                seconds = BACKGROUND
            if seconds:
                asyncio.get_running_loop().call_later(seconds, self.resolver.end, task)
            else:
                self.resolver.end(task)

    async def begin(self, task: str) -> bool:
        """The resolver's `begin`, undone where this is cancelled."""
        begun = self.resolver.pool.submit(self.resolver.begin, task)
        try:
            return await asyncio.shield(asyncio.wrap_future(begun))
        except asyncio.CancelledError:
            begun.add_done_callback(lambda x: x.exception() or (x.result() and self.resolver.end(task)))
            raise

    def unloading(self, asked: Mapping[str, Any], send: Send) -> Send:
        """A `send` that notices when vLLM has unloaded an adapter."""

        async def noting(message: MutableMapping[str, Any]) -> None:
            if message.get("status") == 200:
                self.resolver.forget(str(asked.get("lora_name")))
            await send(message)

        return noting


def servers(scope: Scope) -> int:
    """How many API servers share vLLM's engine; 1 if its arguments are not known."""
    state = getattr(scope.get("app"), "state", None)
    return getattr(getattr(state, "args", None), "api_server_count", None) or 1


def is_json(scope: Scope) -> bool:
    """Whether a request's body is JSON."""
    headers = dict(scope.get("headers", ()))
    return headers.get(b"content-type", b"").partition(b";")[0].strip().lower() == b"application/json"


def parse_request(body: bytes) -> Mapping[str, Any]:
    """The JSON object of a request; empty if it is not an object, which vLLM then refuses."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


async def refuse(send: Send, status: int, message: str) -> None:
    """An answer of the shape that OpenAI's clients expect of an error."""
    body = json.dumps({"error": {"message": message, "type": "AdapterError", "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
