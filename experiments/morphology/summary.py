"""Tables and the trade-off plot of the scores that stores.py wrote, for both regimes.

    python -m experiments.morphology.summary [--plots FOLDER]

For every row: bytes over the fp16 bytes, mean exact match, S = mean over the tasks of score over the own
adapter's score, shown as the mean drop `1 - S`, and the worst task's drop. With `--plots` also a picture per
regime, `stores-REGIME.png`; those in `results` were made so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hydraopt_jax import report
from hydraopt_jax.demo.tasks import LANGUAGES, TASKS

RESULTS = Path(__file__).parent / "results"
CURVES = {
    "budget": "hydraopt_jax",
    "gradients": "with output gradients",
    "refined": "with output gradients, refined",
    "closed": "HydraOpt, closed form",
    "Adam": "HydraOpt, Adam from the mean",
    "merged": "merged into one",
    "K-Merge": "K-Merge",
}


def curve_of(name: str) -> str | None:
    """The curve that a row belongs to; the last word that fits counts."""
    found = [label for word, label in CURVES.items() if word in name]
    return found[-1] if found else None


def drops(result: dict[str, Any], split: str) -> dict[str, dict[str, Any]]:
    """Bytes, mean score, mean and worst relative drop of every row scored on a split."""
    own = np.array(result["rows"]["own adapters"][split])
    out = {}
    for name, row in result["rows"].items():
        if split in row:
            ratio = np.array(row[split]) / own
            out[name] = {
                "fraction": row["bytes"] / result["fp16_bytes"],
                "score": float(np.mean(row[split])),
                "drop": float(1 - ratio.mean()),
                "worst": float(1 - ratio.min()),
                "task": result["tasks"][int(ratio.argmin())],
                "ratio": ratio,
                "by_task": ratio.reshape(len(TASKS), len(LANGUAGES)).mean(1),
                "by_language": ratio.reshape(len(TASKS), len(LANGUAGES)).mean(0),
            }
    return out


def seeds(found: dict[str, dict[str, Any]]) -> list[str]:
    """Rows of a table: what is random, over its seeds: mean and worst drop, least to largest, and the worst
    task's drop in the mean of the seeds."""
    rows = []
    for name, x in found.items():
        same = [x] + [y for other, y in found.items() if other.startswith(f"{name}, seed ")]
        if len(same) > 1 and ", seed " not in name:
            spans = (sorted(100 * y[k] for y in same) for k in ("drop", "worst"))
            cells = " | ".join(f"{low:.2f}% to {high:.2f}%" for low, *_, high in spans)
            mean = 100 * (1 - np.mean([y["ratio"] for y in same], 0).min())
            rows.append(f"| {name} | {len(same)} | {cells} | {mean:.2f}% |")
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables of both regimes, and draw their plots where that is asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the scores")
    parser.add_argument("--plots", type=Path, help="folder of the pictures to draw; none without it")
    given = parser.parse_args(argv)
    for path in sorted(given.results.glob("stores-*.json")):
        result = json.loads(path.read_text())
        print(f"\n## {result['regime']}, {result['items']} test items a task\n")
        print("| stored | bytes | exact match | mean drop | worst task's drop |\n|---|---|---|---|---|")
        curves: dict[str, list[tuple[float, float]]] = {}
        found = drops(result, "test")
        for name, x in found.items():
            worst = f"{100 * x['worst']:.1f}% ({x['task']})" if x["worst"] > 0 else ""
            print(f"| {name} | {x['fraction']:.4f} | {x['score']:.3f} | {100 * x['drop']:.2f}% | {worst} |")
            label = curve_of(name)
            if label is not None:
                curves.setdefault(label, []).append((x["fraction"], max(x["drop"], 1e-3)))
        random = seeds(found)
        if random:
            print("\n| over seeds | seeds | mean drop | worst task's drop | of the mean |")
            print("|---|---|---|---|---|")
            print("\n".join(random))
        print(f"\n| 1 - S by task and language | {' | '.join((*TASKS, *LANGUAGES))} |")
        print("|---" * (1 + len(TASKS) + len(LANGUAGES)) + "|")
        for name, x in found.items():
            if "refined" in name and "seed" not in name:
                cells = (f"{100 * (1 - y):.1f}%" for y in (*x["by_task"], *x["by_language"]))
                print(f"| {name} | {' | '.join(cells)} |")
        if not curves or given.plots is None:
            continue
        report.plot_tradeoff(
            given.plots / f"{path.stem}.png",
            {k: sorted(v) for k, v in curves.items()},
            bytes_label="bytes on disk / fp16 bytes of the adapters",
            error_label="mean relative drop of exact match",
        )


if __name__ == "__main__":
    main()
