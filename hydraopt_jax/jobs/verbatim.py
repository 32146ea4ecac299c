"""A collection kept as its files have it, read while the store is written: see `lossless`."""

import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hydraopt_jax.deferred import Deferred, bytes_of
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.jobs import assembly, job
from hydraopt_jax.jobs.job import Processes, Progress
from hydraopt_jax.jobs.reading import Collection
from hydraopt_jax.rate_control import navigate
from hydraopt_jax.store import Store, lossless
from hydraopt_jax.store.extras import Extras
from hydraopt_jax.store.lossless import Raw


def run(
    out: str | os.PathLike,
    found: Collection,
    options: navigate.Options,
    compress: bool,
    left_out: Mapping[str, str],
    progress: Progress,
    processes: Processes,
    overwrite: bool,
) -> Store | None:
    """Write the store, by the first process; it may take more than its input by its own description."""
    processes.leave()
    if processes.rank:
        return None
    total = len(found.shapes)
    progress.start(total, 0)
    folder = job.folder_of(out)
    with job.alone(out), job.keeping(folder, HydraOptError):
        folder.mkdir(parents=True, exist_ok=True)
        heads = job.coded_heads(folder, found, options.extras_dtype, Processes())
        content = as_they_are(found, options, left_out, heads)
        job.put(out, content, overwrite, compress, None)
        progress.step(total)
    shutil.rmtree(folder, ignore_errors=True)
    return content


def as_they_are(
    found: Collection, options: navigate.Options, left_out: Mapping[str, str], heads: Sequence[Extras]
) -> Store:
    """The store, its numbers in the adapters' files."""
    # both factors of a module are asked for one after the other
    pair = functools.lru_cache(1)(lambda task, module: found.read(task, [module])[0])
    tasks = range(len(found.cards))
    rows = {m: [raw(found, pair, t, m) if found.rank(m, t) else None for t in tasks] for m in found.shapes}
    modules, errors, said = lossless.modules_of(rows)
    report = navigate.account(options, found.entries()) | said
    if left_out:
        report["left_out"] = dict(left_out)
    return Store(found.tasks, modules, assembly.sources_of(found, heads), report, errors)


def raw(found: Collection, pair: Any, task: int, module: str) -> Raw:
    """One module of one task, read when it is asked for."""
    entry = found.cards[task].modules[module]
    places = found.cards[task].places
    low, high = (places[k].dtype for k in entry[:2]) if places else (x.dtype for x in pair(task, module)[:2])

    def read(side: int, start: int, stop: int) -> Any:
        # files have PEFT's orientation, stores ours
        return bytes_of(np.ascontiguousarray(pair(task, module)[side].T))[start:stop]

    a = Deferred((entry.inputs, entry.rank), low, functools.partial(read, 0))
    b = Deferred((entry.rank, entry.outputs), high, functools.partial(read, 1))
    return Raw(a, b, float(np.float32(entry.scale)))
