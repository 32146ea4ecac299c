"""A bounded folder of adapter folders that processes share: the least recently used go, none that is in use.

CACHE/NAME-VERSION/             an adapter's folder, never changed once it is there
CACHE/users/ID.lock             held while the process of a user lives
CACHE/users/ID/NAME-VERSION     a mark for each folder that the user holds
CACHE/.lock                     one change at a time
"""

import json
import os
import re
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from filelock import FileLock, Timeout

from hydraopt_jax.durable import sync
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import adapter_folder
from hydraopt_jax.formats.peft_config import CONFIG_FILE
from hydraopt_jax.formats.tensor_files import one_line

# only folders of such names are ever removed
NAME = re.compile(r".+-[0-9a-f]{16}")
# the most bytes that a weights file takes beside numbers and names, and for each tensor
ROOM, TENSOR_ROOM = 64, 96
# seconds between looks at a lock, between looks for room, and until who waits for room gives up
PAUSE, LOOK, PATIENCE = 0.01, 0.1, 60.0


class NoRoom(HydraOptError):
    """A cache whose folders are all in use."""


class FolderCache:
    """Adapter folders of at most so many bytes together.

    Args:
      path: the folder, made where it is missing.
      limit: the most bytes of the files in it.

    Raises:
      HydraOptError: it cannot be written.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        # one after another in this process, then among processes; and what guards the counts
        self._turn, self._mutex = threading.Lock(), threading.Condition()
        self._holds: Counter[str] = Counter()
        users = path / "users"
        self._user = users / f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._alive = FileLock(f"{self._user}.lock", thread_local=False)
        try:
            users.mkdir(parents=True, exist_ok=True)
            self._alive.acquire(timeout=0)
            self._user.mkdir()
        except OSError as error:
            raise self._unwritable(error) from None
        with self._locked():
            self._in_use()

    def hold(self, name: str) -> bool:
        """Keep a folder as it is until `drop` was called as often; False where it is not there and whole."""
        with self._mutex:
            if self._holds[name]:
                self._holds[name] += 1
                return True
        with self._locked():
            return self._mark(name)

    def drop(self, name: str) -> None:
        """The opposite of `hold`: with the last one the folder may be removed when its room is needed."""
        with self._mutex:
            self._holds[name] -= 1
            if self._holds[name] <= 0:
                del self._holds[name]
                # without the lock: at worst a folder is spared that need not be
                with suppress(OSError):
                    (self._user / name).unlink()
                self._mutex.notify_all()

    def put(self, name: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        """Write a folder that is not there, and hold it; waits for room while folders are in use.

        Raises:
          HydraOptError: it is larger than the limit, or cannot be written: there is then nothing of it.
          NoRoom: nothing was dropped for a minute.
        """
        text = json.dumps(config, indent=2, sort_keys=True)
        size = len(text.encode()) + ROOM
        size += sum(len(k.encode()) + TENSOR_ROOM + x.nbytes for k, x in tensors.items())
        if size > self.limit:
            raise HydraOptError(
                f"{self.path}: {name} takes {size:,} bytes, the cache may take {self.limit:,}: give it more"
            )
        end = time.monotonic() + PATIENCE
        while True:
            with self._locked():
                if self._mark(name):
                    return
                if self._make_room(size):
                    self._write(name, text, tensors)
                    self._mark(name)
                    return
            if time.monotonic() > end:
                raise NoRoom(
                    f"{self.path}: all folders are in use, and {name} does not fit beside them into "
                    f"{self.limit:,} bytes: give the cache more"
                )
            with self._mutex:
                # another process may drop one, too
                self._mutex.wait(LOOK)

    def close(self) -> None:
        """Drop everything; the folders stay."""
        with self._mutex:
            self._holds.clear()
            shutil.rmtree(self._user, ignore_errors=True)
            self._alive.release()
            Path(self._alive.lock_file).unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the cache's lock: nobody else marks, writes or removes folders."""
        try:
            with self._turn, FileLock(self.path / ".lock").acquire(poll_interval=PAUSE):
                yield
        except (OSError, safetensors.SafetensorError) as error:
            raise self._unwritable(error) from None

    def _mark(self, name: str) -> bool:
        """With the lock: hold a folder that is there and whole."""
        if not whole(self.path / name):
            return False
        with self._mutex:
            (self._user / name).touch()
            self._holds[name] += 1
        # the system's own idea of now is some milliseconds wide
        os.utime(self.path / name, ns=(time.time_ns(),) * 2)
        return True

    def _write(self, name: str, text: str, tensors: Mapping[str, np.ndarray]) -> None:
        """With the lock: put a folder in its place, whole or not at all, even if the machine stops."""
        new = self.path / f".new-{self._user.name}"
        try:
            new.mkdir()
            adapter_folder.write_folder(new / "adapter", text, dict(tensors))
            for x in (new / "adapter").iterdir():
                sync(x)
            # what is there is not whole
            shutil.rmtree(self.path / name, ignore_errors=True)
            (new / "adapter").rename(self.path / name)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _make_room(self, size: int) -> bool:
        """With the lock: remove folders that nobody holds until there is room; False where they do not do."""
        for x in self.path.glob(".new-*"):
            # whoever wrote it held the lock and is gone
            shutil.rmtree(x, ignore_errors=True)
        used = self._in_use()
        found = [x for x in self.path.iterdir() if NAME.fullmatch(x.name) and x.is_dir()]
        sizes = {x: sum(y.stat().st_size for y in x.iterdir()) for x in found}
        free = sorted((x for x in found if x.name not in used), key=lambda x: x.stat().st_mtime_ns)
        total = sum(sizes.values()) + size
        if total - sum(sizes[x] for x in free) > self.limit:
            return False
        for x in free:
            if total <= self.limit:
                break
            shutil.rmtree(x)
            total -= sizes[x]
        return True

    def _in_use(self) -> set[str]:
        """With the lock: names that a living user holds; what dead ones left is removed."""
        used = set()
        for marks in (x for x in self._user.parent.iterdir() if x.is_dir()):
            if marks == self._user or alive(Path(f"{marks}.lock")):
                used |= {x.name for x in marks.iterdir()}
            else:
                shutil.rmtree(marks, ignore_errors=True)
                Path(f"{marks}.lock").unlink(missing_ok=True)
        return used

    def _unwritable(self, error: Exception) -> HydraOptError:
        what = one_line(getattr(error, "strerror", None) or error)
        return HydraOptError(f"{self.path}: cannot be written: {what}: give another cache")


def alive(lock: Path) -> bool:
    """Whether somebody holds a lock."""
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def whole(path: Path) -> bool:
    """Whether a folder holds an adapter whose weights are as long as their header says."""
    try:
        with safetensors.safe_open(path / adapter_folder.WEIGHTS_FILE, framework="np"):
            return (path / CONFIG_FILE).is_file()
    except (OSError, safetensors.SafetensorError):
        return False
