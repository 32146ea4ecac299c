"""The command, run in this process."""

import contextlib
import io

import pytest

from hydraopt_jax import cli


def run(capsys, *arguments):
    """Exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(x) for x in arguments])
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err


def run_apart(*arguments):
    """The same for a fixture that several tests share, which has no `capsys`."""
    said, error = io.StringIO(), io.StringIO()
    out, err = contextlib.redirect_stdout(said), contextlib.redirect_stderr(error)
    with out, err, pytest.raises(SystemExit) as stop:
        cli.main([str(x) for x in arguments])
    return stop.value.code, said.getvalue(), error.getvalue()
