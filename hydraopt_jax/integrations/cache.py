"""A bounded cache of adapter folders that processes share.

The least recently used folders are removed first, folders in use never.

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
from hydraopt_jax.errors import HydraOptError, system_error
from hydraopt_jax.formats import adapter_folder
from hydraopt_jax.formats.peft_config import CONFIG_FILE

# only folders with such names are ever removed
NAME = re.compile(r".+-[0-9a-f]{16}")
# maximum bytes of a weights file beside numbers and names, in total and per tensor
ROOM, TENSOR_ROOM = 64, 96
# seconds between attempts to take a lock, between attempts to find room, and until waiting for room fails
PAUSE, LOOK, PATIENCE = 0.01, 0.1, 60.0


class NoRoom(HydraOptError):
    """All folders of the cache are in use."""


class FolderCache:
    """A cache of adapter folders with a limit on their total bytes.

    Args:
      path: the folder of the cache, created if missing.
      limit: maximum bytes of the files in it.

    Raises:
      HydraOptError: the folder cannot be written.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        # one after another in this process, then among processes; and what guards the counts
        self._turn, self._mutex = threading.Lock(), threading.Condition()
        self._holds: Counter[str] = Counter()
        self._closed = False
        self._user = path / "users" / f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._alive = FileLock(f"{self._user}.lock", thread_local=False)
        with self._locked():
            self._in_use()

    def hold(self, name: str) -> bool:
        """Hold a folder until `drop` is called as often as `hold`; False if it is missing or incomplete."""
        with self._mutex:
            # somebody may have cleared the cache
            if self._holds[name] and (self.path / name / adapter_folder.WEIGHTS_FILE).exists():
                self._holds[name] += 1
                return True
        with self._locked():
            return self._mark(name)

    def drop(self, name: str) -> None:
        """Release a `hold`. After the last release the folder may be removed when room is needed."""
        with self._mutex:
            self._holds[name] -= 1
            if self._holds[name] <= 0:
                del self._holds[name]
                # without the lock: at worst a folder is spared that need not be
                with suppress(OSError):
                    (self._user / name).unlink()
                self._mutex.notify_all()

    def put(self, name: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        """Write a missing folder and hold it; waits for room while folders are in use.

        Raises:
          HydraOptError: the folder exceeds the limit or cannot be written; nothing of it stays.
          NoRoom: no folder was released for a minute.
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
        """Release all folders; they stay in the cache."""
        with self._mutex:
            self._closed = True
            self._holds.clear()
            shutil.rmtree(self._user, ignore_errors=True)
            self._alive.release()
            Path(self._alive.lock_file).unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """A context with the cache's lock, in which no other process marks, writes or removes folders."""
        try:
            with self._turn:
                self._user.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(self.path / ".lock").acquire(poll_interval=PAUSE):
                    self._enter()
                    yield
        except (OSError, safetensors.SafetensorError) as error:
            raise self._unwritable(error) from None

    def _enter(self) -> None:
        """Make the user's marks and its held lock if they are missing. Needs the lock."""
        with self._mutex:
            if self._closed:
                raise HydraOptError(f"{self.path}: the cache was closed: open it again")
            if self._user.is_dir() and Path(self._alive.lock_file).exists():
                return
            self._alive.release()
            self._alive.acquire(timeout=0)
            self._user.mkdir(exist_ok=True)
            for x in self._holds:
                (self._user / x).touch()

    def _mark(self, name: str) -> bool:
        """Hold an existing, complete folder. Needs the lock."""
        if not is_complete(self.path / name):
            return False
        with self._mutex:
            (self._user / name).touch()
            self._holds[name] += 1
        # the system's own idea of now is some milliseconds wide
        os.utime(self.path / name, ns=(time.time_ns(),) * 2)
        return True

    def _write(self, name: str, text: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Write a folder atomically, even if the machine stops. Needs the lock."""
        new = self.path / f".new-{self._user.name}"
        try:
            new.mkdir()
            adapter_folder.replace_folder(new / "adapter", text, dict(tensors))
            for x in (new / "adapter").iterdir():
                sync(x)
            # what is there is not whole
            shutil.rmtree(self.path / name, ignore_errors=True)
            (new / "adapter").rename(self.path / name)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _make_room(self, size: int) -> bool:
        """Remove unused folders until there is room; False if that does not suffice. Needs the lock."""
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
        """Names that living processes hold; marks of dead processes are removed. Needs the lock."""
        used = set()
        for marks in (x for x in self._user.parent.iterdir() if x.is_dir()):
            if marks == self._user or alive(Path(f"{marks}.lock")):
                used |= {x.name for x in marks.iterdir()}
            else:
                shutil.rmtree(marks, ignore_errors=True)
                Path(f"{marks}.lock").unlink(missing_ok=True)
        return used

    def _unwritable(self, error: Exception) -> HydraOptError:
        return system_error(self.path, "written", error, ": give another cache")


def alive(lock: Path) -> bool:
    """Whether a process holds a lock."""
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def is_complete(path: Path) -> bool:
    """Whether a folder has an adapter whose weights file has the length that its header says."""
    try:
        with safetensors.safe_open(path / adapter_folder.WEIGHTS_FILE, framework="np"):
            return (path / CONFIG_FILE).is_file()
    except (OSError, safetensors.SafetensorError):
        return False
