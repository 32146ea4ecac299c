"""Provenance of a store: command, version and date, and a recipe that makes the store again.

The report of a store has the field `provenance` with two entries: `made`, and `changed` for the last change.
The digests of the adapters are in the store's sources. A recipe is a JSON or YAML file::

    recipe: 1
    adapters:
      - {task: legal, source: adapters/legal, digest: 9f2c...}
    options: {budget: "0.125"}
"""

import datetime
import importlib.metadata
import json
import os
import shlex
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from hydraopt_jax import strict_json
from hydraopt_jax.errors import HydraOptError, one_line, suggest, system_error
from hydraopt_jax.store.store import Store

KEY = "provenance"
RECIPE = 1
FIELDS = ("recipe", "version", "adapters", "options")


def version() -> str:
    """This package's version."""
    try:
        return importlib.metadata.version("hydraopt-jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def today() -> str:
    """The date in UTC, or that of SOURCE_DATE_EPOCH; without a time, so that builds of one day are equal."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    seconds = int(given) if given.isdecimal() else time.time()
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def entry(verb: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance entry of one run of a verb."""
    return {"verb": verb, "options": dict(options), "version": version(), "date": today()}


def with_entries(store: Store, entries: Mapping[str, Any]) -> Store:
    """The store with some entries of provenance beside its own: all of another store, or `changed`."""
    known = {**store.report.get(KEY, {}), **entries}
    return store.replace(report=store.report.replace(**{KEY: known})) if known else store


def command(said: Mapping[str, Any]) -> str:
    """The command line of an entry.

    >>> command({"verb": "compress", "options": {"max_error": 0.01, "weights": ["a=2"], "alone": True}})
    'hydraopt compress ADAPTERS --max-error 0.01 --weight a=2 --alone'
    """
    words = ["hydraopt", str(said["verb"])] + (["ADAPTERS"] if said["verb"] == "compress" else [])
    for name, value in said["options"].items():
        option = "--weight" if name == "weights" else "--" + name.replace("_", "-")
        for x in value if isinstance(value, list | tuple) else [value]:
            words += [option] if x is True else [option, str(x)]
    return shlex.join(words)


def sentences(store: Store) -> list[str]:
    """Sentences that describe the provenance of a store."""
    known = store.report.get(KEY, {})
    out = []
    for key, verb in (("made", "made"), ("changed", "last changed")):
        if key in known:
            x = known[key]
            out.append(f"{verb} {x['date']} by version {x['version']}: {command(x)}")
    return out


def recipe_of(store: Store) -> dict[str, Any]:
    """The recipe that compresses a store's adapters again.

    Raises:
      HydraOptError: the store has no provenance.
    """
    made = store.report.get(KEY, {}).get("made")
    if made is None:
        raise HydraOptError("the store has no provenance: only stores of hydraopt compress have it")
    adapters = [
        {"task": t, "source": x.origin, "digest": x.digest}
        for t, x in zip(store.tasks, store.sources, strict=True)
    ]
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in made["options"].items()}
    return {"recipe": RECIPE, "version": made["version"], "options": options, "adapters": adapters}


def check_absent(path: str | Path) -> None:
    """Raise if a recipe cannot be written to a path because something is there."""
    if os.path.lexists(path):
        raise HydraOptError(f"{path}: exists; choose another file")


def write_recipe(path: str | Path, recipe: Mapping[str, Any]) -> None:
    """Write a recipe as YAML or JSON, depending on the file's name.

    Raises:
      HydraOptError: the file exists or cannot be written.
    """
    at = Path(path)
    check_absent(at)
    if is_yaml(at):
        import yaml

        text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    else:
        text = json.dumps(recipe, indent=1) + "\n"
    try:
        with at.open("x", encoding="utf-8") as sink:
            sink.write(text)
    except OSError as error:
        raise system_error(path, "written", error) from None


def is_yaml(path: Path) -> bool:
    """Whether a file has the name of a YAML file."""
    return path.suffix.lower() in (".yaml", ".yml")


def read_recipe(path: str | Path, known: Iterable[str], several: Collection[str] = ()) -> dict[str, Any]:
    """The recipe in a file, checked to have `known` options only, and the file's path.

    Options of `several` have a list of values, all others one value.

    Raises:
      HydraOptError: no such file, or not a recipe; the message names the field.
    """
    at = Path(path)
    try:
        text = at.read_bytes()
    except OSError as error:
        raise system_error(path, "read", error) from None
    try:
        if is_yaml(at):
            import yaml

            said = yaml.safe_load(text)
        else:
            said = strict_json.loads(text)
    except Exception as error:
        kind = "YAML" if is_yaml(at) else "JSON"
        raise HydraOptError(f"{path}: not {kind}: {one_line(error, 120)}") from None
    if not isinstance(said, dict) or said.get("recipe") != RECIPE:
        raise HydraOptError(f"{path}: not a recipe of this version: it begins with recipe: {RECIPE}")
    for name in (x for x in said if x not in FIELDS):
        raise HydraOptError(f"{path}: {name}: {suggest(str(name), FIELDS)}")
    options, rows, names = said.get("options", {}), said.get("adapters", []), list(known)
    if not isinstance(options, dict) or not isinstance(rows, list):
        raise HydraOptError(f"{path}: options are a mapping, adapters a list")
    for name in (x for x in options if x not in names):
        raise HydraOptError(f"{path}: options: {name}: {suggest(str(name), names)}")
    options = dict(options)
    for name, given in options.items():
        values = given if name in several and isinstance(given, list) else [given]
        if any(isinstance(x, list | dict) for x in values):
            what = "a list of values" if name in several else "one value"
            raise HydraOptError(f"{path}: options: {name}: give {what}, not {str(given)[:80]}")
        if name in several and given is not None:
            options[name] = values
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("task", "source")):
            raise HydraOptError(f"{path}: adapters: give task and source of each, not {str(row)[:80]}")
    return {"path": path, "options": options, "adapters": rows}


def check_digests(recipe: Mapping[str, Any], found: Mapping[str, str]) -> None:
    """Raise if an adapter's digest, by task, differs from that in a recipe of `read_recipe`."""
    for row in recipe["adapters"]:
        known = row.get("digest")
        if known and found.get(row["task"], known) != known:
            raise HydraOptError(
                f"{row['task']}: has changed since {recipe['path']} was written (digest "
                f"{found[row['task']][:12]}, not {str(known)[:12]}): restore it, or take digest out of the "
                "recipe"
            )
