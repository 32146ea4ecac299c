"""A removed task is gone, or the store says what is left of it; a purge leaves nothing of it."""

import json

import numpy as np
import pytest
from commands import run

from hydraopt_jax import calibration, changes, formats, forms, store, synthetic
from hydraopt_jax.compression import compress
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.explicit import group_loop
from hydraopt_jax.formats.memory_collection import in_memory
from hydraopt_jax.rate_control import distortion, engine, parts
from hydraopt_jax.rate_control.metrics import metrics_of
from hydraopt_jax.rate_control.options import Options
from hydraopt_jax.store import manifest, removal, segment_data, sizes
from hydraopt_jax.store.store import task_errors

MODULES = {"layers.0.q": (96, 64), "layers.1.q": (96, 64)}
NAMES = ["legal", "medical", "sports", "news", "poems"]
TARGET = {"max_error": 0.01, "weights": {"legal": 1.5, "medical": 1.5}}


@pytest.fixture(scope="module")
def many():
    return synthetic.collection(2, tasks=NAMES, modules=MODULES, rank=3, likeness=0.8, dtype="float32")


@pytest.fixture(scope="module")
def grown(many):
    """Three tasks coded together, of which one predicts the others, and two that came later."""
    return changes.add(changes.add(compress(many[:3], **TARGET), many[3]), many[4])


def at_hand(many):
    return {x.task: x for x in many}.get


def same(one, two, task):
    x, y = (store.task_factors(s, task) for s in (one, two))
    return all(np.array_equal(a, b) for n in x for a, b in zip(x[n], y[n], strict=True))


def reference(content):
    """The task that others of the first three are predicted from."""
    label = next(x for x in content.report["forms"] if "predicted from" in x)
    return label.removeprefix("separate, predicted from ")


def blobs(content):
    """Every leaf of a store that holds codes."""
    return [
        bytes(np.asarray(v))
        for x in content.segments
        for k, v in x.leaves.items()
        if not k.endswith("errors")
    ]


def text(content):
    """All names and numbers beside the leaves."""
    written = [segment_data.entry_of(x)._asdict() for x in content.segments]
    return json.dumps(manifest.as_json(content, written))


def test_what_others_are_predicted_from_is_held_by_name(grown, tmp_path):
    task = reference(grown)
    left = changes.remove(grown, task)
    (found,) = removal.held(left)
    assert found.task == task
    assert found.bytes > 100
    assert set(NAMES[:3]) - {task} <= set(found.needed_by)
    store.save(tmp_path / "s", left)
    assert removal.held(store.open(tmp_path / "s")) == (found,)
    assert "predicted from a removed task" in str(left.report["forms"])
    assert task not in str(left.report)


def test_a_purge_is_the_store_of_those_that_are_left(many):
    """Byte for byte what a fit of the others alone at this step gives: nothing of the task can be in it."""
    content = compress(many[:3], **TARGET)
    task = reference(content)
    rest = [x for x in many[:3] if x.task != task]
    purged, again = changes.purge(changes.remove(content, task), at_hand(many))
    assert again == purged.tasks == tuple(x.task for x in rest)
    weights = {k: v for k, v in TARGET["weights"].items() if k != task}
    options = Options(max_error=0.01, weights=weights)
    expected = engine.compress_at_step(in_memory(rest), options, content.report["step"])
    assert blobs(purged) == blobs(expected)
    np.testing.assert_array_equal(purged.errors, expected.errors)
    assert removal.held(purged) == ()
    assert f'"{task}"' not in text(purged)
    assert "bounded" not in purged.report


@pytest.mark.parametrize("originals", [True, False])
@pytest.mark.parametrize("task", NAMES)
def test_a_purge_decodes_within_the_errors_that_it_states(many, grown, tmp_path, task, originals):
    left = changes.remove(grown, task)
    known = {task for x in removal.held(left) for task in x.needed_by}
    purged, again = changes.purge(left, at_hand(many) if originals else lambda task: None)
    assert known <= set(again)
    assert removal.held(purged) == ()
    store.save(tmp_path / "s", purged)
    back = store.open(tmp_path / "s")
    assert f'"{task}"' not in text(back)
    measured = distortion.measure(back, [x for x in many if x.task != task])
    claimed = dict(zip(back.tasks, task_errors(back.errors), strict=True))
    bounds = set(back.report.get("bounded", ()))
    assert bounds == (set() if originals else set(again))
    for name, error in measured.items():
        assert error <= 1.01 * claimed[name]
        assert error < (0.05 if name in bounds else 0.02)
    for name in set(back.tasks) - bounds:
        assert measured[name] == pytest.approx(claimed[name], rel=0.01)
    for name in set(back.tasks) - set(again):
        assert same(grown, back, name)
    # no leaf that the task's own numbers lie in is there any more
    theirs = {
        bytes(np.asarray(x.leaves[f"task_{k}"]))
        for x in left.segments
        for k in x.removed
        if f"task_{k}" in x.leaves
    }
    assert not theirs & set(blobs(back))


def test_a_chain_of_later_tasks_is_coded_again(many):
    """Who is predicted from one that is coded again is coded again, too; a second removal frees the first."""
    content = compress(many[:1], max_error=0.01)
    for x in many[1:4]:
        content = changes.add(content, x)
    left = changes.remove(content, "medical")
    held = removal.held(left)
    assert [x.task for x in held] == ["medical"] * bool(held)
    purged, again = changes.purge(left, at_hand(many))
    assert purged.tasks == ("legal", "sports", "news")
    assert removal.held(purged) == ()
    np.testing.assert_allclose(
        list(distortion.measure(purged, [many[0], many[2], many[3]]).values()),
        task_errors(purged.errors),
        rtol=0.01,
    )
    needed = {t for x in held for t in x.needed_by}
    assert needed == set(again)
    for task in again:
        left = changes.remove(left, task)
    assert removal.held(left) == ()


def test_segments_are_coded_again_by_themselves(many, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "DIRECTIONS", 9)
    made = engine.compress_to_target(in_memory(many), Options(max_error=0.01), segment_bytes=1 << 12)
    store.save(tmp_path / "s", made)
    before = store.open(tmp_path / "s")
    assert len(before.segments) > 2
    task = before.tasks[0] if removal.held(changes.remove(before, before.tasks[0])) else before.tasks[1]
    again = []

    def act(content):
        left = changes.remove(content, task)
        assert [x.task for x in removal.held(left)] == [task]
        purged, done = changes.purge(left)
        again.extend(done)
        return purged

    store.update(tmp_path / "s", act)
    back = store.open(tmp_path / "s")
    assert removal.held(back) == ()
    assert f'"{task}"' not in text(back)
    assert 0 < len(again) < len(back.tasks)
    assert list(back.report["bounded"]) == again
    assert all(same(made, back, t) for t in back.tasks if t not in again)
    measured = distortion.measure(back, [x for x in many if x.task != task])
    claimed = dict(zip(back.tasks, task_errors(back.errors), strict=True))
    assert all(error <= 1.01 * claimed[t] for t, error in measured.items())
    assert removal.traces(back) == {}


@pytest.mark.parametrize("form", ["heads", "lossless"])
def test_plain_stores_say_what_was_fitted_to_a_removed_task(many, form):
    options = {"heads": {"form": forms.Hydra(rank=3)}, "lossless": {"budget": 9.0}}[form]
    kept = compress(many[:3], **options)
    left = changes.remove(kept, "medical")
    assert removal.held(left) == tuple([removal.Held("medical", 0, (), True)] * (form == "heads"))
    purged, again = changes.purge(left, at_hand(many))
    assert again == ((("legal", "sports")) if form == "heads" else ())
    assert removal.held(purged) == ()
    assert "medical" not in text(purged)
    rest = [many[0], many[2]]
    np.testing.assert_allclose(
        list(distortion.measure(purged, rest).values()), task_errors(purged.errors), rtol=0.01, atol=1e-9
    )


def test_a_task_that_joined_a_removed_one_is_fitted_again(many):
    """A plain store whose later task uses factors of a removed one: it says so, and a purge is rid of it."""
    kept = changes.add(compress(many[:3], form=forms.Hydra(rank=3)), many[3])
    left = changes.remove(kept, "legal")
    assert [x.task for x in removal.held(left)] == ["legal"]
    purged, again = changes.purge(left, at_hand(many))
    assert set(again) == {"medical", "sports", "news"}
    assert removal.held(purged) == ()
    assert purged.tasks == ("medical", "sports", "news")


def test_calibrated_stores_need_their_calibration(many):
    rng = np.random.default_rng(0)
    known = {n: (lambda r: r @ r.T)(rng.normal(size=(s[0], 12))) for n, s in MODULES.items()}
    content = compress(many[:3], max_error=0.01, calibration=known)
    left = changes.remove(content, next(t for t in content.tasks if removal.held(changes.remove(content, t))))
    with pytest.raises(HydraOptError, match="--calibration"):
        changes.purge(left)
    purged, again = changes.purge(left, calibration=known)
    assert again == purged.tasks
    rest = [x for x in many[:3] if x.task in again]
    metrics = metrics_of(MODULES, known)
    for claims, more in ((purged.errors, None), (purged.output_errors, metrics)):
        measured = distortion.measure(purged, rest, more)
        assert (np.array(list(measured.values())) <= 1.01 * task_errors(claims)).all()


def test_commands_say_what_is_left_and_are_rid_of_it(many, tmp_path, capsys):
    for x in many[:3]:
        formats.write_adapter(tmp_path / "in" / x.task, x)
    folders = [tmp_path / "in" / x.task for x in many[:3]]
    out = tmp_path / "store"
    assert run(capsys, "compress", *folders, "--out", out, "--max-error", "0.01")[0] == 0
    task = reference(store.open(out))
    others = [x for x in NAMES[:3] if x != task]
    code, said, err = run(capsys, "remove", out, task, "--json")
    assert (code, err) == (0, "")
    (held,) = json.loads(said)["held"]
    assert (held["task"], sorted(held["needed_by"])) == (task, sorted(others))
    assert json.loads(said)["bytes_held"] == held["bytes"] > 0
    words = " ".join(run(capsys, "inspect", out)[1].split())
    assert f"removed task {task}: " in words
    assert all(x in words for x in others)
    assert json.loads(run(capsys, "inspect", out, "--json")[1])["held"] == [held]
    # one original has moved
    moved = folders[NAMES.index(others[0])].rename(tmp_path / "moved")
    code, said, err = run(capsys, "remove", out, "--purge", "--json")
    assert (code, err) == (0, "")
    said = json.loads(said)
    assert (said["held"], said["bytes_held"], said["removed"]) == ([], 0, None)
    assert sorted(said["coded_again"]) == sorted(others)
    assert said["bounded"] == [others[0]]
    originals = [f"{others[0]}={moved}", folders[NAMES.index(others[1])]]
    code, words, _ = run(capsys, "verify", out, *originals)
    assert code == 0
    assert "at most" in " ".join(words.split())
    assert "<= " in run(capsys, "inspect", out)[1]
    wrong = many[NAMES.index(others[0])]
    formats.write_adapter(tmp_path / "wrong", wrong.replace(b={k: 2 * v for k, v in wrong.b.items()}))
    assert run(capsys, "verify", out, f"{others[0]}={tmp_path / 'wrong'}")[0] == 1


@pytest.mark.parametrize("asked", ["--purge", "--refit", "--estimate"])
def test_another_adapter_is_not_taken_for_an_original(many, tmp_path, capsys, asked):
    folders = [tmp_path / x.task for x in many[:3]]
    for x, folder in zip(many, folders, strict=False):
        formats.write_adapter(folder, x)
    formats.write_adapter(tmp_path / "other", many[3])
    given = [formats.read_adapter(x) for x in folders]
    made = compress(given, max_error=0.01)
    task = reference(made)
    one, two = (x for x in NAMES[:3] if x != task)
    store.save(tmp_path / "s", removal.remove(made, task))
    wrong = f"{one}={tmp_path / 'other'}"
    code, _, err = run(
        capsys, "remove", tmp_path / "s", *[two] * (asked != "--purge"), asked, "--original", wrong
    )
    assert code == 2
    assert f"{tmp_path / 'other'}: is not the original of '{one}'" in err
    assert err.count("\n") == 1
    assert removal.held(store.open(tmp_path / "s"))
    # also where there is nothing to code again
    store.save(tmp_path / "whole", made)
    code, _, err = run(capsys, "remove", tmp_path / "whole", two, asked, "--original", wrong)
    assert (code, "is not the original" in err) == (2, True)
    with pytest.raises(HydraOptError, match="is not the original"):
        changes.refit(made, [formats.read_adapter(tmp_path / "other", task=one)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a TASK"),
        (["legal", "--purge", "--refit"], "--refit"),
        (["legal", "--calibration", "c"], "used with --purge"),
        (["legal", "--purge", "--calibration", "c"], "claims no output errors"),
    ],
)
def test_options_of_remove_that_do_nothing_are_refused(many, tmp_path, capsys, arguments, words):
    store.save(tmp_path / "s", compress(many[:2], max_error=0.1))
    calibration.write_moments(tmp_path / "c", {})
    code, out, err = run(capsys, "remove", tmp_path / "s", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert store.open(tmp_path / "s").tasks == ("legal", "medical")
    assert sizes.size_on_disk(tmp_path / "s") > 0


def test_a_task_larger_than_a_part_is_purged_around(many, grown, monkeypatch):
    later = changes.add(compress(many[:1], max_error=0.02), many[1])
    monkeypatch.setattr(engine, "parts_of", lambda found, limit=600: parts.parts_of(found, 600))
    left, again = changes.purge(removal.remove(later, many[0].task))
    assert again == (many[1].task,)
    assert len(left.segments) > 1
    assert not removal.held(left)
    claimed = left.errors
    for t, adapter in enumerate(many[1:2]):
        back = store.task_factors(left, adapter.task)
        for m, n in enumerate(left.shapes):
            delta = adapter.a[n] @ adapter.b[n]
            lost = np.sum((delta - back[n][0] @ back[n][1]) ** 2) / np.sum(delta**2)
            assert lost <= 1.01 * claimed[m, t]


def test_bounds_hold_in_every_segment_of_a_plain_store(many, monkeypatch):
    monkeypatch.setattr(group_loop, "TOGETHER", 0)
    given = [
        x.replace(a={**x.a, "v": x.a["layers.0.q"][:64]}, b={**x.b, "v": x.b["layers.0.q"]}) for x in many
    ]
    plain = compress(given, form=forms.Hydra(heads=2, rank=2), dtype="float16")
    assert len(plain.segments) > 1
    left, _ = changes.purge(removal.remove(plain, given[1].task))
    kept = {x.task: x for x in given}
    for t, task in enumerate(left.tasks):
        back = store.task_factors(left, task)
        for m, n in enumerate(left.shapes):
            delta = kept[task].a[n] @ kept[task].b[n]
            a, b = back.get(n, (np.zeros((len(delta), 1)), np.zeros((1, delta.shape[1]))))
            assert np.sum((delta - a @ b) ** 2) <= 1.01 * left.errors[m, t] * np.sum(delta**2)


def test_full_tensors_stay_where_a_purge_makes_several_segments(many, monkeypatch):
    head = {"score": np.arange(12, dtype=np.float32)}
    later = compress([many[0], *(x.replace(extras=head) for x in many[1:])], max_error=0.02)
    gone = reference(later) if any("predicted" in x for x in later.report["forms"]) else many[0].task
    monkeypatch.setattr(engine, "parts_of", lambda found, limit=2000: parts.parts_of(found, 2000))
    left, again = changes.purge(removal.remove(later, gone))
    assert len(left.segments) > 1
    for task in again:
        if task != many[0].task:
            assert np.array_equal(store.decode(left, task).extras["score"], head["score"])
