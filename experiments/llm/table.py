"""Tables of the scores that `score` and `compare` wrote, and the figure of score against storage.

    python -m experiments.llm.table

Per task: zero-shot and own score. Per stored row: bytes over the fp16 bytes, the mean drop 1 - S (S: mean
over tasks of score over the own adapter's score), the worst task's drop, 95% bootstrap intervals (items
drawn with replacement, the same for stored and own), and means of the companions; over all tasks, and the
mean drop over the tasks whose adapters are worth keeping. Then what was to be reached. Rows that lack a task
are left out. Takes seconds.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.llm.adapters import REGIMES
from experiments.llm.metrics import interval, resample
from experiments.llm.plot import Point, plot
from experiments.llm.tasks import TASKS

HERE = Path(__file__).parent
# of rows of moments at a rank, which are compared among themselves
AT_RANK = "calibrated at rank"
# beginning of the rows' names, greatest mean drop, greatest drop of a task
ONE_START = (
    ("HydraOpt K = 16", 0.018, None),
    ("budget 0.125", 0.003, 0.02),
    ("budget 0.0625", 0.006, 0.03),
    ("budget 0.03", 0.018, 0.05),
    ("budget 0.015", 0.05, None),
)
TARGETS = {
    "shared": ONE_START,
    "independent": (
        ("budget 0.125", 0.005, 0.03),
        ("budget 0.0625", 0.01, 0.04),
        ("budget 0.03", 0.02, 0.06),
    ),
    "rank-16": ONE_START,
}
# what figures and tables call the regimes
TITLES = {
    "shared": "shared initialization",
    "independent": "independent initializations",
    "rank-16": "shared, rank 16",
}


class Summary(NamedTuple):
    """One stored row over some tasks; drops are relative to the own adapters' scores."""

    row: str
    items: int
    share: float
    score: float
    drop: float
    drop_interval: list[float]
    worst: float
    worst_interval: list[float]
    worst_task: str
    gain_kept: float
    worst_gain_kept: float
    kl: float
    same_token: float


def summarize(result: dict[str, Any], tasks: list[str]) -> Summary:
    """Mean and worst relative drop of a row, with intervals, and its companions."""
    found = [result["tasks"][task] for task in tasks]
    ratios = np.array([np.mean(x["items"]) / np.mean(x["own_items"]) for x in found])
    draws = []
    for seed, x in enumerate(found):
        means = resample(np.array([x["items"], x["own_items"]]).T, seed=seed)
        draws.append(means[:, 0] / np.maximum(means[:, 1], 1e-9))
    drawn = 1 - np.array(draws)
    worst = int(ratios.argmin())
    gains = [x["gain_kept"] for x in found]
    return Summary(
        row=result["row"],
        items=result["test_items"],
        share=result["bytes"] / result["fp16_bytes"],
        score=float(np.mean([x["score"] for x in found])),
        drop=float(1 - ratios.mean()),
        drop_interval=interval(drawn.mean(axis=0)),
        worst=float(1 - ratios[worst]),
        worst_interval=interval(drawn[worst]),
        worst_task=tasks[worst],
        gain_kept=float(np.mean(gains)),
        worst_gain_kept=float(np.min(gains)),
        kl=float(np.mean([x["kl"] for x in found])),
        same_token=float(np.mean([x["same_token"] for x in found])),
    )


def load_rows(results: Path, regime: str, tasks: list[str]) -> list[Summary]:
    """Summaries of all rows that have every task, largest first."""
    read = [json.loads(path.read_text()) for path in sorted((results / f"stores-{regime}").glob("*.json"))]
    whole = [summarize(result, tasks) for result in read if set(tasks) <= set(result["tasks"])]
    return sorted(whole, key=lambda row: -row.share)


def load_scores(results: Path, regime: str, task: str) -> dict[str, Any] | None:
    """What `score` wrote of a task, or None."""
    path = results / regime / f"{task}.json"
    return json.loads(path.read_text()) if path.exists() else None


def worth_keeping(zero: float, own: float) -> bool:
    """Whether an adapter is worth keeping: 10 points, or a third of the way to 1, above zero-shot.

    >>> worth_keeping(0.2, 0.31), worth_keeping(0.85, 0.91), worth_keeping(0.5, 0.55)
    (True, True, False)
    """
    return own - zero >= min(0.1, (1 - zero) / 3)


def kept_tasks(results: Path, regime: str, tasks: list[str]) -> list[str]:
    """The tasks whose adapters are worth keeping, by their dev scores."""
    found = {
        task: (load_scores(results, "zero-shot", task), load_scores(results, regime, task)) for task in tasks
    }
    return [
        task
        for task, (zero, own) in found.items()
        if zero and own and worth_keeping(zero["dev"]["score"], own["dev"]["score"])
    ]


def adapter_lines(results: Path, folder: Path) -> list[str]:
    """A Markdown table of the tasks: zero-shot, and every regime's own adapters that are scored."""
    heads = ["task", "metric", "regime", "steps", "cosine of `a` to start"]
    heads += ["dev", "zero-shot dev", "test", "zero-shot test", "worth keeping"]
    out = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for task in TASKS:
        zero = load_scores(results, "zero-shot", task)
        for regime in REGIMES:
            own = load_scores(results, regime, task)
            if own and zero:
                log = json.loads((folder / regime / task / "log.json").read_text())
                dev = [x["dev"]["score"] for x in (own, zero)]
                test = [x["test"]["score"] for x in (own, zero)]
                numbers = " | ".join(f"{v:.3f}" for v in (log["cosine_of_a_to_start"], *dev, *test))
                first = f"| {task} | {own['metric']} | {regime} | {log['steps']}"
                out.append(f"{first} | {numbers} | {'yes' if worth_keeping(dev[1], dev[0]) else 'no'} |")
    return out


def percent(value: float, spread: list[float]) -> str:
    """A share in percent with its interval.

    >>> percent(0.012, [0.0, 0.02])
    '1.2% (0.0 to 2.0)'
    """
    # no "-0.0"
    low, high, middle = (round(100 * v, 1) + 0.0 for v in (*spread, value))
    return f"{middle:.1f}% ({low:.1f} to {high:.1f})"


def row_lines(rows: list[Summary], kept: list[Summary]) -> list[str]:
    """A Markdown table of stored rows over all tasks, and their mean drop over the ones worth keeping."""
    heads = [
        "stored",
        "bytes",
        "items",
        "score",
        "mean drop",
        "mean drop, worth keeping",
        "worst task's drop",
    ]
    heads += ["gain kept", "worst gain kept", "KL", "same token"]
    out = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for x, y in zip(rows, kept, strict=True):
        out.append(
            f"| {x.row} | {x.share:.4f} | {x.items} | {x.score:.3f} | {percent(x.drop, x.drop_interval)} "
            f"| {percent(y.drop, y.drop_interval)} | {percent(x.worst, x.worst_interval)}, {x.worst_task} "
            f"| {x.gain_kept:.4f} | {x.worst_gain_kept:.4f} | {x.kl:.5f} | {x.same_token:.4f} |"
        )
    return out


def verdict(value: float, spread: list[float], target: float | None) -> str:
    """Whether a drop is within its target, and if not, whether the target lies in its interval.

    >>> verdict(0.01, [0.0, 0.02], 0.01), verdict(0.02, [0.0, 0.03], 0.01), verdict(0.02, [0.015, 0.03], 0.01)
    ('yes', 'no, but within noise', 'no')
    """
    if target is None:
        return ""
    if round(value, 4) <= target:
        return "yes"
    return "no, but within noise" if spread[0] <= target else "no"


def target_lines(rows: dict[str, list[Summary]]) -> list[str]:
    """A Markdown table of what was to be reached, and whether it was."""
    out = ["| regime | stored | mean drop | at most | reached | worst task's drop | at most | reached |"]
    out.append("|---" * 8 + "|")
    for regime, targets in TARGETS.items():
        for name, mean, worst in targets:
            for x in rows.get(regime, []):
                if x.row == name or (x.row.startswith(f"{name},") and AT_RANK not in x.row):
                    found = f"{percent(x.drop, x.drop_interval)} | {100 * mean:g}%"
                    last = f"{percent(x.worst, x.worst_interval)}, {x.worst_task}"
                    last += " | " + (f"{100 * worst:g}%" if worst else "")
                    out.append(
                        f"| {regime} | {x.row} | {found} | {verdict(x.drop, x.drop_interval, mean)} "
                        f"| {last} | {verdict(x.worst, x.worst_interval, worst)} |"
                    )
    return out


def points(rows: list[Summary]) -> list[Point]:
    """What the figure shows of the rows: their kept score in percent."""
    out = []
    for x in (x for x in rows if AT_RANK not in x.row):
        low, high = (100 * (1 - v) for v in reversed(x.drop_interval))
        out.append(Point(x.row, x.share, 100 * (1 - x.drop), low, high, 100 * x.gain_kept))
    return out


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--adapters", type=Path, default=HERE / "adapters", help="where train wrote")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS), help="the collection")
    given = parser.parse_args(argv)
    print("\n".join(adapter_lines(given.results, given.adapters)))
    found, worth = {}, {}
    for regime in REGIMES:
        rows = load_rows(given.results, regime, given.tasks)
        kept = kept_tasks(given.results, regime, given.tasks) or given.tasks
        if rows:
            names = [x.row for x in rows]
            few = sorted(load_rows(given.results, regime, kept), key=lambda x: x.row)
            few = [x for name in names for x in few if x.row == name]
            print(f"\n{regime}; worth keeping: {', '.join(kept)}\n\n" + "\n".join(row_lines(rows, few)))
            found[regime], worth[regime] = rows, few
    if found:
        print("\n" + "\n".join(target_lines(found)))
        for name, chosen in (("stores", found), ("stores-worth-keeping", worth)):
            panels = {TITLES[regime]: points(rows) for regime, rows in chosen.items()}
            plot(panels, given.results / f"{name}.png")


if __name__ == "__main__":
    main()
