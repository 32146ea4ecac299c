"""Verbs that read a collection of adapters: similarity, frontier, demo."""

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from hydraopt_jax import merging, report, tradeoff
from hydraopt_jax.cli.common import PlaceType, not_empty, plot_option, read_all, stoppable, with_adapters
from hydraopt_jax.cli.descriptions import groups_note
from hydraopt_jax.cli.output import jsonable, output_options, progress, say
from hydraopt_jax.demo import main as demonstration
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms.similarity import cluster_order, groups, nearest_pairs, summarize
from hydraopt_jax.rate_control.budget import parse_budget

PAIRS = 12
LEGEND = (
    "a, b: cosines of the factors, high where adapters were trained from one initialization. delta: cosine "
    "of a @ b. span: overlap of the subspaces, from 0 to 1."
)


@click.command("similarity")
@click.argument("adapters", nargs=-1, required=True, type=PlaceType())
@with_adapters
@plot_option("write heat maps")
@output_options
def similarity(adapters: Sequence[str], any_base: bool, base_suffix: Sequence[str], plot: str | None) -> None:
    """Measure how alike ADAPTERS are: factors, deltas and subspaces, per layer kind and pair of tasks."""
    summary = summarize(read_all(adapters, any_base, base_suffix))
    if plot:
        report.plot_similarity(plot, summary)
    matrix = np.asarray(summary.mean.delta)
    pairs = nearest_pairs(matrix, PAIRS)
    alike = [[summary.tasks[t] for t in group] for group in groups(matrix)]
    payload = {
        "tasks": list(summary.tasks),
        "order": [summary.tasks[t] for t in cluster_order(matrix)],
        "groups": alike,
        "nearest": [
            {"tasks": [summary.tasks[s], summary.tasks[t]], "delta": jsonable(value)} for s, t, value in pairs
        ],
        "mean": jsonable(summary.mean._asdict()),
        "modules": {m: jsonable(x._asdict()) for m, x in summary.modules.items()},
    }
    last = f"{len(summary.tasks)} adapters, mean similarity of deltas {report.off_diagonal(matrix):.3f}"
    if pairs:
        s, t, value = pairs[0]
        last += f"; most alike: {summary.tasks[s]} and {summary.tasks[t]}, {value:.3f}"
    tables = (report.kinds_table(summary), LEGEND, report.task_table(summary))
    say(payload, *tables, report.nearest_table(summary, count=PAIRS), groups_note(alike), last)


@click.command("frontier")
@click.argument("adapters", nargs=-1, required=True, type=PlaceType())
@with_adapters
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    metavar="SHARE",
    help="share of the factors' fp16 bytes, such as 0.125; may be repeated",
)
@click.option(
    "--baselines",
    metavar="NAMES",
    callback=not_empty,
    help="merging methods to add: all, or names separated by commas",
)
@plot_option("write the plot")
@output_options
def frontier(
    adapters: Sequence[str],
    any_base: bool,
    base_suffix: Sequence[str],
    budgets: Sequence[str],
    baselines: str | None,
    plot: str | None,
) -> None:
    """Measure error against bytes for ADAPTERS: this package, HydraOpt, merging, SVDs and estimates.

    --verbose lists every point of every method.
    """
    fractions = list(dict.fromkeys(map(parse_budget, budgets))) or list(tradeoff.FRACTIONS)
    if any(isinstance(x, int) for x in fractions):
        raise HydraOptError("frontier: --budget takes shares of the fp16 bytes, such as 0.125")
    names = merging.curves.parse_names(baselines) if baselines else ()
    collection = read_all(adapters, any_base, base_suffix)
    runs = len(fractions) * (2 if len(collection) > 1 else 1)
    with progress("compressing", runs + len(names)) as advance:
        others = merging.curves.curves_of(collection, names, advance)
        found = tradeoff.frontier(collection, fractions, baselines=others, progress=advance)
    if plot:
        report.plot_frontier(plot, found)
    payload = jsonable(tradeoff.as_dict(found))
    parts = (report.frontier_table(found), report.shares_left_out(found), against_hydraopt(found))
    say(payload, *parts, more=[report.points_table(found)])


def against_hydraopt(found: tradeoff.Frontier) -> str:
    """A sentence that compares bytes with HydraOpt's form."""
    value = found.delta_rate[tradeoff.HYDRAOPT]
    if value is None:
        return "HydraOpt's form has no error below 100% that a store could have, too: no rate against it"
    less = "fewer" if value < 0 else "more"
    return f"At the same error {abs(value):.1f}% {less} bytes than HydraOpt's form (Bjontegaard-delta rate)"


@click.command()
@click.option("--out", default="hydraopt-demo", show_default=True, type=click.Path(), help="folder to write")
@output_options
def demo(out: str) -> None:
    """Compress forty trained adapters at three budgets, and score them before and after."""
    budgets = demonstration.BUDGETS
    stages = demonstration.stages(budgets)
    with stoppable("nothing was written"), progress("scoring and compressing", stages) as advance:
        result = demonstration.run_demo(Path(out), advance)
    table = report.columns("what is kept", ">bytes", ">of fp16", ">error", ">exact match", ">of own")
    own = result["own_adapters"]["score"]
    none = result["without_adapters"]["score"]
    size = result["bytes_fp16"]
    share = report.format_share
    table.add_row("no adapter", "0 B", "0%", "100%", share(none), share(none / own))
    table.add_row("40 adapters, fp16", report.format_bytes(size), "100%", "", share(own), "100%")
    for row in result["stores"]:
        table.add_row(
            f"store, budget {row['budget']:g}",
            report.format_bytes(row["bytes"]),
            share(row["fraction"]),
            report.format_error(row["error"]),
            share(row["score"]),
            share(row["score"] / own),
        )
    last = result["stores"][-1]
    plot = "the plot, " if result["plot"] else ""
    kept = f"{report.times_smaller(size, last['bytes'])} than fp16, {share(last['score'] / own)} of the score"
    say(
        jsonable(result),
        table,
        f"{out} has {plot}the adapters as PEFT folders, the stores, and one task exported again.",
        None if result["plot"] else "For the plot: pip install 'hydraopt-jax[plot]'",
        f"{len(result['tasks'])} adapters in {report.format_bytes(last['bytes'])}: {kept}",
    )
