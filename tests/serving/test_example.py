"""The example from Orbax trees to a mixed forward pass runs, and its rows are those of the adapters."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.morphology.assets import load_adapters
from experiments.serving import example
from hydraopt_jax.demo import assets
from hydraopt_jax.demo.model import forward


def test_trees_in_orbax_become_a_jitted_mixed_batch(tmp_path, capsys):
    example.train(tmp_path)
    tokens = jnp.array([[5, 9, 14, 22, 7]] * 3)
    store, logits = example.main(tmp_path, tokens)
    assert store.tasks == example.TASKS
    assert "relative squared error" in capsys.readouterr().out
    assert 0 < store.report["refinement"]["after"] < store.report["refinement"]["before"]
    adapters = load_adapters()
    base = assets.load_base()
    whole = jax.jit(forward)
    nothing = {name: (a, 0 * b) for name, (a, b) in adapters[store.tasks[0]].items()}
    plain = whole(base, nothing, tokens[:1])[0]
    for row, task in enumerate(example.TASKS):
        want = whole(base, adapters[task], tokens[row : row + 1])[0]
        # the store keeps two thirds of the directions; what is lost is small beside what the task changes
        assert np.linalg.norm(logits[row] - want) < 0.5 * np.linalg.norm(plain - want)
