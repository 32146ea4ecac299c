"""Every command and every Python example of the README and of docs/ runs as printed, page by page."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
from commands import run

from hydraopt_jax import formats, synthetic

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.S | re.M)
# tests/integrations/test_docs.py types these: they need a partner or a stand-in for one
PARTNERS = {"serving-vllm.md", "peft.md"}
WITH_BLOCKS = [x for x in PAGES if x.name not in PARTNERS and BLOCK.search(x.read_text())]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Adapters as the pages name them, in the folder that the examples run in."""
    monkeypatch.chdir(tmp_path)
    names = ["legal", "medical", "sports", "finance"]
    for adapter in synthetic.collection(tasks=names, likeness=0.8, dtype="float32"):
        formats.write_adapter(
            Path("more" if adapter.task == "finance" else "adapters") / adapter.task, adapter
        )


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=[str(x.relative_to(ROOT)) for x in WITH_BLOCKS])
def test_a_page_runs(page, folders, capsys):
    names: dict = {}
    for language, code in BLOCK.findall(page.read_text()):
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
