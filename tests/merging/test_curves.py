"""Merging methods on the frontier: their bytes and errors against dense computation."""

import inspect

import numpy as np
import pytest

from hydraopt_jax import HydraOptError, merging, synthetic
from hydraopt_jax.merging import curves, registry


@pytest.fixture(scope="module")
def many():
    return synthetic.collection(3, tasks=4, modules={"q": (20, 14), "k": (20, 14)}, rank=2, dtype="float32")


def relative(many, module, hats):
    deltas = [x.a[module] @ x.b[module] for x in many]
    return [((d - h) ** 2).sum() / (d**2).sum() for d, h in zip(deltas, hats, strict=True)]


def test_merged_point_has_the_best_scale(many):
    point = curves.single(many, "task-arithmetic")
    found = merging.merge_adapters(many, "task-arithmetic")

    def mean(scale):
        rows = [relative(many, m, [scale * found.a[m] @ found.b[m]] * 4) for m in ("q", "k")]
        return np.mean(rows), np.mean(rows, 0).max()

    best = min((mean(x) for x in np.linspace(0.01, 1, 400)), key=lambda x: x[0])
    assert (point.mean, point.worst) == pytest.approx(best, rel=1e-3)
    assert point.bytes == 2 * 2 * 2 * (20 + 14)


def test_kept_points_hold_what_they_say(many):
    slots = curves.settings(many, "k-merge")
    assert list(slots) == ["K = 1", "K = 2", "K = 3", "K = 4"]
    three, four = (curves.kept(many, "k-merge", k, **slots[k]) for k in ("K = 3", "K = 4"))
    assert four.mean < 1e-8 < three.mean
    assert three.bytes == 3 * 2 * 2 * 2 * (20 + 14)
    share = curves.curves_of(many, ["share"])[0].points
    assert [p.setting for p in share] == ["rank 2", "rank 4"]
    # two bases, and a 4 x 4 core a task
    assert share[1].bytes == 2 * 2 * (4 * (20 + 14) + 4 * 16)
    assert share[1].mean < share[0].mean
    assert list(curves.settings(many, "jd-full")) == [
        "rank 2",
        "rank 4",
        "rank 2, 2 clusters",
        "rank 4, 2 clusters",
    ]


def test_measured_in_the_order_of_the_names(many):
    names, steps = ["dare", "concatenation", "jd-diag"], []
    found = curves.curves_of(many[:2], names, steps.append)
    assert [c.label for c in found] == names
    assert len(steps) == len(found)
    # half of every delta is common, so that no method on deltas is worse than keeping nothing
    assert all(0 <= p.mean <= 1 for c in found for p in c.points)


def test_all_are_those_that_need_the_adapters_alone():
    assert curves.parse_names("all") == curves.BASELINES
    for name in curves.BASELINES:
        function = registry.method_of(name).function
        keywords = inspect.signature(function).parameters.values()
        needed = {x.name for x in keywords if x.kind is x.KEYWORD_ONLY and x.default is x.empty}
        assert needed <= {"rank", "key"}


@pytest.mark.parametrize("text", ["magic", "ties,", "regmean", "separate"])
def test_unknown_baselines_are_refused(text):
    with pytest.raises(HydraOptError, match="must be all, or some of"):
        curves.parse_names(text)
