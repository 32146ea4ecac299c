"""A store's tasks as adapter folders on demand, for servers that load folders (vLLM, SGLang, LoRAX)."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydraopt_jax import buckets, network, remote
from hydraopt_jax.byte_counts import count_of, number_and_unit
from hydraopt_jax.deferred import bytes_of
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import peft, peft_config, server
from hydraopt_jax.formats.adapter_folder import folder_name
from hydraopt_jax.integrations.cache import FolderCache, NoRoom
from hydraopt_jax.store import decoding, files, schema
from hydraopt_jax.store.store import SHARED, Store, closure, places_of, task_index, tensors_of

# default limit of a cache in bytes
LIMIT = "10GB"
# least seconds between two looks for an unknown task in a remote store
AGAIN = 5.0
# version of the folders' contents, for a given store
WRITER = 1


class StoreState(NamedTuple):
    """A state of a store.

    Attributes:
      stamp: identifies the state.
      store: opened lazily.
      versions: task -> `version_of`, for requested tasks.
    """

    stamp: Any
    store: Store
    versions: dict[str, str]


class TaskFolders:
    """A store's tasks as folders that PEFT and servers load, decoded on demand.

    A task that changes in the store gets a new folder; folders that were returned before stay unchanged.

    Args:
      store: a folder or a `.safetensors` file, which may change while it is served; or the address of a
        store, from which the bytes of requested tasks are fetched.
      cache: a folder for decoded tasks, which processes and stores may share; None for one in the user's
        cache.
      limit: maximum bytes of the decoded tasks, an integer or text such as "10GB". The least recently used
        folders that are not held are removed.
      profile: of the server, see `formats.server.fit_server`; None for PEFT only.

    Raises:
      HydraOptError: no store there, an invalid limit, or a cache that cannot be written.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        cache: str | os.PathLike[str] | None = None,
        limit: int | str = LIMIT,
        *,
        profile: str | None = "vllm",
    ) -> None:
        server.check_ranks(None, profile)
        self.path, self.profile = store_path(store), profile
        self._state, self._opened = read_state(self.path), time.monotonic()
        self.cache = FolderCache(
            Path(default_cache() if cache is None else cache).absolute(), read_limit(limit)
        )
        self._mutex = threading.Lock()
        self._decoding: dict[str, threading.Lock] = {}
        self._kept: dict[str, set[str]] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks in the store's present state."""
        return self._now().store.tasks

    def check(self, task: str) -> None:
        """Raise if the store has no such task.

        A remote store has no stamp: it is opened again for an unknown task, at most every `AGAIN` seconds.
        """
        with self._mutex:
            late = time.monotonic() - self._opened > AGAIN
            if isinstance(self.path, str) and late and task not in self._state.store.tasks:
                self._state, self._opened = read_state(self.path), time.monotonic()
        task_index(self.tasks, task)

    def folder(self, task: str, *, base: str | None = None) -> Path:
        """A task's folder, which stays until `release`, or as long as this object lives.

        Args:
          task: its name in the store.
          base: name of the served base model, compared with the store's before anything is decoded.

        Raises:
          HydraOptError: no such task (similar names are listed), another base model, tensors that the profile
            does not allow, a damaged store, or a cache that cannot be written.
          NoRoom: held folders fill the cache.
        """
        path = self.hold(task, base=base)
        with self._mutex:
            kept = self._kept.setdefault(task, set())
            again = path.name in kept
            kept.add(path.name)
        if again:
            self.cache.drop(path.name)
        return path

    def release(self, task: str) -> None:
        """Release the folders of a task that `folder` returned; they may be removed when room is needed."""
        with self._mutex:
            names = self._kept.pop(task, set())
        for name in names:
            self.cache.drop(name)

    @contextmanager
    def held(self, task: str, *, base: str | None = None) -> Iterator[Path]:
        """A context with a task's folder, which is held only for the body; see `folder`."""
        path = self.hold(task, base=base)
        try:
            yield path
        finally:
            self.cache.drop(path.name)

    def hold(self, task: str, *, base: str | None = None) -> Path:
        """A task's folder, held until `cache.drop` of the path's name; see `folder`."""
        for n in range(files.RETRIES):
            state = self._now()
            try:
                return self._hold(state, task, base)
            except NoRoom:
                raise
            except HydraOptError:
                # a writer that replaces the store removes what this one may be reading
                if not self._replaced(state, n):
                    raise
        raise files.replaced_too_fast(self.path)

    def close(self) -> None:
        """Release all folders."""
        self.cache.close()

    def _now(self) -> StoreState:
        with self._mutex:
            if stamp(self.path) != self._state.stamp:
                self._state = read_state(self.path)
            return self._state

    def _replaced(self, state: StoreState, n: int) -> bool:
        """Whether the store has changed since before the n-th attempt."""
        if isinstance(self.path, Path):
            return stamp(self.path) != state.stamp
        if n == 0:
            # a remote store has no stamp: it is opened again, once
            with self._mutex:
                self._state = read_state(self.path)
        return n == 0

    def _hold(self, state: StoreState, task: str, base: str | None) -> Path:
        source = state.store.sources[task_index(state.store.tasks, task)]
        if base is not None:
            peft_config.check_base(network.redact(str(self.path)), peft_config.base_name(source.config), base)
        server.check_served(self.profile, task, tensors_of(state.store, task), source.config, source.layout)
        if task not in state.versions:
            state.versions[task] = version_of(state.store, task, self.profile)
        path = self.cache.path / f"{folder_name(task)}-{state.versions[task]}"
        if self.cache.hold(path.name):
            return path
        with self._mutex:
            decoding_it = self._decoding.setdefault(path.name, threading.Lock())
        with decoding_it:
            if not self.cache.hold(path.name):
                fitted = server.fit_server(decoding.decode(state.store, task), profile=self.profile)
                self.cache.put(path.name, *peft.contents(fitted.adapter))
        return path


def store_path(store: str | os.PathLike[str]) -> Path | str:
    """The absolute path of a store, or its address."""
    if isinstance(store, str) and (remote.is_address(store) or buckets.is_bucket(store)):
        return store
    return Path(store).absolute()


def stamp(path: Path | str) -> Any:
    """A stamp that changes with the store; None for a remote store."""
    return None if isinstance(path, str) else files.stamp(path)


def read_state(path: Path | str) -> StoreState:
    """The `StoreState` of the store at a path; a store that is replaced meanwhile has another stamp."""
    before = stamp(path)
    return StoreState(before, files.open(path), {})


def version_of(store: Store, task: str, profile: str | None) -> str:
    """Digest of all inputs of a task's folder, 16 hexadecimal digits; the task's leaves are read.

    Adding and removing other tasks does not change it, as long as the vectors that predict the task stay.
    """
    wanted = {n: {place} for n, (place,) in places_of(store, [task]).items()}
    needed = sorted(closure(store.segments, wanted).items())
    position = {n: k for k, (n, _) in enumerate(needed)}
    parts = []
    for n, places in needed:
        x, live = store.segments[n], sorted(k for k in places if k != SHARED)
        names = schema.leaves_of(x.modules, live) | {"prediction", *(f"tensors_{k}" for k in live)}
        leaves = {k: hashlib.sha256(bytes_of(v)).hexdigest() for k, v in x.leaves.items() if k in names}
        references = [(position[r.segment], r.place) for r in x.references]
        said = [schema.as_json(x.modules), live, [x.tensors[k] for k in live]]
        parts.append([said, leaves, references, position.get(x.tables, -1)])
    source = store.sources[task_index(store.tasks, task)]
    whole = [WRITER, profile, parts, source.dtype, source.config, source.layout]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def read_limit(limit: int | str) -> int:
    """Bytes from an integer, or from text such as "10GB"."""
    found = count_of(*number_and_unit(limit)) if isinstance(limit, str) else limit
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise HydraOptError(f"limit {limit!r}: give bytes with a unit, such as {LIMIT}")
    return found


def default_cache() -> Path:
    """A folder for decoded tasks in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hydraopt_jax" / "tasks"
