"""Verbs of the hub: push, pull. Only writing a folder needs JAX."""

import sys
from collections.abc import Sequence
from typing import Any

import click

from hydraopt_jax import report
from hydraopt_jax.cli.common import PlaceType
from hydraopt_jax.cli.output import output_options, say, shown
from hydraopt_jax.integrations import hub
from hydraopt_jax.store.store import counted


@click.command()
@click.argument("path", metavar="STORE", type=PlaceType())
@click.argument("name", metavar="ORG/NAME")
@click.option("--private/--public", default=None, help="visibility of a new repository")
@click.option("--revision", metavar="BRANCH", help="branch to write, made if absent; default: main")
@click.option("--message", default="", metavar="TEXT", help="commit message")
@click.option(
    "--license", metavar="NAME", help="license in the model card; default: that of the adapters' own cards"
)
@output_options
def push(path: str, name: str, **given: Any) -> None:
    """Write STORE to the Hugging Face hub, as one file with a model card.

    The token is HF_TOKEN's or that of `hf auth login`.
    """
    done = hub.push(path, name, progress=on_terminal(), **given)
    table = report.columns("pushed", "")
    table.add_row("commit", done.revision)
    table.add_row("base model", ", ".join(done.base_models) or "not named")
    licenses = ", ".join(dict.fromkeys(done.licenses.values()))
    table.add_row("licenses of the adapters", licenses or "not known")
    say(
        {"store": str(path), **done._asdict()},
        table,
        f"{path}: {report.format_bytes(done.bytes)} at {done.url}",
    )


@click.command()
@click.argument("name", metavar="ORG/NAME[@REVISION]")
@click.argument("path", metavar="STORE", type=PlaceType())
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="fetch this task only; may be repeated")
@click.option("--base", metavar="NAME", help="refuse a store of another base model")
@click.option("--overwrite", is_flag=True, help="replace a store that is there")
@output_options
def pull(name: str, path: str, tasks: Sequence[str], **given: Any) -> None:
    """Write a store of the Hugging Face hub to STORE, a folder or a .safetensors file."""
    done = hub.pull(name, path, tasks=tasks, progress=on_terminal(), **given)
    count, size = counted(len(done.tasks), "adapter"), report.format_bytes(done.bytes)
    say(done._asdict(), f"{done.store}: {count}, {size}, of {done.source}")


def on_terminal() -> bool:
    """Whether progress is shown."""
    return shown() and sys.stderr.isatty()
