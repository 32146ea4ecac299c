"""What the verbs share: reading collections, printing, common options."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydraopt_jax import report
from hydraopt_jax.adapters import Adapter, check
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import check_same_base, read_adapter
from hydraopt_jax.store import Store, count, manifest
from hydraopt_jax.store.removal import Held
from hydraopt_jax.store.store import task_errors

Command = Callable[..., Any]

# bytes of adapters from which on they are not held in memory all at once
LARGE = 1 << 28


class CheckFailed(click.ClickException):
    """A check that did not hold: exit status 1."""

    exit_code = 1


def split_name(text: str) -> tuple[str, str | None]:
    """Where an adapter given as PATH or NAME=PATH is, and its name, None for the folder's."""
    task, sep, path = text.partition("=")
    return (text, None) if not sep or Path(text).exists() else (path, task)


def read_all(
    names: Sequence[str], any_base: bool, base_suffix: Sequence[str], as_json: bool
) -> list[Adapter]:
    """Read adapters given as PATH or NAME=PATH and check that they adapt one base model."""
    return read_beside([], names, any_base, base_suffix, as_json)


def read_beside(
    before: Sequence[Adapter], names: Sequence[str], any_base: bool, base_suffix: Sequence[str], as_json: bool
) -> list[Adapter]:
    """As `read_all`, of adapters that follow others."""
    out = []
    with report.progress("reading", len(names), not as_json) as advance:
        for path, task in map(split_name, names):
            out.append(read_adapter(path, task=task))
            advance()
    check_same_base([*before, *out], any_base=any_base, base_suffixes=tuple(base_suffix))
    check([*before, *out])
    return out


def size_of(name: str) -> int:
    """Bytes of the folder or file of an adapter given as PATH or NAME=PATH; 0 where there is none."""
    folder = Path(split_name(name)[0])
    if folder.is_file():
        return folder.stat().st_size
    return sum(x.stat().st_size for x in folder.iterdir() if x.is_file()) if folder.is_dir() else 0


def read_in_batches(
    names: Sequence[str], any_base: bool, base_suffix: Sequence[str], as_json: bool
) -> Iterator[list[Adapter]]:
    """As `read_all`, about `LARGE` bytes at a time; each adapter is compared with those before."""
    before: list[Adapter] = []
    ends = zip(itertools.accumulate(map(size_of, names)), names, strict=True)
    for _, group in itertools.groupby(ends, key=lambda x: x[0] // LARGE):
        few = read_beside(before, [name for _, name in group], any_base, base_suffix, as_json)
        yield few
        before += map(shell, few)


def shell(x: Adapter) -> Adapter:
    """An adapter without its numbers, to compare others with."""
    return x.replace(
        a={n: v[:, :0].copy() for n, v in x.a.items()},
        b={n: v[:0].copy() for n, v in x.b.items()},
        extras={},
    )


def say(as_json: bool, payload: dict[str, Any], *tables: Any) -> None:
    """Print the JSON object, or the tables."""
    if as_json:
        click.echo(json.dumps(payload, allow_nan=False))
        return
    console = Console()
    for table in tables:
        console.print(table)


def clean(values: Any) -> Any:
    """Numbers as JSON has them: six significant digits, null for what is not a number."""
    if isinstance(values, dict):
        return {k: clean(v) for k, v in values.items()}
    if isinstance(values, list | tuple):
        return [clean(v) for v in values]
    if isinstance(values, np.ndarray):
        return clean(values.tolist())
    if isinstance(values, float | np.floating):
        return float(f"{float(values):.6g}") if np.isfinite(values) else None
    return values


def with_adapters(command: Command) -> Command:
    """The options of every verb that reads a collection."""
    for decorate in (
        click.option(
            "--base-suffix", multiple=True, help="suffix of a quantized mirror's base name to ignore"
        ),
        click.option("--any-base", is_flag=True, help="accept adapters of differently named base models"),
    ):
        command = decorate(command)
    return command


as_json_option = click.option("--json", "as_json", is_flag=True, help="one JSON object on standard output")


def describe(path: str, content: Store) -> dict[str, Any]:
    """What a store is, JSON-able."""
    bound = list(content.report["bound"].values())
    claims: dict[str, Any] = {"error": errors_of(content, content.errors) | {"of": "weights"}}
    if content.output_errors is not None:
        claims["output_error"] = errors_of(content, content.output_errors) | {"of": "outputs"}
    # a form's bound is of what was made small
    for key, x in claims.items():
        x["bound"] = clean(float(np.mean(bound))) if bound and key == list(claims)[-1] else None
    chosen = {
        k: content.report[k]
        for k in ("forms", "estimate", "step", "left_out", "factor_bytes", "uncalibrated")
        if k in content.report
    }
    return {
        "store": str(path),
        "version": manifest.VERSION,
        "tasks": list(content.tasks),
        "modules": len(content.shapes),
        "segments": len(content.segments),
        "form": content.report["form"],
        "options": content.report["options"],
        **claims,
        "bounded": list(content.report.get("bounded", ())),
        "entries": {"before": content.report["entries"], "after": count(content)},
        **clean(chosen),
    }


BOUND = "bound: no factors of this form and rank, at any precision, have a lower mean"
"""Heading of the eigen-tail."""
ESTIMATES = {
    "separate": "Gaussian estimate at this size, nothing shared (no bound)",
    "joint": "Gaussian estimate at this size, sides shared (no bound)",
}
"""Model of `estimates` -> its heading."""


def load_moments(content: Store, path: str, calibration: str) -> dict[str, np.ndarray]:
    """The second moments that a store was made with.

    Raises:
      HydraOptError: it was made without any, or with others.
    """
    from hydraopt_jax.calibration import digest, load

    known = content.report.get("calibration")
    if known is None:
        raise HydraOptError(
            f"{path}: claims no output errors (no --calibration when it was made): leave it out"
        )
    moments = load(calibration)
    if digest(moments) != known:
        raise HydraOptError(f"{calibration}: is not the calibration that {path} was made with: give that one")
    return moments


def calibration_notes(content: Store) -> list[str]:
    """What a calibration said nothing of."""
    without = content.report.get("uncalibrated", [])
    more = f" and {len(without) - 1} more" if len(without) > 1 else ""
    said = "no second moment in the calibration: their errors count as errors of weights"
    return [f"{without[0]}{more}: {said}"] if without else []


def held_notes(held: Sequence[Held]) -> list[str]:
    """What a store still holds of removed tasks, a line each."""
    out = []
    for x in held:
        why = []
        if x.bytes:
            names = ", ".join(x.needed_by)
            why.append(f"{report.format_bytes(x.bytes)} are kept, because {names} are predicted from them")
        if x.fitted:
            why.append("vectors that the others share were fitted to it, too")
        out.append(f"of {x.task}, which was removed, {'; and '.join(why)}")
    return out


def errors_of(content: Store, errors: np.ndarray) -> dict[str, Any]:
    """A table of errors `[M, T]` task by task, mean and worst, JSON-able."""
    per_task = task_errors(errors)
    return {
        "per_task": clean(dict(zip(content.tasks, per_task.tolist(), strict=True))),
        "mean": clean(float(np.nanmean(errors))),
        "worst": clean(float(np.max(per_task))),
    }


def bytes_table(parts: dict[str, int], content: Store) -> Table:
    """What takes the bytes of a store, see `files.account`."""
    table = Table("what", "bytes", "of the factors' fp16 bytes", title="bytes on disk")
    whole = 2 * max(content.report["entries"], 1)
    names = {
        "factors": "factors",
        "heads": "full tensors (heads)",
        "metadata": "manifest, headers, checksums",
    }
    for key, name in names.items():
        share = "" if key == "heads" else f"{parts[key] / whole:.4f}"
        table.add_row(name, report.format_bytes(parts[key]), share)
    return table


def error_table(content: Store) -> Table:
    """Relative squared errors of each task, of weights and of calibrated outputs; mean, worst, bound."""
    claims = [x for x in (content.errors, content.output_errors) if x is not None]
    heads = ["of weights (delta)", "of outputs (calibrated)"][: len(claims)]
    table = Table("task", *heads, title="relative squared error")
    per_task = [task_errors(x) for x in claims]
    bounds = content.report.get("bounded", ())
    for task, *values in zip(content.tasks, *per_task, strict=True):
        table.add_row(Text(task), *(f"{'at most ' * (task in bounds)}{x:.3e}" for x in values))
    table.add_section()
    table.add_row("mean", *(f"{np.nanmean(x):.3e}" for x in claims))
    table.add_row("worst", *(f"{x.max():.3e}" for x in per_task))
    bound = list(content.report["bound"].values())
    if bound:
        # of what was made small
        table.add_row(BOUND, *[""] * (len(claims) - 1), f"{np.mean(bound):.3e}")
    for name, value in content.report.get("estimate", {}).items():
        table.add_row(ESTIMATES.get(name, name), f"{value:.3e}")
    return table


def forms_table(content: Store) -> Table:
    """How many modules took which form."""
    table = Table("form", "modules", title="forms chosen")
    for name, modules in sorted(content.report["forms"].items(), key=lambda x: -x[1]):
        table.add_row(Text(name), str(modules))
    return table


def parse_weights(rows: Sequence[str]) -> dict[str, float]:
    """Task weights given as NAME=WEIGHT."""
    out = {}
    for row in rows:
        task, sep, value = row.rpartition("=")
        try:
            out[task] = float(value)
        except ValueError:
            sep = ""
        if not sep:
            raise HydraOptError(f"weight {row!r}: give NAME=NUMBER, such as legal=2")
    return out
