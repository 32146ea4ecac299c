"""Figures: heat maps of similarities, and trade-offs on the paper's axes. They need matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.report.tables import MEASURES

if TYPE_CHECKING:
    from hydraopt_jax.forms.similarity import Summary
    from hydraopt_jax.tradeoff import Frontier


# names that an axis has room for
LABELS = 200


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(path: str | Path, width: float, height: float) -> Any:
    """A matplotlib figure bound to the Agg canvas, outside pyplot's global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HydraOptError(
            f"{path}: plots need matplotlib: pip install hydraopt-jax[plot], or leave --plot out"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | Path) -> None:
    try:
        figure.savefig(path, dpi=200, facecolor="white")
    except (OSError, ValueError) as error:
        raise HydraOptError(
            f"{path}: cannot write the figure ({error}): name a writable .png or .pdf"
        ) from error


def _plain(text: str, limit: int = 24) -> str:
    """A label that matplotlib does not read as mathematics, shortened in the middle."""
    short = text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-limit // 2 :]}"
    return short.replace("$", r"\$")


def plot_similarity(path: str | Path, summary: Summary, *, title: str = "") -> None:
    """Heat maps of all measures, averaged over modules.

    Args:
      path: PNG, PDF or SVG file to write.
      summary: of `similarity.summarize`.
      title: above the panels; none where empty.

    Raises:
      HydraOptError: matplotlib is missing, or the file cannot be written.
    """
    tasks = len(summary.tasks)
    side = float(np.clip(0.3 * tasks, 1.9, 6.0))
    label = 0.075 * max(len(_plain(x)) for x in summary.tasks)
    figure = _figure(path, 5 * side + label + 2.0, side + label + 0.9)
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    ticks = [_plain(x) for x in summary.tasks]
    size = 7 if tasks <= 20 else 5
    images = []
    for axis, (field, heading) in zip(axes, MEASURES.items(), strict=True):
        matrix = np.asarray(getattr(summary.mean, field))
        angle = field.endswith("subspace")
        # A cosine has a sign and a middle, a share of a subspace has neither.
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
    for image, part, name in (
        (images[0], axes[:3], "cosine"),
        (images[-1], axes[3:], "mean squared cosine of principal angles"),
    ):
        bar = figure.colorbar(image, ax=list(part), shrink=0.9, pad=0.01, aspect=25)
        bar.ax.tick_params(labelsize=7)
        bar.set_label(name, fontsize=7)
        bar.outline.set_visible(False)
    if title:
        figure.suptitle(_plain(title, 120), fontsize=10)
    _save(figure, path)


def plot_errors(path: str | Path, errors: np.ndarray, modules: Sequence[str], tasks: Sequence[str]) -> None:
    """A heat map of errors by module and task, on a logarithmic scale; white where a task lacks a module.

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
    bar = figure.colorbar(image, ax=axis, shrink=0.9, pad=0.01, aspect=25)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("log10 of the relative squared error", fontsize=7)
    bar.outline.set_visible(False)
    _save(figure, path)


def _write_values(axis: Any, matrix: np.ndarray, angle: bool) -> None:
    """Each cell's value in it, light on dark."""
    for s, row in enumerate(matrix):
        for t, value in enumerate(row):
            dark = value < 0.6 if angle else abs(value) > 0.6
            color = "white" if dark else "black"
            axis.text(t, s, f"{value:.2f}", ha="center", va="center", fontsize=5.5, color=color)


def plot_tradeoff(
    path: str | Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    dashed: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    gray: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    title: str = "",
    bytes_label: str = "bytes stored / fp16 bytes of the adapters",
    error_label: str = "relative squared error of delta",
    logarithmic: bool = True,
) -> None:
    """Error against size, both axes logarithmic, one marked line per curve.

    Args:
      path: PNG, PDF or SVG file to write.
      curves: name -> (fraction of the bytes, error) pairs, in any order. Errors of 0 have no place on a
        logarithmic axis: they are drawn as open markers on its lower edge.
      dashed: name of a curve -> a second line of its color, dashed and without markers.
      gray: name -> a gray line, such as an estimate; its errors of 0 are left out.
      title: above the axes; none where empty.
      bytes_label: of the horizontal axis.
      error_label: of the vertical axis.
      logarithmic: whether the vertical axis is (the horizontal one always is).

    Raises:
      HydraOptError: no point to draw, a size that is not positive, matplotlib missing, or the file cannot be
        written.
    """
    points = [point for curve in curves.values() for point in curve]
    if not points:
        raise HydraOptError(f"{path}: no point to plot")
    if min(x for x, _ in points) <= 0:
        raise HydraOptError(f"{path}: a curve holds a size that is not positive")
    figure = _figure(path, 5.2, 3.8)
    axis = figure.subplots()
    positive = [y for _, y in points if y > 0]
    floor = min(positive, default=1e-3) / 2
    # Okabe and Ito's colors: told apart by color-blind readers; markers do so in gray print.
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    markers = ["o", "s", "^", "D", "v", "P", "X"]
    for n, (name, curve) in enumerate(curves.items()):
        ordered = sorted(curve)
        color, marker = colors[n % len(colors)], markers[(n + n // len(colors)) % len(markers)]
        drawn = [(x, y) for x, y in ordered if y > 0]
        exact = [x for x, y in ordered if y <= 0]
        style = {"color": color, "marker": marker, "markersize": 4.5, "clip_on": False, "zorder": 3}
        axis.plot(
            [x for x, _ in drawn], [y for _, y in drawn], label=_plain(name, 60), linewidth=1.4, **style
        )
        second = [(x, y) for x, y in sorted((dashed or {}).get(name, ())) if y > 0]
        if second:
            axis.plot(*zip(*second, strict=True), color=color, linestyle="--", linewidth=1.0)
        axis.plot(exact, [floor] * len(exact), linestyle="none", markerfacecolor="white", **style)
    for dashes, (name, line) in zip((":", "-.", "--"), (gray or {}).items(), strict=False):
        shown = [(x, y) for x, y in sorted(line) if y > 0]
        if shown:
            axis.plot(*zip(*shown, strict=True), color="0.5", linestyle=dashes, label=_plain(name, 60))
    axis.set_xscale("log")
    if logarithmic:
        axis.set_yscale("log")
    if len(positive) < len(points):
        axis.set_ylim(bottom=floor)
    axis.set_xlabel(bytes_label, fontsize=9)
    axis.set_ylabel(error_label, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(which="major", color="0.88", linewidth=0.7)
    axis.grid(which="minor", color="0.95", linewidth=0.4)
    axis.spines[["top", "right"]].set_visible(False)
    if len(curves) > 10:
        # more than the axes have room for
        figure.set_size_inches(8.2, 4.6)
        figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    else:
        axis.legend(fontsize=8, frameon=False)
    if title:
        axis.set_title(_plain(title, 80), fontsize=10, loc="left")
    _save(figure, path)


def plot_frontier(path: str | Path, found: Frontier) -> None:
    """The frontier of a collection: mean error solid, worst task dashed, Gaussian estimates gray."""
    mean = lambda c: [(p.bytes / found.reference, p.mean) for p in c.points]  # noqa: E731
    worst = {c.label: [(p.bytes / found.reference, p.worst) for p in c.points] for c in found.curves[:1]}
    plot_tradeoff(
        path,
        {c.label: mean(c) for c in found.curves if c.points},
        dashed=worst,
        gray={c.label: mean(c) for c in found.estimates},
    )
