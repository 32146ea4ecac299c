"""Answers to learn from and second moments, on a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.morphology import outputs
from experiments.morphology.pretrain import init_base
from hydraopt_jax import calibration
from hydraopt_jax.demo.evaluate import answer_all
from hydraopt_jax.demo.model import Base, Config, forward, modules
from hydraopt_jax.demo.vocabulary import PAD_ID

CONFIG = Config(30, layers=1, width=16, heads=2, hidden=24)
PROMPTS = np.array([[[5, 6, 2], [7, 2, PAD_ID]], [[8, 9, 2], [5, 2, PAD_ID]]])


@pytest.fixture(scope="module")
def base():
    fresh = init_base(CONFIG, jax.random.key(0))
    return Base({n: 4 * x for n, x in fresh.params.items()}, CONFIG)


@pytest.fixture(scope="module")
def lora():
    keys = jax.random.split(jax.random.key(1), 2)
    return {
        n: (0.3 * jax.random.normal(keys[0], (2, i, 2)), 0.3 * jax.random.normal(keys[1], (2, 2, o)))
        for n, (i, o) in modules(CONFIG).items()
    }


@pytest.fixture(scope="module")
def heard(base, lora):
    return outputs.answered(base, lora, PROMPTS, longest=4)


def test_answers_follow_their_prompts(base, lora, heard):
    answers = answer_all(base, lora, PROMPTS, longest=4)
    for t, n in np.ndindex(2, 2):
        length = int((PROMPTS[t, n] != PAD_ID).sum())
        row = heard.tokens[t, n]
        np.testing.assert_array_equal(row[:length], PROMPTS[t, n, :length])
        said = row[length : length + 4]
        np.testing.assert_array_equal(said, answers[t, n][: len(said)])
        # a prediction counts where the token after it is of the answer; the last one is predicted, not read
        counted = np.flatnonzero(heard.counts[t, n])
        np.testing.assert_array_equal(counted, length - 1 + np.arange(np.count_nonzero(answers[t, n])))


def test_batches_begin_again_after_the_last_row(heard):
    found = outputs.batch(heard, 1, 2)
    np.testing.assert_array_equal(found.tokens, heard.tokens[:, [1, 0]])


def test_input_moments_are_those_of_the_embedded_tokens_seen(base, lora, heard):
    """The first projections see normalized embeddings, which can be had without the model's internals."""
    seen = []

    def spy(x):
        seen.append(np.asarray(x))
        return jnp.zeros((*x.shape[:-1], CONFIG.width))

    for t in range(2):
        forward(base, {"layers.0.q_proj": spy}, jnp.asarray(heard.tokens[t]))
    rows = np.concatenate([x[heard.tokens[t] != PAD_ID] for t, x in enumerate(seen)])
    found = outputs.moments(base, lora, heard, jax.random.key(2))
    np.testing.assert_allclose(found["layers.0.q_proj"], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_moments_are_positive_and_do_not_see_padding(base, lora, heard):
    found = outputs.moments(base, lora, heard, jax.random.key(2))
    assert set(found) == {n + end for n in lora for end in ("", calibration.OUTPUT)}
    for n, x in found.items():
        assert np.linalg.eigvalsh(x).min() > -1e-6 * np.trace(x), n
        assert np.trace(x) > 0, n
    wider = [np.pad(x, ((0, 0), (0, 0), (0, 3))) for x in heard]
    again = outputs.moments(base, lora, outputs.Sequences(*wider), jax.random.key(2))
    np.testing.assert_allclose(again["layers.0.up_proj"], found["layers.0.up_proj"], rtol=1e-4, atol=1e-5)
