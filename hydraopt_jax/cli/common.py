"""Functions of several verbs: reading collections, options NAME=VALUE, calibrations."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click
import numpy as np

from hydraopt_jax.adapters import Adapter, check
from hydraopt_jax.cli.output import progress
from hydraopt_jax.errors import HydraOptError, suggest
from hydraopt_jax.formats import check_same_base, read_adapter
from hydraopt_jax.formats.peft_collection import check_cards, collection_of, open_adapter
from hydraopt_jax.reading import locate
from hydraopt_jax.store import Store

Command = Callable[..., Any]


class CheckFailed(click.ClickException):
    """The error of a failed check: exit status 1."""

    exit_code = 1


class Terminated(click.ClickException):
    """The error of a command that SIGTERM stopped."""

    exit_code = 143


@contextlib.contextmanager
def stoppable(left: str) -> Iterator[None]:
    """End with a message on SIGTERM: what is `left`."""

    def stop(*_: Any) -> None:
        raise Terminated(f"stopped by SIGTERM; {left}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class PlaceType(click.Path):
    """A path, a NAME=PATH or an address; a shell completes it as a path."""

    name = "place"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The value, unchanged: the code that reads it checks it."""
        return value


def not_empty(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    """The value of an option for which an empty text means nothing, not the default."""
    if text == "":
        raise HydraOptError(f"--{option.name}: is empty: give a value, or leave it out")
    return text


def plot_option(what: str) -> Callable[[Command], Command]:
    """The option of a verb that can draw `what` it has found."""
    return click.option(
        "--plot",
        type=click.Path(dir_okay=False),
        callback=not_empty,
        help=f"{what} to this PNG, PDF or SVG",
    )


def read_all(given: Sequence[str], any_base: bool, base_suffix: Sequence[str]) -> list[Adapter]:
    """Adapters of arguments of `reading.locate`, checked to be of one base model."""
    sources, out = locate(given), []
    with progress("reading", len(sources)) as advance:
        for path, task in sources:
            out.append(read_adapter(path, task=task))
            advance()
    check_same_base(out, any_base=any_base, base_suffixes=tuple(base_suffix))
    check(out)
    return out


def read_in_turn(given: Sequence[str], any_base: bool, base_suffix: Sequence[str]) -> Iterator[Adapter]:
    """Factors of the adapters of `read_all`, one adapter in memory at a time; all are checked first."""
    sources, cards = locate(given), []
    seen: dict[Any, Any] = {}
    with progress("reading", len(sources)) as advance:
        for path, task in sources:
            cards.append(open_adapter(path, task, {}, seen))
            advance()
    named = [Adapter(x.task, {}, {}, config=x.config, source=x.source) for x in cards]
    check_same_base(named, any_base=any_base, base_suffixes=tuple(base_suffix))
    check_cards(cards)
    for x in cards:
        yield collection_of([x]).adapters([0], list(x.modules))[0].replace(source=x.source)


def with_adapters(command: Command) -> Command:
    """The command with the options of every verb that reads a collection."""
    for decorate in (
        click.option(
            "--base-suffix",
            multiple=True,
            metavar="TEXT",
            help="ignore this suffix of a base model's name, as quantized mirrors have one; may be repeated",
        ),
        click.option("--any-base", is_flag=True, help="accept adapters of differently named base models"),
    ):
        command = decorate(command)
    return command


def number_of(text: str) -> float | None:
    """The number that a text is; None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def parse_numbers(option: str, rows: Sequence[str]) -> dict[str, float]:
    """Task -> number, of options NAME=NUMBER.

    >>> parse_numbers("--weight", ["legal=2", "a=b=0.5"])
    {'legal': 2.0, 'a=b': 0.5}
    """
    out: dict[str, float] = {}
    for row in rows:
        task, sep, value = row.rpartition("=")
        number = number_of(value) if sep else None
        if number is None:
            raise HydraOptError(f"{option} {row}: give NAME=NUMBER, such as legal=2")
        if task in out:
            raise HydraOptError(f"{option} {row}: was given before")
        check_range(f"{option} {row}", number)
        out[task] = number
    return out


def check_range(said: str, number: float) -> None:
    """Raise for an option's number that float32 does not hold: not finite, too large, or too near to 0."""
    with np.errstate(over="ignore", under="ignore"):
        held = np.float32(number)
    if not np.isfinite(held) or (held == 0) != (number == 0):
        raise HydraOptError(f"{said}: is not a number that float32 holds: give a finite one, nearer to 1")


def parse_files(option: str, rows: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """Task -> file, of options NAME=FILE."""
    out: dict[str, str] = {}
    for row in rows:
        task, sep, path = row.partition("=")
        # names and paths may contain "="
        task = max((x for x in tasks if row.startswith(f"{x}=")), key=len, default=task)
        check_task(option, row, task if sep else "", tasks)
        out[task] = row[len(task) + 1 :] if sep else path
    return out


def check_task(option: str, row: str, task: str, tasks: Sequence[str]) -> None:
    """Raise HydraOptError if the name of a NAME=VALUE is not a task."""
    if not task:
        raise HydraOptError(f"{option} {row}: give NAME=VALUE, NAME one of {', '.join(tasks)}")
    if task not in tasks:
        raise HydraOptError(f"{option} {row}: no task {task!r}: {suggest(task, tasks)}")


def load_moments(content: Store, path: str, calibration: str | None) -> Mapping[str, np.ndarray] | None:
    """The second moments that a store was made with; None if no file is given.

    Raises:
      HydraOptError: the store was made without a calibration, or with another one.
    """
    if calibration is None:
        return None
    from hydraopt_jax.calibration import digest, read_moments

    known = content.report.get("calibration")
    if known is None:
        raise HydraOptError(
            f"{path}: claims no output errors, as it was made without --calibration: leave it out"
        )
    moments = read_moments(calibration)
    if digest(moments) != known:
        raise HydraOptError(f"{calibration}: is not the calibration that {path} was made with: give that one")
    return moments
