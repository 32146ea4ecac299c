"""The command, run in this process."""

import pytest

from hydraopt_jax import cli


def run(capsys, *arguments):
    """Exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(x) for x in arguments])
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err
