"""Verbs that read a store: inspect, export, verify, pack, unpack. They need no JAX, but to measure errors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hydraopt_jax import report, store
from hydraopt_jax.adapters import Adapter, module_shapes
from hydraopt_jax.cli.common import (
    CheckFailed,
    as_json_option,
    bytes_table,
    calibration_notes,
    clean,
    describe,
    error_table,
    held_notes,
    load_moments,
    read_in_batches,
    say,
    with_adapters,
)
from hydraopt_jax.deferred import size_of
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import server, write_adapter
from hydraopt_jax.formats.adapter_folder import folder_name
from hydraopt_jax.store import files, portable, removal
from hydraopt_jax.store.decoding import decode_all
from hydraopt_jax.store.store import task_errors, tensors_of
from hydraopt_jax.store.tensors import check_dtype


@click.command()
@click.argument("path", metavar="STORE")
@as_json_option
def inspect(path: str, as_json: bool) -> None:
    """What is in a store: tasks, modules, form, bytes a leaf, error a task."""
    content = store.open(path)
    rows = [
        {"tasks": names_of(x), "leaves": {k: size_of(v) for k, v in x.leaves.items()}}
        for x in content.segments
    ]
    payload = describe(path, content) | {"leaves": rows, "bytes": files.size_on_disk(path)}
    parts = payload["bytes_of"] = files.account(path, content)._asdict()
    table = Table(
        "segment", "leaf", "bytes", title=f"{path}: {report.format_bytes(payload['bytes'])} on disk"
    )
    shape = Table("module", "[in, out]", "rank", "inputs", "outputs")
    for n, x in enumerate(content.segments):
        for leaf, value in x.leaves.items():
            table.add_row(str(n + 1), leaf, f"{size_of(value):,}")
        for name, terms in x.modules.items():
            for term in terms:
                counts = (str(max(of, default=-1) + 1) for of in (term.a_of, term.b_of))
                shape.add_row(Text(name), f"{term.inputs} x {term.outputs}", str(term.rank), *counts)
    held = removal.held(content)
    payload["held"] = [x._asdict() for x in held]
    notes = [*map(escape, [*held_notes(held), *calibration_notes(content)])]
    say(as_json, payload, bytes_table(parts, content), table, shape, error_table(content), *notes)


@click.command()
@click.argument("path", metavar="STORE")
@click.option("--task", "tasks", multiple=True, help="task to export; may be repeated")
@click.option("--all", "everything", is_flag=True, help="export every task, each to OUT/<its name>")
@click.option("--out", required=True, type=click.Path(), help="folder to write")
@click.option("--dtype", help="dtype on disk: float32, float16 or bfloat16; as it came where not given")
@click.option("--overwrite", is_flag=True, help="replace what is there")
@click.option("--rank", type=int, help="cut wider modules to the nearest product of this rank")
@click.option("--pad", is_flag=True, help="fill narrower modules with zeros, up to --rank where given")
@click.option("--profile", help="what the server vllm loads: one rank, one scale, no patterns")
@as_json_option
def export(
    path: str,
    tasks: Sequence[str],
    everything: bool,
    out: str,
    dtype: str | None,
    overwrite: bool,
    rank: int | None,
    pad: bool,
    profile: str | None,
    as_json: bool,
) -> None:
    """Write tasks of a store as PEFT folders."""
    if bool(tasks) == everything:
        raise HydraOptError("export: give either --task NAME or --all")
    check_dtype(dtype)
    whole = store.open(path)
    known = whole.tasks
    names = known if everything else [known[store.task_index(known, t)] for t in tasks]
    folders = {t: Path(out) if len(tasks) == 1 else Path(out) / folder_name(t) for t in names}
    taken = [f for f in folders.values() if f.exists() and not overwrite]
    if taken or len(set(folders.values())) < len(names):
        where = (taken or list(folders.values()))[0]
        raise HydraOptError(f"{where}: exists; choose another --out or give --overwrite")
    server.check(rank, profile)
    for t in names:
        x = whole.sources[whole.tasks.index(t)]
        server.check_task(profile, t, tensors_of(whole, t), x.config, x.layout)
    ranks, cut = {}, {}
    with report.progress("exporting", len(folders), not as_json) as advance:
        for content in files.batches(whole, list(folders)):
            for found in decode_all(content):
                task = found.task
                fitted = server.fit(found, rank=rank, padded=pad, profile=profile)
                write_adapter(folders[task], fitted.adapter, dtype=dtype, overwrite=overwrite)
                ranks[task] = max(x.shape[1] for x in fitted.adapter.a.values())
                if fitted.errors:
                    errors = list(fitted.errors.values())
                    cut[task] = {"modules": len(errors), "mean": float(np.mean(errors)), "worst": max(errors)}
                advance()
    written = {task: str(f) for task, f in folders.items()}
    table = Table("task", "folder", "rank")
    for task, folder_text in written.items():
        table.add_row(Text(task), Text(folder_text), str(ranks[task]))
    notes = [
        f"{escape(task)}: {x['modules']} modules were cut, relative squared error of their deltas "
        f"{x['mean']:.3e}, worst {x['worst']:.3e}"
        for task, x in cut.items()
    ]
    say(as_json, {"exported": written, "ranks": ranks, "cut": clean(cut)}, table, *notes)


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
    if calibration is not None and not adapters:
        raise HydraOptError("--calibration: output errors are measured against ADAPTERS: name them, too")
    leaves = store.verify(path)
    content = store.open(path)
    moments = None if calibration is None else load_moments(content, path, calibration)
    payload: dict[str, Any] = {"store": str(path), "checksums": "ok", "leaves": leaves}
    payload["tasks"] = list(content.tasks)
    wrong: list[str] = []
    bounds = payload["bounded"] = list(content.report.get("bounded", ()))
    claims = {"error": content.errors}
    if moments is not None and content.output_errors is not None:
        claims["output_error"] = content.output_errors
    if adapters:
        measured: dict[str, dict[str, float]] = {k: {} for k in claims}
        for few in read_in_batches(adapters, any_base, base_suffix, as_json):
            for key, found in measured.items():
                found |= true_errors(content, few, moments if key != "error" else None)
        for key, found in measured.items():
            claimed = dict(zip(content.tasks, task_errors(claims[key]).tolist(), strict=True))
            payload[key] = {t: {"measured": clean(x), "claimed": clean(claimed[t])} for t, x in found.items()}
            # a task that was coded again without its original claims no more than a bound
            over = {t: x - claimed[t] if t in bounds else abs(x - claimed[t]) for t, x in found.items()}
            wrong += [t for t, x in over.items() if not x <= 1e-6 + 0.01 * claimed[t]]
        payload["ok"] = not wrong
    table = Table("check", "result", title=str(path))
    table.add_row("checksums", f"ok, {leaves} leaves")
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


def true_errors(
    content: store.Store, few: Sequence[Adapter], moments: Mapping[str, np.ndarray] | None
) -> dict[str, float]:
    """Measured errors of some tasks: of weights, or of outputs where second moments are given."""
    from hydraopt_jax.rate_control.errors_of import measure
    from hydraopt_jax.rate_control.metrics import metrics_of

    shapes = {k: v for x in few for k, v in module_shapes(x).items()}
    return measure(content, few, None if moments is None else metrics_of(shapes, moments))


def names_of(x: store.Segment) -> list[str]:
    """Names of the tasks of a segment that are in the store."""
    return [x.tasks[k] for k in x.live]


@click.command()
@click.argument("path", metavar="STORE")
@click.argument("file")
@click.option("--overwrite", is_flag=True, help="replace a store that is there")
@as_json_option
def pack(path: str, file: str, overwrite: bool, as_json: bool) -> None:
    """Write STORE as one FILE, whose name ends in .safetensors."""
    if not files.is_file(file):
        raise HydraOptError(f"{file}: the name of a portable store ends in {portable.SUFFIX}")
    copy(path, file, overwrite, as_json)


@click.command()
@click.argument("path", metavar="STORE")
@click.argument("folder")
@click.option("--overwrite", is_flag=True, help="replace a store that is there")
@as_json_option
def unpack(path: str, folder: str, overwrite: bool, as_json: bool) -> None:
    """Write STORE as a FOLDER."""
    if files.is_file(folder):
        raise HydraOptError(f"{folder}: a store of that name is one file: name a folder")
    copy(path, folder, overwrite, as_json)


def copy(path: str, out: str, overwrite: bool, as_json: bool) -> None:
    """Write a store somewhere else, as a folder or a file by its name."""
    store.save(out, store.open(path), overwrite=overwrite)
    sizes = {"bytes_before": files.size_on_disk(path), "bytes_after": files.size_on_disk(out)}
    table = Table("store", "bytes on disk")
    for name, size in zip((path, out), sizes.values(), strict=True):
        table.add_row(Text(str(name)), report.format_bytes(size))
    say(as_json, {"store": str(out), **sizes}, table)
