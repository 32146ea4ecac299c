"""A job: the groups of a collection compressed one after another, each kept on disk as soon as it is done.

A job's folder lies beside the store, `STORE.partial`. A killed job goes on where it stopped and ends with the
same store, because a group depends on nothing but its own modules. Processes of one job share the folder and
divide the groups; the first one puts the store together.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax import atomic, compression
from hydraopt_jax.adapters import Bucket
from hydraopt_jax.compression import Options
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.jobs import assembly, devices, heads, streaming
from hydraopt_jax.jobs.assembly import Kept
from hydraopt_jax.jobs.groups import GROUP_BYTES, Block, Group, blocks, groups_of, streams
from hydraopt_jax.jobs.reading import Collection
from hydraopt_jax.rate_control import navigate
from hydraopt_jax.store import Store, checkpoint, packing
from hydraopt_jax.store.extras import Extras

SCHEMA = 1


class Processes(NamedTuple):
    """Who takes part in a job: process `rank` of `size`, how it waits for the others, and leaves."""

    rank: int = 0
    size: int = 1
    wait: Callable[[str], None] = lambda name: None
    leave: Callable[[], None] = lambda: None


class Progress(NamedTuple):
    """What a job tells while it works.

    Attributes:
      start: called once with modules in all and modules already done.
      step: called with modules just done.
      read: called with bytes just read.
    """

    start: Callable[[int, int], None] = lambda total, done: None
    step: Callable[[int], None] = lambda done: None
    read: Callable[[int], None] = lambda count: None


def solve_whole(group: Group, block: Block, options: Options, dtype: str) -> Mapping[str, Any]:
    """Any form of `compression`, with all tasks of the group at once."""
    count = len(group.modules)
    a = block.a[:count].astype(np.float32).swapaxes(2, 3)
    b = block.b[:count].astype(np.float32).swapaxes(2, 3) * block.scale[:count, :, None, None]
    bucket = Bucket(group.modules, a, b, block.ranks[:count])
    return compression.compress_chunk(bucket, slice(0, count), options, dtype)


def keep_whole(file: Path, solved: Mapping[str, Any], dtype: str) -> dict[str, Kept]:
    """Write a group's factors; say where they lie."""
    out = {}
    with file.open("wb") as sink:
        for name, (factors, errors, bound) in solved.items():
            offsets = []
            for part in packing.parts({name: (factors,)}):
                offsets.append(sink.tell())
                sink.write(np.ascontiguousarray(part.value).tobytes())
            core = None if factors.core is None else tuple(np.shape(factors.core))
            out[name] = Kept(
                factors.a.shape,
                factors.b.shape,
                np.asarray(factors.a_of).tolist(),
                np.asarray(factors.b_of).tolist(),
                core,
                dtype,
                str(file),
                offsets,
                [None if np.isnan(x) else float(x) for x in errors],
                bound,
            )
        sink.flush()
        os.fsync(sink.fileno())
    return out


def write_json(path: Path, content: Any) -> None:
    """Write a file at once or not at all."""
    text = json.dumps(content)
    new = path.with_suffix(f".{os.getpid()}")
    with new.open("w") as sink:
        sink.write(text)
        sink.flush()
        os.fsync(sink.fileno())
    os.replace(new, path)


def coded_heads(
    folder: Path, found: Collection, dtype: str | None, processes: Processes
) -> tuple[Extras, ...]:
    """The full tensors of every task, coded into the job's folder by all processes together."""
    heads.code(folder, found, dtype, processes.rank, processes.size)
    processes.wait("full tensors")
    try:
        return heads.kept(folder, found)
    except FileNotFoundError as error:
        raise absent(folder, Path(error.filename).name) from None


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
      HydraOptError: the file is not whole.
    """
    try:
        # a path in it may have bytes that are no text
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise HydraOptError(f"{path}: is not whole ({error}): delete {path.parent} and start again") from None


def fingerprint(found: Collection, options: Options | navigate.Options, dtype: str) -> str:
    """What a job's folder must agree in with the job that goes on with it."""
    rows = [[x.task, x.source, x.digest, x.stamp[0], x.config] for x in found.cards]
    said = {**options._asdict(), "optimizer": None, "dtype": dtype, "schema": SCHEMA, "adapters": rows}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def folder_of(out: str | os.PathLike) -> Path:
    """The folder of the job that makes a store."""
    path = Path(out).absolute()
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def alone(out: str | os.PathLike, rank: int = 0) -> Iterator[None]:
    """Hold the lock of all work on a store, from the first look at its adapters on; the first process does.

    Raises:
      HydraOptError: another job works on it, or there is no place to say so.
    """
    path = Path(out).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.locked(path, "job", again=True) if rank == 0 else contextlib.nullcontext():
            yield
    except OSError as error:
        raise assembly.disk_error(path, error) from error


def enter(folder: Path, mark: str, groups: Sequence[Any], limit: int) -> None:
    """Open a job's folder, new or of the same job.

    Raises:
      HydraOptError: the folder is another job's.
    """
    file = folder / "job.json"
    # the same groups, whatever this process's devices: else what was kept would not fit
    said = {"fingerprint": mark, "groups": len(groups), "limit": limit}
    if file.exists():
        if read_json(file) != said:
            raise HydraOptError(
                f"{folder}: is an unfinished job with other adapters or options: delete it, or choose "
                "another --out"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, said)


def kept_groups(folder: Path, groups: Sequence[Group]) -> dict[int, dict[str, Kept]]:
    """Groups that are done."""
    out = {}
    for n in range(len(groups)):
        file = folder / f"group-{n}.json"
        if file.exists():
            rows = read_json(file)
            out[n] = {k: Kept(*v)._replace(file=str(folder / f"group-{n}.bin")) for k, v in rows.items()}
    return out


def run(
    out: str | os.PathLike,
    found: Collection,
    options: Options,
    *,
    overwrite: bool = False,
    compress: bool = True,
    limit: int | None = None,
    left_out: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    processes: Processes | None = None,
    group_bytes: int = GROUP_BYTES,
) -> Store | None:
    """Compress a collection that need not fit in memory into a store on disk.

    Args:
      out: the store.
      found: the collection.
      options: the form, as `compression.compress` takes it.
      overwrite, compress, limit: as `checkpoint.save`.
      left_out: adapters that were not taken, with the reason, for the store's description.
      progress: what to tell while at work.
      processes: who takes part.
      group_bytes: factors, as they are on disk, that are read and solved together.

    Returns:
      The store without its numbers, for what can be said of it; None in all processes but the first.

    Raises:
      HydraOptError: bad options, a folder that is another job's, or a file system that takes no more. What
        is done stays, and the same call goes on with it.
      TooLarge: as `checkpoint.save`.
    """
    progress, processes = progress or Progress(), processes or Processes()
    tasks = len(found.cards)
    compression.check_options(options, tasks)
    checkpoint.check_target(out, overwrite)
    dtype = options.dtype or found.dtype
    groups = groups_of(found, options, group_bytes)
    folder = folder_of(out)
    with alone(out, processes.rank), keeping(folder, checkpoint.TooLarge):
        if processes.rank == 0:
            enter(folder, fingerprint(found, options, dtype), groups, group_bytes)
        processes.wait("entered")
        carried = coded_heads(folder, found, options.extras_dtype, processes)
        done = kept_groups(folder, groups)
        mine = [n for n in range(processes.rank, len(groups), processes.size) if n not in done]
        todo = {n: groups[n] for n in mine}
        modules = sum(len(groups[n].modules) for n in range(processes.rank, len(groups), processes.size))
        progress.start(modules, modules - sum(len(x.modules) for x in todo.values()))
        work(folder, found, todo, options, dtype, progress)
        processes.wait("worked")
        processes.leave()
        if processes.rank:
            return None
        done = kept_groups(folder, groups)
        missing = [n for n in range(len(groups)) if n not in done]
        if missing:
            raise absent(folder, f"group {missing[0]}")
        content = put_together(found, done, carried, options, dtype, left_out or {})
        put(out, content, overwrite, compress, limit)
    shutil.rmtree(folder, ignore_errors=True)
    return content


@contextlib.contextmanager
def keeping(folder: Path, *hopeless: type[HydraOptError]) -> Iterator[None]:
    """What is done in a job's folder stays there, whatever happens, but for errors that no other try mends.

    Raises:
      HydraOptError: in place of an OSError.
    """
    try:
        yield
    except hopeless:
        # as every refusal these leave nothing behind
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        raise assembly.disk_error(folder, error) from error


def put(out: str | os.PathLike, content: Store, overwrite: bool, compress: bool, limit: int | None) -> None:
    """Write the store and put it where it belongs, as `checkpoint.save`."""
    path = Path(out).resolve()
    with atomic.writing(path) as place:
        checkpoint.check_target(path, overwrite)
        # a full disk here is told as one anywhere else in the job, not as one of an ordinary writer
        with keeping(folder_of(out)):
            checkpoint.put(place, path, content, compress, limit)


def absent(folder: Path, what: str) -> HydraOptError:
    """The error where another process has done its part and it is not there."""
    return HydraOptError(
        f"{folder}: {what} of another process is not there: the folder must be on a file system that all "
        "processes share"
    )


def work(
    folder: Path,
    found: Collection,
    todo: Mapping[int, Group],
    options: Options,
    dtype: str,
    progress: Progress,
) -> None:
    """Solve groups and keep each as soon as it is done."""
    tasks = len(found.cards)
    passes = 2 if streams(options, tasks) else 1
    numbers = iter(todo)
    with contextlib.closing(blocks(found, list(todo.values()), passes, progress.read)) as stream:  # type: ignore[type-var]
        for group, parts in stream:
            number = next(numbers)
            file = folder / f"group-{number}.bin"
            if passes == 2:
                grid = devices.make(group.room)
                kept = streaming.solve(file, group, parts, tasks, options, dtype, grid)
            else:
                kept = keep_whole(file, solve_whole(group, next(parts), options, dtype), dtype)
            write_json(folder / f"group-{number}.json", {k: v._replace(file="") for k, v in kept.items()})
            del parts
            progress.step(len(group.modules))


def put_together(
    found: Collection,
    done: Mapping[int, Mapping[str, Kept]],
    carried: Sequence[Extras],
    options: Options,
    dtype: str,
    left_out: Mapping[str, str],
) -> Store:
    """The store, its numbers where the groups kept them."""
    every = {name: x for group in done.values() for name, x in group.items()}
    kept = {name: every[name] for name in found.shapes}
    report = {
        "form": "hydra",
        "options": {
            **options._asdict(),
            "optimizer": None,
            "heads": options.heads or len(found.cards),
            "dtype": dtype,
        },
        "entries": found.entries(),
        "bound": {name: float(f"{x.bound:.6g}") for name, x in kept.items()},
    }
    if left_out:
        report["left_out"] = dict(left_out)
    errors = np.array([[np.nan if e is None else e for e in x.errors] for x in kept.values()], np.float32)
    modules = {name: (assembly.stored(x),) for name, x in kept.items()}
    return Store(found.tasks, modules, assembly.sources_of(found, carried), report, errors)
