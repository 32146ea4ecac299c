"""Figures of the pages, out of the JSON files that the experiments wrote.

    python -m experiments.figures            # write them into the pages
    python -m experiments.figures --check    # name the pages that are stale, exit status 1

A page marks a region by the lines `<!-- figures: NAME -->` and `<!-- end of figures -->`. What lies
between is what the function NAME of `REGIONS` returns; each experiment has its own in `figures.py`.
`tests/test_figures.py` checks every page. Takes seconds.
"""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.accelerator import figures as accelerator
from experiments.frontier import figures as frontier
from experiments.llm import table
from experiments.llm.table import REGIMES, TASKS
from experiments.markdown import ROOT, markdown, read
from experiments.morphology import figures as morphology
from experiments.peers import figures as peers
from experiments.reliability import figures as reliability
from experiments.scale import figures as scale
from experiments.serving import figures as serving

REGION = re.compile(r"(<!-- figures: (.+?) -->\n).*?(<!-- end of figures -->)", re.S)
# rows of experiments/llm that the README has, as `compare` names them
ROWS = (
    "HydraOpt K = 16, Adam from the mean",
    "HydraOpt K = 16, Adam from the mean, refined",
    "SVD rank 4, 4 bits",
    "SVD rank 2, 4 bits",
    "SVD rank 1, 4 bits",
    "budget 0.125",
    "budget 0.0625",
    "budget 0.03",
    "budget 0.03, refined",
    "budget 0.015, refined",
)


def scores(results: Path = ROOT / "experiments/llm/results") -> str:
    """Stored rows of the language model: bytes, mean drops of score per regime, of the first one over the
    tasks worth keeping, too, least gain kept; rows that were not measured, or that take other bytes in a
    regime, are left out there."""
    found = {regime: {x.row: x for x in table.load_rows(results, regime, list(TASKS))} for regime in REGIMES}
    worth = table.kept_tasks(results, REGIMES[0], list(TASKS)) or list(TASKS)
    few = {x.row: x for x in table.load_rows(results, REGIMES[0], worth)}
    rows = []
    for name in ROWS:
        row = [found[regime].get(name) for regime in REGIMES]
        first = next((x.share for x in row if x), 0.0)
        row = [x if x and abs(x.share / first - 1) < 0.1 else None for x in row]
        known = [x for x in row if x is not None]
        if known:
            shown = [row[0], few.get(name) if row[0] else None, *row[1:]]
            drops = [table.percent(x.drop, x.drop_interval) if x else "" for x in shown]
            kept = f"{100 * min(x.gain_kept for x in known):.1f}%"
            rows.append([name, f"{max(x.share for x in known):.3f}", *drops, kept])
    titles = [table.TITLES[x] for x in REGIMES]
    heads = ["stored", "bytes", titles[0], "the same, worth keeping", *titles[1:], "least gain kept"]
    return markdown(heads, sorted(rows, key=lambda x: -float(x[1])))


def worth_keeping(results: Path = ROOT / "experiments/llm/results") -> str:
    """How many tasks the figure of those worth keeping has."""
    kept = {regime: len(table.kept_tasks(results, regime, list(TASKS))) for regime in REGIMES}
    count = " and ".join(str(x) for x in dict.fromkeys(kept.values()))
    rule = "tasks whose adapters gain 10 points or a third of the way to 1"
    return f"The figure has the {rule} ({count} of {len(TASKS)}).\n"


@functools.cache
def stored_rows(regime: str) -> tuple[list[table.Summary], list[table.Summary]]:
    """Summaries of the language model's stored rows, over all tasks and over those worth keeping."""
    results, tasks = ROOT / "experiments/llm/results", list(TASKS)
    kept = table.kept_tasks(results, regime, tasks)
    whole = table.load_rows(results, regime, tasks)
    part = {x.row: x for x in table.load_rows(results, regime, kept)}
    return whole, [part[x.row] for x in whole]


def stores(regime: str) -> str:
    """Every stored row of a regime with its companions."""
    return "\n".join(table.row_lines(*stored_rows(regime))) + "\n"


def reached() -> str:
    """What the language model's stores were to reach, and whether they did."""
    return "\n".join(table.target_lines({x: stored_rows(x)[0] for x in REGIMES})) + "\n"


def own_adapters() -> str:
    """Scores of the language model's own adapters, and without them."""
    folder = ROOT / "experiments/llm"
    return "\n".join(table.adapter_lines(folder / "results", folder / "adapters")) + "\n"


def similarities() -> str:
    """Mean similarity of pairs of the language model's adapters, by regime."""
    found = {x: read(f"llm/results/similarity-{x}.json")["mean"] for x in REGIMES}
    kinds = list(found[REGIMES[0]])
    rows = []
    for regime, means in found.items():
        pairs = ~np.eye(len(means[kinds[0]]), dtype=bool)
        rows.append([regime, *(f"{np.mean(np.array(means[x])[pairs]):.3f}" for x in kinds)])
    return markdown(["mean over pairs of tasks, all modules", *(x.replace("_", " ") for x in kinds)], rows)


def trainings() -> str:
    """What stores keep of the same tasks' adapters, trained in different ways."""
    rows, found = [], read("llm/results/training-study.json")
    for x in found:
        rows.append(
            [
                f"{len(x['tasks'])}",
                f"{x['layers']}",
                f"{x['rank']}",
                f"{x['rate']:g} / {x['rate'] / x['plus']:.2g}",
                f"{np.mean(list(x['loss'].values())):.3f}",
                f"{x['cosine_of_a_to_start']:.3f}",
                f"{x['energy_of_two_directions']:.2f}",
                *(f"{np.mean(list(v['gain_kept'].values())):.4f}" for v in x["rows"].values()),
            ]
        )
    heads = ["tasks", "layers", "rank", "rate of `b` / of `a`", "dev loss", "cosine of `a` to start"]
    # the first row is HydraOpt with as many heads as there are tasks
    heads += ["energy in two directions", "HydraOpt K = T", *list(found[0]["rows"])[1:]]
    return markdown(heads, sorted(rows, key=lambda x: (*map(int, x[:3]), x[3])))


def verdict(x: dict[str, Any]) -> str:
    """Whether a wait's target was reached; empty where it has none."""
    return {True: "reached", False: "not reached", None: ""}[x.get("reached")]


def waits() -> str:
    """What a user waits for on two machines, with targets and the load at which it was measured."""
    rows = []
    slower = {x["what"]: x for part in read("speed/results-avx2.json").values() for x in part["rows"]}
    for part in read("speed/results.json").values():
        for x in part["rows"]:
            seconds = x.get("processor seconds")
            spent = "" if seconds is None else f"{seconds:g}"
            other = slower[x["what"]]
            target = f"{x['target']:g}: {verdict(x)}" if "target" in x else ""
            here = [f"{x['value']:.3g}", spent, target, f"{part['load at the end']:g}"]
            rows.append([x["what"], *here, f"{other['value']:.3g}", verdict(other)])
    heads = ["wait", "measured", "processor seconds", "target", "load", "slower machine", "there"]
    return markdown(heads, rows)


REGIONS: dict[str, Callable[[], str]] = {
    "scores of the language model": scores,
    "tasks worth keeping": worth_keeping,
    "scores of own adapters": own_adapters,
    "similarity of own adapters": similarities,
    "stores of the shared regime": functools.partial(stores, "shared"),
    "stores of the independent regime": functools.partial(stores, "independent"),
    "stores of rank 16": functools.partial(stores, "rank-16"),
    "what stores were to reach": reached,
    "stores of other trainings": trainings,
    "what a user waits for": waits,
    **frontier.REGIONS,
    **morphology.REGIONS,
    **scale.REGIONS,
    **serving.REGIONS,
    **reliability.REGIONS,
    **peers.REGIONS,
    **accelerator.REGIONS,
}


def pages() -> Iterator[Path]:
    """The pages that may have regions."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))
    yield from sorted((ROOT / "experiments").glob("*/README.md"))


def filled(text: str) -> str:
    """A page's text with every region written anew."""
    return REGION.sub(lambda x: x[1] + REGIONS[x[2]]() + x[3], text)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args(argv)
    stale = 0
    for page in pages():
        text = page.read_text()
        wanted = filled(text)
        if wanted != text:
            stale += 1
            print(page.relative_to(ROOT), "is stale" if given.check else "written")
            if not given.check:
                page.write_text(wanted)
    return int(given.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
