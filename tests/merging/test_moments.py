"""RegMean's second moments, which are larger than all that a merge holds beside them."""

import jax
import numpy as np

from hydraopt_jax import merging
from hydraopt_jax.linalg.decompose import matmul
from hydraopt_jax.merging import activations


def test_regmean_has_one_moment_at_a_time_on_the_device(monkeypatch):
    tasks, inputs = 16, 24
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(x).astype(np.float32) for x in ((tasks, inputs, 2), (tasks, 2, 8)))
    rows = rng.standard_normal((tasks, 40, inputs)).astype(np.float32)

    def matrices():
        return sum(z.shape == (inputs, inputs) for z in jax.live_arrays())

    # tests before this one may hold some
    before, held = matrices(), []

    def product(x, y):
        held.append(matrices() - before)
        return matmul(x, y)

    monkeypatch.setattr(activations, "matmul", product)
    merging.regmean(a, b, np.ones(tasks, np.float32), rank=4, moments=[x.T @ x / 40 for x in rows])
    assert len(held) == tasks
    assert max(held) < 6
