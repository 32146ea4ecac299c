"""A collection that memory does not hold, compressed to a budget or an error target.

The step that meets the target is looked for on a small part of the collection first; then all segments are
coded at it, and again at a corrected one until the whole meets the target, which takes two passes as a rule.
A segment depends on nothing but its own factors, the step and the tables of the pass: processes of one job
divide them, and a killed job goes on with those that are not done and ends with the same store.
"""

import functools
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from hydraopt_jax import memory
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.jobs import assembly, devices, job, segments, target, verbatim
from hydraopt_jax.jobs.job import Processes, Progress
from hydraopt_jax.jobs.reading import Collection
from hydraopt_jax.jobs.segments import SEGMENT_BYTES, Coded, Part
from hydraopt_jax.jobs.target import Pass, Pilot, Target
from hydraopt_jax.rate_control import budget, encode_at_step, navigate
from hydraopt_jax.rate_control.navigate import Options
from hydraopt_jax.store import Payload, Segment, Store, checkpoint, container_writer, extras, packing

# bytes of a store's description: a chunk's line, and what any store has
LINE, FIXED = 40, 1200


def check(options: Options) -> Options:
    """`navigate.check_options`; also refuses what needs the whole collection at once."""
    options = navigate.check_options(options)
    if options.max_task_error is not None or options.calibration is not None:
        name = "--calibration" if options.max_task_error is None else "--max-task-error"
        raise HydraOptError(f"{name} holds the whole collection in memory: compress fewer adapters with it")
    return options


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
    segment_bytes: int = SEGMENT_BYTES,
) -> Store | None:
    """Compress a collection that need not fit in memory to a budget or a mean error, into a store on disk.

    Args:
      out: the store.
      found: the collection.
      options: a budget or `max_error`; no calibration.
      overwrite, compress, limit: as `checkpoint.save`.
      left_out: adapters that were not taken, with the reason, for the store's description.
      progress: what to tell while at work.
      processes: who takes part.
      segment_bytes: half-precision bytes of the factors that are coded together.

    Returns:
      The store without its numbers; None in all processes but the first.

    Raises:
      HydraOptError: bad options, a target that cannot be met, a folder that is another job's, or a file
        system that takes no more. What is done stays, and the same call goes on with it.
      TooLarge: as `checkpoint.save`.
    """
    progress, processes = progress or Progress(), processes or Processes()
    options = check(options)
    checkpoint.check_target(out, overwrite)
    if budget.keeps_all(options.budget):  # type: ignore[arg-type]
        return verbatim.run(out, found, options, compress, left_out or {}, progress, processes, overwrite)
    parts = segments.parts_of(found, segment_bytes)
    folder = job.folder_of(out)
    with job.alone(out, processes.rank), job.keeping(folder, checkpoint.TooLarge, target.Unmet):
        if processes.rank == 0:
            job.enter(folder, job.fingerprint(found, options, "coded"), parts, segment_bytes)
        processes.wait("entered")
        heads = job.coded_heads(folder, found, options.extras_dtype, processes)
        with job.keeping(folder, HydraOptError):
            extras.check_room(options.budget, heads, options.extras_dtype)
            goal = target.target_of(found, options, sum(x.nbytes for x in heads))
        known = pilot_of(folder, found, options, goal, processes, segment_bytes)
        make = functools.partial(put_together, folder, found, options, parts, heads, left_out or {})
        content = passes(folder, found, options, goal, parts, known, make, progress, processes)
        processes.leave()
        if processes.rank:
            return None
        job.put(out, content, overwrite, compress, int(goal.limit) + goal.heads if goal.sign < 0 else limit)
    shutil.rmtree(folder, ignore_errors=True)
    return content


def pilot_of(
    folder: Path, found: Collection, options: Options, goal: Target, processes: Processes, limit: int
) -> Pilot:
    """What a part of the collection tells, which the first process finds out."""
    file = folder / "pilot.npz"
    if processes.rank == 0 and not file.exists():
        with (folder / "pilot.new").open("wb") as sink:
            np.savez(sink, **target.pilot(found, options, goal, limit)._asdict())
        os.replace(folder / "pilot.new", file)
    processes.wait("pilot")
    with np.load(file, allow_pickle=False) as saved:
        return Pilot(**saved)


def passes(
    folder: Path,
    found: Collection,
    options: Options,
    goal: Target,
    parts: Sequence[Part],
    known: Pilot,
    make: Callable[[int, float], Store],
    progress: Progress,
    processes: Processes,
) -> Store:
    """Code all segments until the whole meets the target: the store that `make` makes of that pass."""
    done: list[Pass] = []
    while (chosen := target.met(done)) is None:
        if len(done) == target.PASSES:
            raise target.unmet(done, goal)
        number = len(done)
        step = target.next_step(done, float(known.slope), goal) if number else float(known.step)
        one_pass(folder, number, found, options, parts, step, known, progress, processes)
        processes.wait(f"pass {number}")
        content = make(number, step)
        done.append(Pass(step, miss_of(content, goal)))
        if done[-1].miss > 0:
            # it will not be taken: its description stays, its bytes make room
            for n in range(processes.rank, len(parts), processes.size):
                codes(folder, number, n).unlink(missing_ok=True)
        if done[-1].miss > 0 and step >= navigate.STEPS[1] / 1.0001 and goal.sign < 0:
            raise target.unmet(done, goal)
    if chosen == number:
        return content
    return make(chosen, done[chosen].step)


def one_pass(
    folder: Path,
    number: int,
    found: Collection,
    options: Options,
    parts: Sequence[Part],
    step: float,
    known: Pilot,
    progress: Progress,
    processes: Processes,
) -> None:
    """Code this process's segments that are not done, as many at once as it has devices."""
    weights = navigate.task_weights(found.tasks, options)
    mine = range(processes.rank, len(parts), processes.size)
    todo = [n for n in mine if not row(folder, number, n).exists()]
    total = sum(len(parts[n].modules) for n in mine)
    progress.start(total, total - sum(len(parts[n].modules) for n in todo))
    told = threading.Lock()

    def one(item: tuple[int, list[Adapter]]) -> None:
        n, collection = item
        own = weights[list(parts[n].tasks)]
        problem = segments.prepare(collection, own, options.share, bool(known.deep))
        before = segments.kept(row(folder, 0, n)) if number else None
        if before is None:
            problem = encode_at_step.bar(problem, step, known.frequencies)
        else:
            problem = problem._replace(barred=frozenset(before.barred))
        names = [x.task for x in collection]
        coded = segments.code(problem, names, step, known.frequencies, codes(folder, number, n))
        segments.keep(row(folder, number, n), coded)
        memory.give_back()
        with told:
            progress.step(len(parts[n].modules))

    def count(size: int) -> None:
        with told:
            progress.read(size)

    coming = segments.ahead(found, [parts[n] for n in todo], count, len(jax.local_devices()))
    devices.spread(one, zip(todo, coming, strict=True))


def row(folder: Path, number: int, n: int) -> Path:
    """Where a pass's segment is described."""
    return folder / f"pass-{number}-{n}.json"


def codes(folder: Path, number: int, n: int) -> Path:
    """Where its bytes lie."""
    return folder / f"pass-{number}-{n}.bin"


def segments_of(folder: Path, number: int, count: int) -> list[Coded]:
    """All segments of a pass.

    Raises:
      HydraOptError: one is missing, though its process says that it is done.
    """
    out = []
    for n in range(count):
        found = segments.kept(row(folder, number, n))
        if found is None:
            raise job.absent(folder, f"segment {n}")
        out.append(found)
    return out


def miss_of(content: Store, goal: Target) -> float:
    """Log of a store's bytes or mean error over the target."""
    value = float(np.nanmean(content.errors)) if goal.sign > 0 else size(content) - goal.heads
    return float(np.log(max(value, 1e-30) / goal.limit))


def size(content: Store) -> int:
    """Bytes of a store on disk, a few hundred more than less."""
    index = packing.pack(content)[1]
    body = packing.index_size(index) + sum(index["leaves"].values())
    # a line of the description for each chunk, and what any store has
    return body + LINE * (body // container_writer.division(body)[0] + 1) + FIXED


def put_together(
    folder: Path,
    found: Collection,
    options: Options,
    parts: Sequence[Part],
    heads: Sequence[extras.Extras],
    left_out: Mapping[str, str],
    number: int,
    step: float,
) -> Store:
    """The store of a pass, its leaves in the segments' files."""
    rows = segments_of(folder, number, len(parts))
    made = []
    for n, (part, x) in enumerate(zip(parts, rows, strict=True)):
        file = str(codes(folder, number, n))
        leaves = {k: assembly.in_file(file, at, (size,), np.uint8) for k, (at, size) in x.leaves.items()}
        made.append(Segment(leaves, x.shapes, part.tasks))  # type: ignore[arg-type]
    modules = packing.segmented_terms(made, range(len(found.cards)))
    position = {name: m for m, name in enumerate(modules)}
    errors = np.full((len(modules), len(found.cards)), np.nan)
    forms: dict[str, int] = {}
    for part, x in zip(parts, rows, strict=True):
        for row, name in zip(x.table, x.shapes, strict=True):
            errors[position[name], list(part.tasks)] = row
        for label, count in x.forms.items():
            forms[label] = forms.get(label, 0) + count
    numbers = [np.count_nonzero(~np.isnan(x.table)) for x in rows]
    tail = float(np.average([x.tail for x in rows], weights=numbers))
    report = navigate.account(options, found.entries()) | {
        "form": "coded",
        "step": float(f"{step:.6g}"),
        "forms": forms,
        "bound": {"eigen-tail": float(f"{tail:.6g}")},
    }
    if left_out:
        report["left_out"] = dict(left_out)
    payload = Payload({}, {}, segments=tuple(made))
    if len(made) == 1 and len(made[0].tasks) == len(found.cards):
        # a collection of one segment is an ordinary coded store
        payload = Payload(made[0].leaves, made[0].shapes)
    return Store(found.tasks, modules, assembly.sources_of(found, heads), report, errors, payload)
