"""Every command and every Python example of the README and of docs/ runs as printed, page by page."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
from commands import run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
START = ROOT / "docs" / "start.md"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.S | re.M)
# tests/integrations/test_docs.py types these: they need a partner or a stand-in for one
PARTNERS = {"serving-vllm.md", "peft.md"}
WITH_BLOCKS = [x for x in PAGES if x.name not in PARTNERS and BLOCK.search(x.read_text())]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, in which the examples run."""
    monkeypatch.chdir(tmp_path)


def blocks_of(page):
    """A page's blocks, after those of docs/start.md that write adapters as the pages name them."""
    start = [x for x in BLOCK.findall(START.read_text()) if "write_adapter" in x[1]]
    return BLOCK.findall(page.read_text()) if page == START else start + BLOCK.findall(page.read_text())


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=[str(x.relative_to(ROOT)) for x in WITH_BLOCKS])
def test_a_page_runs(page, folder, capsys):
    names: dict = {}
    for language, code in blocks_of(page):
        if language == "python":
            exec(compile(code, str(page), "exec"), names)
            continue
        for line in code.replace("\\\n", " ").splitlines():
            arguments = shlex.split(line, comments=True)
            if not arguments:
                continue
            assert arguments[0] == "hydraopt", line
            paths = (sorted(map(str, Path().glob(x))) if "*" in x else [x] for x in arguments[1:])
            status, _, said = run(capsys, *itertools.chain.from_iterable(paths))
            assert status == 0, (line, said)
