"""Figures on the pages are those of the JSON files beside them, whatever these hold."""

import json
import re
import shutil

import pytest

pytest.importorskip("matplotlib")
from experiments import figures

PAGES = [x for x in figures.pages() if "<!-- figures:" in x.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=[str(x.relative_to(figures.ROOT)) for x in PAGES])
def test_no_figure_is_stale(page):
    text = page.read_text()
    assert figures.filled(text) == text, "python -m experiments.figures writes them"


def test_every_region_is_on_a_page():
    used = {name for page in PAGES for _, name, _ in figures.REGION.findall(page.read_text())}
    assert used == set(figures.REGIONS)


@pytest.mark.parametrize("page", PAGES, ids=[str(x.relative_to(figures.ROOT)) for x in PAGES])
def test_a_stale_figure_is_noticed(page):
    text = page.read_text()
    stale = figures.REGION.sub(r"\1| an | older | table |\n\3", text)
    assert stale != text
    assert figures.filled(stale) == text


MEASURED = re.compile(r"^\|.*[ (]-?\d+\.\d{2,}%?[ ),].*\|$", re.M)


def test_no_table_of_measurements_is_copied_by_hand():
    found = {x: MEASURED.findall(figures.REGION.sub("", x.read_text())) for x in figures.pages()}
    assert not {k: v for k, v in found.items() if v and k.name == "README.md"}, "give them a region"


def test_rows_that_were_not_measured_are_left_out(tmp_path):
    results = tmp_path / "results"
    assert figures.scores(results).count("\n") == 2
    shutil.copytree(figures.ROOT / "experiments/llm/results/zero-shot", results / "zero-shot")
    (results / "stores-shared").mkdir()
    for path in (figures.ROOT / "experiments/llm/results/stores-shared").glob("budget-0.0625.json"):
        row = json.loads(path.read_text())
        (results / "stores-shared" / path.name).write_text(json.dumps(row | {"row": "budget 0.125"}))
    lines = figures.scores(results).splitlines()
    assert [x.split(" | ")[0] for x in lines[2:]] == ["| budget 0.125"]
    assert figures.worth_keeping(results).endswith("(0 of 16).\n")
