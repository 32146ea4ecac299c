"""Verbs of the hub: push, pull. They need no JAX, but to write a folder."""

import sys
from collections.abc import Sequence
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from hydraopt_jax import report
from hydraopt_jax.cli.common import as_json_option, say
from hydraopt_jax.integrations import hub


@click.command()
@click.argument("path", metavar="STORE")
@click.argument("name", metavar="ORG/NAME")
@click.option("--private/--public", default=None, help="of a repository that is made")
@click.option("--revision", help="branch, made where there is none; main where not given")
@click.option("--message", default="", help="of the commit")
@click.option("--license", help="of the whole; that of the adapters' own cards where not given")
@as_json_option
def push(path: str, name: str, as_json: bool, **given: Any) -> None:
    """Write STORE to the Hugging Face hub, as one file with a model card.

    The token is HF_TOKEN's or that of `hf auth login`.
    """
    done = hub.push(path, name, progress=shown(as_json), **given)
    table = Table("what", "", title=done.url)
    table.add_row("commit", done.revision)
    table.add_row("bytes", report.format_bytes(done.bytes))
    table.add_row("base model", Text(", ".join(done.base_models) or "not named"))
    licenses = ", ".join(dict.fromkeys(done.licenses.values()))
    table.add_row("licenses of the adapters", Text(licenses or "not known"))
    say(as_json, {"store": str(path), **done._asdict()}, table)


@click.command()
@click.argument("name", metavar="ORG/NAME[@REVISION]")
@click.argument("path", metavar="STORE")
@click.option("--task", "tasks", multiple=True, help="fetch this one only; may be repeated")
@click.option("--base", help="the base model that the adapters must be of")
@click.option("--overwrite", is_flag=True, help="replace a store that is there")
@as_json_option
def pull(name: str, path: str, tasks: Sequence[str], as_json: bool, **given: Any) -> None:
    """Write a store of the Hugging Face hub to STORE, a folder or a .safetensors file."""
    done = hub.pull(name, path, tasks=tasks, progress=shown(as_json), **given)
    table = Table("store", "tasks", "bytes", "commit", title=done.source)
    table.add_row(Text(done.store), str(len(done.tasks)), report.format_bytes(done.bytes), done.revision)
    say(as_json, done._asdict(), table)


def shown(as_json: bool) -> bool:
    """Whether progress is shown."""
    return not as_json and sys.stderr.isatty()
