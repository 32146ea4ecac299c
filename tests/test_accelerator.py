"""The measurement of accelerators, where there is none."""

import pytest

from experiments.accelerator import run


def test_without_an_accelerator_it_says_so_and_measures_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(run, "OUT", tmp_path / "results.json")
    run.main([])
    assert "no accelerator" in capsys.readouterr().out
    assert not run.OUT.exists()


def test_errors_that_differ_stop_it():
    row = {"part": "forms", "what": "K = 1", "cold": 2.0, "warm": 1.0, "error": 0.1}
    assert run.ratios(row, row | {"error": 0.1005})["error"] == 0.1
    with pytest.raises(SystemExit, match=r"K = 1: error 0\.1 on the accelerator, 0\.2"):
        run.ratios(row, row | {"error": 0.2})
