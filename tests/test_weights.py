"""Weights of tasks: who is protected and who pays, and that a target holds whatever the weights are."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from commands import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydraopt_jax import HydraOptError, changes, formats, refinement, store, synthetic
from hydraopt_jax.compression import compress
from hydraopt_jax.formats import peft_collection
from hydraopt_jax.forms import Hydra
from hydraopt_jax.rate_control import engine
from hydraopt_jax.rate_control.options import Options
from hydraopt_jax.store import removal, sizes
from hydraopt_jax.store.store import task_errors

TASKS = ["legal", "medical", "sports", "news"]
MODULES = {"layers.0.q": (192, 128), "layers.1.q": (192, 128)}


def collection(likeness=0.5, seed=0):
    return synthetic.collection(
        seed, tasks=TASKS, modules=MODULES, rank=4, likeness=likeness, dtype="float32"
    )


@pytest.fixture(scope="module")
def many():
    return collection()


@pytest.fixture(scope="module")
def protected(many):
    """A store of a third of the bytes, with a task that has four times the weight of the others."""
    return compress(many, budget=0.35, weights={"legal": 4.0})


def weighted(kept, weights):
    """The tasks' errors times weights, which rate-distortion theory makes equal."""
    return task_errors(kept.errors) * np.array([weights.get(t, 1.0) for t in kept.tasks])


def leaves(kept):
    return [{k: bytes(np.asarray(v)) for k, v in x.leaves.items()} for x in kept.segments]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("weight", [0.1, 2.0, 16.0])
def test_errors_are_in_inverse_proportion_to_weights(many, weight, share):
    weights = {"medical": weight}
    kept = compress(many, budget=0.5, weights=weights, share=share)
    np.testing.assert_allclose(weighted(kept, weights) / weighted(kept, weights).mean(), 1, atol=0.1)
    assert 0.97 * 0.5 < sizes.measure_size(kept) / (2 * kept.report["entries"]) <= 0.5


def test_a_protected_task_gains_and_the_others_pay_what_theory_says(gpt2):
    """Of T tasks at equal bytes: the logarithms of errors move by weights, and keep their mean."""
    bare = [x.replace(extras={}) for x in gpt2]
    plain, kept = (compress(bare, budget=0.25, weights=x) for x in ({}, {"legal": 4.0}))
    ratio = dict(zip(kept.tasks, task_errors(kept.errors) / task_errors(plain.errors), strict=True))
    share = 4 ** (1 / len(bare))
    expected = dict.fromkeys(kept.tasks, share) | {"legal": share / 4}
    assert ratio == pytest.approx(expected, rel=0.06)


def test_weights_of_one_change_no_bit(many):
    plain, ones = (compress(many, budget=0.35, weights=x) for x in (None, dict.fromkeys(TASKS, 1.0)))
    assert leaves(plain) == leaves(ones)
    assert plain.report == ones.report
    assert plain.shapes == ones.shapes


@pytest.mark.parametrize("weights", [{"legal": 4.0}, {"legal": 0.25}, {"legal": 9.0, "news": 3.0}])
def test_an_error_target_holds_whatever_the_weights(many, weights):
    kept = compress(many, max_error=0.01, weights=weights)
    assert 0.97 * 0.01 < np.nanmean(kept.errors) <= 0.01
    np.testing.assert_allclose(weighted(kept, weights) / weighted(kept, weights).mean(), 1, atol=0.15)


@pytest.mark.parametrize("weights", [{"legal": 4.0}, {"legal": 0.25}, {"legal": 2.0, "news": 0.5}])
def test_a_target_for_every_task_is_that_of_the_least_weight(many, weights):
    kept = compress(many, max_task_error=0.01, weights=weights)
    least = min([*weights.values(), 1.0])
    assert 0.8 * 0.01 < weighted(kept, weights).max() / least <= 0.01
    assert task_errors(kept.errors).max() <= 0.01


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    weights=st.dictionaries(st.sampled_from(TASKS), st.floats(0.1, 20.0), max_size=4),
    likeness=st.sampled_from([0.0, 0.6, 0.95]),
    target=st.sampled_from([{"budget": 0.4}, {"budget": 0.7}, {"max_error": 0.003}]),
)
def test_whatever_the_weights(weights, likeness, target):
    """The target holds, and no task has more than its share of the error by half."""
    kept = compress(collection(likeness, 3), weights=weights, **target)
    found = weighted(kept, weights)
    assert found.max() < 1.5 * found.min()
    assert np.nanmean(kept.errors) <= target.get("max_error", 1.0)
    assert sizes.measure_size(kept) <= target.get("budget", 1.0) * 2 * kept.report["entries"]


@pytest.mark.parametrize("target", [{"budget": 0.6}, {"max_error": 0.01}, {"max_task_error": 0.02}])
def test_weights_hold_in_segments_of_files(many, tmp_path, target):
    for x in many:
        formats.write_adapter(tmp_path / x.task, x, dtype="float16")
    opened = [peft_collection.open_adapter(str(tmp_path / x.task), None, {}) for x in many]
    found, weights = peft_collection.collection_of(opened), {"sports": 6.0}
    kept = engine.compress_to_target(found, Options(weights=weights, **target), segment_bytes=1 << 13)
    assert len(kept.segments) > 1
    # the worst task of a target for each is allowed what the others leave
    assert weighted(kept, weights).max() < 1.6 * weighted(kept, weights).min()
    assert kept.report["options"]["weights"] == weights


def test_later_tasks_are_coded_as_their_weights_say(many):
    first = compress(many[:3], budget=0.4, weights={"legal": 4.0})
    one = changes.add(first, many[3])
    heavy = changes.add(first, many[3], weight=8.0)
    # as a task of weight 1, which the step in the report is of
    assert task_errors(one.errors)[3] == pytest.approx(task_errors(first.errors)[1:].mean(), rel=0.25)
    assert task_errors(heavy.errors)[3] == pytest.approx(task_errors(one.errors)[3] / 8, rel=0.25)
    assert heavy.report["options"]["weights"] == {"legal": 4.0, "news": 8.0}
    again = changes.refit(heavy, many)
    np.testing.assert_allclose(task_errors(again.errors), task_errors(heavy.errors), rtol=0.25)
    assert again.report["step"] == pytest.approx(first.report["step"], rel=1e-4)
    left = removal.remove(heavy, "news")
    assert left.report["options"]["weights"] == {"legal": 4.0}


def test_a_purge_codes_again_as_weights_say(many, protected):
    left = removal.remove(protected, "legal")
    purged, again = changes.purge(left, {x.task: x for x in many}.get)
    assert again == tuple(TASKS[1:])
    found, before = (task_errors(x.errors) for x in (purged, left))
    np.testing.assert_allclose(found, before, rtol=0.25)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": {"legl": 2.0}}, "weights: no task 'legl': did you mean 'legal'"),
        ({"weights": {"legal": 0.0}}, "weight of 'legal' = 0.0: must be positive"),
        ({"weights": {"legal": -2}}, "must be positive"),
        ({"weights": {"legal": np.nan}}, "must be positive"),
        ({"weights": {"legal": 1e9}}, r"from 1e-06 to 1e\+06"),
        ({"weights": {"legal": "4"}}, "weight of 'legal' = '4'"),
        ({"weights": {"legal": True}}, "weight of 'legal' = True"),
        ({"weights": {"legal": 2.0}, "budget": 1.0}, "weights: does nothing under a budget of 1"),
        ({"weights": {"legal": 2.0}, "form": Hydra()}, "weights: a form excludes it"),
    ],
)
def test_bad_weights_are_refused(many, options, words):
    with pytest.raises(HydraOptError, match=words):
        compress(many, **options)


@pytest.mark.parametrize(
    ("asked", "weight", "words"),
    [
        ({"budget": 1.0}, 4.0, "does nothing in a store of form 'lossless'"),
        ({"form": Hydra(heads=1)}, 4.0, "does nothing in a store of form 'hydra'"),
        ({"budget": 0.5}, 0.0, "weight of 'news' = 0.0: must be positive"),
    ],
)
def test_a_later_task_has_no_weight_where_it_does_nothing(many, asked, weight, words):
    with pytest.raises(HydraOptError, match=words):
        changes.add(compress(many[:3], **asked), many[3], weight=weight)


def test_the_command_protects_and_says_so(capsys, many, tmp_path):
    for x in many:
        formats.write_adapter(tmp_path / "in" / x.task, x)
    args = ["compress", tmp_path / "in", "--budget", 0.35, "--out"]
    code, out, err = run(capsys, *args, tmp_path / "s", "--protect", "legal", "--weight", "news=2", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["options"]["weights"] == {"legal": 4.0, "news": 2.0}
    made = said["provenance"]["made"]["options"]
    assert (made["weights"], made["protect"]) == (["news=2"], ["legal=4"])
    each = said["error"]["per_task"]
    assert each["legal"] == pytest.approx(each["sports"] / 4, rel=0.2)
    mean = np.average(
        [each[t] for t in said["tasks"]], weights=[{"legal": 4, "news": 2}.get(t, 1) for t in said["tasks"]]
    )
    assert said["error"]["weighted_mean"] == pytest.approx(mean, rel=1e-4)
    shown = run(capsys, "inspect", tmp_path / "s")[1]
    assert "--weight news=2 --protect legal=4" in " ".join(shown.split())
    assert f"weighted {100 * mean:.3f}"[:14] in shown
    again = run(capsys, *args, tmp_path / "t", "--protect", "legal=4", "--weight", "news=2")
    assert again[0] == 0
    assert leaves(store.open(tmp_path / "t")) == leaves(store.open(tmp_path / "s"))


def test_a_removed_task_leaves_the_command_that_made_the_store(capsys, many, tmp_path):
    for x in many:
        formats.write_adapter(tmp_path / "in" / x.task, x)
    asked = ["--budget", 0.5, "--protect", "legal", "--weight", "news=2", "--weight", "sports=3"]
    assert run(capsys, "compress", tmp_path / "in", "--out", tmp_path / "s", *asked)[0] == 0
    for task in ("legal", "news"):
        assert run(capsys, "remove", tmp_path / "s", task)[0] == 0
    content = store.open(tmp_path / "s")
    made = content.report["provenance"]["made"]["options"]
    assert (made["weights"], made["protect"]) == (["sports=3"], [])
    assert content.report["options"]["weights"] == {"sports": 3.0}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--protect", "legl"], "did you mean 'legal'"),
        (["--protect", "legal", "--weight", "legal=3"], "--weight legal=4: was given before"),
        (["--protect", "legal=much"], "--weight legal=much: give NAME=NUMBER"),
        (["--protect", "legal", "--budget", "1"], "weights: does nothing under a budget of 1"),
        (["--protect", "legal", "--form", "hydra"], "cannot be combined with --form hydra"),
    ],
)
def test_the_command_refuses_in_one_line(capsys, many, tmp_path, given, words):
    for x in many:
        formats.write_adapter(tmp_path / "in" / x.task, x)
    code, out, err = run(capsys, "compress", tmp_path / "in", "--out", tmp_path / "s", *given)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def forward(lora, x):
    return sum((x @ a) @ b for a, b in lora.values())


def test_a_refinement_keeps_the_weights_of_its_store(many, protected):
    batch = np.random.default_rng(0).normal(size=(4, 5, 192)).astype(np.float32)
    _, found = refinement.refine(protected, many, forward=forward, batches=[batch], steps=1)
    true, kept = (refinement.originals(x) for x in (many, [store.decode(protected, t) for t in TASKS]))
    each = [
        refinement.divergence(forward)(
            *({n: (a[t : t + 1], b[t : t + 1]) for n, (a, b) in x.items()} for x in (kept, true)),
            jnp.asarray(batch[t : t + 1]),
        )
        for t in range(4)
    ]
    assert found.before == pytest.approx(np.average(each, weights=[4, 1, 1, 1]), rel=1e-2)
