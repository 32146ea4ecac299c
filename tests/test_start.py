"""Starting: what needs no JAX does not load it."""

import importlib
import subprocess
import sys

import click
import pytest

import hydraopt_jax
from hydraopt_jax.cli.verbs import VERBS, Verbs

# any import of these fails in the child
POISON = (
    "import sys\nfor x in ('jax', 'jaxlib', 'flax', 'optax', 'orbax', 'tensorstore'): sys.modules[x] = None\n"
)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["-h"]])
def test_help_needs_no_jax(arguments):
    code = POISON + f"from hydraopt_jax.cli import main\nmain({arguments!r})\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "hydraopt" in done.stdout


def test_an_unknown_verb_needs_no_jax():
    code = POISON + "from hydraopt_jax.cli import main\nmain(['compres'])\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "No such command 'compres'" in done.stderr


def test_every_verb_is_listed_and_loads():
    group = Verbs()
    context = click.Context(group)
    assert group.list_commands(context) == list(VERBS)
    for verb in VERBS:
        command = group.get_command(context, verb)
        assert command is not None
        assert command.name == verb
    assert all(len(line) <= 60 and line.endswith(".") for _, _, line in VERBS.values())


def test_every_public_name_resolves_to_its_home():
    for name in hydraopt_jax.__all__:
        assert getattr(hydraopt_jax, name) is not None
    for module, names in hydraopt_jax._HOMES.items():
        home = importlib.import_module(f"hydraopt_jax.{module}")
        assert all(getattr(hydraopt_jax, x) is getattr(home, x) for x in names)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hydraopt_jax.nothing  # noqa: B018
