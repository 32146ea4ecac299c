"""Verbs that read a collection of adapters: similarity, frontier, demo."""

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from rich.table import Table

from hydraopt_jax import merging, report, tradeoff
from hydraopt_jax.adapters import stack
from hydraopt_jax.cli.common import as_json_option, clean, read_all, say, with_adapters
from hydraopt_jax.demo import main as demonstration
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms.similarity import summarize
from hydraopt_jax.rate_control.budget import parse_budget


@click.command("similarity")
@click.argument("adapters", nargs=-1, required=True)
@with_adapters
@click.option("--plot", type=click.Path(dir_okay=False), help="write heat maps to this PNG, PDF or SVG")
@as_json_option
def similarity(
    adapters: Sequence[str], any_base: bool, base_suffix: Sequence[str], plot: str | None, as_json: bool
) -> None:
    """How alike the adapters are: factors, deltas and subspaces, per layer kind and task by task."""
    summary = summarize(stack(read_all(adapters, any_base, base_suffix, as_json)))
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


@click.command("frontier")
@click.argument("adapters", nargs=-1, required=True)
@with_adapters
@click.option("--budget", "budgets", multiple=True, help="a fraction of the fp16 bytes; may be repeated")
@click.option("--baselines", help="merging methods to measure too: all, or names with commas")
@click.option("--plot", type=click.Path(dir_okay=False), help="write the plot to this PNG, PDF or SVG")
@as_json_option
def frontier(
    adapters: Sequence[str],
    any_base: bool,
    base_suffix: Sequence[str],
    budgets: Sequence[str],
    baselines: str | None,
    plot: str | None,
    as_json: bool,
) -> None:
    """The whole trade-off: bytes against error, with HydraOpt, merging, plain SVDs and Gaussian estimates."""
    fractions = [parse_budget(x) for x in budgets] or list(tradeoff.FRACTIONS)
    if any(isinstance(x, int) for x in fractions):
        raise HydraOptError("frontier: --budget takes fractions of the fp16 bytes, such as 0.125")
    names = merging.curves.parse(baselines) if baselines else ()
    collection = read_all(adapters, any_base, base_suffix, as_json)
    with report.progress("compressing", 2 * len(fractions) + len(names), not as_json) as advance:
        others = merging.curves.curves_of(stack(collection), names, advance)
        found = tradeoff.frontier(collection, fractions, baselines=others, progress=advance)
    if plot:
        report.plot_frontier(plot, found)
    say(as_json, clean(tradeoff.as_dict(found)), report.frontier_table(found), report.rates_table(found))


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
