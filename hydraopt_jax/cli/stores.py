"""Verbs that read a store: inspect, export, verify, pack, unpack. They need no JAX, but to measure errors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

from hydraopt_jax import provenance, report, store
from hydraopt_jax.adapters import layer_kind
from hydraopt_jax.cli.common import (
    CheckFailed,
    PlaceType,
    load_moments,
    plot_option,
    read_in_turn,
    with_adapters,
)
from hydraopt_jax.cli.descriptions import (
    bytes_table,
    calibration_notes,
    claims_of,
    describe,
    errors_of_tasks,
    forms_table,
    groups_note,
    held_notes,
    module_errors,
    references_table,
    sentence,
    worst_modules,
)
from hydraopt_jax.cli.output import jsonable, mode, output_options, progress, say
from hydraopt_jax.deferred import size_of
from hydraopt_jax.errors import DamagedStore, HydraOptError, exists
from hydraopt_jax.formats import server, write_adapter
from hydraopt_jax.formats.adapter_folder import folder_name
from hydraopt_jax.rate_control.distortion import measure
from hydraopt_jax.store import files, portable, removal, sizes
from hydraopt_jax.store.decoding import decode_all
from hydraopt_jax.store.predictions import groups, predicted
from hydraopt_jax.store.store import counted, task_errors, tensors_of
from hydraopt_jax.store.tensors import check_dtype


@click.command()
@click.argument("path", metavar="STORE", type=PlaceType())
@click.option(
    "--recipe",
    type=click.Path(),
    help="write a .json or .yaml file that repeats the compression: compress --recipe",
)
@plot_option("write the errors by module and task")
@click.option(
    "--references", is_flag=True, help="show which tasks are predicted from which; reads every leaf"
)
@output_options
def inspect(path: str, recipe: str | None, plot: str | None, references: bool) -> None:
    """Show STORE: tasks with bytes, errors and sources, then modules.

    --verbose lists every leaf, and with --json the error of every module of every task.
    """
    content = store.open(path)
    if recipe is not None:
        provenance.check_absent(recipe)
        again = provenance.recipe_of(content)
    if plot:
        report.plot_errors(plot, list(claims_of(content).values())[-1], list(content.shapes), content.tasks)
    if recipe is not None:
        provenance.write_recipe(recipe, again)
    own = sizes.task_bytes(content)
    rows = [
        {
            "tasks": [x.tasks[k] for k in x.live],
            "leaves": {k: size_of(v) for k, v in x.leaves.items()},
        }
        for x in content.segments
    ]
    parts = sizes.account(path, content)._asdict()
    size = sum(parts.values())
    held, kinds = removal.held(content), kinds_of(content)
    payload = describe(path, content) | {"leaves": rows, "bytes": size, "bytes_of": parts}
    payload |= {"task_bytes": own, "kinds": kinds, "held": [x._asdict() for x in held]}
    payload["worst_modules"] = worst = worst_modules(content)
    if mode().verbose:
        payload["module_errors"] = module_errors(content)
    payload["sources"] = {
        t: {"origin": x.origin, "digest": x.digest, "dtype": x.dtype}
        for t, x in zip(content.tasks, content.sources, strict=True)
    }
    kind_table = report.columns("layer kind", ">modules", ">in x out", ">rank", ">error")
    for kind, x in kinds.items():
        shapes = [f"{low} x {high}" for low, high in x["shapes"]]
        shape = shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes"
        low, high = x["ranks"]
        ranks = str(low) if low == high else f"{low} to {high}"
        error = report.format_error(float("nan") if x["error"] is None else x["error"])
        kind_table.add_row(report.shorten(kind), str(x["modules"]), shape, ranks, error)
    found = predicted(content) if references else {}
    if references:
        payload["references"] = {
            t: {"vectors": x.vectors, "sources": {k: v._asdict() for k, v in x.sources.items()}}
            for t, x in found.items()
        }
        payload["groups"] = groups(found)
    notes = [*held_notes(held, content.tasks), *calibration_notes(content), *provenance.sentences(content)]
    if worst:
        error = report.format_error(worst[0]["error"])
        notes.insert(0, f"highest error of a module: {error}, {worst[0]['module']} of {worst[0]['task']}")
    tables: tuple[Any, ...] = (tasks_table(content, own), kind_table, bytes_table(parts, content))
    if references:
        tables = (*tables, references_table(found) if found else None, groups_note(payload["groups"]))
    if mode().verbose:
        tables = (*tables, forms_table(content), modules_table(content), leaves_table(content))
    say(payload, *tables, *notes, sentence(content, 0, size))


def tasks_table(content: store.Store, own: Mapping[str, int]) -> Table:
    """A table of tasks: own bytes, errors, sources."""
    claims = claims_of(content)
    heads = ["error"] if len(claims) == 1 else ["of weights", "of outputs"]
    table = report.columns("task", ">own bytes", *(f">{x}" for x in heads), "source")
    rows = errors_of_tasks(content, "<= ")
    for t, errors in rows:
        task, source = content.tasks[t], report.shorten_path(content.sources[t].origin, 26)
        table.add_row(report.shorten(task, 24), report.format_bytes(own[task]), *errors, source)
    if len(rows) < len(content.tasks):
        table.add_row(f"and {len(content.tasks) - len(rows)} others")
    table.add_section()
    table.add_row("shared by several tasks", report.format_bytes(sizes.shared_bytes(content)))
    table.add_row("mean", "", *(report.format_error(float(np.nanmean(x))) for x in claims.values()))
    return table


def kinds_of(content: store.Store) -> dict[str, Any]:
    """Layer kind -> number of modules, shapes, lowest and highest rank, mean error (of outputs if known)."""
    out: dict[str, Any] = {}
    errors = dict(zip(content.shapes, list(claims_of(content).values())[-1], strict=True))
    ranks: dict[str, int] = {}
    for x in content.segments:
        for name, terms in x.modules.items():
            ranks[name] = max(ranks.get(name, 0), sum(term.rank for term in terms))
    for name, shape in content.shapes.items():
        found = out.setdefault(layer_kind(name), {"modules": 0, "shapes": [], "ranks": [], "error": []})
        found["modules"] += 1
        found["shapes"] += [] if list(shape) in found["shapes"] else [list(shape)]
        found["ranks"].append(ranks.get(name, 0))
        found["error"] += errors[name][~np.isnan(errors[name])].tolist()
    for found in out.values():
        found["ranks"] = [min(found["ranks"]), max(found["ranks"])]
        found["error"] = jsonable(float(np.mean(found["error"] or [np.nan])))
    return out


def modules_table(content: store.Store) -> Table:
    """A table of modules: shape, rank, number of factors per side."""
    table = report.columns("module", ">in x out", ">rank", ">inputs", ">outputs")
    for x in content.segments:
        for name, terms in x.modules.items():
            for term in terms:
                counts = (str(max(of, default=-1) + 1) for of in (term.a_of, term.b_of))
                shape = f"{term.inputs} x {term.outputs}"
                table.add_row(report.shorten(name, 40), shape, str(term.rank), *counts)
    return table


def leaves_table(content: store.Store) -> Table:
    """A table of leaves by segment, with bytes."""
    table = report.columns(">segment", "leaf", ">bytes")
    for n, x in enumerate(content.segments):
        for leaf, value in x.leaves.items():
            table.add_row(str(n + 1), leaf, f"{size_of(value):,}")
    return table


@click.command()
@click.argument("path", metavar="STORE", type=PlaceType())
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="a task to export; may be repeated")
@click.option("--all", "everything", is_flag=True, help="export every task, each to OUT/<its name>")
@click.option("--out", required=True, type=click.Path(), help="folder to write")
@click.option(
    "--dtype", metavar="DTYPE", help="dtype on disk: float32, float16 or bfloat16; default: the adapter's own"
)
@click.option("--overwrite", is_flag=True, help="replace what is there")
@click.option("--rank", type=int, help="truncate wider modules to this rank")
@click.option("--pad", is_flag=True, help="fill narrower modules with zeros, up to --rank where given")
@click.option("--profile", metavar="SERVER", help="vllm: one rank, one scale, no patterns")
@output_options
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
) -> None:
    """Write tasks of STORE as PEFT folders."""
    if bool(tasks) == everything:
        raise HydraOptError("export: give either --task NAME or --all")
    check_dtype(dtype)
    whole = store.open(path)
    known = whole.tasks
    tasks = tuple(dict.fromkeys(tasks))
    names = known if everything else [known[store.task_index(known, t)] for t in tasks]
    folders = {t: Path(out) if len(tasks) == 1 else Path(out) / folder_name(t) for t in names}
    taken = [f for f in folders.values() if f.exists() and not overwrite]
    if taken or len(set(folders.values())) < len(names):
        where = (taken or list(folders.values()))[0]
        raise exists(where)
    server.check_ranks(rank, profile)
    for t in names:
        x = whole.sources[whole.tasks.index(t)]
        server.check_served(profile, t, tensors_of(whole, t), x.config, x.layout)
    ranks, cut = {}, {}
    with progress("exporting", len(folders)) as advance:
        for content in files.batches(whole, list(folders)):
            for found in decode_all(content):
                task = found.task
                fitted = server.fit_server(found, rank=rank, padded=pad, profile=profile)
                write_adapter(folders[task], fitted.adapter, dtype=dtype, overwrite=overwrite)
                ranks[task] = max(x.shape[1] for x in fitted.adapter.a.values())
                if fitted.errors:
                    errors = list(fitted.errors.values())
                    cut[task] = {"modules": len(errors), "mean": float(np.mean(errors)), "worst": max(errors)}
                advance()
    written = {task: str(f) for task, f in folders.items()}
    table = report.columns("task", "folder", ">rank")
    for task, folder_text in written.items():
        folder = report.shorten_path(folder_text, 34)
        table.add_row(report.shorten(task), folder, str(ranks[task]))
    notes = [
        f"{task}: {x['modules']} modules were truncated, error {report.format_error(x['mean'])}, worst "
        f"{report.format_error(x['worst'])}"
        for task, x in cut.items()
    ]
    last = f"{counted(len(written), 'adapter')} written to {out}"
    say({"exported": written, "ranks": ranks, "cut": jsonable(cut)}, table, *notes, last)


@click.command()
@click.argument("path", metavar="STORE", type=PlaceType())
@click.argument("adapters", nargs=-1, type=PlaceType())
@with_adapters
@click.option(
    "--calibration",
    type=click.Path(),
    help="calibration file that the store was made with: check errors of outputs, too",
)
@output_options
def verify(
    path: str,
    adapters: Sequence[str],
    any_base: bool,
    base_suffix: Sequence[str],
    calibration: str | None,
) -> None:
    """Check STORE's checksums; with ADAPTERS, its originals, measure the errors and check its claims.

    Compares errors of weights, and with --calibration errors of the modules' outputs, with what STORE claims.
    """
    if calibration is not None and not adapters:
        raise HydraOptError("--calibration: errors of outputs are measured against ADAPTERS: give them, too")
    if (any_base or base_suffix) and not adapters:
        name = "--any-base" if any_base else "--base-suffix"
        raise HydraOptError(f"{name}: used with ADAPTERS only: give them, too, or leave it out")
    try:
        leaves = store.verify(path)
    except DamagedStore as error:
        say({"store": str(path), "checksums": "wrong", "damage": str(error), "ok": False})
        raise CheckFailed(str(error)) from None
    content = store.open(path)
    moments = load_moments(content, path, calibration)
    payload: dict[str, Any] = {"store": str(path), "checksums": "ok", "leaves": leaves}
    payload["tasks"] = list(content.tasks)
    wrong: list[str] = []
    bounds = payload["bounded"] = list(content.report.get("bounded", ()))
    # claim -> its table, and the metrics of its errors
    claims: dict[str, tuple[np.ndarray, Any]] = {"error": (content.errors, None)}
    if moments is not None and content.output_errors is not None:
        from hydraopt_jax.rate_control.metrics import metrics_of

        claims["output_error"] = content.output_errors, metrics_of(content.shapes, moments, inner=True)
    if adapters:
        measured: dict[str, dict[str, float]] = {k: {} for k in claims}
        for x in read_in_turn(adapters, any_base, base_suffix):
            for key, (_, metrics) in claims.items():
                measured[key] |= measure(content, [x], metrics)
        for key, found in measured.items():
            claimed = dict(zip(content.tasks, task_errors(claims[key][0]).tolist(), strict=True))
            payload[key] = {
                t: {"measured": jsonable(x), "claimed": jsonable(claimed[t])} for t, x in found.items()
            }
            # a task that was coded again without its original claims an upper bound
            over = {t: x - claimed[t] if t in bounds else abs(x - claimed[t]) for t, x in found.items()}
            wrong += [t for t, x in over.items() if not x <= 1e-6 + 0.01 * claimed[t]]
        payload["ok"] = not wrong
    table = report.columns("task", "error", ">measured", ">claimed") if adapters else None
    for key, label in ERRORS.items():
        for task, pair in payload.get(key, {}).items():
            claim = f"{'at most ' * (task in bounds)}{report.format_error(pair['claimed'])}"
            real = report.format_error(pair["measured"])
            assert table is not None
            table.add_row(report.shorten(task), label, real, claim)
    told = f"{path}: checksums of {leaves} leaves are right"
    if adapters and not wrong:
        told += f"; the errors of {len(payload['error'])} tasks are as claimed"
    say(payload, table, told)
    if wrong:
        names = ", ".join(dict.fromkeys(wrong))
        raise CheckFailed(f"{path}: the errors of {names} differ from what the store claims")


# claim -> its name
ERRORS = {"error": "of weights", "output_error": "of outputs"}


@click.command()
@click.argument("path", metavar="STORE", type=PlaceType())
@click.argument("file", type=PlaceType())
@click.option("--overwrite", is_flag=True, help="replace a store that is there")
@output_options
def pack(path: str, file: str, overwrite: bool) -> None:
    """Write STORE as one FILE, whose name ends in .safetensors."""
    if not files.is_file(file):
        raise HydraOptError(f"{file}: the name of a portable store ends in {portable.SUFFIX}")
    copy(path, file, overwrite)


@click.command()
@click.argument("path", metavar="STORE", type=PlaceType())
@click.argument("folder", type=PlaceType())
@click.option("--overwrite", is_flag=True, help="replace a store that is there")
@output_options
def unpack(path: str, folder: str, overwrite: bool) -> None:
    """Write STORE as a FOLDER."""
    if files.is_file(folder):
        raise HydraOptError(f"{folder}: is the name of a file: give the name of a folder")
    copy(path, folder, overwrite)


def copy(path: str, out: str, overwrite: bool) -> None:
    """Copy a store to a folder or a file, by the name of `out`."""
    store.save(out, store.open(path), overwrite=overwrite)
    before, after = sizes.size_on_disk(path), sizes.size_on_disk(out)
    said = f"{report.format_bytes(before)}, and {out}, {report.format_bytes(after)}"
    payload = {"store": str(out), "bytes_before": before, "bytes_after": after}
    say(payload, f"The same store is in {path}, {said}")
