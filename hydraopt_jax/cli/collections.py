"""Verbs that read a collection of adapters: similarity, compress, frontier, demo."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

from hydraopt_jax import compression, merging, refinement, report, store
from hydraopt_jax.adapters import check, stack
from hydraopt_jax.calibration import load as load_calibration
from hydraopt_jax.cli import scaling
from hydraopt_jax.cli.common import (
    as_json_option,
    bytes_table,
    clean,
    describe,
    error_table,
    forms_table,
    parse_weights,
    read_all,
    say,
    with_adapters,
)
from hydraopt_jax.demo import main as demonstration
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import similarity
from hydraopt_jax.jobs import job
from hydraopt_jax.rate_control import frontier, navigate
from hydraopt_jax.rate_control.budget import keeps_all, parse_budget
from hydraopt_jax.store import checkpoint

# what the options of an explicit form are where they were not given
DEFAULTS = {
    "heads": None,
    "rank": None,
    "side": "auto",
    "cores": False,
    "solver": "closed",
    "start": "closed",
    "steps": 1000,
    "dtype": None,
}


@click.command("similarity")
@click.argument("adapters", nargs=-1, required=True)
@with_adapters
@click.option("--plot", type=click.Path(dir_okay=False), help="write heat maps to this PNG, PDF or SVG")
@as_json_option
def similarity_command(
    adapters: Sequence[str], any_base: bool, base_suffix: Sequence[str], plot: str | None, as_json: bool
) -> None:
    """How alike the adapters are: factors, deltas and subspaces, per layer kind and task by task."""
    summary = similarity.summarize(stack(read_all(adapters, any_base, base_suffix, as_json)))
    if plot:
        report.plot_similarity(plot, summary)
    payload = {
        "tasks": list(summary.tasks),
        "mean": {k: clean(np.asarray(v)) for k, v in summary.mean._asdict().items()},
        "modules": {
            m: {k: clean(np.asarray(v)) for k, v in x._asdict().items()} for m, x in summary.modules.items()
        },
    }
    say(as_json, payload, report.kinds_table(summary), report.task_table(summary))


@click.command("compress")
@click.argument("adapters", nargs=-1, required=True)
@with_adapters
@click.option("--out", required=True, type=click.Path(), help="the store to write, a new folder")
@click.option(
    "--budget",
    help="a fraction of the factors' fp16 bytes (0.125, 12.5%), bytes of all (3MB), or 1: lossless",
)
@click.option("--max-error", type=float, help="largest mean relative squared error")
@click.option("--max-task-error", type=float, help="largest relative squared error of any task")
@click.option("--weight", "weights", multiple=True, help="NAME=NUMBER, weight of a task's error")
@click.option("--calibration", type=click.Path(), help="second moments of the modules' inputs, safetensors")
@click.option("--alone", is_flag=True, help="under a budget or target: share nothing between tasks")
@click.option("--heads", type=int, help="K, heads a module; all tasks where not given")
@click.option("--rank", type=int, help="S, width of the shared factor; the adapters' rank where not given")
@click.option("--side", default="auto", help="which side is shared: in, out or auto")
@click.option("--cores", is_flag=True, help="give each task an S x S core")
@click.option("--solver", default="closed", help="closed or optax")
@click.option("--start", default="closed", help="start of the optax solver: closed or mean")
@click.option("--steps", type=int, default=1000, help="upper limit of Optax steps")
@click.option("--dtype", help="stored dtype: float32, float16 or bfloat16; as it came where not given")
@click.option(
    "--extras-dtype",
    help="dtype of full tensors (heads): float32, float16 or bfloat16; as they came where not given",
)
@click.option(
    "--refine", type=click.IntRange(min=1), help="Optax steps with the rounding in the loop, after all"
)
@click.option("--no-zstd", is_flag=True, help="write the leaves without compression")
@click.option("--overwrite", is_flag=True, help="replace an existing store")
@click.option("--force", is_flag=True, help="keep a store that is larger than its input")
@scaling.scale_options
@as_json_option
def compress_command(
    adapters: Sequence[str],
    any_base: bool,
    base_suffix: Sequence[str],
    out: str,
    no_zstd: bool,
    overwrite: bool,
    force: bool,
    as_json: bool,
    budget: str | None,
    max_error: float | None,
    max_task_error: float | None,
    weights: Sequence[str],
    calibration: str | None,
    alone: bool,
    extras_dtype: str | None,
    refine: int | None,
    skip_bad: bool,
    dry_run: bool,
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    **form: Any,
) -> None:
    """Compress ADAPTERS into one store: to a budget, to an error, or in a form that you choose."""
    context = click.get_current_context()
    checkpoint.check_target(out, overwrite)
    navigated = budget is not None or max_error is not None or max_task_error is not None
    moments = None
    large = {"--skip-bad": skip_bad, "--dry-run": dry_run, "--coordinator": coordinator}
    asked = [k for k, v in large.items() if v]
    whole = [
        k
        for k, v in (
            ("--calibration", calibration),
            ("--max-task-error", max_task_error is not None),
            ("--refine", refine),
        )
        if v
    ]
    if asked and whole:
        raise HydraOptError(
            f"{asked[0]}: {whole[0]} holds the whole collection in memory; leave one of them out"
        )

    def stream(options: compression.Options | navigate.Options) -> None:
        done = scaling.run(
            adapters,
            out,
            options,
            any_base=any_base,
            base_suffix=base_suffix,
            overwrite=overwrite,
            zstd=not no_zstd,
            force=force,
            as_json=as_json,
            skip_bad=skip_bad,
            dry_run=dry_run,
            coordinator=coordinator,
            processes=processes,
            process_id=process_id,
        )
        if done is not None:
            show_store(out, *done, as_json, chosen=[forms_table(done[0])] if navigated else [])

    if navigated:
        fixed = [k for k, v in form.items() if v != DEFAULTS[k]]
        if fixed:
            raise HydraOptError(
                f"--{fixed[0]}: a budget or a target chooses the form itself; leave one of them out"
            )
        moments = None if calibration is None else load_calibration(calibration)
        targets = navigate.Options(
            None if budget is None else parse_budget(budget),
            max_error,
            max_task_error,
            parse_weights(weights),
            moments,
            not alone,
            extras_dtype,
        )
        targets = navigate.check_options(targets)
        kept = keeps_all(targets.budget)  # type: ignore[arg-type]
        if kept and refine:
            raise HydraOptError(
                "--refine: a budget of 1 or more keeps the adapters as they are: leave one out"
            )
        # of files, not of what is read from them: these are kept bit for bit
        if asked or kept or (not whole and scaling.is_large(adapters)):
            stream(targets)
            return
        context.with_resource(job.alone(out))
        collection = read_all(adapters, any_base, base_suffix, as_json)
        with report.progress("navigating", navigate.ROUNDS, not as_json) as advance:
            result = navigate.compress(collection, targets, progress=advance)
    else:
        if weights or calibration or alone:
            raise HydraOptError(
                "--weight, --calibration and --alone need --budget, --max-error or --max-task-error"
            )
        options = compression.Options(**form, extras_dtype=extras_dtype)
        compression.check_options(options, len(adapters))
        if not refine:
            stream(options)
            return
        context.with_resource(job.alone(out))
        collection = read_all(adapters, any_base, base_suffix, as_json)
        with report.progress("compressing", len(check(collection)), not as_json) as advance:
            result = compression.compress(collection, options, progress=advance)
    gained = {}
    if refine:
        with report.progress("refining", refine, not as_json) as advance:
            result, found = refinement.refine(
                result, collection, calibration=moments, steps=refine, progress=lambda loss: advance(1)
            )
        gained = {"refinement": clean({"before": found.before, "after": found.after, "steps": refine})}
    before = sum(checkpoint.size_on_disk(x.source) for x in collection)
    checkpoint.save(out, result, overwrite=overwrite, compress=not no_zstd, limit=None if force else before)
    chosen: list[Any] = [forms_table(result)] if navigated else []
    if gained:
        loss = "output error" if moments is not None else "error of delta"
        chosen.append(f"refined: {loss} {found.before:.4e} before, {found.after:.4e} after {refine} steps")
    show_store(out, result, before, as_json, gained, chosen)


def show_store(
    out: str,
    result: store.Store,
    before: int,
    as_json: bool,
    gained: Mapping[str, Any] | None = None,
    chosen: Sequence[Any] = (),
) -> None:
    """Print what a store that was just written is."""
    after = checkpoint.size_on_disk(out)
    payload = describe(out, result) | {"bytes_before": before, "bytes_after": after} | dict(gained or {})
    payload["ratio"] = clean(after / before)
    parts = payload["bytes_of"] = checkpoint.account(out)._asdict()
    table = Table("on disk", "before", "after", "ratio", title=str(out))
    table.add_row(
        "all files", report.format_bytes(before), report.format_bytes(after), f"{after / before:.3f}"
    )
    left = [f"left out: {x}: {why}" for x, why in result.report.get("left_out", {}).items()]
    if "factor_bytes" in payload:
        size = payload["factor_bytes"]
        share = size / (2 * result.report["entries"])
        left.insert(0, f"as they came: {size:,} bytes of factors, {share:.3f} of their fp16 bytes")
    say(as_json, payload, table, bytes_table(parts, result), *chosen, *left, error_table(result))


@click.command("frontier")
@click.argument("adapters", nargs=-1, required=True)
@with_adapters
@click.option("--budget", "budgets", multiple=True, help="a fraction of the fp16 bytes; may be repeated")
@click.option("--baselines", help="merging methods to measure too: all, or names with commas")
@click.option("--plot", type=click.Path(dir_okay=False), help="write the plot to this PNG, PDF or SVG")
@as_json_option
def frontier_command(
    adapters: Sequence[str],
    any_base: bool,
    base_suffix: Sequence[str],
    budgets: Sequence[str],
    baselines: str | None,
    plot: str | None,
    as_json: bool,
) -> None:
    """The whole trade-off: bytes against error, with HydraOpt, merging, plain SVDs and Gaussian estimates."""
    fractions = [parse_budget(x) for x in budgets] or list(frontier.FRACTIONS)
    if any(isinstance(x, int) for x in fractions):
        raise HydraOptError("frontier: --budget takes fractions of the fp16 bytes, such as 0.125")
    names = merging.curves.parse(baselines) if baselines else ()
    collection = read_all(adapters, any_base, base_suffix, as_json)
    with report.progress("navigating", 2 * len(fractions) + len(names), not as_json) as advance:
        others = merging.curves.measure(stack(collection), names, advance)
        found = frontier.measure(collection, fractions, baselines=others, progress=advance)
    if plot:
        report.plot_frontier(plot, found)
    say(as_json, clean(frontier.as_dict(found)), report.frontier_table(found), report.rates_table(found))


@click.command()
@click.option("--out", default="hydraopt-demo", show_default=True, type=click.Path(), help="folder to write")
@as_json_option
def demo(out: str, as_json: bool) -> None:
    """Forty trained adapters at three budgets: bytes and scores before and after."""
    budgets = demonstration.BUDGETS
    with report.progress("demo", demonstration.stages(budgets), not as_json) as advance:
        result = demonstration.run(Path(out), advance)
    table = Table("what is kept", "bytes", "of fp16", "error of delta", "exact match", "of own")
    own = result["own_adapters"]["score"]
    none = result["without_adapters"]["score"]
    size = result["bytes_fp16"]
    table.add_row("no adapter", "0", "0", "", f"{none:.3f}", f"{none / own:.3f}")
    table.add_row("40 adapters, fp16", report.format_bytes(size), "1", "", f"{own:.3f}", "1")
    for row in result["stores"]:
        table.add_row(
            f"store, budget {row['budget']:g}",
            report.format_bytes(row["bytes"]),
            f"{row['fraction']:.4f}",
            f"{row['error']:.2e}",
            f"{row['score']:.3f}",
            f"{row['score'] / own:.3f}",
        )
    say(as_json, clean(result), table, f"PEFT folders, stores and {result['plot']} are in {out}")
