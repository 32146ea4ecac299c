"""Figures with matplotlib: heat maps of similarities and errors, trade-offs with labeled lines.

PNG and PDF files have a white background. Colors of SVG files follow the reader's light or dark scheme.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.report.tables import MEASURES
from hydraopt_jax.report.text import shorten

if TYPE_CHECKING:
    from hydraopt_jax.forms.similarity import Summary
    from hydraopt_jax.tradeoff import Frontier


# upper limit of names on an axis
LABELS = 200
# color in the light scheme -> in the dark scheme; Okabe and Ito's colors suit color-blind readers
SCHEMES = {
    "#ffffff": "#161b22",
    "#1f2328": "#e6edf3",
    "#e0e0e0": "#30363d",
    "#f2f2f2": "#21262d",
    "#737373": "#9aa5b1",
    "#0072b2": "#6cb8ee",
    "#d55e00": "#f2955c",
    "#009e73": "#4fcfa5",
    "#cc79a7": "#e39ac8",
    "#b07500": "#e69f00",
    "#56b4e9": "#a5d8ff",
}
PAPER, INK, GRID, FAINT, GRAY, *COLORS = SCHEMES
# distance of two labels, as a fraction of the axes' height
GAP = 0.055


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(path: str | Path, width: float, height: float) -> Any:
    """A matplotlib figure with the Agg canvas, independent of pyplot's global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HydraOptError(
            f"{path}: plots need matplotlib: pip install 'hydraopt-jax[plot]', or leave --plot out"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | Path) -> None:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if text.get_color() == "black":
            text.set_color(INK)
    try:
        if Path(path).suffix.lower() != ".svg":
            figure.savefig(path, dpi=200, facecolor=PAPER)
            return
        out = io.StringIO()
        figure.savefig(out, format="svg", facecolor=PAPER)
        Path(path).write_text(with_schemes(out.getvalue()), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise HydraOptError(
            f"{path}: cannot write the figure ({error}): name a writable .png, .svg or .pdf"
        ) from error


def with_schemes(svg: str) -> str:
    """An SVG of matplotlib with a style sheet that has dark colors for readers who prefer them."""
    rules = "".join(
        f'[style*="{kind}: {light}"] {{{kind}: {dark} !important}}\n'
        for light, dark in (*SCHEMES.items(), ("#000000", SCHEMES[INK]))
        for kind in ("fill", "stroke")
    )
    end = svg.index(">", svg.index("<svg")) + 1
    return f"{svg[:end]}\n<style>@media (prefers-color-scheme: dark) {{\n{rules}}}</style>{svg[end:]}"


def spread_labels(wanted: Sequence[float], gap: float = GAP) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart, in the same order.

    >>> [round(x, 2) for x in spread_labels([0.5, 0.52, 0.1], 0.1)]
    [0.46, 0.56, 0.1]
    """
    from scipy.optimize import isotonic_regression

    if not len(wanted):
        return []
    order, steps = np.argsort(wanted, kind="stable"), gap * np.arange(len(wanted))
    # less the gaps, positions only have to rise
    places = isotonic_regression(np.asarray(wanted)[order] - steps).x + steps
    out = np.empty(len(wanted))
    out[order] = places + max(0.0, -places[0])
    return out.tolist()


def _plain(text: str, limit: int = 24) -> str:
    """A shortened label, with `$` escaped: matplotlib reads it as mathematics."""
    return shorten(text, limit).replace("$", r"\$")


def plot_similarity(path: str | Path, summary: Summary) -> None:
    """Write heat maps of all measures, averaged over modules; similar tasks are neighbors.

    Args:
      path: PNG, PDF or SVG file to write.
      summary: result of `similarity.summarize`.

    Raises:
      HydraOptError: matplotlib is missing, or the file cannot be written.
    """
    from hydraopt_jax.forms.similarity import cluster_order

    tasks = len(summary.tasks)
    side = float(np.clip(0.3 * tasks, 1.9, 6.0))
    label = 0.075 * max(len(_plain(x)) for x in summary.tasks)
    figure = _figure(path, 5 * side + label + 2.0, side + label + 0.9)
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    order = cluster_order(np.asarray(summary.mean.delta))
    ticks = [_plain(summary.tasks[t]) for t in order]
    size = 7 if tasks <= 20 else 5
    images = []
    for axis, (field, heading) in zip(axes, MEASURES.items(), strict=True):
        matrix = np.asarray(getattr(summary.mean, field))[np.ix_(order, order)]
        angle = field.endswith("subspace")
        # a cosine has a sign; an overlap of subspaces is in [0, 1]
        image = axis.imshow(
            matrix, cmap="viridis" if angle else "RdBu_r", vmin=0.0 if angle else -1.0, vmax=1.0
        )
        images.append(image)
        axis.set_title(heading, fontsize=9)
        axis.set_xticks(range(tasks), ticks, rotation=90, fontsize=size)
        axis.set_yticks(range(tasks), ticks, fontsize=size)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        if tasks <= 8:
            _write_values(axis, matrix, angle)
    _colorbar(figure, images[0], list(axes[:3]), "cosine")
    _colorbar(figure, images[-1], list(axes[3:]), "mean squared cosine of principal angles")
    _save(figure, path)


def _colorbar(figure: Any, image: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.01, aspect=25)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=7)
    bar.outline.set_visible(False)


def plot_errors(path: str | Path, errors: np.ndarray, modules: Sequence[str], tasks: Sequence[str]) -> None:
    """Write a heat map of errors by module and task, logarithmic; white where a task lacks a module.

    Args:
      path: PNG, PDF or SVG file to write.
      errors: `[M, T]` relative squared errors, NaN where absent.
      modules, tasks: names.

    Raises:
      HydraOptError: matplotlib is missing, or the file cannot be written.
    """
    count, width = errors.shape
    figure = _figure(path, float(np.clip(0.25 * width, 2, 12)) + 4, float(np.clip(0.11 * count, 2, 24)) + 1.5)
    axis = figure.subplots()
    shown = np.log10(np.where(errors > 0, errors, np.nan))
    image = axis.imshow(shown, cmap="viridis", aspect="auto", interpolation="nearest")
    every = max(count // LABELS, 1)
    axis.set_yticks(range(0, count, every), [_plain(x, 40) for x in modules[::every]], fontsize=5)
    every = max(width // LABELS, 1)
    axis.set_xticks(range(0, width, every), [_plain(x) for x in tasks[::every]], rotation=90, fontsize=6)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    _colorbar(figure, image, axis, "log10 of the relative squared error")
    _save(figure, path)


def _write_values(axis: Any, matrix: np.ndarray, angle: bool) -> None:
    """Write each cell's value into it, light on dark cells."""
    for s, row in enumerate(matrix):
        for t, value in enumerate(row):
            dark = value < 0.6 if angle else abs(value) > 0.6
            # not a color of a scheme: the cell keeps its color in both schemes
            color = "#fefefe" if dark else "#010101"
            axis.text(t, s, f"{value:.2f}", ha="center", va="center", fontsize=5.5, color=color)


def plot_tradeoff(
    path: str | Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    dashed: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    gray: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    bytes_label: str = "bytes stored / fp16 bytes of the adapters",
    error_label: str = "relative squared error of delta",
    logarithmic: bool = True,
) -> None:
    """Write a plot of error against size on logarithmic axes, one labeled line per curve.

    Args:
      path: PNG, PDF or SVG file to write.
      curves: name -> (fraction of the bytes, error) pairs, in any order. Errors of 0 are drawn as open
        markers on the lower edge.
      dashed: name of a curve -> a second line of its color, dashed, without markers.
      gray: name -> a gray line, such as an estimate, without its errors of 0.
      bytes_label: label of the horizontal axis.
      error_label: label of the vertical axis.
      logarithmic: whether the vertical axis is logarithmic; the horizontal axis is.

    Raises:
      HydraOptError: no point, a size that is not positive, matplotlib is missing, or the file cannot be
        written.
    """
    points = [point for curve in curves.values() for point in curve]
    if not points:
        raise HydraOptError(f"{path}: no point to plot")
    if min(x for x, _ in points) <= 0:
        raise HydraOptError(f"{path}: a curve holds a size that is not positive")
    labels = len(curves) + len(gray or ())
    figure = _figure(path, 7.2, max(4.0, 0.25 * labels))
    axis = figure.subplots()
    positive = [y for _, y in points if y > 0]
    floor = min(positive, default=1e-3) / 2
    markers = ["o", "s", "^", "D", "v", "P", "X"]
    # name, color and last point per line
    ends: list[tuple[str, str, tuple[float, float]]] = []
    for n, (name, curve) in enumerate(curves.items()):
        color, marker = COLORS[n % len(COLORS)], markers[(n + n // len(COLORS)) % len(markers)]
        drawn = [(x, y if y > 0 else floor) for x, y in sorted(curve)]
        style = {"color": color, "marker": marker, "markersize": 4.5, "clip_on": False, "zorder": 3}
        lossy = [(x, y) for x, y in sorted(curve) if y > 0]
        axis.plot([x for x, _ in lossy], [y for _, y in lossy], linewidth=1.4, **style)
        second = [(x, y) for x, y in sorted((dashed or {}).get(name, ())) if y > 0]
        if second:
            axis.plot(*zip(*second, strict=True), color=color, linestyle="--", linewidth=1.0)
        exact = [x for x, y in curve if y <= 0]
        axis.plot(exact, [floor] * len(exact), linestyle="none", markerfacecolor=PAPER, **style)
        if drawn:
            ends.append((name, color, drawn[-1]))
    for dashes, (name, line) in zip((":", "-.", "--"), (gray or {}).items(), strict=False):
        shown = [(x, y) for x, y in sorted(line) if y > 0]
        if shown:
            axis.plot(*zip(*shown, strict=True), color=GRAY, linestyle=dashes)
            ends.append((name, GRAY, shown[-1]))
    axis.set_xscale("log")
    if logarithmic:
        axis.set_yscale("log")
    if len(positive) < len(points):
        axis.set_ylim(bottom=floor)
    axis.set_xlabel(bytes_label, fontsize=9, color=INK)
    axis.set_ylabel(error_label, fontsize=9, color=INK)
    axis.tick_params(which="both", labelsize=8, colors=INK)
    axis.grid(which="major", color=GRID, linewidth=0.7)
    axis.grid(which="minor", color=FAINT, linewidth=0.4)
    axis.spines[:].set_color(INK)
    axis.spines[["top", "right"]].set_visible(False)
    _label(axis, ends)
    _save(figure, path)


def _label(axis: Any, ends: Sequence[tuple[str, str, tuple[float, float]]]) -> None:
    """Write each line's name to the right of the axes, connected to its last point."""
    axis.margins(0.04)
    axis.autoscale_view()
    to_axes = axis.transData + axis.transAxes.inverted()
    gap = min(GAP, 1 / max(len(ends), 1))
    places = spread_labels([float(to_axes.transform(end)[1]) for _, _, end in ends], gap)
    for (name, color, end), y in zip(ends, places, strict=True):
        axis.annotate(
            _plain(name, 60),
            end,
            (1.04, y),
            textcoords="axes fraction",
            color=color,
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 1},
        )


def plot_frontier(path: str | Path, found: Frontier) -> None:
    """Write the plot of a frontier: mean errors solid, errors of the worst task dashed, estimates gray."""
    mean = lambda c: [(p.bytes / found.reference, p.mean) for p in c.points]  # noqa: E731
    worst = {c.label: [(p.bytes / found.reference, p.worst) for p in c.points] for c in found.curves[:1]}
    plot_tradeoff(
        path,
        {c.label: mean(c) for c in found.curves if c.points},
        dashed=worst,
        gray={c.label: mean(c) for c in found.estimates},
    )
