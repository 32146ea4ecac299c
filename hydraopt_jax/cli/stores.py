"""Verbs that read a store: inspect, export, verify."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from hydraopt_jax import checkpoint, compression, report, store
from hydraopt_jax.cli.common import (
    CheckFailed,
    as_json_option,
    bytes_table,
    clean,
    describe,
    error_table,
    read_in_batches,
    say,
    with_adapters,
)
from hydraopt_jax.coding.trial import task_errors
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import peft, write_adapter


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
    say(as_json, payload, bytes_table(parts, content), table, shape, error_table(content))


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
@as_json_option
def verify(
    path: str, adapters: Sequence[str], any_base: bool, base_suffix: Sequence[str], as_json: bool
) -> None:
    """Check a store's checksums; with ADAPTERS, measure the true errors against them."""
    files = checkpoint.verify(path)
    content = checkpoint.outline(path)
    payload: dict[str, Any] = {"store": str(path), "checksums": "ok", "files": files}
    payload["tasks"] = list(content.tasks)
    if adapters:
        measured: dict[str, float] = {}
        for few in read_in_batches(adapters, any_base, base_suffix, as_json):
            measured |= compression.measure(checkpoint.restore(path, [x.task for x in few]), few)
        claimed = dict(zip(content.tasks, task_errors(content.errors).tolist(), strict=True))
        payload["error"] = {
            t: {"measured": clean(x), "claimed": clean(claimed[t])} for t, x in measured.items()
        }
        wrong = [t for t, x in measured.items() if not abs(x - claimed[t]) <= 1e-6 + 0.01 * claimed[t]]
        payload["ok"] = not wrong
    table = Table("check", "result", title=str(path))
    table.add_row("checksums", f"ok, {files} files")
    for task, pair in payload.get("error", {}).items():
        table.add_row(Text(task), f"error {pair['measured']:.3e}, claimed {pair['claimed']:.3e}")
    say(as_json, payload, table)
    if adapters and wrong:
        raise CheckFailed(f"{path}: the errors of {', '.join(wrong)} differ from what the store claims")
