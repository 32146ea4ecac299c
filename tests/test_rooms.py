"""Imports run downward from room to room, also those inside functions, and no file is long."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hydraopt_jax"
LONGEST = 400
# arguments of a function; where there are more, its docstring says why
MOST = 8
WHY = "More than eight arguments: "
# a room is a folder or a module of the package; it imports from itself and from lines above its own
ROOMS = """
errors static strict_json durable devices compilation byte_counts checkpoints
network locks buckets deferred
remote
adapters factors
linalg
forms
codec
store
pytrees collection
formats
nnx_layers
calibration
rate_control
explicit
compression
reading provenance synthetic tradeoff changes
merging refinement serving
report
integrations demo jobs
__init__
cli
"""
LEVELS = {room: n for n, line in enumerate(ROOMS.split("\n")) for room in line.split()}


def room_of(file: Path) -> str:
    """The room of a file of the package."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(file: Path) -> set[str]:
    """Rooms that a file imports from, itself left out."""
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "hydraopt_jax":
            names = [f"hydraopt_jax.{x.name}" for x in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        rooms |= {x.split(".")[1] for x in names if x.startswith("hydraopt_jax.")}
    return rooms - {room_of(file)}


def test_every_room_has_its_place():
    assert {room_of(x) for x in PACKAGE.rglob("*.py")} == set(LEVELS)


def test_imports_run_downward():
    upward = [
        f"{file.relative_to(ROOT)} imports {room}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for room in sorted(imported(file))
        if LEVELS[room] >= LEVELS[room_of(file)]
    ]
    assert not upward


@pytest.mark.parametrize("folder", ["hydraopt_jax", "tests", "experiments"])
def test_no_file_is_long(folder):
    lengths = {x: len(x.read_text().splitlines()) for x in (ROOT / folder).rglob("*.py")}
    assert not {str(x.relative_to(ROOT)): n for x, n in lengths.items() if n > LONGEST}


def arguments(node: ast.FunctionDef) -> list[str]:
    """Names of a function's arguments, without `self`."""
    given = node.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [x.arg for x in every if x is not None and x.arg not in ("self", "cls")]


def test_a_function_of_many_arguments_says_why():
    """Commands aside: they have one for each of their options."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and len(arguments(node)) > MOST:
                command = any("click." in ast.unparse(x) for x in node.decorator_list)
                found[node.name] = command or WHY in (ast.get_docstring(node) or "")
    assert [name for name, said in found.items() if not said] == []
    assert len(found) <= 9
