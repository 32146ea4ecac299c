"""`hydraopt compress` of a collection that memory need not hold: it is read a few modules at a time."""

import contextlib
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from hydraopt_jax import compression, report, store
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.cli.common import LARGE, Command, clean, say, size_of, split_name
from hydraopt_jax.formats import check_same_base
from hydraopt_jax.jobs import assembly, coded, estimate, headers, hosts, job, progress
from hydraopt_jax.rate_control import navigate

# files of a job that say that something is done
KEPT = ("group-*.json", "pass-*.json")


class Terminated(click.ClickException):
    """The job was told to stop."""

    exit_code = 143


@contextlib.contextmanager
def stoppable(folder: Path) -> Iterator[None]:
    """Turn SIGTERM into a clean end with a message."""

    def stop(*_: Any) -> None:
        raise Terminated(
            f"stopped by SIGTERM; what is done is kept in {folder}: run the same command again to go on"
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def scale_options(command: Command) -> Command:
    """The options of a job that is large."""
    for decorate in (
        click.option("--process-id", type=int, help="with --coordinator: which process this is, from 0"),
        click.option("--processes", type=int, help="with --coordinator: how many processes take part"),
        click.option("--coordinator", help="ADDRESS:PORT of process 0, or auto on TPU pods and SLURM"),
        click.option("--dry-run", is_flag=True, help="say what memory, time and store it takes, and stop"),
        click.option(
            "--skip-bad", is_flag=True, help="leave out adapters that cannot be read, and list them"
        ),
    ):
        command = decorate(command)
    return command


def is_large(adapters: Sequence[str]) -> bool:
    """Whether adapters, given as PATH or NAME=PATH, are too many to be held in memory a few times over."""
    return sum(map(size_of, adapters)) > LARGE


def run(
    adapters: Sequence[str],
    out: str,
    options: compression.Options | navigate.Options,
    *,
    any_base: bool,
    base_suffix: Sequence[str],
    overwrite: bool,
    zstd: bool,
    force: bool,
    as_json: bool,
    skip_bad: bool,
    dry_run: bool,
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
) -> tuple[store.Store, int] | None:
    """Compress, or plan; the store's outline and the bytes that came in, None where none was made here."""
    folder = job.folder_of(out)
    sources = [split_name(x) for x in adapters]
    with stoppable(folder), contextlib.ExitStack() as held:
        who = hosts.join(coordinator, processes, process_id)
        # before anything is put into its folder, or taken out of it
        held.enter_context(job.alone(out, who.rank))
        who.wait("alone")
        try:
            with report.progress("checking", len(sources), not as_json and who.rank == 0) as advance:
                found, bad = headers.look(sources, folder, skip_bad=skip_bad, processes=who, advance=advance)
            named = [Adapter(x.task, {}, {}, config=x.config, source=x.source) for x in found.cards]
            check_same_base(named, any_base=any_base, base_suffixes=tuple(base_suffix))
            if dry_run:
                show(out, found.size, estimate.estimate(found, options), bad, as_json)
                return None
            common: Any = {
                "overwrite": overwrite,
                "compress": zstd,
                "limit": None if force else found.size,
                "left_out": bad,
                "progress": progress.to_stderr(),
                "processes": who,
            }
            if isinstance(options, navigate.Options):
                content = coded.run(out, found, options, **common)
            else:
                content = job.run(out, found, options, **common)
        except OSError as error:
            raise assembly.disk_error(folder, error) from error
        finally:
            # no group is kept: there is nothing to go on with
            if folder.exists() and not any(x for kept in KEPT for x in folder.glob(kept)):
                shutil.rmtree(folder, ignore_errors=True)
        return None if content is None else (content, found.size)


def show(out: str, size: int, found: estimate.Plan, bad: dict[str, str], as_json: bool) -> None:
    """Print a plan."""
    table = Table("estimate", "", title=f"{out}: not written")
    for name, value in (
        ("input", report.format_bytes(size)),
        ("read", report.format_bytes(found.read)),
        ("store, before zstd", report.format_bytes(found.store)),
        ("memory beside Python and JAX", report.format_bytes(found.memory)),
        ("floating-point operations", f"{found.flops:.2e}"),
        ("time", f"{found.time_class}, about {found.seconds:.2g} s on one such machine"),
        ("groups of modules", str(found.groups)),
        *(("left out", f"{x}: {why}") for x, why in bad.items()),
    ):
        table.add_row(name, value)
    say(as_json, {"plan": clean(estimate.as_dict(found)), "bytes_before": size, "left_out": bad}, table)
