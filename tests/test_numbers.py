"""Numbers at their edges: overflow, denormals, rank 0, wide ranks, one task, thin modules, copies."""

import numpy as np
import pytest

import hydraopt_jax as hydra
from hydraopt_jax import HydraOptError, formats, store
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.store.sizes import measure_size


def one(task="one", shape=(48, 32), rank=3, size=1.0, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(shape[0], rank)), size * rng.normal(size=(rank, shape[1]))
    return Adapter(task, {"q": a.astype(np.float32)}, {"q": b.astype(np.float32)}, dtype)


def delta(content, task):
    found = store.task_factors(content, task).get("q")
    return np.zeros(()) if found is None else found[0].astype(np.float64) @ found[1]


def true(adapter):
    return adapter.a["q"].astype(np.float64) @ adapter.b["q"]


WAYS = {
    "plain": lambda x: hydra.compress(x, form=hydra.forms.Hydra()),
    "coded": lambda x: hydra.compress(x, max_error=0.01),
    "lossless": lambda x: hydra.compress(x, budget=1),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "adapter",
    [
        one(size=1e-12),
        one(size=1e12),
        one(shape=(2, 32), rank=3),
        one(shape=(48, 2), rank=3),
        one(shape=(1, 32), rank=1),
        one(shape=(48, 1), rank=2),
        one(shape=(1, 1), rank=4),
    ],
    ids=["tiny", "huge", "R > I", "R > O", "1 x N", "N x 1", "1 x 1"],
)
def test_one_task_alone(tmp_path, way, adapter):
    """T = 1 and K = T = 1: within the error asked for, whatever the size and shape."""
    hydra.save(tmp_path / "s", WAYS[way]([adapter]))
    back = hydra.open(tmp_path / "s")
    lost = np.linalg.norm(delta(back, "one") - true(adapter)) / np.linalg.norm(true(adapter))
    assert lost**2 <= 0.0101
    assert abs(lost**2 - back.errors[0, 0]) < 1e-3


def test_values_beyond_half_precision_are_balanced_or_refused(tmp_path):
    """b alone overflows float16, the balanced pair does not; a larger delta is refused by name."""
    adapter = one(size=1e5, dtype="float16")
    kept = hydra.compress([adapter], form=hydra.forms.Hydra(), dtype="float16")
    lost = np.linalg.norm(delta(kept, "one") - true(adapter)) / np.linalg.norm(true(adapter))
    assert lost < 1e-3
    with pytest.raises(HydraOptError, match="q: values overflow float16"):
        hydra.compress([one(size=1e12)], form=hydra.forms.Hydra(), dtype="float16")
    formats.write_adapter(tmp_path / "out", store.decode(kept, "one"), dtype="float16")
    with pytest.raises(HydraOptError, match="overflow float16"):
        formats.write_adapter(tmp_path / "no", one(size=1e12), dtype="float16")


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
@pytest.mark.parametrize("way", WAYS)
def test_what_float32_cannot_square_is_refused_by_name(way, size):
    """Denormals and their like: their energy would count as zero, and an error relative to it be a lie."""
    with pytest.raises(HydraOptError, match=r"two: q has factors of norms .* set them to zero"):
        WAYS[way]([one(), one("two", size=size)])


@pytest.mark.parametrize("way", WAYS)
def test_rank_0_is_a_zero_delta(tmp_path, way):
    none = Adapter("none", {"q": np.zeros((48, 0), np.float32)}, {"q": np.zeros((0, 32), np.float32)})
    hydra.save(tmp_path / "s", WAYS[way]([one(), none]))
    back = hydra.open(tmp_path / "s")
    assert not delta(back, "none").any()
    assert hydra.measure(back, [one()])["one"] <= 0.0101


@pytest.mark.parametrize(("sign", "heads"), [(1, 1), (-1, 2)])
def test_copies_and_negatives_are_exact(sign, heads):
    """Copies under one head cost one adapter; a task and its negative under two a head more."""
    base = one(shape=(160, 128), rank=4)
    many = [base.replace(task=f"t{k}", b={"q": base.b["q"] * sign**k}) for k in range(3)]
    plain = hydra.compress(many, form=hydra.forms.Hydra(heads=heads))
    assert np.nanmax(plain.errors) < 1e-9
    assert store.count(plain) <= base.a["q"].size + heads * base.b["q"].size


def test_a_coded_copy_costs_next_to_nothing():
    base = one(shape=(160, 128), rank=4)
    alone = measure_size(WAYS["coded"]([base]))
    many = [base.replace(task=f"t{k}") for k in range(3)]
    assert measure_size(WAYS["coded"](many)) < 1.3 * alone


def test_negatives_under_one_head_are_zero_and_say_so():
    """The mean of a task and its negative is nothing: one head keeps nothing, and says so."""
    base = one()
    both = [base, base.replace(task="two", b={"q": -base.b["q"]})]
    kept = hydra.compress(both, form=hydra.forms.Hydra(heads=1))
    np.testing.assert_allclose(kept.errors, 1, rtol=1e-4)
