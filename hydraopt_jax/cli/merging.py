"""The verb that merges adapters into one: merge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table
from rich.text import Text

from hydraopt_jax import calibration, merging, report
from hydraopt_jax.adapters import Adapter, check
from hydraopt_jax.cli.common import as_json_option, clean, read_all, say, with_adapters
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import write_adapter
from hydraopt_jax.merging import collection as merged_collection
from hydraopt_jax.merging import registry
from hydraopt_jax.store.store import task_errors
from hydraopt_jax.store.tensors import check_dtype


def parse_weight_list(text: str) -> list[float]:
    """Weights in the adapters' order, separated by commas.

    >>> parse_weight_list("1,0.5, -2")
    [1.0, 0.5, -2.0]
    """
    try:
        return [float(x) for x in text.split(",")]
    except ValueError:
        raise HydraOptError(
            f"weights {text!r}: give one number an adapter, in their order: 0.5,0.3,0.2"
        ) from None


def read_moments(rows: Sequence[str], tasks: Sequence[str]) -> list[Mapping[str, np.ndarray]]:
    """Second moments of each task's inputs, given as NAME=FILE, in the order of `tasks`."""
    files = {}
    for row in rows:
        name, sep, path = row.rpartition("=")
        if not sep or name not in tasks:
            raise HydraOptError(f"moments {row!r}: give NAME=FILE, NAME one of {', '.join(tasks)}")
        files[name] = path
    missing = [x for x in tasks if x not in files]
    if missing:
        raise HydraOptError(f"moments: none for {', '.join(missing)}: give --moments NAME=FILE for each")
    return [calibration.load(files[x]) for x in tasks]


def warn(message: str) -> None:
    """One line on standard error."""
    click.echo(f"hydraopt: warning: {message}", err=True)


def warnings(collection: Sequence[Adapter], method: str) -> None:
    """Say what a user may not expect of the result."""
    if method == "linear-factors":
        warn("linear-factors averages factors, not deltas: cross terms between adapters come in; use linear")
    extras = sorted({name for x in collection for name in x.extras})
    if extras:
        shown = ", ".join(extras[:3]) + (", ..." if len(extras) > 3 else "")
        warn(f"left out {len(extras)} tensors that belong to one task each: {shown}")


@click.command("merge")
@click.argument("adapters", nargs=-1, required=True)
@with_adapters
@click.option("--out", required=True, type=click.Path(), help="the PEFT folder to write")
@click.option("--method", default="linear", show_default=True, help=f"one of {', '.join(registry.METHODS)}")
@click.option("--weights", help="one number an adapter, in their order, separated by commas")
@click.option("--rank", type=int, help="S; the adapters' largest rank where not given")
@click.option("--density", type=float, help="fraction of entries kept, in (0, 1]")
@click.option("--epsilon", type=float, help="della: width of the range of probabilities")
@click.option("--outliers", type=float, help="breadcrumbs: fraction of largest entries dropped")
@click.option("--elect", help="signs by total or by frequency")
@click.option("--keep", type=int, help="tsv-m: singular directions a task")
@click.option("--off-diagonal", type=float, help="regmean: factor of the moments' off-diagonal entries")
@click.option("--moments", multiple=True, help="regmean: NAME=FILE, second moments of a task's inputs")
@click.option("--seed", type=int, default=0, show_default=True, help="of random masks")
@click.option("--dtype", help="dtype on disk: float32, float16 or bfloat16; as they came where not given")
@click.option("--overwrite", is_flag=True, help="replace what is there")
@as_json_option
def merge(
    adapters: Sequence[str],
    any_base: bool,
    base_suffix: Sequence[str],
    out: str,
    method: str,
    weights: str | None,
    rank: int | None,
    moments: Sequence[str],
    seed: int,
    dtype: str | None,
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Merge ADAPTERS into one adapter, a PEFT folder, by a published method."""
    options = {k: v for k, v in given.items() if v is not None}
    numbers = None if weights is None else parse_weight_list(weights)
    merged_collection.check_single(method)
    registry.check_options(
        method,
        options | ({} if rank is None else {"rank": rank}) | ({"moments": moments} if moments else {}),
    )
    merged_collection.check_weights(numbers, registry.find(method), len(adapters))
    check_dtype(dtype)
    if Path(out).exists() and not overwrite:
        raise HydraOptError(f"{out}: exists; choose another --out or give --overwrite")
    collection = read_all(adapters, any_base, base_suffix, as_json)
    if moments:
        options["moments"] = read_moments(moments, [x.task for x in collection])
    with report.progress(f"merging by {method}", len(check(collection)), not as_json) as advance:
        merged = merging.merge_adapters(
            collection,
            method,
            weights=numbers,
            rank=rank,
            seed=seed,
            task=Path(out).name,
            progress=advance,
            **options,
        )
    errors = merging.merged_errors(collection, merged)
    write_adapter(out, merged, dtype=dtype, overwrite=overwrite)
    warnings(collection, method)
    per_task = dict(zip([x.task for x in collection], task_errors(errors).tolist(), strict=True))
    payload = {
        "out": str(out),
        "method": method,
        "options": clean({k: v for k, v in options.items() if k != "moments"}),
        "weights": dict(zip(per_task, numbers, strict=True)) if numbers else None,
        "modules": len(merged.a),
        "rank": max(x.shape[1] for x in merged.a.values()),
        "error": {
            "per_task": clean(per_task),
            "mean": clean(float(np.nanmean(errors))),
            "worst": clean(max(per_task.values())),
        },
    }
    table = Table("task", "relative squared error", title=f"{out}: {method}, rank {payload['rank']}")
    for task, value in per_task.items():
        table.add_row(Text(task), f"{value:.3e}")
    say(as_json, payload, table)
