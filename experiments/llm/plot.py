"""The paper's figure: average score over the own adapters' score against storage."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
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


def color_of(group: str) -> str:
    """Color of a line, the last name of `COLORS` in it."""
    return next((color for name, color in reversed(COLORS.items()) if name in group), OTHERS)


def styles_of(groups: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each line is drawn: this package's and HydraOpt's in colors, the others gray with a marker each."""
    names = sorted(dict.fromkeys(groups), key=lambda x: (color_of(x) == OTHERS, not x.startswith("--"), x))
    gray = itertools.cycle(MARKERS)
    styles: dict[str, dict[str, Any]] = {}
    for name in names:
        color = color_of(name)
        style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1.4}
        if color == OTHERS:
            style |= {"marker": next(gray), "linewidth": 0.8}
        elif name == "HydraOpt, closed form":
            style["linestyle"] = "--"
        elif name.startswith("HydraOpt") and name.endswith("refined"):
            style |= {"markerfacecolor": "white", "markersize": 6}
        if name == "one merged adapter":
            style["linestyle"] = ""
        styles[name] = style
    return styles


def draw(axes: Axes, points: list[Point], styles: Mapping[str, dict[str, Any]], *, gain: bool) -> None:
    """One panel of scores with their intervals, or of kept gains."""
    groups: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda x: x.share):
        groups.setdefault(group_of(point.row), []).append(point)
    for name, mine in groups.items():
        shares = [x.share for x in mine]
        if gain:
            axes.plot(shares, [x.gain for x in mine], **styles[name])
        else:
            spread = [[x.score - x.low for x in mine], [x.high - x.score for x in mine]]
            axes.errorbar(shares, [x.score for x in mine], spread, elinewidth=0.6, capsize=2, **styles[name])


def plot(panels: dict[str, list[Point]], path: Path) -> None:
    """Writes two panels per regime, kept score above and kept gain in log-likelihood below; one legend."""
    styles = styles_of(group_of(x.row) for points in panels.values() for x in points)
    figure, rows = pyplot.subplots(
        2,
        len(panels),
        figsize=(5.4 * len(panels), 7.8),
        layout="constrained",
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    figure.set_facecolor("white")
    for column, (title, points) in enumerate(panels.items()):
        for row, axes in enumerate(rows[:, column]):
            draw(axes, points, styles, gain=row == 1)
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
    lines = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=7, fontsize=8.5, frameon=False)
    figure.savefig(path, dpi=110, facecolor="white")
    pyplot.close(figure)
