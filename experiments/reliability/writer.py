"""A process that runs the command and is killed; `kills` forks it from one that has imported everything."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Event
from typing import Any

import jax  # noqa: F401
import tensorstore  # noqa: F401
from orbax.checkpoint import v1  # noqa: F401

from hydraopt_jax import changes, cli, compression  # noqa: F401
from hydraopt_jax.cli import changes as verbs  # noqa: F401
from hydraopt_jax.cli import compress, stores  # noqa: F401

# what changes names in a folder, in Python; TensorStore's own renames are met by kills at random instants
RENAMES = ("rename", "replace", "link")
REMOVALS = ("unlink", "remove", "rmdir")


def counted(call: Callable[..., Any], point: int, after: bool, calls: list[str]) -> Callable[..., Any]:
    """A call that kills its process before, or after, it is made for the `point`-th time."""

    def run(*positional: Any, **named: Any) -> Any:
        calls.append(call.__name__)
        here = len(calls) == point
        if here and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*positional, **named)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return run


def work(
    arguments: Sequence[str], names: Sequence[str], point: int, after: bool, said: str, ready: Event
) -> None:
    """Run the command.

    Args:
      arguments: of the command.
      names: of functions of `os` whose calls are counted together.
      point: which call it does not survive, from 1; 0 for none.
      after: whether it dies when the call is done.
      said: file that takes what it prints.
      ready: set when the command begins.
    """
    sink = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    calls: list[str] = []
    for name in names:
        setattr(os, name, counted(getattr(os, name), point, after, calls))
    sys.argv = ["hydraopt"]
    ready.set()
    cli.main(arguments)
