"""Progress bars: on a terminal only, with the stage, what is done, and the time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def bars() -> Progress:
    """Bars on standard error that leave nothing behind."""
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn()]
    left = [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    return Progress(*columns, *left, console=Console(stderr=True), transient=True)


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
      `advance(steps=1, description=None)`, to call after each step.

    >>> with progress("Reading", 2, enabled=False) as advance:
    ...     advance()
    """
    if not (enabled and sys.stderr.isatty()):
        yield lambda steps=1, description=None: None
        return
    with bars() as bar:
        # Markup off by escaping: descriptions name tasks and files.
        task = bar.add_task(description.replace("[", r"\["), total=total)

        def advance(steps: int = 1, description: str | None = None) -> None:
            text = None if description is None else description.replace("[", r"\[")
            bar.update(task, advance=steps, description=text)

        yield advance
