"""Descriptions of a store: a JSON object, tables, and one sentence."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from hydraopt_jax import report
from hydraopt_jax.cli.output import jsonable, mode
from hydraopt_jax.store import Store, count, manifest
from hydraopt_jax.store.predictions import Predicted
from hydraopt_jax.store.removal import Held
from hydraopt_jax.store.store import counted, given_weights, task_errors

# upper limit of tasks in a table without --verbose
ROWS = 20
# number of listed modules with the highest errors
WORST = 10
ESTIMATES = {
    "separate": "Gaussian estimate at this size, nothing shared",
    "joint": "Gaussian estimate at this size, sides shared",
}
"""Model of `estimates` -> its heading; neither is a bound."""
KNOWN = ", if readers knew the moments"
"""What is assumed of an estimate of errors of outputs."""


def describe(path: str, content: Store) -> dict[str, Any]:
    """Description of a store, JSON-able."""
    bound = list(content.report["bound"].values())
    claims: dict[str, Any] = {"error": errors_by_task(content, content.errors) | {"of": "weights"}}
    if content.output_errors is not None:
        claims["output_error"] = errors_by_task(content, content.output_errors) | {"of": "outputs"}
    # the bound and the estimate are of the errors that were minimized
    for key, x in claims.items():
        x["bound"] = jsonable(float(np.mean(bound))) if bound and key == list(claims)[-1] else None
    chosen = {
        k: content.report[k]
        for k in ("forms", "estimate", "step", "left_out", "factor_bytes", "uncalibrated")
        if k in content.report
    }
    if "estimate" in chosen:
        chosen["estimate"] = {**chosen["estimate"], "of": list(claims.values())[-1]["of"]}
    return {
        "store": str(path),
        "version": manifest.VERSION,
        "tasks": list(content.tasks),
        "modules": len(content.shapes),
        "segments": len(content.segments),
        "form": content.report["form"],
        "options": content.report["options"],
        "provenance": content.report.get("provenance"),
        **claims,
        "bounded": list(content.report.get("bounded", ())),
        "entries": {"before": content.report["entries"], "after": count(content)},
        **jsonable(chosen),
    }


def errors_by_task(content: Store, errors: np.ndarray) -> dict[str, Any]:
    """Errors `[M, T]` per task, mean and worst, JSON-able."""
    per_task = task_errors(errors)
    weights = given_weights(content)
    weighted = {} if weights is None else {"weighted_mean": float(np.average(per_task, weights=weights))}
    return jsonable(
        {
            "per_task": dict(zip(content.tasks, per_task.tolist(), strict=True)),
            "mean": float(np.nanmean(errors)),
            "worst": float(np.max(per_task)),
            **weighted,
        }
    )


def worst_modules(content: Store) -> list[dict[str, Any]]:
    """Modules and tasks with the highest errors, of outputs if these are known, JSON-able."""
    errors = list(claims_of(content).values())[-1]
    names = list(content.shapes)
    order = np.argsort(-np.where(np.isnan(errors), -1.0, errors), axis=None, kind="stable")[:WORST]
    places = [np.unravel_index(x, errors.shape) for x in order]
    return [
        {"module": names[m], "task": content.tasks[t], "error": jsonable(float(errors[m, t]))}
        for m, t in places
        if errors[m, t] > 0
    ]


def module_errors(content: Store) -> dict[str, Any]:
    """Module -> task that has it -> error, of outputs if these are known, JSON-able."""
    errors = list(claims_of(content).values())[-1]
    return {
        name: {t: jsonable(float(x)) for t, x in zip(content.tasks, row, strict=True) if not np.isnan(x)}
        for name, row in zip(content.shapes, errors, strict=True)
    }


def groups_note(groups: Sequence[Sequence[str]]) -> str:
    """A line with the groups of alike tasks; of many tasks the first ones."""
    many = [x for x in groups if len(x) > 1]
    if not many:
        return "groups of alike tasks: none"
    shown = [", ".join(x[:ROWS]) + f" and {len(x) - ROWS} others" * (len(x) > ROWS) for x in many[:WORST]]
    more = f"; and {len(many) - WORST} groups" * (len(many) > WORST)
    return f"groups of alike tasks: {'; '.join(shown)}{more}; alone: {len(groups) - len(many)}"


def references_table(found: Mapping[str, Predicted]) -> Table:
    """A table of tasks: share of their vectors that is predicted, and the tasks that predict most of them."""
    table = report.columns("task", ">vectors", ">predicted", "most of these from")
    for task, x in found.items():
        total = max(x.vectors, 1)
        sources = {k: v.predicted / total for k, v in x.sources.items() if v.predicted}
        first = [f"{k} ({report.format_share(v)})" for k, v in list(sources.items())[:2]]
        share = report.format_share(sum(sources.values()))
        table.add_row(report.shorten(task, 24), str(x.vectors), share, report.shorten(", ".join(first), 40))
    return table


def bytes_table(parts: Mapping[str, int], content: Store) -> Table:
    """A table of the bytes of a store's parts, see `sizes.account`."""
    table = report.columns("part of the store", ">bytes on disk", ">of fp16 factors")
    whole = 2 * max(content.report["entries"], 1)
    names = {
        "factors": "factors",
        "heads": "full tensors (heads)",
        "metadata": "manifest, headers, checksums",
    }
    for key, name in names.items():
        share = "" if key == "heads" else report.format_share(parts[key] / whole)
        table.add_row(name, report.format_bytes(parts[key]), share)
    return table


def claims_of(content: Store) -> dict[str, np.ndarray]:
    """Heading -> errors `[M, T]`: of weights, and of outputs if the store has them."""
    claims = {"error of weights": content.errors}
    if content.output_errors is not None:
        claims["error of outputs"] = content.output_errors
    return claims


def most_telling(per_task: Sequence[np.ndarray]) -> list[int]:
    """Indices of the tasks in a table: all if there are few or with --verbose, else the worst."""
    tasks = len(per_task[0])
    if tasks <= ROWS or mode().verbose:
        return list(range(tasks))
    return np.argsort(-per_task[-1], kind="stable")[: ROWS // 2].tolist()


def errors_of_tasks(content: Store, bound: str) -> list[tuple[int, list[str]]]:
    """Position and errors of the tasks in a table; `bound` marks errors that are upper bounds."""
    per_task = [task_errors(x) for x in claims_of(content).values()]
    bounds = content.report.get("bounded", ())
    return [
        (t, [bound * (content.tasks[t] in bounds) + report.format_error(float(x[t])) for x in per_task])
        for t in most_telling(per_task)
    ]


def errors_table(content: Store) -> Table:
    """A table of relative squared errors: per task, mean, worst, lower bound, estimates."""
    claims, weights = claims_of(content), given_weights(content)
    table = report.columns("task", *(f">{x}" for x in claims), *([">weight"] if weights else []))
    rows = errors_of_tasks(content, "at most ")
    for t, errors in rows:
        table.add_row(report.shorten(content.tasks[t]), *errors, *([f"{weights[t]:g}"] if weights else []))
    if len(rows) < len(content.tasks):
        table.add_row(f"{len(content.tasks) - len(rows)} tasks with lower errors: --verbose")
    per_task = [task_errors(x) for x in claims.values()]
    table.add_section()
    table.add_row("mean", *(report.format_error(float(np.nanmean(x))) for x in claims.values()))
    if weights:
        table.add_row(
            "weighted mean", *(report.format_error(np.average(x, weights=weights)) for x in per_task)
        )
    table.add_row("worst task", *(report.format_error(float(x.max())) for x in per_task))
    # of the errors that were minimized
    last = [""] * (len(claims) - 1)
    bound = list(content.report["bound"].values())
    if any(bound):
        table.add_row("lower bound for this form and rank", *last, report.format_error(float(np.mean(bound))))
    for name, value in content.report.get("estimate", {}).items():
        heading = ESTIMATES.get(name, name) + (KNOWN if last else "")
        table.add_row(heading, *last, report.format_error(value))
    return table


def forms_table(content: Store) -> Table | None:
    """A table of forms with their numbers of modules."""
    if "forms" not in content.report:
        return None
    table = report.columns("form of a module", ">modules")
    for name, modules in sorted(content.report["forms"].items(), key=lambda x: -x[1]):
        table.add_row(report.shorten(name, 60), str(modules))
    return table


def sentence(content: Store, before: int, after: int) -> str:
    """A sentence on a store: tasks, bytes, error, and the lower one of `ESTIMATES` where they are of weights.

    `before` are the bytes of the adapters' files, 0 if unknown, `after` those of the store on disk.
    """
    size = report.format_bytes(after)
    if before:
        size = f"{report.format_bytes(before)} -> {size} ({report.times_smaller(before, after)})"
    claims = claims_of(content)
    heading, errors = list(claims.items())[-1]
    mean = float(np.nanmean(errors))
    named = heading if len(claims) > 1 else "error"
    said = "lossless" if mean == 0 else f"{named} {report.format_error(mean)}"
    weights = given_weights(content)
    if weights:
        # of this one are estimates and bounds
        said += f", weighted {report.format_error(np.average(task_errors(errors), weights=weights))}"
    # readers do not know the moments
    estimates = [] if len(claims) > 1 else list(content.report.get("estimate", {}).values())
    bound = list(content.report["bound"].values())
    if estimates and mean:
        said += f"; estimate {report.format_error(min(estimates))}"
    elif bound and mean:
        said += f"; least of this form {report.format_error(float(np.mean(bound)))}"
    return f"{counted(len(content.tasks), 'adapter')}, {size}, {said}"


def calibration_notes(content: Store) -> list[str]:
    """Notes on modules that the calibration lacks."""
    without = content.report.get("uncalibrated", [])
    more = f" and {len(without) - 1} more" if len(without) > 1 else ""
    said = "no second moment in the calibration: their errors count as errors of weights"
    return [f"{without[0]}{more}: {said}"] if without else []


def held_notes(held: Sequence[Held], tasks: Sequence[str]) -> list[str]:
    """Notes on what a store of some tasks still holds of removed ones, one per task."""
    out = []
    for x in held:
        why = []
        if x.bytes:
            names = ", ".join(x.needed_by)
            why.append(f"{report.format_bytes(x.bytes)} stay, because {names} are predicted from them")
        if x.fitted:
            why.append("vectors that other tasks share were fitted to it")
        what = "an earlier" if x.task in tasks else "removed"
        out.append(f"{what} task {x.task}: {'; '.join(why)}")
    return out
