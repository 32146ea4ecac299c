"""Stacking: padding is exact, missing modules are zeros, what cannot be stored together is refused."""

import numpy as np
import pytest

from hydraopt_jax.adapters import Adapter, check, module_shapes, stack
from hydraopt_jax.errors import HydraOptError


def adapter(task: str, ranks: dict[str, int], shapes: dict[str, tuple[int, int]]) -> Adapter:
    rng = np.random.default_rng(len(task))
    a = {name: rng.normal(size=(shapes[name][0], r)).astype(np.float32) for name, r in ranks.items()}
    b = {name: rng.normal(size=(r, shapes[name][1])).astype(np.float32) for name, r in ranks.items()}
    return Adapter(task, a, b, source=f"/{task}")


SHAPES = {"q": (6, 6), "k": (6, 2), "o": (6, 6)}


def test_stack_keeps_every_delta():
    found = [
        adapter("a", {"q": 2, "k": 1, "o": 2}, SHAPES),
        adapter("bb", {"q": 4, "o": 1}, SHAPES),
        adapter("ccc", {"k": 3}, SHAPES),
    ]
    stacked = stack(found)
    assert stacked.tasks == ("a", "bb", "ccc")
    assert [x.modules for x in stacked.buckets] == [("q", "o"), ("k",)]
    np.testing.assert_array_equal(stacked.buckets[0].ranks, [[2, 4, 0], [2, 1, 0]])
    for bucket in stacked.buckets:
        for m, name in enumerate(bucket.modules):
            for t, one in enumerate(found):
                empty = np.zeros((SHAPES[name][0], 0)), np.zeros((0, SHAPES[name][1]))
                expected = one.a.get(name, empty[0]) @ one.b.get(name, empty[1])
                np.testing.assert_allclose(bucket.a[m, t] @ bucket.b[m, t], expected, atol=1e-6)


def test_size_leaves_padding_out():
    found = [adapter("a", {"q": 2, "k": 1}, SHAPES), adapter("bb", {"q": 4}, SHAPES)]
    assert stack(found).size == sum(x.size for one in found for x in (*one.a.values(), *one.b.values()))


def test_shapes():
    assert module_shapes(adapter("a", {"q": 2, "k": 1}, SHAPES)) == {"q": (6, 6), "k": (6, 2)}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "no adapter given"),
        ([adapter("a", {"q": 1}, SHAPES)] * 2, "'a' is used by both /a and /a"),
        ([Adapter("a", {}, {})], "holds no LoRA factor"),
        (
            [adapter("a", {"q": 1}, SHAPES), adapter("b", {"q": 1}, {"q": (5, 6)})],
            r"q: 'b' has .* \[5, 6\], 'a' has \[6, 6\]",
        ),
        ([Adapter("a", {"q": np.array([[np.nan]])}, {"q": np.ones((1, 1))})], "q has NaN.*input-side"),
        ([Adapter("a", {"q": np.ones((1, 1))}, {"q": np.array([[np.inf]])})], "q has NaN.*output-side"),
    ],
)
def test_refusals(found, message):
    with pytest.raises(HydraOptError, match=message):
        check(found)
