"""Output of the verbs: a JSON object, tables and sentences, or nothing; progress and warnings."""

import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import click
import numpy as np
from rich.console import Console

from hydraopt_jax import report


class Mode(NamedTuple):
    """Output options of the running verb.

    Attributes:
      json: one JSON object on standard output and nothing else.
      quiet: nothing but errors.
      verbose: every table.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False


def mode() -> Mode:
    """The mode of the running verb."""
    context = click.get_current_context(silent=True)
    given = {} if context is None else context.meta.get(__name__, {})
    return Mode(**given)


def keep_mode(context: click.Context, option: click.Parameter, value: bool) -> None:
    """Record an output option for `mode`."""
    if value:
        context.meta.setdefault(__name__, {})[option.name] = True


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the options of every verb."""
    for names, text in (
        (("--verbose", "-v"), "print every table"),
        (("--quiet", "-q"), "print nothing but errors"),
        (("--json",), "print one JSON object, and nothing else on standard output"),
    ):
        command = click.option(*names, is_flag=True, expose_value=False, callback=keep_mode, help=text)(
            command
        )
    return command


def shown() -> bool:
    """Whether progress and tables are printed."""
    return not (mode().json or mode().quiet)


def progress(
    stage: str, total: int | None = None, enabled: bool = True
) -> AbstractContextManager[Callable[..., None]]:
    """`report.progress`, if progress is printed."""
    return report.progress(stage, total, enabled and shown())


def warn(message: str) -> None:
    """Print a warning on standard error, unless --quiet is given."""
    if not mode().quiet:
        click.echo(f"hydraopt: warning: {message}", err=True)


class Printer(Console):
    """A console that leaves a closed pipe to `to_a_reader`; rich ends the process with status 1."""

    def on_broken_pipe(self) -> None:
        """See `rich.console.Console`."""
        raise BrokenPipeError


@contextmanager
def to_a_reader() -> Iterator[None]:
    """A context that prints; it ends the process without a failure where nobody reads any more (`| head`)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # what is flushed at the end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def say(payload: Mapping[str, Any], *parts: Any, more: Sequence[Any] = ()) -> None:
    """Print a JSON object, or tables and sentences.

    Args:
      payload: the object; the name of its schema is added.
      *parts: tables, and sentences as text; None is skipped.
      more: parts that --verbose prints before the others.
    """
    with to_a_reader():
        say_all(payload, parts, more)


def say_all(payload: Mapping[str, Any], parts: Sequence[Any], more: Sequence[Any]) -> None:
    """See `say`."""
    if mode().json:
        # a new field keeps the version, any other change raises it
        name = f"hydraopt.{click.get_current_context().info_name}/1"
        click.echo(json.dumps({"schema": name, **payload}, allow_nan=False))
        return
    if mode().quiet:
        return
    # names of tasks are no markup
    console = Printer(highlight=False, markup=False, emoji=False)
    # rich takes COLUMNS=0 for a width, others for none
    width = console.width or 80
    for part in (*(more if mode().verbose else ()), *parts):
        if isinstance(part, str):
            click.echo(wrapped(part, width))
        elif part is not None:
            if part.title:
                # rich would break the title at the width of the table
                click.echo(wrapped(str(part.title), width))
                part.title = None
            console.width = max(width, report.least_width(part))
            console.print(part)
            click.echo()


def wrapped(sentence: str, width: int) -> str:
    """A sentence as lines of at most `width` characters, broken between words."""
    return textwrap.fill(sentence, width, break_long_words=False, break_on_hyphens=False)


def jsonable(values: Any) -> Any:
    """JSON-able values: numbers with six significant digits, None for NaN and infinity."""
    if isinstance(values, dict):
        return {k: jsonable(v) for k, v in values.items()}
    if isinstance(values, list | tuple):
        return [jsonable(v) for v in values]
    if isinstance(values, np.ndarray):
        return jsonable(values.tolist())
    if isinstance(values, float | np.floating):
        return float(f"{float(values):.6g}") if np.isfinite(values) else None
    return values
