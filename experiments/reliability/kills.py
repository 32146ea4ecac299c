"""Writers killed: at random instants, before and after every rename, before every third removal of a file.

After each kill the store is the old one or the new one, whole. Then the same command runs again, or, where it
was done, a change of nothing: it must succeed, and leave nothing but the new store.
"""

import functools
import multiprocessing
import shutil
import socket
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.reliability import stores, writer
from hydraopt_jax import compression, formats, store
from hydraopt_jax.errors import HydraOptError

SEED = 0
# a folder takes one removal for each file: `tests/test_survival.py` is killed before all of them
REMOVALS_STRIDE = 3
# starts the command and kills it; False where the command ended before
Kill = Callable[[], bool]


class Case(NamedTuple):
    """A command that writes.

    Attributes:
      name: for the table.
      arguments: of the command; `{w}` is the folder that it works in.
      path: what it writes, in that folder.
      present: names in the folder before, and what each is a copy of.
      processes: how many take part; all are killed together.
    """

    name: str
    arguments: list[str]
    path: str
    present: dict[str, str]
    processes: int = 1


def cases(folders: Sequence[str]) -> list[Case]:
    """Every command that changes a store, onto nothing and onto a store."""
    asked = [*folders[1:], "--max-error", "0.02", "--json"]
    form = [*folders[1:], "--form", "hydra", "--heads", "1", "--json"]
    old, new = {"s": "three"}, {"s": "three", "f.safetensors": "one.safetensors"}
    return [
        Case("add", ["add", "{w}/s", folders[3], "--json"], "s", old),
        Case("add to a file", ["add", "{w}/f.safetensors", folders[3], "--json"], "f.safetensors", new),
        Case("remove", ["remove", "{w}/s", "t0", "--json"], "s", old),
        Case("remove --purge", ["remove", "{w}/s", "t0", "--purge", "--json"], "s", old),
        Case("compress", ["compress", *asked, "--out", "{w}/s"], "s", {}),
        Case("compress --overwrite", ["compress", *form, "--out", "{w}/s", "--overwrite"], "s", old),
        Case("compress to a file", ["compress", *asked, "--out", "{w}/f.safetensors"], "f.safetensors", {}),
        Case("compress, two processes", ["compress", *asked, "--out", "{w}/s"], "s", {}, 2),
        Case("pack", ["pack", "{w}/s", "{w}/f.safetensors", "--json"], "f.safetensors", old),
        Case(
            "pack --overwrite",
            ["pack", "{w}/s", "{w}/f.safetensors", "--overwrite", "--json"],
            "f.safetensors",
            new,
        ),
        Case("unpack", ["unpack", "{w}/f.safetensors", "{w}/u", "--json"], "u", new),
    ]


class Bench:
    """A folder to work in, and processes that are killed in it.

    Args:
      root: holds what the cases' folders are copies of.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.work, self.said = root, root / "work", root / "said"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["experiments.reliability.writer"])

    def reset(self, case: Case) -> None:
        """The folder as it is before the command."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for name, source in case.present.items():
            at = self.root / source
            (shutil.copytree if at.is_dir() else shutil.copy)(at, self.work / name)

    def start(
        self, case: Case, names: Sequence[str] = (), point: int = 0, after: bool = False, victim: int = 0
    ) -> list[BaseProcess]:
        """The command's processes, one of which may be told to die; returns when they have begun."""
        arguments = [x.format(w=self.work) for x in case.arguments]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        out: list[BaseProcess] = []
        for rank in range(case.processes):
            ready = self.context.Event()
            given = list(arguments)
            if case.processes > 1:
                given += ["--coordinator", f"localhost:{port}", "--processes", str(case.processes)]
                given += ["--process-id", str(rank)]
            die = point if rank == victim else 0
            said = f"{self.said}{rank}"
            process = self.context.Process(target=writer.work, args=(given, names, die, after, said, ready))
            process.start()
            ready.wait()
            out.append(process)
        return out

    def finish(self, running: Sequence[BaseProcess]) -> bool:
        """Wait for the first to end, or to be killed, then for the others; did it end well?"""
        for process in running:
            while process.exitcode is None and all(x.exitcode in (None, 0) for x in running):
                process.join(0.02)
        codes = [x.exitcode for x in running]
        well = codes == [0] * len(running)
        for process in running:
            if not well:
                process.kill()
            process.join()
        return well

    def kill_later(self, case: Case, delay: float) -> bool:
        """Kill the command after some seconds."""
        running = self.start(case)
        time.sleep(delay)
        for x in running:
            x.kill()
        self.finish(running)
        return True

    def kill_at(self, case: Case, names: Sequence[str], victim: int, point: int, after: bool) -> bool:
        """Kill the command at a call, and its other process with it; False where there is no such call."""
        return not self.finish(self.start(case, names, point, after, victim))

    def complaint(self) -> str:
        """What the processes have said last."""
        files = sorted(self.root.glob("said*"))
        return " | ".join(" ".join(x.read_text(errors="replace").split())[-300:] for x in files)

    def state(self, case: Case) -> Any:
        """What is in the store; None where none is there, or an unfinished job."""
        at = self.work / case.path
        try:
            return stores.content(at)
        except HydraOptError as error:
            if any(x in str(error) for x in ("no store there", "an unfinished job")):
                return None
            raise

    def check(self, case: Case, old: Any, new: Any) -> None:
        """What must hold after a kill.

        Raises:
          AssertionError: it does not.
        """
        found = self.state(case)
        assert found in (old, new), "neither the old store nor the new one"
        if found == new:
            store.update(self.work / case.path, lambda x: x)
        else:
            assert self.finish(self.start(case)), f"the next writer failed: {self.complaint()}"
        assert self.state(case) == new, "the next writer has made another store"
        left = sorted(x.name for x in self.work.iterdir())
        assert left == sorted({*case.present, case.path}), f"left beside the store: {left}"
        assert not stores.litter(self.work / case.path), "left in the store's folder"


def kill_all(
    bench: Bench, case: Case, took: float, instants: Sequence[float], trial: Callable[[str, Kill], bool]
) -> None:
    """Every kill of a command.

    Args:
      bench: where it runs.
      case: the command.
      took: seconds that it takes.
      instants: of kills, as parts of these seconds.
      trial: `(kind, kill)`; says whether the command got so far.
    """
    for share in instants:
        trial("random instants", functools.partial(bench.kill_later, case, share * took))
    for kind, names in (("renames", writer.RENAMES), ("removals", writer.REMOVALS)):
        for victim in range(case.processes):
            kill = functools.partial(bench.kill_at, case, names, victim)
            point = 1
            while trial(kind, functools.partial(kill, point, False)):
                if kind == "renames":
                    trial(kind, functools.partial(kill, point, True))
                point += 1 if kind == "renames" else REMOVALS_STRIDE


def prepare(root: Path) -> list[str]:
    """Adapters and the stores that the cases begin with; NAME=FOLDER of each adapter."""
    made = stores.collection(True)
    for x in made:
        formats.write_adapter(root / x.task, x)
    first = compression.compress([formats.read_adapter(root / x.task) for x in made[:3]], max_error=0.02)
    store.save(root / "three", first)
    store.save(root / "one.safetensors", first)
    return [str(root / x.task) for x in made]


def kills(root: Path, name: str, count: int) -> tuple[dict[str, int], list[str]]:
    """Kill a command; returns how often, and what was lost.

    Args:
      root: an empty folder.
      name: of the case.
      count: of kills at random instants.
    """
    bench = Bench(root)
    case = {x.name: x for x in cases(prepare(root))}[name]
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    tried: dict[str, int] = {}
    lost: list[str] = []
    bench.reset(case)
    old = bench.state(case)
    # the first run compiles
    assert bench.finish(bench.start(case)), bench.complaint()
    bench.reset(case)
    running = bench.start(case)
    begun = time.perf_counter()
    assert bench.finish(running), bench.complaint()
    took = time.perf_counter() - begun
    new = bench.state(case)

    def trial(kind: str, kill: Kill) -> bool:
        bench.reset(case)
        if not kill():
            return False
        tried[kind] = tried.get(kind, 0) + 1
        try:
            bench.check(case, old, new)
        except (AssertionError, HydraOptError) as error:
            lost.append(f"{kind} {tried[kind]}: {error}")
            print(f"{name}: {lost[-1]}", file=sys.stderr, flush=True)
        return True

    kill_all(bench, case, took, rng.uniform(0, 1, count).tolist(), trial)
    return tried, lost
