"""Readers of a store while two processes replace it: every read must be one of the whole stores."""

import multiprocessing
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from queue import Queue
from typing import Any

from experiments.reliability import stores
from hydraopt_jax import store
from hydraopt_jax.errors import HydraOptError

Row = tuple[str, int, int, list[str]]


def write(path: Path, contents: list[Path], times: int, queue: "Queue[Row]") -> None:
    """Replace a store over and over; report how often it went through and how often the lock was taken."""
    kept = [store.open(x).load() for x in contents]
    done = refused = 0
    lost: list[str] = []
    for k in range(times):
        try:
            store.save(path, kept[k % 2], overwrite=True)
            done += 1
        except HydraOptError as error:
            if "another process is writing it" in str(error):
                refused += 1
            else:
                lost.append(f"writer: {error}")
            time.sleep(0.01)
    queue.put(("write", done, refused, lost))


def read(path: Path, wanted: list[Any], stop: Event, queue: "Queue[Row]") -> None:
    """Read a store until told to stop; report reads, and how often a store was replaced under one."""
    done = again = 0
    lost: list[str] = []
    while not stop.is_set():
        try:
            found = stores.content(path)
        except HydraOptError as error:
            if "was replaced since it was opened" in str(error) or "is replaced faster" in str(error):
                again += 1
            else:
                lost.append(f"reader: {error}")
            continue
        done += 1
        if found not in wanted:
            lost.append("a read that is neither of the stores")
    queue.put(("read", done, again, lost))


def races(root: Path, times: int) -> tuple[dict[str, int], list[str]]:
    """Two writers and two readers of a folder, then of a file; returns how often, and what was lost.

    Args:
      root: an empty folder.
      times: how often each writer tries.
    """
    counts: dict[str, int] = {}
    lost: list[str] = []
    contents = [root / "plain", root / "coded"]
    for path, made in zip(contents, (stores.plain(), stores.coded()), strict=True):
        store.save(path, made)
    wanted = [stores.content(x) for x in contents]
    context = multiprocessing.get_context("spawn")
    for name in ("shared", "shared.safetensors"):
        path = root / name
        store.save(path, store.open(contents[0]))
        queue: Queue[Row] = context.Queue()  # type: ignore[assignment]
        stop = context.Event()
        writers = [context.Process(target=write, args=(path, contents, times, queue)) for _ in "ab"]
        readers = [context.Process(target=read, args=(path, wanted, stop, queue)) for _ in "ab"]
        for x in (*readers, *writers):
            x.start()
        rows = [queue.get() for _ in writers]
        stop.set()
        rows += [queue.get() for _ in readers]
        for x in (*readers, *writers):
            x.join()
        for kind, done, other, found in rows:
            second = "writers told to wait" if kind == "write" else "readers told to open it again"
            for key, value in ((f"{kind}s", done), (second, other)):
                counts[key] = counts.get(key, 0) + value
            lost += found
        if stores.content(path) not in wanted or stores.litter(path):
            lost.append(f"{name}: what is there in the end is neither of the stores, or litter is")
    return counts, lost
