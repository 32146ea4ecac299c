"""The script that measures what a stored task costs where it is used: its command line."""

import json

import pytest

pytest.importorskip("torch", reason="pip install '.[peft]'")
pytest.importorskip("peft", reason="pip install '.[peft]'")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(("named", "measured"), [([], ["lines", "http"]), (["http"], ["http"])])
def test_what_is_not_named_is_measured_with_the_others(named, measured, tmp_path, monkeypatch):
    """The documented command names no part, which argparse refused."""
    from experiments.serving import costs

    monkeypatch.setattr(costs, "RESULT", tmp_path / "costs.json")
    monkeypatch.setattr(costs, "PARTS", {"lines": lambda folder: 5, "http": lambda folder: str(folder)})
    costs.main(["--folder", str(tmp_path / "kept"), *named])
    found = json.loads((tmp_path / "costs.json").read_text())
    assert found == {x: {"lines": 5, "http": str(tmp_path / "kept")}[x] for x in measured}
    assert (tmp_path / "kept").is_dir()
