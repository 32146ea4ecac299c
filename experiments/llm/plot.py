"""The paper's figure: average score over the own adapters' score against storage, labeled directly."""

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

COLORS = {"budget": "#0b5fa5", "calibrated": "#1b8a5a", "refined": "#7a3fa0", "HydraOpt": "#c2410c"}
OTHERS = "#666666"


class Point(NamedTuple):
    """A stored row: bytes over fp16 bytes, and kept score in percent with its interval."""

    row: str
    share: float
    score: float
    low: float
    high: float


def group_of(row: str) -> str:
    """The line that a row is a point of.

    >>> group_of("budget 0.03"), group_of("budget 0.03, calibrated"), group_of("HydraOpt K = 16, closed form")
    ('--budget', '--budget, calibrated', 'HydraOpt, closed form')
    >>> group_of("jd-full")
    'jd-full'
    """
    head, _, tail = row.partition(", ")
    if head.startswith("budget "):
        return f"--budget, {tail}" if tail else "--budget"
    return f"HydraOpt, {tail}" if head.startswith("HydraOpt") else row


def color_of(group: str) -> str:
    """Color of a line, the last name of `COLORS` in it."""
    return next((color for name, color in reversed(COLORS.items()) if name in group), OTHERS)


def draw(axes: Axes, points: list[Point]) -> None:
    """One panel: a line per method, its name at its last point."""
    groups: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda x: x.share):
        groups.setdefault(group_of(point.row), []).append(point)
    for n, (name, mine) in enumerate(groups.items()):
        color = color_of(name)
        shares, scores = [x.share for x in mine], [x.score for x in mine]
        spread = [[x.score - x.low for x in mine], [x.high - x.score for x in mine]]
        axes.errorbar(
            shares,
            scores,
            spread,
            marker="o",
            markersize=4,
            linewidth=1.4,
            elinewidth=0.7,
            capsize=2,
            color=color,
        )
        above = 1 if name == "--budget" else -1
        axes.annotate(
            name,
            (shares[0], scores[0]),
            xytext=(4, above * (8 + 4 * (n % 2))),
            textcoords="offset points",
            fontsize=8,
            color=color,
            va="center",
        )


def plot(panels: dict[str, list[Point]], path: Path) -> None:
    """Writes one panel per regime."""
    figure, row = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4.2), layout="constrained", sharey=True, squeeze=False
    )
    figure.set_facecolor("white")
    for axes, (regime, points) in zip(row[0], panels.items(), strict=True):
        draw(axes, points)
        axes.axhline(100, color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.set_xscale("log")
        axes.set_title(f"{regime} initialization", fontsize=10)
        axes.set_xlabel("bytes on disk over the adapters' fp16 bytes", fontsize=9)
        axes.grid(visible=True, color="#eeeeee", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    row[0][0].set_ylabel("mean score over own adapters' score, %", fontsize=9)
    figure.savefig(path, dpi=130, facecolor="white")
    pyplot.close(figure)
