"""The loop of explicit forms: group after group, each kept as a plain segment as soon as it is done.

What it shares with the loop over a target's parts (`rate_control.engine`) is one function each: places,
notes, processes and progress (`rate_control.work`), full tensors and what is kept (`carried`), reading ahead
(`collection.read_ahead`). The loops are two. Here a group is some modules of all tasks, which all devices
solve together from sums over its tasks, once. There a part is some modules of few tasks, which one device
codes, again at every step until the whole meets the target. One loop for both would branch at each line.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from hydraopt_jax import devices
from hydraopt_jax.adapters import Bucket
from hydraopt_jax.collection import Collection
from hydraopt_jax.explicit import fitting, streaming
from hydraopt_jax.explicit.groups import GROUP_BYTES, Group, GroupFactors, groups_of, is_streamed, read_groups
from hydraopt_jax.factors import Factors, LazyFactors
from hydraopt_jax.forms import Gradient, Hydra
from hydraopt_jax.forms.hyperparameters import check_form
from hydraopt_jax.rate_control.carried import full_tensors, kept_segment
from hydraopt_jax.rate_control.segments import kept_note
from hydraopt_jax.rate_control.work import IN_MEMORY, Job, Memory, Place, Progress
from hydraopt_jax.static import Static
from hydraopt_jax.store import plain
from hydraopt_jax.store.store import Store, make_segment
from hydraopt_jax.store.tensors import check_dtype

# maximum bytes of plain segments that are joined at the end: each segment costs some hundred bytes on disk
TOGETHER = 1 << 25


def form_options(form: Hydra, tasks: int, dtype: str, extras_dtype: str | None) -> dict[str, Any]:
    """The options of a form as JSON."""
    solver = form.solver
    said: dict[str, Any] = {k: v for k, v in form._asdict().items() if k != "solver"}
    said |= {"heads": form.heads or tasks, "solver": "closed" if solver is None else "optax"}
    said |= {} if solver is None else {"start": solver.start, "steps": solver.steps}
    return said | {"dtype": dtype, "extras_dtype": extras_dtype}


def form_of(options: Mapping[str, Any]) -> Hydra:
    """The inverse of `form_options`; an optimizer becomes the default one."""
    solver = None
    if options["solver"] == "optax":
        solver = Gradient(None, options["start"], options["steps"])
    return Hydra(options["heads"], options["rank"], options["side"], options["cores"], solver)


def compress_in_form(
    found: Collection,
    form: Hydra,
    job: Job = IN_MEMORY,
    *,
    dtype: str | None = None,
    extras_dtype: str | None = None,
    group_bytes: int = GROUP_BYTES,
) -> Store:
    """A store of a collection in an explicit form.

    Args:
      found: the collection.
      form: the form and its solver.
      job: where segments are kept, and who takes part; existing segments are not made again.
      dtype: of the stored factors; None for the widest dtype of the input.
      extras_dtype: wider full tensors are rounded to it; None keeps them.
      group_bytes: bytes of factors (in their dtype on disk) that are read and solved together.

    Returns:
      Store with the achieved relative squared error of every module and task, measured on the rounded
      factors, and the bound of the form in `report`.

    Raises:
      HydraOptError: a bad form, or values that overflow the dtype.

    Reference: Ceritli et al., HydraOpt, arXiv 2507.17706, 2025.
    """
    place, progress, processes = job.place or Memory(), job.progress, job.processes
    tasks = len(found.cards)
    form = check_form(form, tasks)
    check_dtype(dtype)
    check_dtype(extras_dtype, "extras_dtype")
    kind = dtype or found.dtype
    groups = groups_of(found, form, group_bytes)
    heads, carried = full_tensors(found, extras_dtype, place, processes, apart=len(groups) > 1)
    mine = range(processes.rank, len(groups), processes.size)
    todo = {n: groups[n] for n in mine if place.note(f"group-{n}") is None}
    modules = sum(len(groups[n].modules) for n in mine)
    progress.start(modules, modules - sum(len(x.modules) for x in todo.values()))
    solve_groups(found, todo, form, kind, place, progress)
    processes.wait("worked")
    notes = [kept_note(place, f"group-{n}") for n in range(len(groups))]
    segments = [kept_segment(place, f"group-{n}") for n in range(len(groups))]
    bounds = {name: x for note in notes for name, x in note["bound"].items()}
    report = {
        "form": "hydra",
        "options": form_options(form, tasks, kind, extras_dtype),
        **found.entries_report(),
        "bound": {name: float(f"{bounds[name]:.6g}") for name in found.shapes if name in bounds},
        **job.said,
    }
    if carried:
        segments = [segments[0].with_tensors(carried)]
    return bundled(Store((*segments, *heads), found.tasks, found.sources, Static(report)), list(found.shapes))


def bundled(store: Store, order: list[str]) -> Store:
    """The store with small plain segments joined into one, and modules in the order given."""
    few = [x for x in store.segments if x.modules]
    sizes = [np.size(v) for x in few for v in x.leaves.values()]
    if len(few) < 2 or sum(sizes) > TOGETHER:
        return store
    terms: dict[str, Any] = {}
    errors: dict[str, np.ndarray] = {}
    for x in few:
        terms |= plain.from_leaves(Factors, x.modules, x.leaves, range(len(x.tasks)))
        table = x.error_table()
        assert table is not None
        errors |= dict(zip(x.modules, table, strict=True))
    schema, leaves = plain.to_leaves({n: terms[n] for n in order if n in terms})
    # a table of errors is its rounded roots already
    segment = make_segment(store.tasks, schema, leaves, np.stack([errors[n] for n in schema]))
    rest = [x for x in store.segments if not x.modules]
    return store.replace(segments=(segment, *rest))


# module -> its factors, relative squared errors `[T]`, lower bound of the form's error
Solved = Mapping[str, tuple[Factors | LazyFactors, np.ndarray, float]]


def solve_whole(group: Group, block: GroupFactors, form: Hydra, dtype: str) -> Solved:
    """Any form, with all tasks of the group at once."""
    count = len(group.modules)
    a = block.a[:count].astype(np.float32).swapaxes(2, 3)
    b = block.b[:count].astype(np.float32).swapaxes(2, 3) * block.scale[:count, :, None, None]
    return fitting.fit_modules(Bucket(group.modules, a, b, block.ranks[:count]), form, dtype)


def solve_groups(
    found: Collection, todo: Mapping[int, Group], form: Hydra, dtype: str, place: Place, progress: Progress
) -> None:
    """Solve groups and keep each when it is finished."""
    tasks = len(found.cards)
    passes = 2 if is_streamed(form, tasks) else 1
    numbers = iter(todo)
    stream = read_groups(found, list(todo.values()), passes, progress.read)
    with contextlib.closing(stream) as coming:
        for group, parts in coming:
            name = f"group-{next(numbers)}"
            file = place.scratch / f"{name}.bin"
            if passes == 2:
                grid = devices.make(group.room)
                solved: Solved = streaming.solve_group(file, group, parts, tasks, form, dtype, grid)
            else:
                solved = solve_whole(group, next(parts), form, dtype)
            schema, leaves = plain.to_leaves({n: (x[0],) for n, x in solved.items()})
            errors = np.stack([solved[n][1] for n in schema])
            place.keep(name, make_segment(found.tasks, schema, leaves, errors))
            place.keep_note(name, {"bound": {n: x[2] for n, x in solved.items()}})
            file.unlink(missing_ok=True)
            del parts
            progress.step(len(group.modules))
