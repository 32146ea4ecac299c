"""The paper's figure: average score over the own adapters' score against storage, labeled directly."""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

COLORS = {"--budget": "#0b5fa5", "calibrated": "#1b8a5a", "refined": "#7a3fa0", "HydraOpt": "#c2410c"}
OTHERS = "#666666"
MARKERS = ("s", "D", "^", "v", "P", "X", "*")
TICKS = (0.015, 0.03, 0.0625, 0.125, 0.25, 0.5)


class Point(NamedTuple):
    """A stored row: bytes over fp16 bytes, kept score in percent with its interval, kept gain in percent."""

    row: str
    share: float
    score: float
    low: float
    high: float
    gain: float


def group_of(row: str) -> str:
    """The line that a row is a point of.

    >>> group_of("budget 0.03"), group_of("budget 0.03, calibrated"), group_of("HydraOpt K = 16, closed form")
    ('--budget', '--budget, calibrated', 'HydraOpt, closed form')
    >>> group_of("jd-full"), group_of("SVD rank 4, 4 bits"), group_of("merged, ties")
    ('jd-full', 'SVD, 4 bits', 'one merged adapter')
    """
    head, _, tail = row.partition(", ")
    if head == "merged":
        return "one merged adapter"
    if head.startswith("SVD rank"):
        return f"SVD, {tail}"
    if head.startswith("budget "):
        return f"--budget, {tail}" if tail else "--budget"
    return f"HydraOpt, {tail}" if head.startswith("HydraOpt") else row


def short(row: str) -> str:
    """A row's name without the solver, for a point that stands alone.

    >>> short("HydraOpt K = 16, Adam from the mean, refined"), short("HydraOpt K = 16, Adam from the mean")
    ('HydraOpt K = 16, refined', 'HydraOpt K = 16')
    """
    return row.replace(", Adam from the mean", "")


def color_of(group: str) -> str:
    """Color of a line, the last name of `COLORS` in it."""
    return next((color for name, color in reversed(COLORS.items()) if name in group), OTHERS)


def draw(axes: Axes, points: list[Point], *, gain: bool) -> None:
    """One panel of scores, or of kept gains: the names of lines of color stand at their last points, those of
    other methods in a legend of the lower panel."""
    groups: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda x: x.share):
        groups.setdefault(group_of(point.row), []).append(point)
    others = [name for name in groups if color_of(name) == OTHERS]
    for name, mine in groups.items():
        color = color_of(name)
        shares, values = [x.share for x in mine], [x.gain if gain else x.score for x in mine]
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.4, "color": color}
        if name in others:
            style |= {"marker": MARKERS[others.index(name) % len(MARKERS)], "linewidth": 0.8, "label": name}
        if name == "one merged adapter":
            style["linewidth"] = 0
        if gain:
            axes.plot(shares, values, **style)
        else:
            spread = [[x.score - x.low for x in mine], [x.high - x.score for x in mine]]
            axes.errorbar(shares, values, spread, elinewidth=0.6, capsize=2, **style)
        if name in others:
            continue
        long = len(mine) > 2 and name.startswith("HydraOpt")
        # two lines of HydraOpt side by side: one has its name on the left, the other on the right
        closed = name.endswith("closed form")
        at = (len(mine) - 1) // 2 + closed if long else -1
        left = closed if long else shares[at] > 0.2
        above = name.endswith("refined") or name == "--budget" or (long and closed)
        axes.annotate(
            name if len(mine) > 1 or not name.startswith("HydraOpt") else short(mine[0].row),
            (shares[at], values[at]),
            xytext=((-6 if long else 4) if left else 6, 6 if above else -12),
            textcoords="offset points",
            fontsize=7.5,
            color=color,
            ha="right" if left else "left",
        )
    if others and gain:
        axes.legend(fontsize=7, frameon=False, loc="lower right", labelcolor=OTHERS)


def plot(panels: dict[str, list[Point]], path: Path) -> None:
    """Writes two panels per regime: kept score above, kept gain in log-likelihood below."""
    figure, rows = pyplot.subplots(
        2,
        len(panels),
        figsize=(5.4 * len(panels), 7.2),
        layout="constrained",
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    figure.set_facecolor("white")
    for column, (title, points) in enumerate(panels.items()):
        for row, axes in enumerate(rows[:, column]):
            draw(axes, points, gain=row == 1)
            axes.axhline(100, color="#bbbbbb", linewidth=0.8, zorder=0)
            axes.set_xscale("log")
            axes.tick_params(labelbottom=True)
            axes.xaxis.set_major_locator(FixedLocator(TICKS))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
            axes.tick_params(labelsize=8)
            axes.grid(visible=True, color="#eeeeee", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        rows[0, column].set_title(title, fontsize=10)
        rows[1, column].set_xlabel("bytes on disk over the adapters' fp16 bytes", fontsize=9)
    rows[0, 0].set_ylabel("mean score over own adapters' score, %", fontsize=9)
    rows[1, 0].set_ylabel("gain in log-likelihood kept, %", fontsize=9)
    figure.savefig(path, dpi=110, facecolor="white")
    pyplot.close(figure)
