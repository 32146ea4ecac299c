"""The `hydraopt` command: parsing and printing only.

Exit status 0 when all went well, 1 for a failed check, 2 for bad use or bad input; errors are one line on
standard error. With `--json` one JSON object goes to standard output and nothing else.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# before NumPy and JAX load: OpenBLAS threads under a batched factorisation slow it a hundredfold
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydraopt_jax import checkpoint, compression, report, similarity, store
from hydraopt_jax import demo as demonstration
from hydraopt_jax.adapters import Adapter, check, stack
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import check_same_base, peft, read_adapter, write_adapter

Command = Callable[..., Any]


def read_all(
    names: Sequence[str], any_base: bool, base_suffix: Sequence[str], as_json: bool
) -> list[Adapter]:
    """Read adapters given as PATH or NAME=PATH and check that they adapt one base model."""
    out = []
    with report.progress("reading", len(names), not as_json) as advance:
        for name in names:
            task, sep, path = name.partition("=")
            plain = not sep or Path(name).exists()
            out.append(read_adapter(name if plain else path, task=None if plain else task))
            advance()
    check_same_base(out, any_base=any_base, base_suffixes=tuple(base_suffix))
    check(out)
    return out


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
            "--base-suffix", multiple=True, help="suffix of a quantised mirror's base name to ignore"
        ),
        click.option("--any-base", is_flag=True, help="accept adapters of differently named base models"),
    ):
        command = decorate(command)
    return command


as_json_option = click.option("--json", "as_json", is_flag=True, help="one JSON object on standard output")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hydraopt-jax")
def cli() -> None:
    """Keep many LoRA adapters in little storage. ADAPTER is a PEFT folder, NAME=FOLDER, or hf:ORG/NAME."""


@cli.command("similarity")
@click.argument("adapters", nargs=-1, required=True)
@with_adapters
@click.option("--plot", type=click.Path(dir_okay=False), help="write heat maps to this PNG, PDF or SVG")
@as_json_option
def similarity_command(
    adapters: Sequence[str], any_base: bool, base_suffix: Sequence[str], plot: str | None, as_json: bool
) -> None:
    """How alike the adapters are: factors, deltas and subspaces, per layer kind and task by task."""
    summary = similarity.summarise(stack(read_all(adapters, any_base, base_suffix, as_json)))
    if plot:
        report.plot_similarity(plot, summary)
    payload = {
        "tasks": list(summary.tasks),
        "mean": {k: clean(np.asarray(v)) for k, v in summary.mean._asdict().items()},
        "modules": {
            m: {k: clean(np.asarray(v)) for k, v in x._asdict().items()} for m, x in summary.modules.items()
        },
    }
    say(as_json, payload, report.kinds_table(summary), report.task_table(summary))


@cli.command("compress")
@click.argument("adapters", nargs=-1, required=True)
@with_adapters
@click.option("--out", required=True, type=click.Path(), help="the store to write, a new folder")
@click.option("--heads", type=int, help="K, heads a module; all tasks where not given")
@click.option("--rank", type=int, help="S, width of the shared factor; the adapters' rank where not given")
@click.option("--side", default="auto", help="which side is shared: in, out or auto")
@click.option("--cores", is_flag=True, help="give each task an S x S core")
@click.option("--solver", default="closed", help="closed or optax")
@click.option("--start", default="closed", help="start of the optax solver: closed or mean")
@click.option("--steps", type=int, default=1000, help="upper limit of Optax steps")
@click.option("--dtype", help="stored dtype: float32, float16 or bfloat16; as it came where not given")
@click.option("--no-zstd", is_flag=True, help="write the leaves without compression")
@click.option("--overwrite", is_flag=True, help="replace an existing store")
@click.option("--force", is_flag=True, help="keep a store that is larger than its input")
@as_json_option
def compress_command(
    adapters: Sequence[str],
    any_base: bool,
    base_suffix: Sequence[str],
    out: str,
    no_zstd: bool,
    overwrite: bool,
    force: bool,
    as_json: bool,
    **form: Any,
) -> None:
    """Compress ADAPTERS into one store."""
    checkpoint.check_target(out, overwrite)
    options = compression.Options(**form)
    compression.check_options(options, len(adapters))
    collection = read_all(adapters, any_base, base_suffix, as_json)
    with report.progress("compressing", len(check(collection)), not as_json) as advance:
        result = compression.compress(collection, options, progress=advance)
    before = sum(checkpoint.size_on_disk(x.source) for x in collection)
    checkpoint.save(out, result, overwrite=overwrite, compress=not no_zstd, limit=None if force else before)
    after = checkpoint.size_on_disk(out)
    payload = describe(out, result) | {"bytes_before": before, "bytes_after": after}
    payload["ratio"] = clean(after / before)
    table = Table("on disk", "before", "after", "ratio", title=str(out))
    table.add_row(
        "all files", report.format_bytes(before), report.format_bytes(after), f"{after / before:.3f}"
    )
    say(as_json, payload, table, error_table(result))


def describe(path: str, content: store.Store) -> dict[str, Any]:
    """What a store is, JSON-able."""
    per_task = task_errors(content.errors)
    bound = list(content.report["bound"].values())
    return {
        "store": str(path),
        "schema": checkpoint.SCHEMA,
        "tasks": list(content.tasks),
        "modules": len(content.modules),
        "form": content.report["form"],
        "options": content.report["options"],
        "error": {
            "per_task": clean(dict(zip(content.tasks, per_task.tolist(), strict=True))),
            "mean": clean(float(np.nanmean(content.errors))),
            "worst": clean(float(np.max(per_task))),
            "bound": clean(float(np.mean(bound))),
        },
        "entries": {"before": content.report["entries"], "after": store.count(content)},
    }


def task_errors(errors: np.ndarray) -> np.ndarray:
    """Mean relative squared error of each task over the modules it has, `[M, T] -> [T]`."""
    present = ~np.isnan(errors)
    return np.where(present, errors, 0.0).sum(0) / np.maximum(present.sum(0), 1)


def error_table(content: store.Store) -> Table:
    """Relative squared error a task, mean, worst and the form's bound."""
    table = Table("task", "relative squared error", title="error of delta")
    per_task = task_errors(content.errors)
    for task, value in zip(content.tasks, per_task, strict=True):
        table.add_row(Text(task), f"{value:.3e}")
    table.add_section()
    table.add_row("mean", f"{np.nanmean(content.errors):.3e}")
    table.add_row("worst", f"{per_task.max():.3e}")
    table.add_row("bound of the form (mean)", f"{np.mean(list(content.report['bound'].values())):.3e}")
    return table


@cli.command()
@click.argument("path", metavar="STORE")
@as_json_option
def inspect(path: str, as_json: bool) -> None:
    """What is in a store: tasks, modules, form, bytes a leaf, error a task."""
    content = checkpoint.restore(path)
    _, index = checkpoint.read_index(path)
    leaves = {name: size for name, (size, _) in index["leaves"].items()}
    payload = describe(path, content) | {"leaves": leaves, "bytes": checkpoint.size_on_disk(path)}
    table = Table("leaf", "bytes", title=f"{path}: {report.format_bytes(payload['bytes'])} on disk")
    for name, size in leaves.items():
        table.add_row(name, f"{size:,}")
    shape = Table("module", "[in, out]", "rank", "inputs", "outputs")
    for name, terms in content.modules.items():
        for term in terms:
            a, b = term.a[0], term.b[0]
            row = f"{a.shape[0]} x {b.shape[1]}", str(a.shape[1]), str(len(term.a)), str(len(term.b))
            shape.add_row(Text(name), *row)
    say(as_json, payload, table, shape, error_table(content))


@cli.command()
@click.argument("path", metavar="STORE")
@click.option("--task", "tasks", multiple=True, help="task to export; may be repeated")
@click.option("--all", "everything", is_flag=True, help="export every task, each to OUT/<its name>")
@click.option("--out", required=True, type=click.Path(), help="folder to write")
@click.option("--dtype", help="dtype on disk: float32, float16 or bfloat16; as it came where not given")
@click.option("--overwrite", is_flag=True, help="replace what is there")
@as_json_option
def export(
    path: str,
    tasks: Sequence[str],
    everything: bool,
    out: str,
    dtype: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write tasks of a store as PEFT folders."""
    if bool(tasks) == everything:
        raise HydraOptError("export: give either --task NAME or --all")
    if dtype is not None and dtype not in compression.DTYPES:
        raise HydraOptError(f"dtype = {dtype!r}: must be one of {', '.join(compression.DTYPES)}")
    content = checkpoint.restore(path, None if everything else list(tasks))
    single = len(tasks) == 1
    folders = [Path(out) if single else Path(out) / peft.folder_name(t) for t in content.tasks]
    taken = [f for f in folders if f.exists() and not overwrite]
    if taken or len(set(folders)) < len(folders):
        raise HydraOptError(f"{(taken or folders)[0]}: exists; choose another --out or give --overwrite")
    with report.progress("exporting", len(folders), not as_json) as advance:
        for task, folder in zip(content.tasks, folders, strict=True):
            write_adapter(folder, store.adapter(content, task), dtype=dtype, overwrite=overwrite)
            advance()
    written = {task: str(f) for task, f in zip(content.tasks, folders, strict=True)}
    table = Table("task", "folder")
    for task, folder_text in written.items():
        table.add_row(Text(task), Text(folder_text))
    say(as_json, {"exported": written}, table)


@cli.command()
@click.argument("path", metavar="STORE")
@click.argument("adapters", nargs=-1)
@with_adapters
@as_json_option
def verify(
    path: str, adapters: Sequence[str], any_base: bool, base_suffix: Sequence[str], as_json: bool
) -> None:
    """Check a store's checksums; with ADAPTERS, measure the true errors against them."""
    content = checkpoint.restore(path)
    payload: dict[str, Any] = {"store": str(path), "checksums": "ok", "tasks": list(content.tasks)}
    if adapters:
        measured = compression.measure(content, read_all(adapters, any_base, base_suffix, as_json))
        claimed = dict(zip(content.tasks, task_errors(content.errors).tolist(), strict=True))
        payload["error"] = {
            t: {"measured": clean(x), "claimed": clean(claimed[t])} for t, x in measured.items()
        }
        wrong = [t for t, x in measured.items() if not abs(x - claimed[t]) <= 1e-6 + 0.01 * claimed[t]]
        payload["ok"] = not wrong
    table = Table("check", "result", title=str(path))
    table.add_row("checksums", "ok")
    for task, pair in payload.get("error", {}).items():
        table.add_row(Text(task), f"error {pair['measured']:.3e}, claimed {pair['claimed']:.3e}")
    say(as_json, payload, table)
    if adapters and wrong:
        raise CheckFailed(f"{path}: the errors of {', '.join(wrong)} differ from what the store claims")


@cli.command()
@click.option("--out", default="hydraopt-demo", show_default=True, type=click.Path(), help="folder to write")
@click.option("--seed", default=0, show_default=True, help="seed of the collection")
@as_json_option
def demo(out: str, seed: int, as_json: bool) -> None:
    """The main job on a collection made for it: compress, export, verify, and the trade-off over K."""
    with report.progress("demo", demonstration.STAGES, not as_json) as advance:
        result = demonstration.run(Path(out), seed, advance)
    table = Table("heads K", "bytes on disk", "of input", "mean error", "worst task", "bound")
    for row in result["curve"]:
        table.add_row(
            str(row["heads"]),
            report.format_bytes(row["bytes"]),
            f"{row['ratio']:.3f}",
            f"{row['mean']:.3e}",
            f"{row['worst']:.3e}",
            f"{row['bound']:.3e}",
        )
    say(as_json, clean(result), table, f"PEFT folders, stores and {result['plot']} are in {out}")


class CheckFailed(click.ClickException):
    """A check that did not hold: exit status 1."""

    exit_code = 1


def keep_compilations() -> None:
    """Keep compiled computations between runs in the user's cache folder, where JAX has none set."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hydraopt_jax"
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; turn every expected failure into one line and an exit status."""
    keep_compilations()
    try:
        sys.exit(cli.main(args=arguments, prog_name="hydraopt", standalone_mode=False) or 0)
    except checkpoint.TooLarge as error:
        fail(f"{error}; --force keeps it", 1)
    except HydraOptError as error:
        fail(str(error), 2)
    except click.ClickException as error:
        fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


def fail(message: str, status: int) -> None:
    """One line on standard error, and the exit status."""
    click.echo(f"hydraopt: {' '.join(message.split())}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
