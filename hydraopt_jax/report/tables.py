"""Tables of similarities and trade-offs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from hydraopt_jax.report.text import (
    columns,
    format_brief,
    format_bytes,
    format_error,
    format_rate,
    format_share,
    off_diagonal,
    shorten,
)

if TYPE_CHECKING:
    from hydraopt_jax.forms.similarity import Similarity, Summary
    from hydraopt_jax.tradeoff import Curve, Frontier

MEASURES = {
    "input_factor": "input factor",
    "output_factor": "output factor",
    "delta": "delta",
    "input_subspace": "input subspace",
    "output_subspace": "output subspace",
}
"""Field of Similarity -> its heading."""
SHORT = ("a", "b", "delta", "span of a", "span of b")

# upper limits of tasks in a table of hundredths, and in a table of tenths
HUNDREDTHS, TENTHS = 16, 56


def kinds_table(summary: Summary) -> Table:
    """A table of mean similarities over pairs of tasks and modules: layer kind by measure."""
    table = columns(
        "layer kind", *(f">{x}" for x in SHORT), title="Similarity by layer kind, mean over pairs of tasks"
    )
    for kind, value in summary.kinds.items():
        table.add_row(shorten(kind), *_means(value))
    table.add_section()
    table.add_row("all modules", *_means(summary.mean), style="bold")
    return table


def _means(value: Similarity) -> list[str]:
    return [f"{off_diagonal(np.asarray(getattr(value, field))):.3f}" for field in MEASURES]


def cell(value: float, width: int) -> str:
    """Text of a similarity: hundredths; in a cell of one character tenths, `.` near 0, `-` below.

    >>> cell(0.684, 3), cell(0.684, 1), cell(0.03, 1), cell(-0.2, 1), cell(0.99, 1)
    (' 68', '7', '.', '-', '9')
    """
    if width > 1:
        return f"{round(100 * value):{width}d}"
    return "-" if value < -0.05 else "." if value < 0.05 else str(min(round(10 * value), 9))


def task_table(summary: Summary) -> Table | None:
    """A table of the deltas' cosines by pairs of tasks, averaged over modules; similar tasks are neighbors.

    It is in hundredths for up to `HUNDREDTHS` tasks and in tenths for up to `TENTHS`; None for more.
    """
    from hydraopt_jax.forms.similarity import cluster_order

    if len(summary.tasks) > TENTHS:
        return None
    width, unit = (3, "hundredths") if len(summary.tasks) <= HUNDREDTHS else (1, "tenths, . below 0.05")
    matrix = np.asarray(summary.mean.delta)
    order = cluster_order(matrix)
    table = columns("", "task", "", title=f"Similarity of deltas, {unit}; alike tasks side by side")
    table.columns[2].no_wrap = True
    # columns of one character are numbered by the last digit
    table.columns[2].header = "".join(
        f"{n + 1:3d}" if width > 1 else str((n + 1) % 10) for n in range(len(order))
    )
    for n, t in enumerate(order):
        cells = "".join(" " * (width - 1) + "*" if s == t else cell(matrix[t, s], width) for s in order)
        table.add_row(str(n + 1), shorten(summary.tasks[t], 18), cells)
    return table


def nearest_table(summary: Summary, count: int = 12) -> Table:
    """A table of the most similar pairs of tasks."""
    from hydraopt_jax.forms.similarity import nearest_pairs

    table = columns(">delta", "task", "task", title="")
    pairs = nearest_pairs(np.asarray(summary.mean.delta), count)
    table.title = f"The {len(pairs)} most similar pairs of tasks"
    for s, t, value in pairs:
        table.add_row(f"{value:.3f}", shorten(summary.tasks[s]), shorten(summary.tasks[t]))
    return table


def best_below(curve: Curve, size: float) -> str:
    """Text of a curve's lowest mean error within `size` bytes; a dash if no point is that small."""
    errors = [p.mean for p in curve.points if p.bytes <= size]
    return format_brief(min(errors)) if errors else "-"


# upper limit of budgets in a line of 80 columns
SHARES = 5


def frontier_table(found: Frontier) -> Table:
    """A table of methods: lowest mean error within each fraction of the bytes, and our rate against it."""
    ours = found.curves[0]
    shares = found.fractions[:SHARES]
    title = (
        "Lowest mean error within a share of the factors' fp16 bytes (- where a method takes more), and our "
        "bytes at the same error"
    )
    table = columns("method", *(f">{100 * f:.3g}%" for f in shares), ">our bytes", title=title)
    for curve in (*found.curves, *found.estimates):
        known = curve is not ours and curve.label in found.delta_rate
        rate = found.delta_rate[curve.label] if known else None
        # rounding may take a store slightly over its budget
        cells = (best_below(curve, 1.001 * f * found.reference) for f in shares)
        said = "" if not known else "-" if rate is None else format_rate(rate)
        table.add_row(shorten(curve.label, 28), *cells, said)
    return table


def shares_left_out(found: Frontier) -> str | None:
    """A line that names the shares that `frontier_table` has no column for; None if there are none."""
    shares = [f"{100 * f:.3g}%" for f in found.fractions[SHARES:]]
    return f"With --verbose and --json only: {', '.join(shares)}" if shares else None


def points_table(found: Frontier) -> Table:
    """A table of every point: bytes, fraction of the fp16 bytes, mean error, worst task's error."""
    table = columns("method", "setting", ">bytes", ">of fp16", ">mean error", ">worst task")
    for curve in (*found.curves, *found.estimates):
        for p in curve.points:
            share = format_share(p.bytes / found.reference)
            errors = (format_error(x) for x in (p.mean, p.worst))
            table.add_row(shorten(curve.label, 27), p.setting, format_bytes(p.bytes), share, *errors)
        table.add_section()
    return table
