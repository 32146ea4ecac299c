"""Verbs that read a store: inspect, export, verify."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hydraopt_jax import compression, report, store
from hydraopt_jax.adapters import Adapter, check, stack
from hydraopt_jax.cli.common import (
    CheckFailed,
    as_json_option,
    bytes_table,
    clean,
    describe,
    error_table,
    held_notes,
    load_moments,
    read_in_batches,
    say,
    with_adapters,
)
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import peft, write_adapter
from hydraopt_jax.rate_control.encode_at_step import Metrics, metrics_of, task_errors
from hydraopt_jax.store import checkpoint, purging


@click.command()
@click.argument("path", metavar="STORE")
@as_json_option
def inspect(path: str, as_json: bool) -> None:
    """What is in a store: tasks, modules, form, bytes a leaf, error a task."""
    content = checkpoint.outline(path)
    leaves = checkpoint.read_index(path)[1]["leaves"]
    payload = describe(path, content) | {"leaves": leaves, "bytes": checkpoint.size_on_disk(path)}
    parts = payload["bytes_of"] = checkpoint.account(path)._asdict()
    table = Table("leaf", "bytes", title=f"{path}: {report.format_bytes(payload['bytes'])} on disk")
    for name, size in leaves.items():
        table.add_row(name, f"{size:,}")
    shape = Table("module", "[in, out]", "rank", "inputs", "outputs")
    for name, terms in content.modules.items():
        for term in terms:
            a, b = term.a[0], term.b[0]
            row = f"{a.shape[0]} x {b.shape[1]}", str(a.shape[1]), str(len(term.a)), str(len(term.b))
            shape.add_row(Text(name), *row)
    held = purging.held(content)
    payload["held"] = [x._asdict() for x in held]
    notes = [*map(escape, held_notes(held))]
    say(as_json, payload, bytes_table(parts, content), table, shape, error_table(content), *notes)


@click.command()
@click.argument("path", metavar="STORE")
@click.option("--task", "tasks", multiple=True, help="task to export; may be repeated")
@click.option("--all", "everything", is_flag=True, help="export every task, each to OUT/<its name>")
@click.option("--out", required=True, type=click.Path(), help="folder to write")
@click.option("--dtype", help="dtype on disk: float32, float16 or bfloat16; as it came where not given")
@click.option("--overwrite", is_flag=True, help="replace what is there")
@as_json_option
def export(
    path: str,
    tasks: Sequence[str],
    everything: bool,
    out: str,
    dtype: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write tasks of a store as PEFT folders."""
    if bool(tasks) == everything:
        raise HydraOptError("export: give either --task NAME or --all")
    if dtype is not None and dtype not in compression.DTYPES:
        raise HydraOptError(f"dtype = {dtype!r}: must be one of {', '.join(compression.DTYPES)}")
    known = checkpoint.read_index(path)[0]
    names = known if everything else [known[store.task_index(known, t)] for t in tasks]
    folders = {t: Path(out) if len(tasks) == 1 else Path(out) / peft.folder_name(t) for t in names}
    taken = [f for f in folders.values() if f.exists() and not overwrite]
    if taken or len(set(folders.values())) < len(names):
        where = (taken or list(folders.values()))[0]
        raise HydraOptError(f"{where}: exists; choose another --out or give --overwrite")
    with report.progress("exporting", len(folders), not as_json) as advance:
        for content in checkpoint.batches(path, list(folders)):
            for task in content.tasks:
                found = store.adapter(content, task)
                write_adapter(folders[task], found, dtype=dtype, overwrite=overwrite)
                advance()
    written = {task: str(f) for task, f in folders.items()}
    table = Table("task", "folder")
    for task, folder_text in written.items():
        table.add_row(Text(task), Text(folder_text))
    say(as_json, {"exported": written}, table)


@click.command()
@click.argument("path", metavar="STORE")
@click.argument("adapters", nargs=-1)
@with_adapters
@click.option(
    "--calibration", type=click.Path(), help="what the store was made with: check output errors, too"
)
@as_json_option
def verify(
    path: str,
    adapters: Sequence[str],
    any_base: bool,
    base_suffix: Sequence[str],
    calibration: str | None,
    as_json: bool,
) -> None:
    """Check a store's checksums; with ADAPTERS, measure the true errors against them.

    Errors of weights, and with --calibration those of the modules' outputs, each against its own claim.
    """
    moments = None if calibration is None else moments_of(path, calibration, adapters)
    files = checkpoint.verify(path)
    content = checkpoint.outline(path)
    payload: dict[str, Any] = {"store": str(path), "checksums": "ok", "files": files}
    payload["tasks"] = list(content.tasks)
    wrong: list[str] = []
    bounds = payload["bounded"] = list(content.report.get("bounded", ()))
    claims = {"error": content.errors}
    if moments is not None and content.output_errors is not None:
        claims["output_error"] = content.output_errors
    if adapters:
        measured: dict[str, dict[str, float]] = {k: {} for k in claims}
        for few in read_in_batches(adapters, any_base, base_suffix, as_json):
            kept = checkpoint.restore(path, [x.task for x in few])
            for key, found in measured.items():
                found |= compression.measure(kept, few, metrics(few, moments) if key != "error" else None)
        for key, found in measured.items():
            claimed = dict(zip(content.tasks, task_errors(claims[key]).tolist(), strict=True))
            payload[key] = {t: {"measured": clean(x), "claimed": clean(claimed[t])} for t, x in found.items()}
            # a task that was coded again without its original claims no more than a bound
            over = {t: x - claimed[t] if t in bounds else abs(x - claimed[t]) for t, x in found.items()}
            wrong += [t for t, x in over.items() if not x <= 1e-6 + 0.01 * claimed[t]]
        payload["ok"] = not wrong
    table = Table("check", "result", title=str(path))
    table.add_row("checksums", f"ok, {files} files")
    for key, label in ERRORS.items():
        for task, pair in payload.get(key, {}).items():
            claim = f"claimed {'at most ' * (task in bounds)}{pair['claimed']:.3e}"
            table.add_row(Text(task), f"{label} {pair['measured']:.3e}, {claim}")
    say(as_json, payload, table)
    if wrong:
        names = ", ".join(dict.fromkeys(wrong))
        raise CheckFailed(f"{path}: the errors of {names} differ from what the store claims")


# what is claimed, and what it is called
ERRORS = {"error": "error of weights", "output_error": "error of outputs"}


def moments_of(path: str, calibration: str, adapters: Sequence[str]) -> dict[str, np.ndarray]:
    """The second moments that a store was made with.

    Raises:
      HydraOptError: as `load_moments`, or there is nothing to check with them.
    """
    if not adapters:
        raise HydraOptError("--calibration: output errors are measured against ADAPTERS: name them, too")
    return load_moments(path, calibration)


def metrics(few: Sequence[Adapter], moments: dict[str, np.ndarray] | None) -> dict[str, Metrics]:
    """The metrics of the modules of some adapters."""
    return metrics_of(stack(few), list(check(few)), moments or {})
