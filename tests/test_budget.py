"""What a budget means, whatever number or text gives it; options that would do nothing are refused."""

import decimal
import fractions

import numpy as np
import pytest

from hydraopt_jax import forms, synthetic
from hydraopt_jax.codec import encode
from hydraopt_jax.compression import compress
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.rate_control.budget import keeps_all, read_budget
from hydraopt_jax.store import sizes


@pytest.fixture(scope="module")
def few():
    return synthetic.collection(tasks=["one", "two"], modules={"q": (48, 32)}, rank=4, dtype="float16")


@pytest.mark.parametrize(
    ("given", "means"),
    [
        (0.125, 0.125),
        (1.0, 1.0),
        (2.5, 2.5),
        (np.float32(0.5), 0.5),
        (np.float16(1), 1.0),
        (fractions.Fraction(1, 8), 0.125),
        (1, 1.0),
        (10, 10.0),
        (np.int64(1), 1.0),
        (11, 11),
        (5000, 5000),
        (np.int64(5000), 5000),
        (np.uint8(200), 200),
        ("0.125", 0.125),
        ("1", 1.0),
        ("100%", 1.0),
        ("12.5%", 0.125),
        ("3MB", 3_000_000),
        ("11B", 11),
        (None, None),
    ],
)
def test_one_meaning_each(given, means):
    assert read_budget(given) == means
    assert type(read_budget(given)) is type(means)


@pytest.mark.parametrize(
    "given",
    [True, False, np.True_, "3000", "many", "", "1 parsec", 1 + 1j, [0.5], np.array([0.5]), b"1", object()],
)
def test_anything_else_is_refused(few, given):
    with pytest.raises(HydraOptError, match=r"budget.*give a fraction of the fp16 bytes") as caught:
        compress(few, budget=given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [0, 0.0, -1, -0.5, np.nan, np.inf, "0", "0B", decimal.Decimal("NaN")])
def test_what_is_not_positive_is_refused(few, given):
    with pytest.raises(HydraOptError, match="budget"):
        compress(few, budget=given)


@pytest.mark.parametrize("given", [1, 1.0, np.int64(1), np.float32(1), "1", "100%", 2.0])
def test_one_keeps_the_adapters_as_they_are(few, given):
    kept = compress(few, budget=given)
    assert kept.report["form"] == "lossless"
    assert not kept.errors.any()
    assert keeps_all(kept.report["options"]["budget"])


def test_bytes_are_a_limit_whatever_integer_gives_them(few):
    sizes = {type(x): compress(few, budget=x) for x in (2600, np.int64(2600), "2600B")}
    assert {x.report["options"]["budget"] for x in sizes.values()} == {2600}
    assert {x.report["form"] for x in sizes.values()} == {"coded"}


@pytest.mark.parametrize("name", ["max_error", "max_task_error"])
@pytest.mark.parametrize("value", [True, "0.1", [0.1], np.nan])
def test_errors_are_numbers(few, name, value):
    with pytest.raises(HydraOptError, match=name):
        compress(few, **{name: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": forms.Hydra(cores=True)}, "cores: do nothing with a head for each of the 2 tasks"),
        ({"form": forms.Hydra(cores=True, heads=2)}, "cores: do nothing with a head for each of the 2 tasks"),
        ({"form": forms.Hydra(heads=3)}, "heads = 3: must lie between 1 and the 2 tasks"),
        ({"form": forms.Hydra(rank=0)}, "rank = 0"),
        ({"form": forms.Hydra(side="up")}, "side = 'up': must be one of in, out, auto"),
        ({"form": forms.Hydra(solver=forms.Gradient(start="zero"))}, "start = 'zero'"),
        ({"form": forms.Hydra(solver=forms.Gradient(steps=0))}, "steps = 0"),
        ({"form": forms.Hydra(), "dtype": "int4"}, "dtype = 'int4'"),
        ({"form": forms.Hydra(), "budget": 0.5}, "budget: a form excludes it"),
        ({"form": forms.Hydra(), "weights": {"one": 2.0}}, "weights: a form excludes it"),
        ({"form": forms.Hydra(), "share": False}, "share=False: a form excludes it"),
        ({"budget": 0.5, "dtype": "float16"}, "dtype: only plain factors have one"),
        ({"budget": 0.5, "max_error": 0.1}, "exactly one of"),
    ],
)
def test_options_that_do_nothing_are_refused(few, options, words):
    with pytest.raises(HydraOptError, match=words):
        compress(few, **options)


def test_without_a_target_a_quarter_of_the_bytes_is_aimed_at():
    many = synthetic.collection(tasks=["one", "two"], modules={"q": (256, 256)}, rank=8, dtype="float16")
    kept = compress(many)
    assert kept.report["options"]["budget"] == 0.25
    assert kept.report["form"] == "coded"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": {"one": 2.0}}, "weights: does nothing under a budget of 1"),
        ({"calibration": {"q": np.ones(48)}}, "calibration: does nothing under a budget of 1"),
        ({"share": False}, "alone: does nothing under a budget of 1"),
    ],
)
def test_options_that_do_nothing_beside_a_budget_of_one_are_refused(few, options, words):
    with pytest.raises(HydraOptError, match=words):
        compress(few, budget=1, **options)


@pytest.mark.parametrize("budget", [2600, 2688, 2760])
@pytest.mark.parametrize("factor", [0.97, 0.995])
def test_bytes_that_are_estimated_too_low_are_made_up_for(small, monkeypatch, budget, factor):
    sizes_of = encode.estimate_bytes
    monkeypatch.setattr(encode, "estimate_bytes", lambda *a: factor * sizes_of(*a))
    kept = compress(small, budget=budget)
    assert 0.9 * budget < sizes.measure_size(kept) <= budget
