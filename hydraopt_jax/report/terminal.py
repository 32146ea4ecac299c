"""Progress bars: on a terminal only, with the stage, what is done, and the time left."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def bars(enabled: bool = True) -> Progress:
    """Bars on standard error that leave nothing behind."""
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn()]
    left = [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    console = Console(stderr=True)
    return Progress(*columns, *left, console=console, transient=True, disable=not enabled)


@contextmanager
def progress(
    description: str, total: int | None = None, enabled: bool = True
) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; nothing where that is no terminal or `enabled` is False.

    Args:
      description: what is being done.
      total: count of steps; a spinner where None.
      enabled: False under `--json` and `--quiet`.

    Yields:
      `advance(steps=1)`, to call after each step.

    >>> with progress("Reading", 2, enabled=False) as advance:
    ...     advance()
    """
    with bars(enabled and sys.stderr.isatty()) as bar:
        task = bar.add_task(escape(description), total=total)
        yield lambda steps=1: bar.advance(task, steps)
