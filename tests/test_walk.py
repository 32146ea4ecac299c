"""The way of one factor that CONTRIBUTING.md tells: every function is there, and a run passes through it."""

import pkgutil
import re
import sys
import threading
from pathlib import Path

import pytest

from hydraopt_jax import cli, formats, synthetic

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
INTO, BACK = re.split(r"And back ", TEXT[TEXT.index("## The way of one factor") :].split("\n## ")[0])
TOLD = {"compress": INTO, "export": BACK.split("\n\nPlain factors")[0]}


def hops(table):
    """Names of the functions of a table's first column."""
    rows = re.findall(r"^\| (`.+?) \|", table, re.M)
    return [name for row in rows for name in re.findall(r"`(.+?)`", row)]


def code_of(name):
    """The code of a function, or of a method of a class."""
    return pkgutil.resolve_name(f"hydraopt_jax.{name}").__code__


def passed(arguments):
    """The code of every Python function that a command calls."""
    found = set()

    def note(frame, event, argument):
        found.add(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert not ended.value.code
    return found


def test_a_factor_goes_the_way_that_is_told(tmp_path):
    names = []
    for x in synthetic.collection(tasks=3, modules={"q": (24, 16), "v": (24, 16)}, rank=2):
        formats.write_adapter(tmp_path / x.task, x)
        names.append(str(tmp_path / x.task))
    out = str(tmp_path / "out")
    runs = {
        "compress": ["compress", *names, "--max-error", "0.05", "--out", str(tmp_path / "store"), "--quiet"],
        "export": ["export", str(tmp_path / "store"), "--task", Path(names[0]).name, "--out", out, "--quiet"],
    }
    for verb, arguments in runs.items():
        found, told = passed(arguments), hops(TOLD[verb])
        assert len(told) > 7
        assert [x for x in told if code_of(x) not in found] == []
