"""Recipes on the command line: options read from a file, and options recorded in a store."""

from typing import Any

import click
from click.core import ParameterSource

from hydraopt_jax import provenance

HELP = "read adapters and options from this .json or .yaml file; inspect --recipe writes one"
# parameters that are not part of a recipe: output, printing, processes
BESIDE = frozenset(
    [
        "adapters",
        "out",
        "recipe",
        "path",
        "adapter",
        "task",
        "known",
        "overwrite",
        "force",
        "dry_run",
        "json",
        "quiet",
        "verbose",
        "help",
        "coordinator",
        "processes",
        "process_id",
    ]
)


def option_names(command: click.Command) -> list[str]:
    """Names of the options that determine a store's content."""
    return [x.name for x in command.params if x.name and x.name not in BESIDE]


def apply_recipe(context: click.Context, option: click.Parameter, path: str | None) -> dict[str, Any] | None:
    """The recipe of a file; its values become the defaults of the command line."""
    if path is None:
        return None
    found = provenance.read_recipe(path, option_names(context.command))
    adapters = [f"{x['task']}={x['source']}" for x in found["adapters"]]
    context.default_map = {**found["options"], **({"adapters": adapters} if adapters else {})}
    return found


def recorded(context: click.Context) -> dict[str, Any]:
    """Name -> value of the given options, JSON-able."""
    given = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP, ParameterSource.ENVIRONMENT)
    out = {}
    for name in option_names(context.command):
        value = context.params.get(name)
        if context.get_parameter_source(name) in given and value not in (None, (), False):
            out[name] = list(value) if isinstance(value, tuple) else value
    return out
