"""The transformer and its greedy decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.morphology.assets import load_adapters, stack_adapters
from experiments.morphology.pretrain import init_base
from experiments.morphology.training import loss
from hydraopt_jax.demo.assets import load_base, load_sample, load_vocabulary
from hydraopt_jax.demo.evaluate import answer_all, evaluate, greedy, greedy_tasks
from hydraopt_jax.demo.model import Base, Config, Lora, forward, modules
from hydraopt_jax.demo.vocabulary import END_ID, Items, encode_items
from hydraopt_jax.forms import Factors

whole = jax.jit(forward)
CONFIG = Config(30, layers=2, width=16, heads=2, hidden=24)


@pytest.fixture
def base() -> Base:
    fresh = init_base(CONFIG, jax.random.key(0))
    return Base({name: 4 * leaf for name, leaf in fresh.params.items()}, CONFIG)


def random_lora(key: jax.Array, *, tasks: int | None = None, rank: int = 3) -> Lora:
    front = () if tasks is None else (tasks,)
    out = {}
    for i, (name, (n_in, n_out)) in enumerate(modules(CONFIG).items()):
        ka, kb = jax.random.split(jax.random.fold_in(key, i))
        out[name] = (
            0.3 * jax.random.normal(ka, (*front, n_in, rank)),
            0.3 * jax.random.normal(kb, (*front, rank, n_out)),
        )
    return out


def slow_greedy(base: Base, lora: Lora, prompt: np.ndarray, longest: int) -> list[int]:
    """The definition: a whole forward pass for each token; one padded length, so one compilation."""
    tokens = [int(t) for t in prompt if t]
    written: list[int] = []
    while len(written) < longest and END_ID not in written:
        row = np.zeros((1, len(prompt) + longest), int)
        row[0, : len(tokens + written)] = tokens + written
        written.append(int(jnp.argmax(whole(base, lora, row)[0, len(tokens + written) - 1])))
    return written + [0] * (longest - len(written))


@pytest.mark.parametrize("adapted", [True, False])
def test_cached_decoding_is_the_full_forward_argmax(base, adapted):
    lora = random_lora(jax.random.key(3)) if adapted else {}
    prompts = np.array([[5, 6, 7, 2, 0, 0], [9, 8, 2, 0, 0, 0], [10, 11, 12, 13, 14, 2], [2, 0, 0, 0, 0, 0]])
    found = np.asarray(greedy(base, lora, jnp.asarray(prompts), 7))
    assert found.tolist() == [slow_greedy(base, lora, row, 7) for row in prompts]


def test_every_task_uses_its_own_adapter(base):
    lora = random_lora(jax.random.key(4), tasks=3)
    prompts = jnp.tile(jnp.array([[[5, 6, 7, 2], [9, 2, 0, 0]]]), (3, 1, 1))
    together = greedy_tasks(base, lora, prompts, 5)
    alone = [greedy(base, {m: (a[t], b[t]) for m, (a, b) in lora.items()}, prompts[t], 5) for t in range(3)]
    np.testing.assert_array_equal(together, jnp.stack(alone))
    assert len({bytes(np.asarray(x)) for x in alone}) > 1


def test_a_lora_pair_is_its_product_added_to_the_kernel(base):
    lora = random_lora(jax.random.key(5))
    merged = dict(base.params)
    for name, (a, b) in lora.items():
        merged[f"{name}.kernel"] = merged[f"{name}.kernel"] + a @ b
    tokens = jnp.array([[5, 6, 7, 8]])
    expected = forward(Base(merged, CONFIG), {}, tokens)
    np.testing.assert_allclose(forward(base, lora, tokens), expected, rtol=2e-4, atol=2e-4)


def test_the_future_and_the_padding_change_nothing(base):
    short = forward(base, {}, jnp.array([[5, 6, 7]]))
    long = forward(base, {}, jnp.array([[5, 6, 7, 0, 9]]))
    np.testing.assert_allclose(short, long[:, :3], atol=1e-5)


def test_the_loss_counts_the_answer_only(base):
    tokens = jnp.array([[5, 6, 2, 7, END_ID, 0]])
    log_p = jax.nn.log_softmax(forward(base, {}, tokens[:, :5]))[0]
    expected = -(log_p[2, 7] + log_p[3, END_ID]) / 2
    np.testing.assert_allclose(loss(base, {}, tokens, jnp.array([3])), expected, rtol=1e-5)


def test_scores_count_exact_answers_and_edits(base):
    prompts = np.array([[[5, 6, 2], [7, 8, 2], [2, 0, 0]]])
    answers = np.asarray(greedy_tasks(base, {}, jnp.asarray(prompts), 4))
    targets = np.array([[[*answers[0, 0]], [29, 29, END_ID, 0], [29, END_ID, 0, 0]]])
    targets[0, 1, :2] = (answers[0, 1, :2] + 1) % 26 + 4
    scores = evaluate(base, {}, Items(prompts, targets, np.array([[True, True, False]])), longest=4, block=2)
    assert scores.exact.tolist() == [0.5]
    assert 0 < scores.error[0] < 2


def test_wrong_number_of_adapters_is_refused(base):
    items = Items(np.ones((2, 1, 3), int), np.ones((2, 1, 3), int), np.ones((2, 1), bool))
    with pytest.raises(ValueError, match=r"\[3\] tasks for items of 2"):
        evaluate(base, random_lora(jax.random.key(1), tasks=3), items)


def test_a_store_answers_in_mixed_batches_as_task_by_task(base):
    prompts = np.array([[[5, 6, 2], [7, 2, 0]], [[8, 9, 2], [5, 2, 0]], [[6, 6, 2], [9, 8, 2]]])
    lora = random_lora(jax.random.key(1), tasks=3)
    of = jnp.arange(3)
    stored = {n: (Factors(a, b, of, of),) for n, (a, b) in lora.items()}
    found = [answer_all(base, x, prompts, longest=4, block=2) for x in (lora, stored)]
    np.testing.assert_array_equal(*found)


def test_what_ships_can_do_its_tasks():
    items = {t: rows for t, rows in load_sample().items() if t in ("lemmatise-en", "pronounce-es")}
    adapters = load_adapters()
    assert len(adapters) == len(load_sample()) == 40
    held = encode_items(load_vocabulary(), items)
    scores = evaluate(load_base(), stack_adapters({t: adapters[t] for t in items}), held)
    assert scores.exact.min() > 0.7
    assert scores.error.max() < 0.1
