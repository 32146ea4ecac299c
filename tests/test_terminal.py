"""What people see: 80 columns, words whole, a last line that can be repeated, no colors but on terminals."""

import io
import json
import sys

import numpy as np
import pytest
from commands import run
from rich.console import Console

from hydraopt_jax import cli, compression, formats, report, store, synthetic
from hydraopt_jax.cli import descriptions
from hydraopt_jax.forms import similarity
from hydraopt_jax.jobs import progress
from hydraopt_jax.static import Static

LONG = "a-task-with-a-name-that-is-longer-than-any-table-has-room-for"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Adapters and a store of them, with long names of tasks and modules."""
    at = tmp_path_factory.mktemp("terminal")
    modules = {
        f"base.model.transformer.layers.{n}.self_attention.query_projection": (64, 48) for n in range(3)
    }
    tasks = [LONG, LONG + "-2", "c"]
    for x in synthetic.collection(3, tasks=tasks, modules=modules, rank=4, likeness=0.95, dtype="float32"):
        formats.write_adapter(at / "in" / x.task, x)
    return at


@pytest.fixture(scope="module")
def made(place):
    store.save(place / "s", compression.compress(formats_of(place), max_error=0.05))
    return place / "s"


def formats_of(place):
    return [formats.read_adapter(x) for x in sorted((place / "in").iterdir())]


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def ok(capsys, *arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    # a path that is longer than a line is not broken
    assert all(len(x) <= 80 or " " not in x for x in out.splitlines())
    return out


def test_every_verb_fits_the_terminal(capsys, place, made, tmp_path):
    given, s = place / "in", tmp_path / "s"
    said = ok(capsys, "compress", given, "--max-error", "0.05", "--out", s)
    last = said.splitlines()[-1]
    assert last.startswith("3 adapters, ")
    assert " smaller), error " in last or " larger), error " in last
    ok(capsys, "compress", given, "--out", tmp_path / "t", "--dry-run")
    assert ok(capsys, "verify", s, given).splitlines()[-1].endswith("as claimed")
    ok(capsys, "similarity", given)
    ok(capsys, "merge", given, "--method", "ties", "--out", tmp_path / "m")
    ok(capsys, "remove", s, "c")
    ok(capsys, "add", s, given / "c")
    ok(capsys, "export", s, "--all", "--out", tmp_path / "x")
    ok(capsys, "pack", s, tmp_path / "s.safetensors")
    assert "fewer bytes than HydraOpt" in " ".join(ok(capsys, "frontier", given, "--budget", "0.9").split())


def test_inspect_names_and_draws_the_modules_with_the_highest_errors(capsys, made, tmp_path):
    rows = json.loads(run(capsys, "inspect", made, "--json")[1])["worst_modules"]
    content = store.open(made)
    known = {
        (n, t): content.errors[m, k]
        for m, n in enumerate(content.shapes)
        for k, t in enumerate(content.tasks)
    }
    errors = [x["error"] for x in rows]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(max(known.values()), rel=1e-3)
    for x in rows:
        assert x["error"] == pytest.approx(known[x["module"], x["task"]], rel=1e-3)
    said = ok(capsys, "inspect", made, "--plot", tmp_path / "errors.svg")
    assert "highest error of a module" in said
    drawn = (tmp_path / "errors.svg").read_text()
    assert drawn.count("<use") > len(content.shapes)


def test_inspect_begins_with_the_tasks_and_lists_leaves_on_request(capsys, made):
    short = ok(capsys, "inspect", made)
    assert short.startswith("task ")
    assert "query_projection" in short
    assert "3" in short
    assert "shared_by" not in short
    assert "task_0" not in short
    assert "task_0" in ok(capsys, "inspect", made, "--verbose")


def test_changes_and_parts_say_what_their_numbers_are(capsys, place, tmp_path):
    s = tmp_path / "my store"
    ok(capsys, "compress", place / "in", "--max-error", "0.05", "--out", s)
    removed = ok(capsys, "remove", s, "c").splitlines()
    assert f"to remove them: hydraopt remove '{s}' --purge" in " ".join(removed)
    assert removed[0].split() == ["task", "error", "of", "weights"]
    assert removed[2].startswith("mean ")
    added = ok(capsys, "add", s, place / "in/c", "--estimate").splitlines()
    assert added[0].split("  ")[-1].strip() == "after a refit"
    assert [x.split()[0] for x in added[2:4]] == ["c", "mean"]
    parts = next(x for x in ok(capsys, "inspect", s).splitlines() if x.startswith("part of the store"))
    assert parts.endswith("bytes on disk   of fp16 factors")


@pytest.mark.parametrize(("bound", "rows"), [(0.0, 0), (0.01, 1)])
def test_a_bound_of_zero_is_no_row(made, bound, rows):
    content = store.open(made)
    said = Static({**content.report, "bound": dict.fromkeys(content.shapes, bound)})
    headings = [str(x) for x in descriptions.errors_table(content.replace(report=said)).columns[0].cells]
    assert sum(x.startswith("lower bound") for x in headings) == rows


def test_quiet_prints_nothing_but_errors(capsys, place, made, tmp_path):
    assert run(capsys, "inspect", made, "--quiet") == (0, "", "")
    assert run(capsys, "compress", place / "in", "--max-error", "0.1", "-q", "--out", tmp_path / "s") == (
        0,
        "",
        "",
    )
    code, out, err = run(capsys, "inspect", tmp_path / "none", "-q")
    assert (code, out) == (2, "")
    assert "no store there" in err


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stream_is_no_failure(made, tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", str(made), "--all", "--out", str(tmp_path / "x")])
    getattr(sys, name).close()
    assert stop.value.code == 0
    assert len(list((tmp_path / "x").iterdir())) == 3


def test_letters_that_standard_output_lacks_are_replaced(made, tmp_path, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as stop:
        cli.main(["pack", str(made), str(tmp_path / "法é.safetensors")])
    assert stop.value.code == 0
    assert "?é.safetensors" in out.buffer.getvalue().decode("latin-1")


def test_a_narrow_terminal_shortens_names_and_no_number(capsys, made, monkeypatch):
    def numbers():
        rows = (x.split() for x in run(capsys, "inspect", made)[1].splitlines())
        return sorted(x for row in rows if row[1:] for x in row if x.endswith("%"))

    before = numbers()
    assert before
    monkeypatch.setenv("COLUMNS", "20")
    assert numbers() == before


def test_zero_columns_are_as_many_as_without_a_terminal(capsys, made, monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    assert max(map(len, ok(capsys, "inspect", made).splitlines())) > 60


def test_the_command_alone_prints_its_help(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    assert out == run(capsys, "--help")[1]
    assert out.count("\n") > 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compres"], "did you mean 'compress'? (options: hydraopt --help)"),
        (["x"], "must be one of similarity, compress,"),
        (["compress"], "(options: hydraopt compress --help)"),
        (
            ["inspect", "s", "--jsn"],
            "No such option '--jsn': did you mean '--json'? (options: hydraopt inspect",
        ),
    ],
)
def test_bad_use_says_what_is_near_and_where_help_is(capsys, arguments, said):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("tasks", [2, 16, 40, 56])
def test_similarities_of_many_tasks_are_legible(tasks):
    """Two groups, shuffled: alike tasks stand side by side, no cell is cut."""
    names = tuple(f"task-{t % 2}-{t}" for t in range(tasks))
    group = np.arange(tasks) % 2
    matrix = np.where(group[:, None] == group, 0.6, 0.02) + 0.4 * np.eye(tasks)
    mean = similarity.Similarity(*(matrix for _ in similarity.Similarity._fields))
    summary = similarity.Summary(names, {}, {}, mean)
    console = Console(file=io.StringIO(), width=80)
    table = report.task_table(summary)
    console.print(table)
    text = console.file.getvalue()
    assert all(name in text for name in names)
    assert "…" not in text
    kinds = [names[t][5] for t in similarity.cluster_order(matrix)]
    assert kinds == sorted(kinds) or kinds == sorted(kinds, reverse=True)
    console.print(report.nearest_table(summary))
    assert console.file.getvalue().count("1.000") <= 12


def test_more_tasks_than_a_terminal_holds_are_listed_by_pairs():
    names = tuple(f"t{t}" for t in range(60))
    mean = similarity.Similarity(*(np.eye(60) for _ in similarity.Similarity._fields))
    assert report.task_table(similarity.Summary(names, {}, {}, mean)) is None


def test_many_tasks_are_named_by_the_worst(made):
    content = store.open(made)
    assert descriptions.most_telling([np.arange(50.0)]) == list(range(49, 39, -1))
    assert descriptions.most_telling([np.arange(3.0)]) == [0, 1, 2]
    assert descriptions.sentence(content, 10**6, 10**4).startswith(
        "3 adapters, 1.00 MB -> 10.0 kB (100x smaller), error "
    )


def test_a_job_on_a_terminal_shows_its_stages(monkeypatch):
    out = io.StringIO()
    out.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", out)
    with progress.to_stderr() as told:
        told.start(4, 1)
        told.read(5_000_000)
        told.step(1)
        told.start(4, 0)
    assert "pass 2" in out.getvalue()
    with progress.to_stderr(enabled=False) as told:
        told.start(4, 1)
        told.step(1)
