"""Figures of the pages, out of the JSON files that the experiments wrote.

    python -m experiments.figures            # write them into the pages
    python -m experiments.figures --check    # name the pages that are stale, exit status 1

A page marks a region by the lines `<!-- figures: NAME -->` and `<!-- end of figures -->`. What lies
between is what the function NAME of `REGIONS` returns. `tests/test_figures.py` checks every page. Takes
seconds.
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.llm import table
from experiments.llm.table import REGIMES, TASKS

ROOT = Path(__file__).parents[1]
REGION = re.compile(r"(<!-- figures: (.+?) -->\n).*?(<!-- end of figures -->)", re.S)
# rows of experiments/llm that the README has, as `compare` names them
ROWS = (
    "HydraOpt K = 16, Adam from the mean",
    "SVD rank 4, 4 bits",
    "budget 0.125",
    "budget 0.0625",
    "budget 0.03",
    "budget 0.03, refined",
)


def read(path: str) -> Any:
    """The content of a JSON file in `experiments/`."""
    return json.loads((ROOT / "experiments" / path).read_text())


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(markdown(["a", "b"], [["1", "2"]]), end="")
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [heads, *rows]
    out = ["| " + " | ".join(x).rstrip() + " |" for x in lines]
    return "\n".join([out[0], "|---" * len(heads) + "|", *out[1:]]) + "\n"


def error(value: float) -> str:
    """An error with four decimals, or two figures below a thousandth.

    >>> error(0.00496786), error(0.0885929), error(0.000266525), error(8.46e-7), error(0.541368)
    ('0.0050', '0.0886', '0.00027', '8.5e-7', '0.5414')
    """
    return f"{value:.4f}" if value >= 0.001 else f"{value:.2g}".replace("e-0", "e-")


def scores(results: Path = ROOT / "experiments/llm/results") -> str:
    """Stored rows of the language model: bytes, mean drops of score in both regimes, gain kept; rows that
    were not measured are left out."""
    found = {regime: {x.row: x for x in table.load_rows(results, regime, list(TASKS))} for regime in REGIMES}
    rows = []
    for name in ROWS:
        row = [found[regime].get(name) for regime in REGIMES]
        known = [x for x in row if x is not None]
        if known:
            drops = [table.percent(x.drop, x.drop_interval) if x else "" for x in row]
            kept = f"{100 * min(x.gain_kept for x in known):.1f}%"
            rows.append([name, f"{max(x.share for x in known):.3f}", *drops, kept])
    heads = ["stored", "bytes", *(f"{x} initialization{'s' * (x != 'shared')}" for x in REGIMES), "gain kept"]
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


def waits() -> str:
    """What a user waits for, with targets and the load at which it was measured."""
    rows = []
    for part in read("speed/results.json").values():
        for x in part["rows"]:
            seconds = x.get("processor seconds")
            target = (
                f"{x['target']:g}: {'reached' if x['reached'] else 'not reached'}" if "target" in x else ""
            )
            spent = "" if seconds is None else f"{seconds:g}"
            rows.append([x["what"], f"{x['value']:.3g}", spent, target, f"{part['load at the end']:g}"])
    return markdown(["wait", "measured", "processor seconds", "target", "load"], rows)


def curve(label: str) -> list[dict[str, Any]]:
    """The points of one curve of the six GPT-2 adapters."""
    found = read("frontier/gpt2.json")
    return (found["curves"] | found["estimates"])[label]


def at(label: str) -> dict[str, str]:
    """Errors of a curve of budgets or of an estimate, by budget."""
    return {p["setting"].removeprefix("budget "): error(p["mean"]) for p in curve(label)}


def frontier() -> str:
    """Errors at each budget: this package with and without sharing, and both estimates."""
    labels = ("hydraopt_jax", "hydraopt_jax, nothing shared", *read("frontier/gpt2.json")["estimates"])
    columns = [at(x) for x in labels]
    rows = [[budget, *(x[budget] for x in columns)] for budget in columns[0]]
    heads = ["bytes", "this package", "nothing shared", *(x for x in labels[2:])]
    return markdown(heads, rows)


def against_plain() -> str:
    """Errors at each budget beside the best plain SVD and HydraOpt that are no larger."""
    mine, alone = at("hydraopt_jax"), at("hydraopt_jax, nothing shared")
    plain = [(bits, p) for bits in (16, 8, 4) for p in curve(f"separate SVD, {bits} bits")]
    rows = []
    for budget in list(mine)[1:]:
        # 1% of room: a plain row counts no container
        fits = [(p["mean"], bits, p) for bits, p in plain if p["fraction"] <= 1.01 * float(budget)]
        paper = [p for p in curve("HydraOpt, fp16") if p["fraction"] <= 1.01 * float(budget)]
        least = min(fits, key=lambda x: x[0], default=None)
        best = min(paper, key=lambda x: x["mean"], default=None)
        rows.append(
            [
                budget,
                mine[budget],
                alone[budget],
                f"{error(least[0])} ({least[1]} bits, {least[2]['setting']})" if least else "",
                f"{error(best['mean'])} ({best['setting']})" if best else "",
            ]
        )
    heads = ["bytes", "this package", "nothing shared", "best plain SVD at 16, 8 or 4 bits", "HydraOpt, fp16"]
    return markdown(heads, rows)


def rates() -> str:
    """Bjontegaard-delta rates against the other curves."""
    found = {
        name: f"{-value:.1f}% fewer bytes than {name}"
        for name, value in read("frontier/gpt2.json")["bjontegaard_delta_rate_percent"].items()
        if value is not None
    }
    return "At the same error (Bjontegaard-delta rate): " + "; ".join(found.values()) + ".\n"


def paper() -> str:
    """HydraOpt with all heads, and the rates against it and against SVDs at 4 bits."""
    last = curve("HydraOpt, fp16")[-1]
    rate = read("frontier/gpt2.json")["bjontegaard_delta_rate_percent"]
    most, bits = (f"{-rate[name]:.1f}%" for name in ("HydraOpt, fp16", "separate SVD, 4 bits"))
    return (
        f"HydraOpt with all six heads has {error(last['mean'])} at {last['fraction']:.3f}. At the same\n"
        f"error (Bjontegaard-delta rate) this package takes {most} fewer bytes than HydraOpt with\n"
        f"K = 1..6, {bits} fewer than SVDs at 4 bits.\n"
    )


def entropy() -> str:
    """Bytes of coders over the entropy of the same codes."""
    found = read("frontier/entropy.json")
    names = [x for x in next(iter(found.values())) if x != "entropy"]
    rows = [[budget, *(f"{100 * (x[n] - 1):.1f}%" for n in names)] for budget, x in found.items()]
    return markdown(["budget", *(f"{x}, bytes above the entropy" for x in names)], rows)


def ablation() -> str:
    """Bytes that the coder saves against one with one thing changed, per cent, and seconds of the search."""
    found = read("frontier/ablation.json")
    cells = [(name, budget, x) for name, budgets in found.items() for budget, x in budgets.items()]
    variants = [x for x in cells[0][2] if x != "error"]
    rows = []
    for variant in variants:
        saved = [f"{100 * x[variant]['saved']:.1f}" for _, _, x in cells]
        seconds = sorted(x[variant]["seconds"] for _, _, x in cells)
        rows.append([variant, *saved, f"{seconds[0]:.2f} to {seconds[-1]:.2f}"])
    heads = ["instead", *(f"{name}, {budget}" for name, budget, _ in cells), "processor seconds"]
    return markdown(heads, rows)


def survived() -> str:
    """What was done to stores, how often, and what was lost or not found."""
    found = read("reliability/run.json")
    kills = {k: x for k, x in found.items() if k.startswith("kill ")}
    damage = [x for k, x in found.items() if k.startswith("damage ")]
    names = ", ".join(f"`{x.removeprefix('kill ')}`" for x in sorted(kills))
    rows = []
    for kind, text in (
        ("random instants", f"SIGKILL at a random instant of {names}"),
        ("renames", "SIGKILL before and after each of their renames"),
        ("removals", "SIGKILL before every third removal of a file"),
    ):
        tried = sum(x["tried"].get(kind, 0) for x in kills.values())
        rows.append([text, tried, sum(y.startswith(kind) for x in kills.values() for y in x["lost"])])
    lost = sum(len(x["lost"]) for x in damage)
    stores = ", ".join(k.removeprefix("damage ") for k in found if k.startswith("damage "))
    for kind, text in (
        ("bits", f"a bit flipped in each byte of stores ({stores})"),
        ("files cut short or removed", "files of them cut short or removed"),
    ):
        tried = [x["tried"][kind] for x in damage if kind in x["tried"]]
        count = sum(x["tried"] for x in tried)
        missed = count - sum(x.get("verify: named", 0) for x in tried)
        rows.append([f"{text}, named by `verify`", count, missed])
    both = rows[-1][1] + rows[-2][1]
    rows.append(["the same damage, opened and decoded: read with other numbers, or a crash", both, lost])
    for kind, text in (
        (
            "mutations",
            "mutated configurations, headers, manifests, leaves, portable stores, options",
        ),
        ("fuzz", "inputs of the coverage-guided fuzzer (atheris, a minute)"),
    ):
        if kind in found:
            rows.append([text, sum((found[kind]["tried"] or {}).values()), len(found[kind]["lost"])])
    if "races" in found:
        x = found["races"]["tried"]
        text = (
            f"reads of a folder, then of a file, that two processes replace ({x['writes']} times; "
            f"{x['writers told to wait']} times one was told to wait; {x['readers told to open it again']} "
            "reads were told to open it again)"
        )
        rows.append([text, x["reads"], len(found["races"]["lost"])])
    cells = [[a, f"{b:,}" if isinstance(b, int) else b, str(c)] for a, b, c in rows]
    return markdown(["tried", "times", "lost or not found"], cells)


def verbs(**files: str) -> str:
    """Processor seconds and peak memory of every verb, a pair of columns for each file of `living`."""
    found = {label: read(f"scale/{name}.json") for label, name in files.items()}
    names = dict.fromkeys(verb for x in found.values() for verb in x["verbs"])
    rows = []
    for verb in names:
        row = [f"`{verb}`" if verb != "nothing" else "Python, JAX and one product"]
        for x in found.values():
            took = x["verbs"].get(verb)
            good = took is not None and not took.get("failed")
            row += (
                [f"{took['cpu_seconds']:.1f}", f"{took['peak_memory_bytes'] / 1e6:.0f}"] if good else ["", ""]
            )
        rows.append(row)
    heads = [f"{label}: {y}" for label in found for y in ("cpu s", "peak MB")]
    return markdown(["verb", *heads], rows)


REGIONS: dict[str, Callable[[], str]] = {
    "scores of the language model": scores,
    "tasks worth keeping": worth_keeping,
    "stores of the shared regime": functools.partial(stores, "shared"),
    "stores of the independent regime": functools.partial(stores, "independent"),
    "what stores were to reach": reached,
    "what a user waits for": waits,
    "trade-off of six adapters": frontier,
    "trade-off against plain methods": against_plain,
    "rates of six adapters": rates,
    "HydraOpt on six adapters": paper,
    "coders and entropy": entropy,
    "what each part saves": ablation,
    "what stores survive": survived,
    "verbs on 999 adapters": lambda: verbs(**{"5d9d005": "living-5d9d005", "now": "living"}),
    "verbs on 299 adapters": lambda: verbs(f68485a="living-300-f68485a", now="living-300"),
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
