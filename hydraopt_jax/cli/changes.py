"""Verbs that change a store in place: add, remove."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from hydraopt_jax import provenance, report, store
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.cli import recipes
from hydraopt_jax.cli.common import PlaceType, load_moments, read_all, with_adapters
from hydraopt_jax.cli.descriptions import calibration_notes, held_notes, sentence
from hydraopt_jax.cli.output import jsonable, output_options, say
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import check_same_base, read_adapter
from hydraopt_jax.reading import locate
from hydraopt_jax.store import Store, files, removal, sizes, task_index
from hydraopt_jax.store.store import task_errors

if TYPE_CHECKING:
    from hydraopt_jax.changes.refitting import Refit


def original_of(content: Store, given: Sequence[Adapter]) -> Callable[[str], Adapter | None]:
    """A function: task -> its original if given or unchanged at its source, else None.

    Raises:
      HydraOptError: one that is given is not the task's, also if it will not be read.
    """
    from hydraopt_jax.changes import refitting

    refitting.check_originals(content, given)
    known = {x.task: x for x in given}
    sources = dict(zip(content.tasks, content.sources, strict=True))

    def find(task: str) -> Adapter | None:
        source = sources[task]
        if task in known or not source.digest or not Path(source.origin).exists():
            return known.get(task)
        try:
            found = read_adapter(source.origin, task=task)
        except HydraOptError:
            return None
        return found if found.digest == source.digest else None

    return find


def originals_of(content: Store, given: Sequence[Adapter]) -> dict[str, Adapter]:
    """Task -> original, for originals that are given or at their source."""
    find = original_of(content, given)
    return {t: x for t in content.tasks if (x := find(t)) is not None}


def refit_store(content: Store, given: Sequence[Adapter], moments: Mapping[str, np.ndarray] | None) -> Store:
    """The store fitted again; it needs the originals of all tasks."""
    from hydraopt_jax.changes import refitting

    collection, absent = refitting.at_hand(content, content.tasks, original_of(content, given))
    if absent:
        raise HydraOptError(
            f"--refit needs the original of {absent[0]!r}, which is not where it was read from: "
            f"give --original {absent[0]}=FOLDER"
        )
    fitted = refitting.refit(content, collection, moments)
    return provenance.with_entries(fitted, content.report.get(provenance.KEY, {}))


def change_options(command: Any) -> Any:
    """The command with the options of both verbs."""
    for decorate in (
        output_options,
        click.option(
            "--calibration", type=click.Path(), help="calibration file that the store was made with, if any"
        ),
        click.option(
            "--estimate", is_flag=True, help="print the errors that a refit of all tasks would give"
        ),
        click.option(
            "--original",
            "known",
            multiple=True,
            metavar="NAME=FOLDER",
            help="a task's original that has moved; may be repeated",
        ),
        click.option("--refit", is_flag=True, help="fit all tasks again, from their originals"),
    ):
        command = decorate(command)
    return command


def check_used(known: Sequence[str], given: Mapping[str, Any], what: str, purge: bool = False) -> None:
    """Raise for --estimate beside --refit, and for originals that nothing reads."""
    if given["refit"] and given["estimate"]:
        raise HydraOptError("--estimate: says what --refit would do: give one of them")
    if known and not (purge or given["refit"] or given["estimate"]):
        raise HydraOptError(f"--original: used with {what} only: give one of them, or leave it out")


def change_report(path: str, before: int, content: Store, found: "Refit | None", task: str | None) -> Any:
    """JSON object, table with notes, and last sentence on a change."""
    own = task_errors(content.errors)
    # over modules and tasks, as `sentence` has it: a task with fewer modules counts for less
    mean = float(np.nanmean(content.errors))
    held = removal.held(content)
    payload: dict[str, Any] = {
        "store": str(path),
        "tasks": list(content.tasks),
        "bytes_before": before,
        "bytes_after": sizes.size_on_disk(path),
        "bytes_held": sum(x.bytes for x in held),
        "held": [x._asdict() for x in held],
        "uncalibrated": list(content.report.get("uncalibrated", ())),
        "error": {"mean": jsonable(mean)},
    }
    then = [] if found is None else [">after a refit"]
    table = report.columns("task", ">error of weights", *then)
    rows = [("mean", mean, None if found is None else found.mean)]
    if task is not None:
        payload["error"]["task"] = jsonable(float(own[task_index(content.tasks, task)]))
        rows.insert(0, (task, payload["error"]["task"], None if found is None else found.task))
    if found is not None:
        payload["refit"] = jsonable(found._asdict())
    for name, now, other in rows:
        then = [] if other is None else [report.format_error(other)]
        table.add_row(report.shorten(name), report.format_error(now), *then)
    notes = calibration_notes(content)
    if held:
        notes += held_notes(held, content.tasks)
        notes.append(f"to remove them: hydraopt remove {shlex.quote(path)} --purge")
    if found is not None and found.due:
        notes.append("A refit is due: --refit would lower the mean error by more than a tenth.")
    return payload, (table, *notes), sentence(content, before, payload["bytes_after"])


@click.command()
@click.argument("path", metavar="STORE", type=PlaceType())
@click.argument("adapter", type=PlaceType())
@with_adapters
@click.option("--weight", type=float, default=1.0, help="weight of its error, as in compress")
@change_options
@click.pass_context
def add(
    context: click.Context,
    path: str,
    adapter: str,
    any_base: bool,
    base_suffix: Sequence[str],
    known: Sequence[str],
    **given: Any,
) -> None:
    """Add ADAPTER to STORE; the other tasks stay bit for bit as they are.

    --refit fits all tasks again, which may lower the errors; --estimate prints by how much and takes as long.
    """
    check_used(known, given, "--refit or --estimate")
    several = len(locate([adapter], strict=False))
    if several > 1:
        raise HydraOptError(f"{adapter}: holds {several} adapters: add one at a time")
    files.located(path)
    content = store.open(path)
    moments = load_moments(content, path, given["calibration"])
    new, *originals = read_all([adapter, *known], any_base, base_suffix)
    before: list[int] = []
    found: list[Refit] = []

    def change(content: Store) -> Store:
        from hydraopt_jax import changes

        before.append(sizes.size_on_disk(path))
        bases = [x.replace(config=s.config) for x, s in ((new, content.sources[0]),) if s.config]
        check_same_base([*bases, new], any_base=any_base, base_suffixes=tuple(base_suffix))
        grown = changes.add(content, new, weight=given["weight"], calibration=moments)
        if given["refit"]:
            return refit_store(grown, [*originals, new], moments)
        if given["estimate"]:
            known = originals_of(grown, [*originals, new])
            found.append(changes.estimate_refit(grown, known, new.task, moments))
        return grown

    said = {"changed": provenance.entry("add", recipes.recorded(context))}
    # no other command may change the store before the report has read it
    with files.updated(path, lambda x: provenance.with_entries(change(x), said)) as content:
        payload, shown, last = change_report(path, before[0], content, found[0] if found else None, new.task)
    say(payload | {"added": new.task}, *shown, last)


@click.command()
@click.argument("path", metavar="STORE", type=PlaceType())
@click.argument("task", required=False)
@click.option(
    "--purge", is_flag=True, help="leave nothing of removed tasks: code again the tasks that depend on them"
)
@change_options
@click.pass_context
def remove(
    context: click.Context, path: str, task: str | None, purge: bool, known: Sequence[str], **given: Any
) -> None:
    """Remove TASK from STORE; the other tasks stay bit for bit as they are.

    Vectors of the task that predict others stay, and are named. --purge codes these others again, from their
    originals where those are at hand, else from the store: nothing of the task is left. Without TASK, --purge
    does so for tasks that were removed before.
    """
    if task is None and not purge:
        raise HydraOptError("remove: give a TASK, or --purge to erase what removed tasks left in the store")
    if purge and given["refit"]:
        raise HydraOptError("--purge: --refit erases removed tasks, too: give one of them")
    check_used(known, given, "--purge, --refit or --estimate", purge)
    if given["calibration"] is not None and not (purge or given["refit"] or given["estimate"]):
        raise HydraOptError(
            "--calibration: used with --purge, --refit or --estimate only: give one of them, or leave it out"
        )
    files.located(path)
    content = store.open(path)
    moments = load_moments(content, path, given["calibration"])
    originals = read_all(known, True, ()) if known else []
    before: list[int] = []
    found: list[Refit] = []
    again: list[str] = []

    def change(content: Store) -> Store:
        before.append(sizes.size_on_disk(path))
        left = content if task is None else removal.remove(content, task)
        if given["refit"]:
            return refit_store(left, originals, moments)
        if not (purge or given["estimate"]):
            return left
        from hydraopt_jax import changes

        if purge:
            left, done = changes.purge(left, original_of(left, originals), moments)
            again.extend(done)
        if given["estimate"]:
            estimate = changes.estimate_refit(left, originals_of(left, originals), None, moments)
            found.append(estimate)
        return left

    said = {"changed": provenance.entry("remove", recipes.recorded(context))}
    with files.updated(path, lambda x: provenance.with_entries(change(x), said)) as content:
        payload, shown, last = change_report(path, before[0], content, found[0] if found else None, None)
    payload |= {"removed": task, "coded_again": again, "bounded": content.report.get("bounded", [])}
    if again:
        shown = (*shown, f"coded again: {', '.join(again)}")
    if payload["bounded"]:
        names = ", ".join(payload["bounded"])
        shown = (*shown, f"errors are upper bounds, as the originals were not at hand: {names}")
    say(payload, *shown, last)
