"""Tables of the scores that `score` and `compare` wrote, and the trade-off plot.

    python -m experiments.llm.table

Per task: zero-shot and own score. Per stored row: bytes over the fp16 bytes, the mean drop 1 - S (S: mean
over tasks of score over the own adapter's score), the worst task's drop, 95% bootstrap intervals (items
drawn with replacement, the same for stored and own), and means of the companions. Rows that lack a task are
left out. Takes seconds.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.llm.adapters import REGIMES
from experiments.llm.metrics import interval, resample
from experiments.llm.tasks import TASKS

HERE = Path(__file__).parent


class Summary(NamedTuple):
    """One stored row over all tasks; drops are relative to the own adapters' scores."""

    row: str
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
    ratios = np.array([x["score"] / x["own"] for x in found])
    draws = []
    for seed, x in enumerate(found):
        means = resample(np.array([x["items"], x["own_items"]]).T, seed=seed)
        draws.append(means[:, 0] / np.maximum(means[:, 1], 1e-9))
    drawn = 1 - np.array(draws)
    worst = int(ratios.argmin())
    gains = [x["gain_kept"] for x in found]
    return Summary(
        row=result["row"],
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


def worth_keeping(zero: float, own: float) -> str:
    """Whether an adapter is worth keeping: 10 points, or a third of the way to 1, above zero-shot.

    >>> worth_keeping(0.2, 0.31), worth_keeping(0.85, 0.91), worth_keeping(0.5, 0.55)
    ('yes', 'yes', 'no')
    """
    return "yes" if own - zero >= min(0.1, (1 - zero) / 3) else "no"


def adapter_lines(results: Path, folder: Path) -> list[str]:
    """A Markdown table of the tasks: zero-shot, and every regime's own adapters that are scored."""
    heads = ("task", "metric", "regime", "steps", "cosine of `a` to start")
    heads += ("dev", "zero-shot dev", "test", "zero-shot test", "worth keeping")
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
                out.append(f"{first} | {numbers} | {worth_keeping(zero=dev[1], own=dev[0])} |")
    return out


def row_lines(rows: list[Summary]) -> list[str]:
    """A Markdown table of stored rows."""
    out = [
        "| stored | bytes | score | mean drop | worst drop | gain kept | worst gain kept | KL | same token |"
    ]
    out.append("|---|---|---|---|---|---|---|---|---|")
    for x in rows:
        low, high = (100 * v for v in x.drop_interval)
        first, last = (100 * v for v in x.worst_interval)
        out.append(
            f"| {x.row} | {x.share:.4f} | {x.score:.3f} | {100 * x.drop:.2f}% ({low:.2f} to {high:.2f}) "
            f"| {100 * x.worst:.1f}% ({first:.1f} to {last:.1f}), {x.worst_task} "
            f"| {x.gain_kept:.4f} | {x.worst_gain_kept:.4f} | {x.kl:.5f} | {x.same_token:.4f} |"
        )
    return out


def plot(rows: list[Summary], path: Path) -> None:
    """The paper's figure: mean score over own score against bytes, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    groups: dict[str, list[Summary]] = {}
    for x in rows:
        label = (
            "budget" if x.row.startswith("budget") else x.row.split(",")[-1 if "K =" in x.row else 0].strip()
        )
        groups.setdefault(f"HydraOpt, {label}" if "K =" in x.row else label, []).append(x)
    for label, points in groups.items():
        shares, scores = [x.share for x in points], [100 * (1 - x.drop) for x in points]
        spread = np.abs(100 * (1 - np.array([x.drop_interval[::-1] for x in points])).T - scores)
        axes.errorbar(shares, scores, spread, marker="o", markersize=4, capsize=2, label=label)
    axes.set(
        xscale="log", xlabel="bytes over the adapters' fp16 bytes", ylabel="score over own adapters' score, %"
    )
    axes.axhline(100, color="gray", linewidth=0.6)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


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
    for regime in REGIMES:
        rows = load_rows(given.results, regime, given.tasks)
        if rows:
            print(f"\n{regime}\n\n" + "\n".join(row_lines(rows)))
            plot(rows, given.results / f"stores-{regime}.png")


if __name__ == "__main__":
    main()
