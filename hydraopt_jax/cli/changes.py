"""Verbs that change a store in place: add, remove."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hydraopt_jax import report
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.cli.common import (
    LARGE,
    as_json_option,
    clean,
    held_notes,
    load_moments,
    read_all,
    say,
    with_adapters,
)
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import check_same_base, read_adapter
from hydraopt_jax.rate_control.encode_at_step import task_errors
from hydraopt_jax.store import Store, changes, checkpoint, purging, task_index


def original_of(content: Store, given: Sequence[Adapter]) -> Callable[[str], Adapter | None]:
    """Task -> its original, if it is given or lies unchanged where it was read from."""
    known = {x.task: x for x in given}
    sources = dict(zip(content.tasks, content.sources, strict=True))

    def find(task: str) -> Adapter | None:
        source = sources[task]
        if task in known or not source.digest or not Path(source.origin).is_dir():
            return known.get(task)
        try:
            found = read_adapter(source.origin, task=task)
        except HydraOptError:
            return None
        return found if found.digest == source.digest else None

    return find


def originals_of(content: Store, given: Sequence[Adapter]) -> dict[str, Adapter]:
    """The tasks' originals that are given or at hand."""
    find = original_of(content, given)
    return {t: x for t in content.tasks if (x := find(t)) is not None}


def is_large(content: Store) -> bool:
    """Whether a collection is not to be fitted anew in memory: it was coded in parts, or would have been."""
    segments = content.payload is not None and bool(content.payload.segments)
    return segments or 2 * content.report["entries"] > LARGE


def refitted(content: Store, given: Sequence[Adapter]) -> Store:
    """The store fitted anew; the originals of all its tasks must be at hand."""
    if is_large(content):
        raise HydraOptError(
            "--refit holds the collection in memory, and this one is large: compress it again"
        )
    collection, absent = changes.originals(content, originals_of(content, given))
    if absent:
        raise HydraOptError(
            f"--refit needs the original of {absent[0]!r}, which is not where it was read from: "
            f"give --original {absent[0]}=FOLDER"
        )
    return changes.refit(collection, content)


def estimated(
    content: Store, given: Sequence[Adapter], quick: bool, task: str | None
) -> changes.Refit | None:
    """What a refit would give; None where nobody asks, or the collection is large."""
    if quick or is_large(content) or changes.is_calibrated(content):
        return None
    return changes.estimate(content, originals_of(content, given), task)


def options(command: Any) -> Any:
    """What both verbs take."""
    for decorate in (
        as_json_option,
        click.option("--quick", is_flag=True, help="do not estimate what a refit would give"),
        click.option(
            "--original", "known", multiple=True, help="NAME=FOLDER, a task's original that has moved"
        ),
        click.option("--refit", is_flag=True, help="fit all tasks anew, from their originals"),
    ):
        command = decorate(command)
    return command


def account(path: str, before: int, content: Store, found: changes.Refit | None, task: str | None) -> Any:
    """The JSON object and the table of a change."""
    own = task_errors(content.errors)
    held = purging.held(content)
    payload: dict[str, Any] = {
        "store": str(path),
        "tasks": list(content.tasks),
        "bytes_before": before,
        "bytes_after": checkpoint.size_on_disk(path),
        "bytes_held": sum(x.bytes for x in held),
        "held": [x._asdict() for x in held],
        "error": {"mean": clean(float(own.mean()))},
    }
    table = Table("", "now", "a refit at these bytes", title=str(path))
    rows = [("mean error of weights", float(own.mean()), None if found is None else found.mean)]
    if task is not None:
        payload["error"]["task"] = clean(float(own[task_index(content.tasks, task)]))
        rows.insert(
            0,
            (
                f"error of the weights of {task}",
                payload["error"]["task"],
                None if found is None else found.task,
            ),
        )
    if found is not None:
        payload["refit"] = clean(found._asdict())
    for name, now, then in rows:
        table.add_row(Text(name), f"{now:.3e}", "" if then is None else f"{then:.3e}")
    sizes = (report.format_bytes(x) for x in (payload["bytes_before"], payload["bytes_after"]))
    notes = [f"{' before, '.join(sizes)} after"]
    if held:
        notes += [*held_notes(held), f"to be rid of that: hydraopt remove {path} --purge"]
    if found is not None and found.due:
        notes.append("a refit is due: --refit would lower the mean error by more than a tenth")
    if changes.is_calibrated(content):
        notes.append("what a refit would give is not estimated: the store does not hold its calibration")
    if is_large(content):
        notes.append("what a refit would give is not estimated: the collection is large")
    return payload, (table, *map(escape, notes))


@click.command()
@click.argument("path", metavar="STORE")
@click.argument("adapter")
@with_adapters
@options
def add(
    path: str,
    adapter: str,
    any_base: bool,
    base_suffix: Sequence[str],
    refit: bool,
    known: Sequence[str],
    quick: bool,
    as_json: bool,
) -> None:
    """Add ADAPTER to a store; what it holds of the other tasks stays bit for bit as it was."""
    checkpoint.read_index(path)
    new, *given = read_all([adapter, *known], any_base, base_suffix, as_json)
    before = checkpoint.size_on_disk(path)
    found: list[changes.Refit | None] = []

    def change(content: Store) -> Store:
        bases = [x._replace(config=s.config) for x, s in ((new, content.sources[0]),) if s.config]
        check_same_base([*bases, new], any_base=any_base, base_suffixes=tuple(base_suffix))
        grown = changes.add(content, new)
        if refit:
            return refitted(grown, [*given, new])
        found.append(estimated(grown, [*given, new], quick, new.task))
        return grown

    content = checkpoint.update(path, change)
    payload, shown = account(path, before, content, found[0] if found else None, new.task)
    say(as_json, payload | {"added": new.task}, *shown)


@click.command()
@click.argument("path", metavar="STORE")
@click.argument("task", required=False)
@click.option("--purge", is_flag=True, help="code again what removed tasks have left their mark on")
@click.option("--calibration", type=click.Path(), help="with --purge: what the store was made with")
@options
def remove(
    path: str,
    task: str | None,
    purge: bool,
    calibration: str | None,
    refit: bool,
    known: Sequence[str],
    quick: bool,
    as_json: bool,
) -> None:
    """Remove TASK from a store; what it holds of the others stays bit for bit as it was.

    Vectors that others are predicted from, or share with the task, stay, and are named. With --purge these
    others are coded again, from their originals where those are at hand, else from what the store holds:
    nothing of the task is left then. Without TASK, --purge does so for tasks that were removed before.
    """
    if task is None and not purge:
        raise HydraOptError("remove: name the TASK, or give --purge for what removed tasks have left")
    if purge and refit:
        raise HydraOptError("--purge: --refit leaves nothing of a removed task either: give one of them")
    if calibration is not None and not purge:
        raise HydraOptError("--calibration: only --purge codes anything with it; leave it out")
    moments = None if calibration is None else load_moments(path, calibration)
    checkpoint.read_index(path)
    given = read_all(known, True, (), as_json) if known else []
    before = checkpoint.size_on_disk(path)
    found: list[changes.Refit | None] = []
    again: list[str] = []

    def change(content: Store) -> Store:
        left = content if task is None else changes.remove(content, task)
        if refit:
            return refitted(left, given)
        if purge:
            left, done = purging.purge(left, original_of(left, given), moments)
            again.extend(done)
            return left
        found.append(estimated(left, given, quick, None))
        return left

    content = checkpoint.update(path, change)
    payload, shown = account(path, before, content, found[0] if found else None, None)
    payload |= {"removed": task, "coded_again": again, "bounded": content.report.get("bounded", [])}
    if again:
        shown = (*shown, escape(f"coded again: {', '.join(again)}"))
    if payload["bounded"]:
        names = ", ".join(payload["bounded"])
        shown = (*shown, escape(f"errors are upper bounds, as the originals were not at hand: {names}"))
    say(as_json, payload, *shown)
