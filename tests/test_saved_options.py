"""Options of NumPy's types mean what Python's do, and a store made with them can be saved."""

from fractions import Fraction

import numpy as np
import pytest

import hydraopt_jax as hydra
from hydraopt_jax import synthetic
from hydraopt_jax.forms import Gradient, Hydra

PAIR = synthetic.collection(tasks=["a", "b"], modules={"q": (24, 16), "v": (16, 24)}, rank=4)

SAME = {
    "max_error": ({"max_error": 0.01}, {"max_error": np.float32(0.01)}),
    "fraction": ({"max_error": 0.25}, {"max_error": Fraction(1, 4)}),
    "max_task_error": ({"max_task_error": 0.25}, {"max_task_error": np.float16(0.25)}),
    "weights": (
        {"max_error": 0.1, "weights": {"a": 3, "b": 2}},
        {"max_error": 0.1, "weights": {"a": np.float32(3), "b": np.int64(2)}},
    ),
    "share": ({"max_error": 0.1, "share": False}, {"max_error": 0.1, "share": np.bool_(False)}),
    "heads": ({"form": Hydra(1, 2)}, {"form": Hydra(np.int64(1), np.int32(2), cores=np.bool_(False))}),
    "steps": (
        {"form": Hydra(1, solver=Gradient(steps=3))},
        {"form": Hydra(1, solver=Gradient(steps=np.int64(3)))},
    ),
}


@pytest.mark.parametrize("asked", SAME.values(), ids=SAME)
def test_a_store_asked_for_with_numpy_numbers_is_the_same(asked, tmp_path):
    one, two = (hydra.compress(PAIR, **x) for x in asked)
    hydra.save(tmp_path / "s", two)
    kept = hydra.open(tmp_path / "s")
    np.testing.assert_allclose(kept.errors, one.errors, rtol=1e-4)
    said, wanted = (
        {k: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for k, v in x.report["options"].items()}
        for x in (kept, one)
    )
    assert list(said) == list(wanted)
    assert one.report["options"] == said
