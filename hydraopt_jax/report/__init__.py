"""Text, tables, figures and progress bars for people. Nothing here computes anything."""

from hydraopt_jax.report.figures import can_plot, plot_errors, plot_frontier, plot_similarity, plot_tradeoff
from hydraopt_jax.report.tables import (
    MEASURES,
    frontier_table,
    kinds_table,
    nearest_table,
    points_table,
    shares_left_out,
    task_table,
)
from hydraopt_jax.report.terminal import bars, progress
from hydraopt_jax.report.text import (
    columns,
    format_bytes,
    format_error,
    format_rate,
    format_share,
    least_width,
    off_diagonal,
    shorten,
    shorten_path,
    times_smaller,
)

__all__ = [
    "MEASURES",
    "bars",
    "can_plot",
    "columns",
    "format_bytes",
    "format_error",
    "format_rate",
    "format_share",
    "frontier_table",
    "kinds_table",
    "least_width",
    "nearest_table",
    "off_diagonal",
    "plot_errors",
    "plot_frontier",
    "plot_similarity",
    "plot_tradeoff",
    "points_table",
    "progress",
    "shares_left_out",
    "shorten",
    "shorten_path",
    "task_table",
    "times_smaller",
]
