"""The same numbers as PEFT's merging: recorded ones, and PEFT itself where it is installed."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hydraopt_jax import merging
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.merging import sparse

spec = importlib.util.spec_from_file_location("record_peft", Path(__file__).parent / "record_peft.py")
peft = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peft)


@pytest.fixture(
    scope="module",
    params=["recorded", pytest.param("live", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")])],
)
def golden(request):
    def live():
        pytest.importorskip("torch")
        pytest.importorskip("peft")
        return peft.record()

    return {"recorded": lambda: dict(np.load(peft.GOLDEN)), "live": live}[request.param]()


def combine(tensors, weights, sparsify, elect=None):
    got = sparse.combine(jnp.asarray(tensors), jnp.asarray(weights), lambda x: x, sparsify, elect)
    return np.asarray(got)


def trim(x, t):
    return sparse.trim(x, peft.DENSITY)


def test_functions_of_matrices(golden):
    rows = {k.removeprefix("functions/"): v for k, v in golden.items() if k.startswith("functions/")}
    tensors, masks = rows.pop("tensors"), jnp.asarray(rows.pop("masks"))
    weights = np.float32(peft.WEIGHTS)

    def dropped(x, t):
        return x * masks[t] / peft.DENSITY

    got = {"magnitude": combine(tensors, weights, trim), "dare": combine(tensors, weights, dropped)}
    for elect in ("total", "frequency"):
        got[f"ties {elect}"] = combine(tensors, weights, trim, elect)
        got[f"dare-ties {elect}"] = combine(tensors, weights, dropped, elect)
    assert got.keys() == rows.keys()
    for name, want in rows.items():
        np.testing.assert_allclose(got[name], want, atol=1e-6, err_msg=name)


def collection(golden, part, shapes):
    out = []
    for t, (rank, alpha) in enumerate(shapes):
        a, b = golden[f"{part}/a{t}"].T, golden[f"{part}/b{t}"].T * (alpha / rank)
        out.append(Adapter(str(t), {"q": a}, {"q": b}))
    return out


@pytest.mark.parametrize(
    ("case", "method", "options"),
    [
        ("alike/linear", "linear-factors", {}),
        ("alike/linear signed", "linear-factors", {"weights": peft.SIGNED}),
        ("alike/ties_svd", "ties", {"rank": 4, "density": peft.DENSITY}),
        ("alike/magnitude_prune_svd", "magnitude", {"rank": 4, "density": peft.DENSITY}),
        ("uneven/svd", "linear", {}),
        ("uneven/svd signed", "linear", {"weights": peft.SIGNED, "rank": 2}),
        ("uneven/cat", "concatenation", {"weights": peft.SIGNED}),
    ],
)
def test_weighted_adapters_of_a_model(golden, case, method, options):
    part = case.split("/")[0]
    made = collection(golden, part, {"alike": peft.ALIKE, "uneven": peft.UNEVEN}[part])
    merged = merging.merge_adapters(made, method, **({"weights": peft.WEIGHTS} | options))
    want = golden[case].T
    np.testing.assert_allclose(merged.a["q"] @ merged.b["q"], want, atol=1e-5 * np.abs(want).max())


def test_ties_of_factors(golden):
    """PEFT's "ties" trims and elects the factors; the same function does it here."""
    root = np.sqrt(np.float32(peft.WEIGHTS) * 2)
    sides = [np.stack([golden[f"alike/{side}{t}"] for t in range(peft.TASKS)]) for side in "ab"]
    a, b = (combine(x, root, trim, "total") for x in sides)
    np.testing.assert_allclose(b @ a, golden["alike/ties"], atol=1e-5)
