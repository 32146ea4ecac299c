"""Recipes on the command line: options read from a file, and options recorded in a store."""

from collections.abc import Mapping, Sequence
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
    several = [x.name for x in context.command.params if x.name and x.multiple]
    found = provenance.read_recipe(path, option_names(context.command), several)
    adapters = [f"{x['task']}={x['source']}" for x in found["adapters"]]
    context.default_map = {**found["options"], **({"adapters": adapters} if adapters else {})}
    return found


def without_replaced(
    context: click.Context, targets: Sequence[str], form: Mapping[str, Any], beside: Mapping[str, Any]
) -> dict[str, Any]:
    """Values of a recipe's targets that one of the command line stands for, and of what goes with them.

    Args:
      context: of the verb.
      targets: options of which a store has one.
      form: defaults of the options of "form".
      beside: defaults of the options that go with no form.
    """
    source = context.get_parameter_source
    if all(source(k) is not ParameterSource.COMMANDLINE for k in targets):
        return {}
    gone: dict[str, Any] = {k: None for k in targets if source(k) is ParameterSource.DEFAULT_MAP}
    for given, options in (("form" in gone, form), (source("form") is ParameterSource.COMMANDLINE, beside)):
        gone |= {k: v for k, v in options.items() if given and source(k) is ParameterSource.DEFAULT_MAP}
    context.params |= gone
    return gone


def recorded(context: click.Context) -> dict[str, Any]:
    """Name -> value of the given options, JSON-able."""
    given = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP, ParameterSource.ENVIRONMENT)
    out = {}
    for name in option_names(context.command):
        value = context.params.get(name)
        if context.get_parameter_source(name) in given and value not in (None, (), False):
            out[name] = list(value) if isinstance(value, tuple) else value
    return out
