"""The transformer and the adapters that the package ships, in mixed batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from plain_stores import store_of

from experiments.morphology.assets import load_adapters
from hydraopt_jax import serving
from hydraopt_jax.demo import assets
from hydraopt_jax.demo.evaluate import greedy
from hydraopt_jax.demo.model import bind, forward
from hydraopt_jax.demo.vocabulary import encode_items
from hydraopt_jax.store import task_factors


@pytest.fixture(scope="module")
def shipped():
    adapters = load_adapters()
    return store_of({t: adapters[t] for t in ("lemmatise-en", "pronounce-es", "inflect-de")})


def test_the_shipped_transformer_serves_a_mixed_batch(shipped):
    base = assets.load_base()
    model = bind(base)
    serving.wrap(model, serving.load(shipped, dtype=jnp.float32), ["layers.*"])
    tokens = jax.random.randint(jax.random.key(0), (4, 6), 5, 60)
    positions = jnp.broadcast_to(jnp.arange(6), (4, 6))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (4, 6, 6))
    ids = jnp.array([2, 0, -1, 1])
    serving.set_task_ids(model, ids[:, None])
    got = nnx.jit(lambda model: model.readout(model(tokens, positions, mask, {})[0]))(model)
    whole = jax.jit(forward)
    for row, task in enumerate(ids.tolist()):
        factors = task_factors(shipped, shipped.tasks[task])
        lora = {name: (a, (task >= 0) * b) for name, (a, b) in factors.items()}
        np.testing.assert_allclose(got[row], whole(base, lora, tokens[row : row + 1])[0], atol=2e-3)


def test_answers_of_a_mixed_batch_are_right(shipped):
    rows = {t: items[:16] for t, items in assets.load_sample().items() if t in shipped.tasks}
    held = encode_items(assets.load_vocabulary(), {t: rows[t] for t in shipped.tasks})
    ids = np.repeat(np.arange(3), 16)
    order = np.random.default_rng(0).permutation(48)
    prompts, targets = (np.asarray(x).reshape(48, -1)[order] for x in (held.prompts, held.targets))
    served = serving.branches(serving.load(shipped, dtype=jnp.float32), jnp.asarray(ids[order])[:, None])
    answers = np.asarray(jax.jit(lambda p: greedy(assets.load_base(), served, p, targets.shape[1]))(prompts))
    exact = (answers == targets).all(1)
    assert np.mean(exact) > 0.7
