"""The verb that compresses a collection: compress."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import jax

from hydraopt_jax import buckets, calibration, compression, provenance, report
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.cli import recipes
from hydraopt_jax.cli.common import PlaceType, number_of, parse_numbers, stoppable, with_adapters
from hydraopt_jax.cli.descriptions import (
    bytes_table,
    calibration_notes,
    describe,
    errors_table,
    forms_table,
    sentence,
)
from hydraopt_jax.cli.output import jsonable, mode, output_options, say
from hydraopt_jax.cli.output import progress as stage
from hydraopt_jax.errors import HydraOptError, suggest
from hydraopt_jax.formats import check_same_base
from hydraopt_jax.forms import Gradient, Hydra
from hydraopt_jax.forms.hyperparameters import check_form
from hydraopt_jax.jobs import estimate, headers, hosts, job, progress
from hydraopt_jax.rate_control.budget import keeps_all, parse_budget
from hydraopt_jax.rate_control.options import Options, check_options
from hydraopt_jax.rate_control.work import Job
from hydraopt_jax.reading import NamedPath, locate
from hydraopt_jax.store import Store, files, sizes
from hydraopt_jax.store.job_folder import JOB
from hydraopt_jax.store.tensors import check_dtype

# options of which a store has one, if it has no form
TARGETS = ("budget", "max_error", "max_task_error")
# options of an explicit form, and what they are where they were not given
FORM = {
    "heads": None,
    "rank": None,
    "side": "auto",
    "cores": False,
    "solver": "closed",
    "start": "closed",
    "steps": 1000,
    "dtype": None,
}
# options that no form has, and what they are where they were not given
BESIDE_FORM = {"weights": (), "protect": (), "calibration": None, "alone": False}
# weight of a task that is protected without a number: half the quantizer step
PROTECTED = 4
DEFAULT_NOTE = (
    "No target was given: a quarter of the factors' fp16 bytes. Others: --budget, --max-error, --form hydra."
)


def with_number(rows: Sequence[str], sources: Sequence[NamedPath]) -> tuple[str, ...]:
    """Options NAME=NUMBER; a NAME alone, which may have "=", has the weight `PROTECTED`."""
    names = {task or Path(place).absolute().name.removesuffix(".safetensors") for place, task in sources}

    def numbered(row: str) -> bool:
        name, sep, number = row.rpartition("=")
        return bool(sep) and row not in names and (name in names or number_of(number) is not None)

    return tuple(x if numbered(x) else f"{x}={PROTECTED:g}" for x in rows)


@click.command("compress")
@click.argument("adapters", nargs=-1, required=True, type=PlaceType())
@with_adapters
@click.option("--out", required=True, type=click.Path(), help="the store: a new folder or .safetensors file")
@click.option(
    "--budget",
    metavar="SIZE",
    help="share of the factors' fp16 bytes (0.125 or 12.5%), bytes on disk (3MB), or 1: lossless",
)
@click.option("--max-error", type=float, help="largest mean relative squared error, such as 0.01")
@click.option("--max-task-error", type=float, help="largest relative squared error of any task")
@click.option(
    "--weight",
    "weights",
    multiple=True,
    metavar="NAME=NUMBER",
    help="weight of a task's error, 1 if not given; may be repeated",
)
@click.option(
    "--protect",
    multiple=True,
    metavar="NAME[=NUMBER]",
    help=f"the same, {PROTECTED:g} for NAME alone",
)
@click.option("--calibration", type=click.Path(), help="file with second moments of the modules' inputs")
@click.option("--alone", is_flag=True, help="share nothing between tasks")
@click.option("--form", type=click.Choice(["hydra"]), help="HydraOpt's own form, as plain factors")
@click.option("--heads", type=int, help="hydra: K, heads per module; default: one per task")
@click.option("--rank", type=int, help="hydra: S, width of the shared factor; default: the adapters' rank")
@click.option("--side", default="auto", metavar="SIDE", help="hydra: shared side: in, out or auto")
@click.option("--cores", is_flag=True, help="hydra: give each task an S x S core")
@click.option("--solver", default="closed", metavar="SOLVER", help="hydra: closed or optax")
@click.option("--start", default="closed", metavar="START", help="hydra, optax: begin at closed or mean")
@click.option("--steps", type=int, default=1000, help="hydra, optax: upper limit of steps")
@click.option(
    "--dtype", metavar="DTYPE", help="hydra: float32, float16 or bfloat16; default: the adapters' own"
)
@click.option(
    "--extras-dtype",
    metavar="DTYPE",
    help="dtype of full tensors (heads): float32, float16 or bfloat16; default: their own",
)
@click.option("--recipe", type=click.Path(), is_eager=True, callback=recipes.apply_recipe, help=recipes.HELP)
@click.option("--no-zstd", is_flag=True, help="write plain factors without compression")
@click.option("--overwrite", is_flag=True, help="replace an existing store")
@click.option("--force", is_flag=True, help="keep a store that is larger than its input")
@click.option("--skip-bad", is_flag=True, help="leave out adapters that cannot be read, and list them")
@click.option("--dry-run", is_flag=True, help="print memory, time and size to expect, and stop")
@click.option(
    "--coordinator",
    metavar="ADDRESS:PORT",
    help="address of process 0 of several; auto on TPU pods and SLURM",
)
@click.option("--processes", type=int, help="with --coordinator: how many processes take part")
@click.option("--process-id", type=int, help="with --coordinator: number of this process, from 0")
@output_options
@click.pass_context
def compress(context: click.Context, adapters: Sequence[str], out: str, **given: Any) -> None:
    """Compress ADAPTERS into one store: to a budget, to an error, or in HydraOpt's form.

    Without a target the store takes a quarter of the bytes that the factors take in fp16.
    """
    files.check_output(out, given["overwrite"])
    sources = locate(adapters, strict=not given["skip_bad"])
    context.params["protect"] = given["protect"] = with_number(given["protect"], sources)
    given |= recipes.without_replaced(context, (*TARGETS, "form"), FORM, BESIDE_FORM)
    asked = asked_of(given, len(sources))
    made = {"made": provenance.entry("compress", recipes.recorded(context))}
    if given["coordinator"] is not None and buckets.is_bucket(out):
        raise HydraOptError(
            "--coordinator: several processes need a folder as --out; pack or unpack it afterwards"
        )
    given["out"] = str(files.located(out))
    tell: Callable[[], None] | None
    with files.staged(out, given["overwrite"], given["dry_run"]) as path:
        kept = f"what is done is kept in {path}: run the same command again to go on"
        with stoppable(kept):
            tell = streamed(path, sources, asked, given, made)
    if tell is not None:
        tell()


def asked_of(given: Mapping[str, Any], tasks: int) -> dict[str, Any]:
    """Keyword arguments of `compression.compress` for the command's options.

    Raises:
      HydraOptError: options that contradict each other.
    """
    targets = [k for k in TARGETS if given[k] is not None]
    fixed = [k for k, v in FORM.items() if given[k] != v]
    beside = [k for k in BESIDE_FORM if given[k]]
    if given["form"] is None and fixed:
        raise HydraOptError(f"--{fixed[0]}: is an option of --form hydra: give --form hydra, or leave it out")
    if given["form"] is not None:
        if targets or beside:
            name = (targets + beside)[0].replace("_", "-").removesuffix("s")
            raise HydraOptError(f"--{name}: cannot be combined with --form hydra: leave one of them out")
        return asked_form(given, tasks)
    options = Options(
        budget=None if given["budget"] is None else parse_budget(given["budget"]),
        max_error=given["max_error"],
        max_task_error=given["max_task_error"],
        weights=parse_numbers("--weight", (*given["weights"], *given["protect"])),
        calibration=None if given["calibration"] is None else calibration.read_moments(given["calibration"]),
        share=not given["alone"],
        extras_dtype=given["extras_dtype"],
    )
    if not targets:
        options = options._replace(budget=compression.DEFAULT_BUDGET)
    return check_options(options)._asdict()


def asked_form(given: Mapping[str, Any], tasks: int) -> dict[str, Any]:
    """Keyword arguments of `compression.compress` for --form."""
    if given["solver"] not in ("closed", "optax"):
        raise HydraOptError(f"solver = {given['solver']!r}: {suggest(given['solver'], ['closed', 'optax'])}")
    idle = [k for k in ("start", "steps") if given["solver"] == "closed" and given[k] != FORM[k]]
    for name in idle:
        raise HydraOptError(
            f"{name} = {given[name]!r}: does nothing with solver = 'closed': give solver = 'optax', or leave "
            "it out"
        )
    solver = None if given["solver"] == "closed" else Gradient(None, given["start"], given["steps"])
    form = check_form(Hydra(given["heads"], given["rank"], given["side"], given["cores"], solver), tasks)
    check_dtype(given["dtype"])
    return {"form": form, "dtype": given["dtype"], "extras_dtype": given["extras_dtype"]}


def as_text(asked: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able keyword arguments; a job continues only if they are equal."""
    moments = asked.get("calibration")
    known = None if moments is None else calibration.digest(moments)
    return {**{k: v for k, v in asked.items() if k != "calibration"}, "calibration": known}


def streamed(
    path: Path,
    sources: Sequence[NamedPath],
    asked: Mapping[str, Any],
    given: Mapping[str, Any],
    made: Mapping[str, Any],
) -> Callable[[], None] | None:
    """A function that prints the result of compressing the sources, or the plan with --dry-run."""
    # sums never leave a process, and the transport between processes would speak on standard output
    if given["coordinator"] is not None:
        jax.config.update("jax_cpu_collectives_implementation", None)
    who = hosts.join_processes(given["coordinator"], given["processes"], given["process_id"])
    with job.alone(path, who.rank):
        who.wait("alone")
        with stage("checking", len(sources), who.rank == 0) as advance:
            found, bad = headers.read_headers(
                sources,
                files.job_home(path) / JOB,
                skip_bad=given["skip_bad"],
                processes=who,
                advance=advance,
            )
        named = [Adapter(x.task, {}, {}, config=x.config, source=x.source) for x in found.cards]
        check_same_base(named, any_base=given["any_base"], base_suffixes=tuple(given["base_suffix"]))
        if given["recipe"] is not None:
            provenance.check_digests(given["recipe"], {x.task: x.digest for x in found.cards})
        if given["dry_run"]:
            return shown_plan(given["out"], found, asked, bad)
        with progress.to_stderr(who.rank == 0 and not mode().quiet) as told:
            store = job.run_job(
                path,
                found,
                functools.partial(compression.compress, **asked),
                as_text(asked),
                Job(progress=told, processes=who, left_out=bad, provenance=made),
                overwrite=given["overwrite"],
                limit=None if given["force"] or keeps_all(asked.get("budget")) else found.size,
                zstd=not given["no_zstd"],
            )
    return None if store is None else shown_store(path, store, found.size, given)


def shown_store(path: Path, store: Store, before: int, given: Mapping[str, Any]) -> Callable[[], None]:
    """A function that prints a new store; the last line is the summary."""
    after = sizes.size_on_disk(path)
    parts = sizes.account(path, store)._asdict()
    payload = describe(given["out"], store)
    payload |= {
        "bytes_before": before,
        "bytes_after": after,
        "ratio": jsonable(after / before),
        "bytes_of": parts,
    }
    left = [f"left out: {x}: {why}" for x, why in store.report.get("left_out", {}).items()]
    if "factor_bytes" in payload:
        size = payload["factor_bytes"]
        share = report.format_share(size / (2 * store.report["entries"]))
        left.insert(
            0, f"original factors, kept bit for bit: {report.format_bytes(size)}, {share} of their fp16 bytes"
        )
    left += calibration_notes(store)
    if all(given[k] is None for k in (*TARGETS, "form")):
        left.append(DEFAULT_NOTE)
    tables = (errors_table(store), bytes_table(parts, store))
    last = sentence(store, before, after)
    return functools.partial(say, payload, *tables, *left, last, more=[forms_table(store)])


def shown_plan(out: str, found: Any, asked: Mapping[str, Any], bad: Mapping[str, str]) -> Callable[[], None]:
    """A function that prints the plan of a job."""
    if "form" in asked:
        plan = estimate.form_costs(found, asked["form"], asked["dtype"])
    else:
        plan = estimate.target_costs(found, Options(**asked))
    table = report.columns("quantity", ">estimate")
    for name, value in (
        ("input", report.format_bytes(found.size)),
        ("bytes read", report.format_bytes(plan.read)),
        ("store, before zstd", report.format_bytes(plan.store)),
        ("memory beside Python and JAX", report.format_bytes(plan.memory)),
        ("floating-point operations", f"{plan.flops:.2e}"),
        ("time on one machine like this", f"{plan.time_class}, about {plan.seconds:.2g} s"),
        ("groups of modules", str(plan.groups)),
    ):
        table.add_row(name, value)
    left = [f"left out: {x}: {why}" for x, why in bad.items()]
    payload = {"plan": jsonable(estimate.as_dict(plan)), "bytes_before": found.size, "left_out": dict(bad)}
    return functools.partial(say, payload, table, *left, f"{out}: nothing was written")
