"""Untrained modules, whose delta is zero: they are there, with no error, and cost nothing."""

import numpy as np
import pytest
from commands import run

import hydraopt_jax as hydra
from hydraopt_jax import changes, formats, synthetic
from hydraopt_jax.store import predictions
from hydraopt_jax.store.store import task_errors

MODULES = {"q": (64, 64), "k": (64, 32)}


def collection(*zero):
    """Two adapters, of which some have not trained `q`."""
    made = synthetic.collection(1, tasks=["t0", "t1"], modules=MODULES, rank=4, dtype="float32")
    return [x.replace(b={**x.b, "q": 0 * x.b["q"]}) if x.task in zero else x for x in made]


@pytest.mark.parametrize("zero", [["t0"], ["t0", "t1"]])
@pytest.mark.parametrize("target", [{"max_error": 0.02}, {"budget": 8000}, {"max_task_error": 0.03}])
def test_an_untrained_module_is_stated_and_measured_alike(zero, target):
    given = collection(*zero)
    made = hydra.compress(given, **target)
    assert made.shapes == MODULES
    assert made.errors[0, 0] == 0
    assert not np.isnan(made.errors).any()
    np.testing.assert_allclose(
        list(hydra.measure(made, given).values()), task_errors(made.errors), rtol=0.01, atol=1e-9
    )
    assert "max_error" not in target or made.errors.mean() <= 0.02


def test_verify_agrees_with_a_store_of_untrained_modules(tmp_path, capsys):
    given = collection("t0")
    for x in given:
        formats.write_adapter(tmp_path / x.task, x)
    hydra.save(tmp_path / "s", hydra.compress(given, max_error=0.02))
    code, said, _ = run(capsys, "verify", tmp_path / "s", tmp_path / "t0", tmp_path / "t1")
    assert code == 0
    assert "differ" not in said


def test_a_module_that_none_has_trained_stays_through_every_change(tmp_path):
    given = collection("t0", "t1")
    hydra.save(tmp_path / "s", hydra.compress(given, max_error=0.02))
    new = synthetic.collection(5, tasks=["new"], modules=MODULES, rank=4, dtype="float32")[0]
    grown = hydra.add(hydra.add(hydra.open(tmp_path / "s"), given[0].replace(task="again")), new)
    assert grown.errors[0, :3].tolist() == [0, 0, 0]
    assert 0 < grown.errors[0, 3] < 0.1
    left = hydra.remove(grown, "t0")
    for done in (
        changes.purge(left, lambda t: None)[0],
        changes.purge(left, {"t1": given[1], "new": new}.get)[0],
    ):
        assert done.tasks == ("t1", "again", "new")
        assert all(0 < x < 0.2 for x in hydra.measure(done, [given[1], new]).values())


def test_an_untrained_module_is_not_taken_for_a_predicted_one():
    """The tasks that its adapter is predicted from have the module."""
    alike = synthetic.collection(
        1, tasks=list("abc"), modules=MODULES, rank=4, likeness=0.95, dtype="float32"
    )
    new = alike[2].replace(b={**alike[2].b, "q": 0 * alike[2].b["q"]})
    grown = hydra.add(hydra.compress(alike[:2], max_error=0.01), new)
    assert grown.segments[-1].references
    assert grown.errors[0, 2] == 0
    found = predictions.predicted(grown)["c"]
    assert found.vectors == sum(x.predicted for x in found.sources.values()) == 2 * 4
    alone = hydra.remove(hydra.remove(grown, "a"), "b")
    assert alone.shapes == MODULES
    for made, given in ((grown, [*alike[:2], new]), (alone, [new])):
        np.testing.assert_allclose(
            list(hydra.measure(made, given).values()), task_errors(made.errors), rtol=0.01
        )


def test_a_store_of_untrained_adapters_has_no_step_for_a_trained_one():
    trained, other = collection()
    made = hydra.compress([other.replace(b={n: 0 * x for n, x in other.b.items()})], max_error=0.02)
    with pytest.raises(hydra.HydraOptError, match="all untrained, which gives no quantizer step for 't0'"):
        hydra.add(made, trained)


def test_a_module_that_the_store_lacks_may_only_be_zero():
    given = collection("t0", "t1")
    made = hydra.compress([x.replace(a={"k": x.a["k"]}, b={"k": x.b["k"]}) for x in given], max_error=0.02)
    assert list(hydra.measure(made, given)) == ["t0", "t1"]
    with pytest.raises(hydra.HydraOptError, match="no module q"):
        hydra.measure(made, collection())
