"""Which tasks are alike: groups by similarity, and which predict which in a store."""

import itertools
import json

import numpy as np
import pytest
from commands import run

from hydraopt_jax import changes, forms, store, synthetic
from hydraopt_jax.cli.descriptions import groups_note
from hydraopt_jax.compression import compress
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats.memory_collection import in_memory
from hydraopt_jax.forms import similarity
from hydraopt_jax.rate_control import coding, engine, parts
from hydraopt_jax.rate_control.options import Options
from hydraopt_jax.store import predictions, removal
from hydraopt_jax.store.predictions import Predicted, Source

MODULES = {f"layers.{n}.q": (96, 64) for n in range(4)}
ORDER = ["a1", "b1", "other", "a2", "b2", "a3", "b3"]


def family(names, seed, likeness=0.9):
    return synthetic.collection(
        seed, tasks=names, modules=MODULES, rank=4, likeness=likeness, dtype="float32"
    )


@pytest.fixture(scope="module")
def many():
    """Two families of three alike tasks and one that is like none, in turn."""
    made = [*family(["a1", "a2", "a3"], 1), *family(["b1", "b2", "b3"], 2), *family(["other"], 3)]
    return sorted(made, key=lambda x: ORDER.index(x.task))


@pytest.fixture(scope="module")
def kept(many):
    """A store of all but the last task, which came later."""
    return changes.add(compress(many[:-1], budget=0.5), many[-1])


def named(many, groups):
    return [[many[t].task for t in group] for group in groups]


def test_families_are_groups(many):
    matrix = similarity.summarize(many).mean.delta
    assert named(many, similarity.groups(matrix)) == [["a1", "a2", "a3"], ["b1", "b2", "b3"], ["other"]]


@pytest.mark.parametrize(
    ("likeness", "groups"), [(0.0, [[0], [1], [2]]), (0.3, [[0, 1, 2]]), (1.0, [[0, 1, 2]])]
)
def test_all_or_none_may_be_alike(likeness, groups):
    matrix = similarity.summarize(family(["x", "y", "z"], 4, likeness)).mean.delta
    assert similarity.groups(matrix) == groups


def test_groups_do_not_depend_on_the_order_of_tasks(many):
    matrix = similarity.summarize(many).mean.delta
    order = np.random.default_rng(0).permutation(len(many))
    turned = similarity.groups(matrix[np.ix_(order, order)])
    assert {frozenset(order[list(x)].tolist()) for x in turned} == set(
        map(frozenset, similarity.groups(matrix))
    )


@pytest.mark.parametrize("matrix", [np.ones((1, 1)), np.zeros((1, 1))])
def test_one_task_is_a_group(matrix):
    assert similarity.groups(matrix) == [[0]]


def test_a_store_says_which_task_predicts_which(many, kept):
    found = predictions.predicted(kept)
    assert list(found) == [x.task for x in many]
    assert {x.vectors for x in found.values()} == {2 * 4 * 4}
    labels = " ".join(kept.report["forms"])
    leaders = [t for t in ORDER if f"from {t}" in labels]
    assert {s for t in ORDER[:-1] for s in found[t].sources} == set(leaders)
    # the later task is predicted from one of its family, every vector
    assert {k[0] for k in found["b3"].sources} == {"b"}
    assert sum(x.predicted for x in found["b3"].sources.values()) == found["b3"].vectors
    # what is like nothing is predicted from nothing, though others come before it
    assert all(x.possible > x.predicted == 0 for x in found["other"].sources.values())


def test_groups_of_a_store_are_of_one_family(kept):
    groups = predictions.groups(predictions.predicted(kept))
    assert sorted(itertools.chain(*groups)) == sorted(ORDER)
    assert all(len({t[0] for t in group}) == 1 for group in groups)
    assert len(groups[0]) >= 3
    assert ["other"] in groups


def test_a_basis_of_several_tasks_is_named_by_its_segment():
    two = {"x": Source(8, 8), "basis of segment 1": Source(8, 8)}
    one = {"basis of segment 1": Source(8, 7)}
    found = {"x": Predicted(16, one), "y": Predicted(16, two), "z": Predicted(16, {})}
    assert predictions.groups(found) == [["x", "y"], ["z"]]


def of_one_span():
    """Many tasks whose sides have the same span."""
    alike = family([f"t{k}" for k in range(12)], 5, 1.0)
    rng = np.random.default_rng(0)
    return [
        x.replace(a={n: a @ rng.normal(size=(4, 4)).astype(np.float32) / 2 for n, a in x.a.items()})
        for x in alike
    ]


def test_a_joint_basis_is_a_source():
    kept = compress(of_one_span(), budget=0.1)
    sources = {s for x in predictions.predicted(kept).values() for s in x.sources}
    assert kept.report["forms"] == {"joint basis": 4}
    assert sources == {"basis of segment 1"}
    assert predictions.groups(predictions.predicted(kept)) == [list(kept.tasks)]


@pytest.mark.parametrize(("dearer", "left"), [(0, 4), (1, 2), (4, 0)])
def test_where_noise_is_shaped_a_few_modules_are_asked_first(monkeypatch, dearer, left):
    """Of each that are asked, so many are dearer with a joint basis."""
    asked = []

    def dearer_joint(problem, chosen, step, frequencies):
        asked.append(len(chosen))
        return frozenset(chosen[:dearer])

    monkeypatch.setattr(coding, "dearer_joint", dearer_joint)
    seen = np.random.default_rng(0).normal(size=(200, 96)).astype(np.float32)
    moments = dict.fromkeys(MODULES, seen.T @ seen / 200)
    kept = compress(of_one_span(), budget=0.1, calibration=moments)
    assert asked == ([2] if dearer == 4 else [2, 2])
    assert kept.report["forms"].get("joint basis", 0) == left


def test_where_no_noise_is_shaped_all_modules_are_asked_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr(coding, "dearer_joint", lambda p, chosen, *_: asked.append(chosen) or frozenset())
    compress(of_one_span(), budget=0.1, calibration={n: np.ones(96, np.float32) for n in MODULES})
    assert asked == [list(MODULES)]


def test_segments_are_counted_together(many, monkeypatch):
    monkeypatch.setattr(parts, "DIRECTIONS", 12)
    kept = engine.compress_to_target(in_memory(many), Options(budget=0.9), segment_bytes=1 << 14)
    assert len(kept.segments) > 2
    found = predictions.predicted(kept)
    assert {x.vectors for x in found.values()} == {2 * 4 * 4}


def test_removed_tasks_are_sources_and_no_members(kept):
    leader = next(iter(predictions.predicted(kept)["b3"].sources))
    left = removal.remove(kept, leader)
    found = predictions.predicted(left)
    assert leader not in found
    assert f"{leader} (removed, in segment 1)" in found["b3"].sources
    assert leader not in set(itertools.chain(*predictions.groups(found)))


def test_a_task_that_came_back_is_no_source_for_its_namesake(many, kept):
    other = next(x for x in many if x.task == "other")
    leader = next(iter(predictions.predicted(kept)["b3"].sources))
    back = changes.add(removal.remove(kept, leader), other.replace(task=leader))
    found = predictions.predicted(back)
    assert all(leader not in x.sources for x in found.values())
    assert found["b3"].sources == {
        f"{leader} (removed, in segment 1)": predictions.predicted(kept)["b3"].sources[leader]
    }
    assert leader not in next(x for x in predictions.groups(found) if "b3" in x)
    # a later task that is gone, of which others are predicted, has sources of its own
    grown = changes.add(kept, many[-1].replace(task="again"))
    assert any(r.segment == 1 for r in grown.segments[-1].references)
    left = changes.add(removal.remove(grown, many[-1].task), other.replace(task=many[-1].task))
    mine = predictions.predicted(left)[many[-1].task]
    assert all(x.predicted <= x.possible for x in mine.sources.values())
    assert sum(x.predicted for x in mine.sources.values()) <= mine.vectors


@pytest.mark.parametrize("asked", [{"form": forms.Hydra(heads=1)}, {"budget": 1.0}])
def test_plain_stores_predict_nothing(many, asked):
    assert predictions.predicted(compress(many, **asked)) == {}


def test_the_command_shows_references_and_groups(capsys, many, kept, tmp_path):
    store.save(tmp_path / "s", kept)
    code, out, err = run(capsys, "inspect", tmp_path / "s", "--references", "--verbose", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    found = predictions.predicted(kept)
    assert said["groups"] == predictions.groups(found)
    assert {t: x["vectors"] for t, x in said["references"].items()} == {
        t: x.vectors for t, x in found.items()
    }
    errors = said["module_errors"]
    assert list(errors) == list(MODULES)
    worst = said["worst_modules"][0]
    assert (
        errors[worst["module"]][worst["task"]]
        == worst["error"]
        == max(map(max, map(dict.values, errors.values())))
    )
    assert said["kinds"]["q"]["error"] == pytest.approx(said["error"]["mean"], rel=1e-3)
    shown = run(capsys, "inspect", tmp_path / "s", "--references")[1]
    assert f"groups of alike tasks: {', '.join(said['groups'][0])}" in shown
    assert "module_errors" not in json.loads(run(capsys, "inspect", tmp_path / "s", "--json")[1])


def test_leaves_that_no_encoder_writes_are_one_line(kept):
    *rest, last = kept.segments
    short = last.replace(leaves={**last.leaves, "prediction": last.leaves["prediction"][:2]})
    with pytest.raises(HydraOptError, match="damaged store") as refused:
        predictions.predicted(kept.replace(segments=(*rest, short)))
    assert "\n" not in str(refused.value)


def test_many_groups_are_cut_short():
    rows = [[f"t{n}" for n in range(25)], *([f"x{n}", f"y{n}"] for n in range(12)), ["z"]]
    said = groups_note(rows)
    assert "t19 and 5 others; x0, y0;" in said
    assert said.endswith("x8, y8; and 3 groups; alone: 1")
    assert groups_note([["a"], ["b"]]) == "groups of alike tasks: none"
