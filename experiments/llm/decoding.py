"""Greedy answers: token by token with a cache of keys and values, or verified against a draft in one pass.

Classification is decoded within its labels: at every position only tokens that continue one of them are
allowed. Stores are scored by drafts: the answer that an adapter itself gives is run through the stored one;
as long as the stored adapter's best token is the draft's, its greedy answer is the draft, so that only
answers that differ are decoded, from their first difference. That is exact, and costs one pass over the
upper layers.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.llm import model
from experiments.llm.activations import LENGTHS, Batch, Lower, fit, gather, in_order, pad
from experiments.llm.tasks import Sequence

ROWS = 32
LONGEST_ANSWER = 48


class Labels:
    """The tokens that may follow each beginning of a label; without labels all may."""

    def __init__(self, labels: list[list[int]] | None) -> None:
        """`labels` are token ids, with the id that ends an answer."""
        self.after: dict[tuple[int, ...], list[int]] = {}
        for label in labels or []:
            for i, token in enumerate(label):
                found = self.after.setdefault(tuple(label[:i]), [])
                if token not in found:
                    found.append(token)

    def choose(self, scores: np.ndarray, prefix: list[int]) -> int:
        """The allowed token with the highest of `scores` `[V]` after `prefix`."""
        if not self.after:
            return int(scores.argmax())
        allowed = self.after.get(tuple(prefix), [])
        return allowed[int(scores[allowed].argmax())] if allowed else int(scores.argmax())

    def complete(self, prefix: list[int]) -> list[int]:
        """`prefix` and the tokens that have no alternative after it."""
        prefix = list(prefix)
        while len(self.after.get(tuple(prefix), ())) == 1:
            prefix += self.after[tuple(prefix)]
        return prefix


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _extend(outer, layers, tokens, at, last, cache, *, config):  # type: ignore[no-untyped-def]
    """Logits `[N, V]` at index `last` `[N]` of `tokens` `[N, P]` at positions `at`, and the longer cache."""
    x, cache = model.run_layers(layers, model.embed(outer, tokens), config=config, positions=at, cache=cache)
    return model.logits(outer, x[jnp.arange(len(x)), last], config=config), cache


def joined(lower: Lower, upper: dict[str, Any]) -> dict[str, Any]:
    """All layers, the upper ones as given."""
    return {name: jnp.concatenate([lower.layers[name], upper[name]]) for name in lower.layers}


def decode(
    lower: Lower, layers: dict[str, Any], prefixes: list[tuple[list[int], list[int]]], labels: Labels
) -> list[list[int]]:
    """Greedy answers, without the id that ends them, to pairs of a prompt and the beginning of its answer."""
    out: list[list[int]] = [[] for _ in prefixes]
    order = sorted(range(len(prefixes)), key=lambda i: sum(map(len, prefixes[i])))
    for first in range(0, len(order), ROWS):
        chosen = order[first : first + ROWS]
        answers = _decode_batch(lower, layers, [prefixes[i] for i in chosen], labels)
        for i, answer in zip(chosen, answers, strict=True):
            out[i] = answer
    return out


def _decode_batch(
    lower: Lower, layers: dict[str, Any], prefixes: list[tuple[list[int], list[int]]], labels: Labels
) -> list[list[int]]:
    config, stop = lower.base.config, lower.base.stop
    rows = fit(len(prefixes), (8, ROWS))
    filled = prefixes + [([stop], [])] * (rows - len(prefixes))
    ids = [prompt + answer for prompt, answer in filled]
    length = fit(max(map(len, ids)), LENGTHS)
    shape = (config.layers, rows, length + LONGEST_ANSWER, config.kv_heads, config.head_width)
    cache = model.Cache(jnp.zeros(shape), jnp.zeros(shape))
    at = np.array([len(row) for row in ids])
    positions = np.broadcast_to(np.arange(length), (rows, length))
    extend = partial(_extend, lower.outer, layers, config=config)
    scores, cache = extend(pad(ids, length, stop), positions, at - 1, cache)
    answers = [list(answer) for _, answer in filled]
    done = [i >= len(prefixes) for i in range(rows)]
    while True:
        best = np.asarray(scores)
        for i in range(rows):
            if not done[i]:
                answers[i].append(labels.choose(best[i], answers[i]))
                forced = labels.complete(answers[i])
                if forced[-1] == stop:
                    answers[i] = forced
                done[i] = answers[i][-1] == stop or len(answers[i]) >= LONGEST_ANSWER
        if all(done):
            return [answer[:-1] if answer[-1] == stop else answer for answer in answers[: len(prefixes)]]
        tokens = np.array([[answer[-1] if answer else stop] for answer in answers], np.int32)
        # Rows that are done write past their answer again and again, which nobody reads.
        scores, cache = extend(tokens, np.minimum(at, shape[2] - 1)[:, None], np.zeros(rows, int), cache)
        at = at + 1


@partial(jax.jit, static_argnames="config")
def _answer_logits(outer, upper, batch, *, config):  # type: ignore[no-untyped-def]
    """Logits `[A, V]` at the answers' positions of a batch."""
    x, _ = model.run_layers(upper, batch.hidden, config=config)
    return model.logits(outer, x.reshape(-1, config.width)[batch.at], config=config)


def answer_logits(
    lower: Lower, upper: dict[str, Any], sequences: list[Sequence], hidden: list[np.ndarray], rows: int = 16
) -> Iterator[tuple[list[int], Batch, jax.Array]]:
    """Per batch, the sequences in it, the batch, and logits `[A, V]` of their answers' tokens."""
    for chosen in in_order(sequences, rows):
        batch = gather(sequences, hidden, chosen, rows)
        yield chosen, batch, _answer_logits(lower.outer, upper, batch, config=lower.base.config)


def first_difference(best: list[int], draft: list[int]) -> int | None:
    """The first position at which a stored adapter's tokens leave the draft, or None."""
    return next((i for i, (a, b) in enumerate(zip(best, draft, strict=True)) if a != b), None)
