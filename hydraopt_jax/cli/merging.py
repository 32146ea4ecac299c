"""The verb that merges adapters into one: merge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from click.core import ParameterSource

from hydraopt_jax import calibration, merging, report
from hydraopt_jax.adapters import Adapter, check
from hydraopt_jax.cli.common import (
    PlaceType,
    check_range,
    check_task,
    number_of,
    parse_files,
    parse_numbers,
    read_all,
    with_adapters,
)
from hydraopt_jax.cli.output import jsonable, output_options, progress, say, warn
from hydraopt_jax.errors import HydraOptError, exists
from hydraopt_jax.formats import write_adapter
from hydraopt_jax.merging import registry, whole_adapters
from hydraopt_jax.rate_control import search
from hydraopt_jax.store.store import task_errors
from hydraopt_jax.store.tensors import check_dtype

# methods that make one adapter; the others are baselines of frontier
SINGLE = [name for name, x in registry.METHODS.items() if x.single]
WORSE = (
    "An error of 100% is that of no adapter. Above 100% the merged delta is farther from the task's own "
    "delta than zero is."
)


def weights_of(rows: Sequence[str], method: str, tasks: Sequence[str]) -> list[float] | None:
    """One weight per task, the method's default for unnamed tasks; None if no weight is given."""
    given = parse_numbers("--weight", rows)
    if not given:
        return None
    for task in given:
        check_task("--weight", f"{task}={given[task]:g}", task, tasks)
    own = whole_adapters.check_weights(None, registry.method_of(method), len(tasks))
    return [given.get(t, float(x)) for t, x in zip(tasks, own, strict=True)]


def moments_of_tasks(rows: Sequence[str], tasks: Sequence[str]) -> list[Mapping[str, np.ndarray]]:
    """Second moments of each task's inputs, from options NAME=FILE, in the order of `tasks`."""
    files = parse_files("--moments", rows, tasks)
    missing = [x for x in tasks if x not in files]
    if missing:
        raise HydraOptError(f"--moments: none for {', '.join(missing)}: give --moments NAME=FILE for each")
    return [calibration.read_moments(files[x]) for x in tasks]


def parse_scale(text: str) -> float | None:
    """The factor of --scale; None for `auto`.

    >>> parse_scale("0.5"), parse_scale("auto")
    (0.5, None)
    """
    if text == "auto":
        return None
    value = number_of(text)
    if value is None or not np.isfinite(value):
        raise HydraOptError(
            f"--scale {text}: give a number, or auto for the factor with the lowest mean error"
        )
    check_range(f"--scale {text}", value)
    return value


def warnings(collection: Sequence[Adapter], method: str) -> None:
    """Warn of results that may surprise."""
    if method == "linear-factors":
        warn("linear-factors averages factors, not deltas: cross terms between adapters come in; use linear")
    extras = sorted({name for x in collection for name in x.extras})
    if extras:
        shown = ", ".join(extras[:3]) + (", ..." if len(extras) > 3 else "")
        count = f"{len(extras)} tensor{'s' * (len(extras) > 1)}"
        warn(f"left out {count} that a task has for itself, such as a head: {shown}")


@click.command("merge")
@click.argument("adapters", nargs=-1, required=True, type=PlaceType())
@with_adapters
@click.option("--out", required=True, type=click.Path(), help="the PEFT folder to write")
@click.option("--method", default="linear", show_default=True, help=f"one of {', '.join(SINGLE)}")
@click.option(
    "--weight",
    "weights",
    multiple=True,
    metavar="NAME=NUMBER",
    help="weight of a task; default: 1 / T where the method adds, else 1; may be repeated",
)
@click.option(
    "--scale",
    default="1",
    metavar="NUMBER",
    help="factor of the merged delta (lambda of task arithmetic and TIES); auto: that of lowest mean error",
)
@click.option("--rank", type=int, help="rank of the merged adapter; default: the largest of the adapters")
@click.option("--density", type=float, help="fraction of entries kept, in (0, 1]")
@click.option("--epsilon", type=float, help="della: width of the range of probabilities")
@click.option("--outliers", type=float, help="breadcrumbs: fraction of largest entries dropped")
@click.option("--elect", metavar="RULE", help="ties and others: signs by total or by frequency")
@click.option("--keep", type=int, help="tsv-m: singular directions per task")
@click.option("--off-diagonal", type=float, help="regmean: factor of the moments' off-diagonal entries")
@click.option(
    "--moments",
    multiple=True,
    metavar="NAME=FILE",
    help="regmean: second moments of a task's inputs; once per task",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="seed of the random masks"
)
@click.option(
    "--dtype", metavar="DTYPE", help="dtype on disk: float32, float16 or bfloat16; default: the adapters' own"
)
@click.option("--overwrite", is_flag=True, help="replace what is there")
@output_options
def merge(
    adapters: Sequence[str],
    any_base: bool,
    base_suffix: Sequence[str],
    out: str,
    method: str,
    weights: Sequence[str],
    scale: str,
    rank: int | None,
    moments: Sequence[str],
    seed: int,
    dtype: str | None,
    overwrite: bool,
    **given: Any,
) -> None:
    """Merge ADAPTERS into one adapter, a PEFT folder, by a published method.

    Errors say how far the merged delta is from each task's own: 0 is equal, 100% as far as no adapter.
    """
    options = {k: v for k, v in given.items() if v is not None}
    factor = parse_scale(scale)
    whole_adapters.check_single(method)
    registry.check_options(
        method,
        options | ({} if rank is None else {"rank": rank}) | ({"moments": moments} if moments else {}),
    )
    source = click.get_current_context().get_parameter_source("seed")
    if source is ParameterSource.COMMANDLINE and "key" not in registry.method_of(method).options:
        raise HydraOptError(f"--seed: {method} draws no masks: leave it out")
    parse_numbers("--weight", weights)
    check_dtype(dtype)
    if Path(out).exists() and not overwrite:
        raise exists(out)
    collection = read_all(adapters, any_base, base_suffix)
    tasks = [x.task for x in collection]
    numbers = weights_of(weights, method, tasks)
    if moments:
        options["moments"] = moments_of_tasks(moments, tasks)
    with progress(f"merging by {method}", len(check(collection))) as advance:
        merged = merging.merge_adapters(
            collection,
            method,
            weights=numbers,
            rank=rank,
            scale=1.0 if factor is None else factor,
            key=jax.random.key(seed),
            progress=advance,
            **options,
        )
    best, least = merging.best_scale(collection, merged)
    if factor is None:
        factor = best
        merged = merged.replace(b={k: v * np.float32(best) for k, v in merged.b.items()})
        best = 1.0
    errors = merging.merged_errors(collection, merged)
    write_adapter(out, merged, dtype=dtype, overwrite=overwrite)
    warnings(collection, method)
    per_task = dict(zip(tasks, task_errors(errors).tolist(), strict=True))
    mean, worst = search.value(errors, ()), max(per_task.values())
    payload = {
        "out": str(out),
        "method": method,
        "options": jsonable({k: v for k, v in options.items() if k != "moments"}),
        "weights": dict(zip(per_task, numbers, strict=True)) if numbers else None,
        "scale": jsonable(factor),
        "best": jsonable({"scale": factor * best, "mean": least}),
        "modules": len(merged.a),
        "rank": max(x.shape[1] for x in merged.a.values()),
        "error": {"per_task": jsonable(per_task), "mean": jsonable(mean), "worst": jsonable(worst)},
    }
    table = report.columns("task", ">error")
    for task, value in per_task.items():
        table.add_row(report.shorten(task), report.format_error(value))
    notes = []
    if worst > 1:
        notes.append(WORSE)
    if least < 0.99 * mean and scale != "auto":
        low = report.format_error(least)
        notes.append(f"Lowest mean error: {low}, at scale {factor * best:.3g} (--scale auto)")
    how = f"{method}, rank {payload['rank']}, scale {factor:.3g}"
    last = f"{out}: {len(tasks)} adapters merged by {how}, mean error {report.format_error(mean)}"
    say(payload, table, *notes, last)
