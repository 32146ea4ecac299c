"""Draw the pictures of the concept pages: `python docs/pictures/draw.py [NAME ...]`, next to this file.

Each is an SVG whose colors follow the reader's light or dark scheme. Curves are computed here, by the
package; none is copied from elsewhere. Takes 45 processor seconds.
"""

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

import hydraopt_jax as hydra
from hydraopt_jax import forms, synthetic
from hydraopt_jax.adapters import stack
from hydraopt_jax.linalg import decompose

HERE = Path(__file__).parent
INK, MUTED, PAPER = "#1f2328", "#59636f", "#fffffe"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#c04f00", "#007a59", "#a03f7f"
PALE_BLUE, PALE_ORANGE, PALE_GREEN, PALE_GRAY = "#cfe5f5", "#fbdcc8", "#c9ebdf", "#e8eaed"
DARK = {
    INK: "#e6edf3",
    MUTED: "#9aa5b1",
    PAPER: "#161b22",
    BLUE: "#6cb8ee",
    ORANGE: "#f2955c",
    GREEN: "#4fcfa5",
    PURPLE: "#e39ac8",
    PALE_BLUE: "#16405f",
    PALE_ORANGE: "#5e3015",
    PALE_GREEN: "#12493a",
    PALE_GRAY: "#30363d",
}
"""Color in the light scheme -> in the dark one."""


def canvas(width: float, height: float) -> tuple[Figure, Any]:
    """A figure and its axes in inches, without ticks."""
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.axis("off")
    return figure, axis


def box(axis: Any, x: float, y: float, w: float, h: float, fill: str, text: str = "") -> None:
    """A rectangle with a label in its middle."""
    axis.add_patch(Rectangle((x, y), w, h, facecolor=fill, edgecolor=INK, linewidth=0.8))
    write(axis, x + w / 2, y + h / 2, text, size=9)


def write(
    axis: Any, x: float, y: float, text: str, color: str = INK, size: float = 9, at: str = "center"
) -> None:
    """A label, centered unless `at` is left or right."""
    axis.text(x, y, text, color=color, fontsize=size, ha=at, va="center", linespacing=1.35)


def arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], color: str = MUTED) -> None:
    """An arrow between two points."""
    axis.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=color, linewidth=1.1)
    )


def draw_forms() -> Figure:
    """HydraOpt's form at K = 1, 2 and 4 for four tasks."""
    figure, axis = canvas(7.2, 2.7)
    titles = ("K = 1: one merged adapter", "K = 2: two heads", "K = T: a head per task")
    for column, (heads, title) in enumerate(zip((1, 2, 4), titles, strict=True)):
        left = 0.15 + 2.4 * column
        write(axis, left + 1.05, 2.5, title)
        box(axis, left, 0.95, 0.45, 1.2, PALE_BLUE, "a")
        write(axis, left + 0.22, 0.75, "I × S", MUTED, 8)
        height = 0.24
        for task in range(4):
            write(axis, left + 2.05, 2.02 - 0.31 * task, f"task {task + 1}", at="right", size=8)
        for k in range(heads):
            of = [t for t in range(4) if t * heads // 4 == k]
            middle = 2.02 - 0.31 * float(np.mean(of))
            box(
                axis,
                left + 0.75,
                middle - height / 2,
                0.6,
                height,
                PALE_ORANGE,
                f"b{k + 1}" if heads > 1 else "b",
            )
            for t in of:
                arrow(axis, (left + 1.36, middle), (left + 1.68, 2.02 - 0.31 * t))
        write(axis, left + 1.05, 0.75, "S × O each", MUTED, 8)
        count = "1 factor" if heads == 1 else f"{heads} heads"
        write(
            axis,
            left + 1.05,
            0.36,
            f"I S + {heads if heads > 1 else ''} S O numbers ({count})".replace("+  ", "+ "),
            size=8,
        )
    return figure


def draw_sharing() -> Figure:
    """Energy that one shared input factor loses at best, for collections from unlike to alike."""
    figure = Figure(figsize=(5.4, 3.3))
    axis = figure.add_axes((0.12, 0.16, 0.62, 0.74))
    ranks = (1, 2, 4, 8, 12, 16, 24, 32, 48)
    for likeness, color in ((0.0, ORANGE), (0.5, PURPLE), (0.8, GREEN), (0.95, BLUE)):
        made = synthetic.collection(3, tasks=8, modules={"m": (96, 96)}, rank=8, likeness=likeness)
        bucket = stack(made).buckets[0]
        deltas = decompose.svd(bucket.a[0], bucket.b[0])
        lost = [float(forms.hydra(deltas, heads=8, rank=s)[1].bound) / 8 for s in ranks]
        axis.plot(ranks, lost, color=color, marker="o", markersize=3, linewidth=1.4)
        axis.annotate(
            f"cosine of deltas {likeness:g}",
            (ranks[0], lost[0]),
            (6, 4),
            color=color,
            fontsize=8,
            textcoords="offset points",
        )
    plain(axis, "rank S of the shared factor", "energy lost, mean over tasks")
    axis.set(xlim=(0, 50), ylim=(0, None))
    axis.axvline(8, color=MUTED, linewidth=0.8, linestyle=":")
    axis.text(8.6, axis.get_ylim()[1] * 0.95, "rank of the adapters", color=MUTED, fontsize=8, va="top")
    return figure


def plain(axis: Any, x: str, y: str) -> None:
    """Axes with labels in the picture's colors, without a frame."""
    axis.set_facecolor(PAPER)
    axis.set_xlabel(x, fontsize=9, color=INK)
    axis.set_ylabel(y, fontsize=9, color=INK)
    axis.tick_params(labelsize=8, colors=MUTED, which="both")
    axis.spines[:].set_color(MUTED)
    axis.spines[["top", "right"]].set_visible(False)


def draw_coding() -> Figure:
    """The encoder's steps, and the loop of rate control around them."""
    figure, axis = canvas(7.2, 2.5)
    steps = (
        ("analysis", "SVD of every delta", PALE_BLUE),
        ("prediction", "from tasks decoded\nbefore", PALE_BLUE),
        ("quantizer", "trellis, one step\nfor all", PALE_ORANGE),
        ("entropy coder", "rANS, a table\nper context", PALE_GREEN),
    )
    for n, (name, what, fill) in enumerate(steps):
        left = 0.75 + 1.5 * n
        box(axis, left, 1.35, 1.15, 0.5, fill, name)
        write(axis, left + 0.57, 1.05, what, MUTED, 8)
        arrow(axis, (left - 0.35, 1.6), (left, 1.6))
    write(axis, 0.2, 1.6, "a, b", INK)
    arrow(axis, (6.4, 1.6), (6.75, 1.6))
    write(axis, 6.97, 1.6, "bytes", INK)
    axis.plot((6.97, 6.97, 5.2), (1.45, 0.4, 0.4), color=MUTED, linewidth=1.1)
    box(axis, 3.35, 0.16, 1.85, 0.4, PALE_GRAY, "rate control")
    arrow(axis, (4.32, 0.56), (4.32, 0.86))
    write(axis, 3.25, 0.36, "searches the step that meets the target", MUTED, 8, "right")
    write(axis, 3.6, 2.25, "mode decision: per module the cheapest of own, predicted, joint basis", MUTED, 8)
    return figure


def draw_water() -> Figure:
    """Bits per number of the directions of one delta: reverse water-filling."""
    figure = Figure(figsize=(5.4, 2.9))
    axis = figure.add_axes((0.12, 0.18, 0.85, 0.76))
    energy = synthetic.power_law(8, 3.1) ** 2
    level = 0.008
    n = np.arange(1, 9)
    axis.bar(n, energy, color=PALE_BLUE, edgecolor=INK, linewidth=0.8)
    axis.axhline(level, color=ORANGE, linewidth=1.2)
    axis.set_yscale("log")
    axis.set_ylim(5e-4, 3)
    for k, e in zip(n, energy, strict=True):
        bits = max(0.5 * np.log2(e / level), 0.0)
        axis.text(k, e * 1.2, f"{bits:.1f} bits" if bits else "0", ha="center", fontsize=8, color=INK)
    axis.text(8.6, level * 1.15, "distortion", color=ORANGE, fontsize=8, ha="right", va="bottom")
    plain(axis, "singular direction", "energy")
    return figure


def draw_adapters() -> Figure:
    """A layer with an adapter, and a collection as a table of deltas."""
    figure, axis = canvas(7.2, 2.6)
    write(axis, 1.9, 2.4, "one module of one task")
    box(axis, 0.35, 0.75, 1.2, 1.2, PALE_GRAY, "w\nbase, frozen")
    write(axis, 1.8, 1.35, "+", size=12)
    box(axis, 2.05, 0.75, 0.3, 1.2, PALE_BLUE, "a")
    box(axis, 2.45, 1.65, 1.2, 0.3, PALE_ORANGE, "b")
    write(axis, 0.95, 0.55, "I × O", MUTED, 8)
    write(axis, 2.2, 0.55, "I × R", MUTED, 8)
    write(axis, 3.05, 1.48, "R × O", MUTED, 8)
    write(axis, 1.9, 0.22, "y = x w + x a b, and R is 4 to 64", size=8)
    write(axis, 5.6, 2.4, "a collection")
    for t in range(4):
        for m in range(5):
            box(axis, 4.55 + 0.48 * m, 1.7 - 0.34 * t, 0.42, 0.28, PALE_GREEN if t else PALE_BLUE, "Δ")
        write(axis, 4.45, 1.84 - 0.34 * t, f"task {t + 1}", MUTED, 8, "right")
    write(axis, 5.75, 2.1, "module 1 ... M", MUTED, 8)
    arrow(axis, (7.02, 1.84), (7.02, 0.82), ORANGE)
    write(
        axis, 5.75, 0.42, "what adapters have in common\nlies along this axis: tasks, not modules", ORANGE, 8
    )
    return figure


def draw_objectives() -> Figure:
    """Where each of the three errors is measured."""
    figure, axis = canvas(7.2, 2.2)
    write(axis, 0.3, 1.4, "x")
    arrow(axis, (0.45, 1.4), (0.95, 1.4))
    box(axis, 0.95, 1.1, 1.3, 0.6, PALE_BLUE, "w + a b")
    arrow(axis, (2.25, 1.4), (3.3, 1.4))
    box(axis, 3.3, 1.1, 1.5, 0.6, PALE_GRAY, "layers above")
    arrow(axis, (4.8, 1.4), (5.6, 1.4))
    box(axis, 5.6, 1.1, 1.3, 0.6, PALE_GREEN, "next token")
    for x, title, text in (
        (1.6, "weights", "Δ − Δ̂"),
        (2.78, "activations", "x (Δ − Δ̂),\nneeds moments of x"),
        (6.25, "outputs", "divergence of p,\nneeds the model"),
    ):
        axis.plot((x, x), (0.72, 1.08 if x != 2.78 else 1.36), color=ORANGE, linewidth=1.1)
        write(axis, x, 0.6, title, ORANGE)
        write(axis, x, 0.3, text, MUTED, 8)
    return figure


def draw_bounds() -> Figure:
    """A store's errors, HydraOpt's with its bound, and the Gaussian estimate, of one synthetic collection."""
    made = synthetic.collection(3, tasks=4, modules={"m": (128, 128)}, rank=8, likeness=0.6, dtype="float32")
    found = hydra.frontier(made, (0.5, 0.25, 0.125, 0.0625, 0.03))
    points = {c.label: c.points for c in (*found.curves, *found.estimates)}
    figure = Figure(figsize=(5.6, 3.5))
    axis = figure.add_axes((0.13, 0.15, 0.6, 0.8))
    store, estimate = found.curves[0].points, points["Gaussian estimate, joint"]
    paper = points["HydraOpt, fp16"]
    deltas = decompose.svd(*(getattr(stack(made).buckets[0], x)[0] for x in "ab"))
    tails, sizes = [], []
    for rank in (1, 2, 4, 8, 12, 16, 24, 32):
        tails.append(float(forms.hydra(deltas, heads=4, rank=rank)[1].bound) / 4)
        sizes.append(2 * rank * (128 + 4 * 128) / found.reference)
    for xy, color, style, label in (
        ([(p.bytes / found.reference, p.mean) for p in store], BLUE, "o-", "this package"),
        ([(p.bytes / found.reference, p.mean) for p in estimate], MUTED, ":", "Gaussian estimate"),
        ([(p.bytes / found.reference, p.mean) for p in paper], ORANGE, "s-", "HydraOpt, K = 1 to 4"),
        (list(zip(sizes, tails, strict=True)), ORANGE, "--", "eigen-tail: bound of\nHydraOpt with K = 4"),
    ):
        rows = sorted((x, y) for x, y in xy if y > 1e-7)
        axis.plot(*zip(*rows, strict=True), style, color=color, markersize=3.5, linewidth=1.3)
        axis.annotate(
            label, rows[-1], (7, 0), color=color, fontsize=8, textcoords="offset points", va="center"
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    plain(axis, "bytes / fp16 bytes of the adapters", "relative squared error")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "forms": draw_forms,
    "sharing": draw_sharing,
    "coding": draw_coding,
    "water": draw_water,
    "adapters": draw_adapters,
    "objectives": draw_objectives,
    "bounds": draw_bounds,
}


def as_svg(figure: Figure) -> str:
    """The figure as SVG text that has both color schemes."""
    out = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "hydraopt", "font.family": "sans-serif"}
    ):
        figure.savefig(out, format="svg", facecolor=PAPER, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    rules = "".join(
        f'[style*="{kind}: {light}"] {{{kind}: {dark} !important}}\n'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    )
    end = text.index(">", text.index("<svg")) + 1
    return f"{text[:end]}\n <style>\n@media (prefers-color-scheme: dark) {{\n{rules}}}\n </style>{text[end:]}"


def main(names: Sequence[str]) -> None:
    """Write the pictures named, or all."""
    for name in names or PICTURES:
        (HERE / f"{name}.svg").write_text(as_svg(PICTURES[name]()))
        print(HERE / f"{name}.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
