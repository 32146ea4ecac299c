"""Tasks come and go: the others stay bit for bit, errors are true, a refit that is due is announced."""

import numpy as np
import pytest

from hydraopt_jax import compression, store, synthetic
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.rate_control import navigate
from hydraopt_jax.rate_control.encode_at_step import task_errors
from hydraopt_jax.store import changes, checkpoint, purging

MODULES = {"layers.0.q": (96, 64), "layers.1.q": (96, 64)}


def collection(likeness=0.7, tasks=5):
    return synthetic.collection(
        2, tasks=[f"t{k}" for k in range(tasks)], modules=MODULES, rank=3, likeness=likeness, dtype="float32"
    )


FORMS = {
    "coded": lambda x: navigate.compress(x, navigate.Options(max_error=0.01)),
    "lossless": lambda x: navigate.compress(x, navigate.Options(budget=9.0)),
    "heads": lambda x: compression.compress(x, compression.Options(rank=3)),
    "two heads, cores": lambda x: compression.compress(
        x, compression.Options(heads=2, cores=True, side="out")
    ),
}


@pytest.fixture(scope="module", params=FORMS)
def made(request):
    return FORMS[request.param](collection()[:3])


def same(one, two, task):
    """Whether two stores hold the very same of a task."""
    x, y = (store.task_factors(s, task) for s in (one, two))
    return x.keys() == y.keys() and all(
        np.array_equal(a, b) for n in x for a, b in zip(x[n], y[n], strict=True)
    )


def saved(content, folder, name):
    checkpoint.save(folder / name, content)
    return checkpoint.restore(folder / name)


def test_add_leaves_the_others_bit_for_bit(made, tmp_path):
    *_, fourth, fifth = collection()
    less = {"layers.0.q": fifth.a["layers.0.q"]}, {"layers.0.q": fifth.b["layers.0.q"]}
    extra = {"score.weight": np.arange(6, dtype=np.float16)}
    fifth = fifth._replace(a=less[0], b=less[1], extras=extra)
    grown = changes.add(made, fourth)
    grown = saved(changes.add(saved(grown, tmp_path, "one"), fifth), tmp_path, "two")
    assert grown.tasks == ("t0", "t1", "t2", "t3", "t4")
    assert all(same(made, grown, x) for x in made.tasks)
    measured = compression.measure(grown, [*collection()[:4], fifth])
    np.testing.assert_allclose(list(measured.values()), task_errors(grown.errors), rtol=0.01, atol=1e-6)
    assert np.isnan(grown.errors[1, 4])
    np.testing.assert_array_equal(grown.sources[4].extras["score.weight"], extra["score.weight"])
    alone = checkpoint.restore(tmp_path / "two", ["t4", "t1"])
    assert same(alone, grown, "t4")
    assert same(alone, grown, "t1")


def test_remove_frees_bytes_and_leaves_the_others(made, tmp_path):
    *_, fourth, _ = collection()
    grown = changes.add(made, fourth)
    rest = saved(changes.remove(grown, "t1"), tmp_path, "rest")
    assert rest.tasks == ("t0", "t2", "t3")
    assert all(same(grown, rest, x) for x in rest.tasks)
    back = saved(changes.remove(changes.remove(rest, "t3"), "t2"), tmp_path, "back")
    assert same(made, back, "t0")
    sizes = [checkpoint.measure_size(x) for x in (grown, rest, back)]
    # what predicts others stays, and its task's name with it
    assert sizes[1] < sizes[0] + 40
    assert sizes[0] - sizes[2] > 300
    np.testing.assert_allclose(task_errors(back.errors), task_errors(made.errors)[:1], rtol=2e-3, atol=1e-9)
    with pytest.raises(HydraOptError, match="only task"):
        changes.remove(back, "t0")
    with pytest.raises(HydraOptError, match="'t0'"):
        changes.remove(back, "t9")


def test_a_store_fitted_at_once_is_its_own_refit():
    """Estimate and refit fall on the store itself; one that is worse is told that a refit is due."""
    many = collection()[:3]
    content = FORMS["coded"](many)
    given = {x.task: x for x in many}
    found = changes.estimate(content, given, "t2")
    assert found.mean == pytest.approx(np.nanmean(content.errors), rel=0.05)
    assert found.task == pytest.approx(np.nanmean(content.errors[:, 2]), rel=0.05)
    assert not found.due
    assert found.stand_ins == ()
    worse = content._replace(errors=1.2 * content.errors)
    assert changes.estimate(worse, {}).due
    again = changes.refit(many, content)
    assert checkpoint.measure_size(again) == pytest.approx(checkpoint.measure_size(content), rel=0.02)


def test_like_tasks_cost_less_to_add():
    sizes = []
    for likeness in (0.0, 0.9):
        many = collection(likeness, 4)
        content = navigate.compress(many[:3], navigate.Options(max_error=0.01))
        grown = changes.add(content, many[3])
        assert task_errors(grown.errors)[3] < 0.03
        sizes.append(checkpoint.measure_size(grown) - checkpoint.measure_size(content))
    assert sizes[1] < 0.9 * sizes[0]


@pytest.mark.parametrize("form", ["lossless", "two heads, cores"])
def test_refit_keeps_the_form(form):
    many = collection()[:4]
    grown = changes.add(FORMS[form](many[:3]), many[3])
    again = changes.refit(many, grown)
    assert again.tasks == grown.tasks
    assert again.report["form"] == grown.report["form"]
    assert np.nanmean(again.errors) < 0.15
    assert checkpoint.measure_size(again) < 1.05 * checkpoint.measure_size(grown)
    found = changes.estimate(grown, {"t3": many[3]}, "t3")
    assert found.stand_ins == ("t0", "t1", "t2")


def test_what_cannot_be_added_is_named(made):
    one = collection()[3]
    with pytest.raises(HydraOptError, match="'t1' is in the store"):
        changes.add(made, one._replace(task="t1"))
    wide = one._replace(a={**one.a, "layers.0.q": np.ones((7, 3), np.float32)})
    with pytest.raises(HydraOptError, match=r"layers.0.q: 't3' has .*\[7, 64\]"):
        changes.add(made, wide)


def test_what_a_removed_task_still_takes_is_said():
    first, second, third = collection(likeness=0.9)[:3]
    grown = changes.add(FORMS["coded"]([first, second]), third)
    (added,) = grown.payload.additions.values()
    assert purging.held(grown) == ()
    for task, slot in (("t0", 0), ("t1", 1), ("t2", 2)):
        left = changes.remove(grown, task)
        kept = slot in added.references
        own = [x for x in purging.held(left) if "t2" in x.needed_by]
        assert [x.task for x in own] == [task] * kept
    assert any(slot >= 0 for slot in added.references)
