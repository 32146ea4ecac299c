"""The README's Python example runs as printed."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.S))
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    assert "model.layers.0.self_attn.q_proj" in capsys.readouterr().out
    learned, start = (names["errors"](x) for x in (names["logits"], 0 * names["logits"]))
    assert learned.max() < start.max()
