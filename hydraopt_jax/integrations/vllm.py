"""Serve a store's tasks in vLLM: a request for `model=<task>` loads it from the store. No JAX, no GPU memory.

    HYDRAOPT_STORE          the store: a folder, a `.safetensors` file, or the address of one
    HYDRAOPT_CACHE          a folder for decoded tasks; by default one in the user's cache
    HYDRAOPT_CACHE_LIMIT    its maximum bytes, such as 10GB
    HYDRAOPT_ANY_BASE       1: do not compare the base model's name with that of the adapters

vLLM reads a folder again, inside its engine's loop, when its own caches have dropped the adapter, and stops
if the folder is gone. So a folder that was given to vLLM stays while the process lives. With the middleware
`hold_tasks.HoldTasks`, which sees all requests, it stays only while a request for its task is being answered,
and is decoded again for a later one. The cache then needs room only for the tasks in use at one time. The
middleware also has vLLM ask for tasks; without it VLLM_ALLOW_RUNTIME_LORA_UPDATING must be set.
"""

import asyncio
import dataclasses
import hashlib
import logging
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.integrations.folders import LIMIT, TaskFolders, store_path
from hydraopt_jax.store import files

# below vLLM's own logger, whose handler writes; where it has made one, the root's may write nothing
LOG = logging.getLogger("vllm.hydraopt_jax")
NAME = "hydraopt"
STORE, CACHE, CACHE_LIMIT, ANY_BASE = (f"HYDRAOPT_{x}" for x in ("STORE", "CACHE", "CACHE_LIMIT", "ANY_BASE"))
# vLLM's own: whether it asks resolvers
ALLOW = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
# vLLM's option by which it asks them, and serves more tasks than fit the cache
MIDDLEWARE = "hydraopt_jax.integrations.hold_tasks.HoldTasks"
# maximum number of tasks that are decoded, or wait for room, at once
THREADS = 32
# path of vLLM's request to unload an adapter
UNLOAD = "/v1/unload_lora_adapter"


def register() -> None:
    """Register a resolver if HYDRAOPT_STORE is set; vLLM calls this entry point in each of its processes.

    Raises:
      HydraOptError: HYDRAOPT_STORE is not a store.
    """
    if not os.environ.get(STORE):
        return
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        path = store_path(os.environ[STORE])
        if isinstance(path, Path):
            files.read_manifest(path)
        LoRAResolver.register(StoreResolver)
        LoRAResolverRegistry.register_resolver(NAME, StoreResolver())
        if ALLOW not in os.environ and multiprocessing.parent_process() is None:
            LOG.info("tasks of %s are served by name with --middleware %s", os.environ[STORE], MIDDLEWARE)


class Changed(HydraOptError):
    """The store no longer has a task as vLLM has loaded it."""


@dataclasses.dataclass
class Requests:
    """The running requests for a task.

    Attributes:
      count: their number.
      path: the folder that is held for them.
      busy: lock of the thread that makes the folder.
    """

    count: int = 0
    path: Path | None = None
    busy: threading.Lock = dataclasses.field(default_factory=threading.Lock)


class StoreResolver:
    """vLLM's `LoRAResolver` for the tasks of a store, configured by environment variables."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix=NAME)
        self.mutex = threading.RLock()
        self.requests: dict[str, Requests] = {}
        # where vLLM will look for a task again
        self.handed: dict[str, Path] = {}
        self._folders: TaskFolders | None = None

    @property
    def folders(self) -> TaskFolders:
        """The `TaskFolders`, opened by the first process that uses them."""
        with self.mutex:
            if self._folders is None:
                given = os.environ.get(CACHE) or None, os.environ.get(CACHE_LIMIT) or LIMIT
                self._folders = TaskFolders(os.environ[STORE], *given)
            return self._folders

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """vLLM's request for a task, or None with a line in the log that says why not."""
        from vllm.lora.request import LoRARequest

        base = None if os.environ.get(ANY_BASE) == "1" else base_model_name
        loop = asyncio.get_running_loop()
        try:
            path = await loop.run_in_executor(self.pool, self.find, lora_name, base)
        except HydraOptError as error:
            LOG.warning("%s", error)
            return None
        # vLLM puts a number of its own in the place of this one
        number = int.from_bytes(hashlib.sha256(lora_name.encode()).digest()[:4], "big") // 2 + 1
        return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(path))

    def find(self, task: str, base: str | None) -> Path:
        """A task's folder, held for running requests; held permanently if no request is known."""
        self.folders.check(task)
        requests = self._requests(task)
        with requests.busy:
            path = self.folders.hold(task, base=base)
            with self.mutex:
                self.handed[task] = path
                before = requests.path if requests.count else None
                if requests.count:
                    requests.path = path
            if before is not None:
                self.folders.cache.drop(before.name)
        return path

    def begin(self, task: str) -> bool:
        """Begin a request for a task, whose folder (if vLLM knows it) stays until `end`; False for no task.

        Raises:
          Changed: the store has changed, and the folder that vLLM knows is gone.
          HydraOptError: the task cannot be decoded again, or there is no room for it.
        """
        if task not in self.handed and not self._serves(task):
            return False
        requests = self._requests(task)
        with self.mutex:
            requests.count += 1
        try:
            with requests.busy:
                if requests.path is None and task in self.handed:
                    path = self._again(task)
                    with self.mutex:
                        requests.path = path
        except BaseException:
            self.end(task)
            raise
        return True

    def end(self, task: str) -> None:
        """End a request for a task."""
        requests = self._requests(task)
        with self.mutex:
            requests.count -= 1
            path = None if requests.count else requests.path
            if path is not None:
                requests.path = None
        if path is not None:
            self.folders.cache.drop(path.name)

    def forget(self, task: str) -> None:
        """Note that vLLM has unloaded a task and will request it again."""
        with self.mutex:
            self.handed.pop(task, None)

    def close(self) -> None:
        """Release all folders."""
        self.pool.shutdown()
        if self._folders is not None:
            self._folders.close()

    def _requests(self, task: str) -> Requests:
        with self.mutex:
            return self.requests.setdefault(task, Requests())

    def _serves(self, task: str) -> bool:
        """Whether the store has a task; for a missing store False, and requests for tasks get an error."""
        try:
            return task in self.folders.tasks
        except HydraOptError:
            return False

    def _again(self, task: str) -> Path:
        """Hold the folder that vLLM knows, after decoding it again if necessary."""
        known = self.handed[task]
        if self.folders.cache.hold(known.name):
            return known
        path = self.folders.hold(task) if task in self.folders.tasks else None
        if path != known:
            if path is not None:
                self.folders.cache.drop(path.name)
            raise Changed(
                f"{self.folders.path}: task {task!r} has changed since it was loaded: start the server "
                f"again, or, with {ALLOW}=1, POST its name to {UNLOAD}"
            )
        return known
