"""Tasks come and go: the others stay bit for bit, errors are true, a refit that is due is announced."""

import numpy as np
import pytest

from hydraopt_jax import changes, forms, store, synthetic
from hydraopt_jax.cli import descriptions
from hydraopt_jax.compression import compress
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.rate_control import distortion
from hydraopt_jax.static import Static
from hydraopt_jax.store import removal, sizes
from hydraopt_jax.store.store import task_errors, tensors_of

MODULES = {"layers.0.q": (96, 64), "layers.1.q": (96, 64)}


def collection(likeness=0.7, tasks=5):
    return synthetic.collection(
        2, tasks=[f"t{k}" for k in range(tasks)], modules=MODULES, rank=3, likeness=likeness, dtype="float32"
    )


FORMS = {
    "coded": {"max_error": 0.01},
    "lossless": {"budget": 9.0},
    "heads": {"form": forms.Hydra(rank=3)},
    "two heads, cores": {"form": forms.Hydra(heads=2, cores=True, side="out")},
}


@pytest.fixture(scope="module", params=FORMS)
def made(request):
    return compress(collection()[:3], **FORMS[request.param])


def same(one, two, task):
    """Whether two stores hold the very same of a task."""
    x, y = (store.task_factors(s, task) for s in (one, two))
    return x.keys() == y.keys() and all(
        np.array_equal(a, b) for n in x for a, b in zip(x[n], y[n], strict=True)
    )


def saved(content, folder, name):
    store.save(folder / name, content)
    return store.open(folder / name)


def test_add_leaves_the_others_bit_for_bit(made, tmp_path):
    *_, fourth, fifth = collection()
    less = {"layers.0.q": fifth.a["layers.0.q"]}, {"layers.0.q": fifth.b["layers.0.q"]}
    extra = {"score.weight": np.arange(6, dtype=np.float16)}
    fifth = fifth.replace(a=less[0], b=less[1], extras=extra)
    grown = changes.add(made, fourth)
    assert len(grown.segments) == len(made.segments) + 1
    grown = saved(changes.add(saved(grown, tmp_path, "one"), fifth), tmp_path, "two")
    assert grown.tasks == ("t0", "t1", "t2", "t3", "t4")
    assert all(same(made, grown, x) for x in made.tasks)
    measured = distortion.measure(grown, [*collection()[:4], fifth])
    np.testing.assert_allclose(list(measured.values()), task_errors(grown.errors), rtol=0.01, atol=1e-6)
    assert np.isnan(grown.errors[1, 4])
    np.testing.assert_array_equal(tensors_of(grown, "t4")["score.weight"], extra["score.weight"])
    alone = store.select(grown, ["t4", "t1"])
    assert same(alone, grown, "t4")
    assert same(alone, grown, "t1")


def test_a_later_task_joins_what_is_there():
    """In a plain store a task that is like the others uses their factors."""
    many = collection(0.95, 4)
    content = compress(many[:3], form=forms.Hydra(rank=3))
    grown = changes.add(content, many[3])
    numbers = store.count(grown) - store.count(content)
    assert numbers <= store.count(content) / 3
    assert task_errors(grown.errors)[3] < 0.3
    (segment,) = grown.segments[len(content.segments) :]
    borrowed = [x for terms in segment.modules.values() for x in terms if max(x.a_from, x.b_from) >= 0]
    assert borrowed
    assert segment.references


def test_remove_frees_bytes_and_leaves_the_others(made, tmp_path):
    *_, fourth, _ = collection()
    grown = changes.add(made, fourth)
    rest = saved(changes.remove(grown, "t1"), tmp_path, "rest")
    assert rest.tasks == ("t0", "t2", "t3")
    assert all(same(grown, rest, x) for x in rest.tasks)
    back = saved(changes.remove(changes.remove(rest, "t3"), "t2"), tmp_path, "back")
    assert same(made, back, "t0")
    taken = [sizes.measure_size(x) for x in (grown, rest, back)]
    # what predicts others stays, and its task's name with it
    assert taken[1] < taken[0] + 40
    assert taken[0] - taken[2] > 300
    np.testing.assert_allclose(task_errors(back.errors), task_errors(made.errors)[:1], rtol=2e-3, atol=1e-9)
    with pytest.raises(HydraOptError, match="only task"):
        changes.remove(back, "t0")
    with pytest.raises(HydraOptError, match="'t0'"):
        changes.remove(back, "t9")


def test_a_task_may_come_back_under_its_name(made):
    many = collection()
    left = changes.remove(made, "t1")
    again = changes.add(left, many[4].replace(task="t1"))
    assert again.tasks == ("t0", "t2", "t1")
    assert all(same(made, again, x) for x in ("t0", "t2"))
    measured = distortion.measure(again, [many[4].replace(task="t1")])["t1"]
    np.testing.assert_allclose(measured, task_errors(again.errors)[2], rtol=0.01, atol=1e-6)


def test_a_store_fitted_at_once_is_its_own_refit():
    """Estimate and refit fall on the store itself."""
    many = collection()[:3]
    content = compress(many, **FORMS["coded"])
    given = {x.task: x for x in many}
    found = changes.estimate_refit(content, given, "t2")
    # of so few codes one more or less shows
    assert found.mean == pytest.approx(np.nanmean(content.errors), rel=0.15)
    assert found.task == pytest.approx(np.nanmean(content.errors[:, 2]), rel=0.2)
    assert found.stand_ins == ()
    again = changes.refit(content, many)
    assert sizes.measure_size(again) == pytest.approx(sizes.measure_size(content), rel=0.02)


def test_a_refit_that_is_due_is_told():
    """Of tasks that are alike and came one by one a fit of all at once is better by more than a tenth."""
    many = collection(0.95, 5)
    content = compress(many[:1], max_error=0.01)
    for x in many[1:]:
        content = changes.add(content, x)
    found = changes.estimate_refit(content, {x.task: x for x in many})
    assert found.due == (np.nanmean(content.errors) > 1.1 * found.mean)
    assert found.mean < 1.02 * np.nanmean(content.errors)


def test_like_tasks_cost_less_to_add():
    taken = []
    for likeness in (0.0, 0.9):
        many = collection(likeness, 4)
        content = compress(many[:3], max_error=0.01)
        grown = changes.add(content, many[3])
        assert task_errors(grown.errors)[3] < 0.03
        taken.append(sum(map(np.size, grown.segments[-1].leaves.values())))
    assert taken[1] < 0.9 * taken[0]


@pytest.mark.parametrize("form", ["lossless", "two heads, cores"])
def test_refit_keeps_the_form(form):
    many = collection()[:4]
    grown = changes.add(compress(many[:3], **FORMS[form]), many[3])
    again = changes.refit(grown, many)
    assert again.tasks == grown.tasks
    assert again.report["form"] == grown.report["form"]
    assert np.nanmean(again.errors) < 0.15
    assert sizes.measure_size(again) < 1.05 * sizes.measure_size(grown)
    found = changes.estimate_refit(grown, {"t3": many[3]}, "t3")
    assert found.stand_ins == ("t0", "t1", "t2")


def test_a_refit_rounds_full_tensors_as_before(made):
    many = [x.replace(extras={"head": np.arange(8, dtype=np.float32) / 7}) for x in collection()[:2]]
    asked = {"form": forms.Hydra(rank=3)} if made.report["form"] == "hydra" else made.report["options"]
    target = {k: v for k, v in asked.items() if k in ("form", "budget", "max_error") and v}
    again = changes.refit(compress(many, **target, extras_dtype="float16"), many)
    assert again.report["form"] == made.report["form"]
    assert again.report["options"]["extras_dtype"] == "float16"
    assert {tensors_of(again, x.task)["head"].dtype.name for x in many} == {"float16"}


def test_a_task_that_is_added_to_tasks_alone_is_alone():
    many = collection(0.95, 4)
    content = compress(many[:3], max_error=0.01, share=False)
    grown = changes.add(content, many[3])
    assert grown.segments[-1].references == ()
    assert 0 < task_errors(grown.errors)[3] < 0.03
    for x in many:
        left = changes.remove(grown, x.task)
        assert removal.held(left) == ()
        assert changes.purge(left)[1] == ()
        assert all(same(left, grown, t) for t in left.tasks)


def test_what_cannot_be_added_is_named(made):
    one = collection()[3]
    with pytest.raises(HydraOptError, match="'t1' is in the store"):
        changes.add(made, one.replace(task="t1"))
    wide = one.replace(a={**one.a, "layers.0.q": np.ones((7, 3), np.float32)})
    with pytest.raises(HydraOptError, match=r"layers.0.q: 't3' has .*\[7, 64\]"):
        changes.add(made, wide)


def test_a_calibrated_store_takes_a_task_with_its_calibration():
    many = collection()
    rng = np.random.default_rng(0)
    known = {n: (lambda r: r @ r.T)(rng.normal(size=(s[0], 12))) for n, s in MODULES.items()}
    content = compress(many[:3], max_error=0.01, calibration=known)
    with pytest.raises(HydraOptError, match="--calibration"):
        changes.add(content, many[3])
    grown = changes.add(content, many[3], calibration=known)
    assert grown.output_errors.shape == (2, 4)
    assert 0 < task_errors(grown.output_errors)[3] < 0.03
    measured = distortion.measure(grown, many[3:4])["t3"]
    np.testing.assert_allclose(measured, task_errors(grown.errors)[3], rtol=0.01)


def test_what_a_removed_task_still_takes_is_said():
    first, second, third = collection(likeness=0.9)[:3]
    grown = changes.add(compress([first, second], **FORMS["coded"]), third)
    added = grown.segments[-1]
    assert removal.held(grown) == ()
    for task, place in (("t0", 0), ("t1", 1)):
        left = changes.remove(grown, task)
        kept = any(r.place == place for r in added.references)
        own = [x for x in removal.held(left) if "t2" in x.needed_by]
        assert [x.task for x in own] == [task] * kept
    assert removal.held(changes.remove(grown, "t2")) == ()
    assert any(r.place >= 0 for r in added.references)


def test_a_task_is_added_after_a_predicted_one_has_gone():
    """Its segment stays for those that are predicted from it, without a task of its own."""
    modules = {"q": (48, 32), "k": (48, 32)}
    a, b, c, d = synthetic.collection(
        1, tasks=list("abcd"), modules=modules, rank=4, likeness=0.9, dtype="float32"
    )
    made = compress([a, b], max_error=0.01)
    for x in (c, c.replace(task="alike")):
        made = changes.add(made, x)
    assert changes.add(changes.remove(made, "c"), d).tasks == ("a", "b", "alike", "d")


def size_of(given):
    return sum(v.size for x in given for v in (*x.a.values(), *x.b.values()))


def test_what_the_adapters_took_is_stated_after_every_change(made, tmp_path):
    """Tasks of higher ranks than the others, which were added or came at once."""
    given = collection()[:3]
    wide = synthetic.collection(3, tasks=["wide", "t2"], modules=MODULES, rank=12, dtype="float32")
    grown = saved(changes.add(made, wide[0]), tmp_path, "s")
    assert grown.report["entries"] == size_of([*given, wide[0]])
    left = changes.remove(grown, "wide")
    assert left.report["entries"] == made.report["entries"]
    assert left.report.get("factor_bytes") == made.report.get("factor_bytes")
    assert store.select(grown, ["wide"]).report["entries"] == size_of(wide[:1])
    asked = {"form": forms.Hydra(rank=3)} if made.report["form"] == "hydra" else {"budget": 9.0}
    mixed = saved(compress([*given[:2], wide[1]], **asked), tmp_path, "mixed")
    for task in mixed.tasks:
        rest = [x for x in (*given[:2], wide[1]) if x.task != task]
        left = changes.remove(mixed, task)
        assert left.report["entries"] == size_of(rest)
        assert left.report.get("factor_bytes", 4 * size_of(rest)) == 4 * size_of(rest)
    # a store from before: the tasks have equal shares
    before = made.replace(report=Static({k: v for k, v in made.report.items() if k != "task_entries"}))
    assert changes.remove(before, "t0").report["entries"] == round(2 / 3 * made.report["entries"])


def test_a_weight_of_one_is_a_weight():
    """A task that comes back without its weight does not get the one that it had."""
    given = collection(likeness=0.0)[:3]
    made = compress(given, max_error=0.01, weights={"t0": 16})
    back = [changes.add(x, given[0]) for x in (changes.remove(made, "t0"), store.select(made, ["t1", "t2"]))]
    for x in back:
        assert x.report["options"]["weights"] == {}
        assert x.report["entries"] == made.report["entries"]
        assert x.errors[:, 2].mean() > 3 * made.errors[:, 0].mean()
    assert store.select(made, made.tasks[::-1]).report == made.report


def test_a_purge_keeps_the_weight_of_a_task_that_came_back():
    given = collection(likeness=0.95)[:3]
    made = compress(given, max_error=0.01, weights={"t0": 4})
    made = changes.add(changes.remove(made, "t0"), given[0], weight=4)
    assert [x.task for x in removal.held(made)] == ["t0"]
    done, _ = changes.purge(made, {x.task: x for x in given}.get)
    assert not removal.held(done)
    assert done.report["options"]["weights"] == {"t0": 4}
    assert max(distortion.measure(done, given).values()) < 0.05


def test_an_earlier_copy_of_a_task_is_called_so():
    given = collection(likeness=0.95)[:3]
    made = compress(given, max_error=0.01, weights={"t0": 4})
    made = changes.add(changes.remove(made, "t0"), given[0])
    assert descriptions.held_notes(removal.held(made), made.tasks)[0].startswith("an earlier task t0: ")
    gone = changes.remove(made, "t0")
    assert descriptions.held_notes(removal.held(gone), gone.tasks)[0].startswith("removed task t0: ")
