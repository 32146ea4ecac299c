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
from experiments.llm.activations import Batch, Lower, fit, gather, in_order, pad, shapes
from experiments.llm.tasks import Sequence

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
        self.tokens = sorted({token for found in self.after.values() for token in found})
        self.place = {token: i for i, token in enumerate(self.tokens)}

    def candidates(self, logits: jax.Array | np.ndarray) -> np.ndarray:
        """What `choose` needs of logits `[A, V]`: those of the labels' tokens `[A, L]`, or the best `[A]`."""
        return np.asarray(logits[:, np.array(self.tokens)] if self.tokens else logits.argmax(-1))

    def choose(self, candidate: np.ndarray, prefix: list[int]) -> int:
        """The best allowed token after `prefix`, given its row of `candidates`."""
        if not self.tokens:
            return int(candidate)
        allowed = self.after.get(tuple(prefix), self.tokens)
        return allowed[int(candidate[[self.place[token] for token in allowed]].argmax())]

    def complete(self, prefix: list[int]) -> list[int]:
        """`prefix` and the tokens that have no alternative after it."""
        prefix = list(prefix)
        while len(self.after.get(tuple(prefix), ())) == 1:
            prefix += self.after[tuple(prefix)]
        return prefix


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _one_layer(layer, x, at, cache, *, config):
    """Activations `[N, 1, D]` of tokens at positions `at` `[N]` after one layer, and its longer cache."""
    return model.run_layers(layer, x, config=config, positions=at[:, None], cache=cache)


@partial(jax.jit, static_argnames="config")
def _head(outer, x, *, config):
    """Logits `[N, V]` of activations `[N, 1, D]`."""
    return model.logits(outer, x[:, 0], config=config)


def separate(layers: dict[str, Any]) -> list[dict[str, Any]]:
    """Layer by layer: a scan over them would copy every weight for every token."""
    return [
        {name: jnp.asarray(x[i : i + 1]) for name, x in layers.items()} for i in range(len(layers["q_proj"]))
    ]


@partial(jax.jit, static_argnames="config")
def _whole_layer(layer, x, *, config):
    """Activations `[N, P, D]` after one layer, and its keys and values with room for an answer."""
    x, cache = model.run_layers(layer, x, config=config)
    return x, model.Cache(*(jnp.pad(y, [(0, 0), (0, 0), (0, LONGEST_ANSWER), (0, 0), (0, 0)]) for y in cache))


def batches_of(lengths: list[int]) -> Iterator[list[int]]:
    """Indices in the largest batches of similar length."""
    order, rows = sorted(range(len(lengths)), key=lengths.__getitem__), shapes().rows[-1]
    for first in range(0, len(order), rows):
        yield order[first : first + rows]


def decode(
    lower: Lower, upper: dict[str, Any], prefixes: list[tuple[list[int], list[int]]], labels: Labels
) -> list[list[int]]:
    """Greedy answers, without the id that ends them, to pairs of a prompt and the beginning of its answer."""
    out: list[list[int]] = [[] for _ in prefixes]
    layers = separate(lower.layers) + separate(upper)
    for chosen in batches_of([len(prompt) + len(answer) for prompt, answer in prefixes]):
        ids = [prefixes[i][0] + prefixes[i][1] for i in chosen]
        rows, length = fit(len(ids), shapes().rows), fit(max(map(len, ids)), shapes().cached)
        tokens = pad([row[:-1] for row in ids] + [[]] * (rows - len(ids)), length, lower.base.stop)
        past, x = [], model.embed(lower.outer, jnp.asarray(tokens))
        for layer in layers:
            x, found = _whole_layer(layer, x, config=lower.base.config)
            past.append(found)
        answers = _go_on(lower, layers, ids, [prefixes[i][1] for i in chosen], past, labels)
        for i, answer in zip(chosen, answers, strict=True):
            out[i] = answer
    return out


def decode_from_drafts(
    lower: Lower,
    upper: dict[str, Any],
    drafts: list[Sequence],
    hidden: list[np.ndarray],
    begun: dict[int, list[int]],
    past: dict[int, np.ndarray],
    labels: Labels,
) -> dict[int, list[int]]:
    """Greedy answers to the items of `begun`, item -> the beginning of its answer.

    All but the last token of a beginning are those of the item's draft: what the lower layers make of them is
    the same for all stores. `past` keeps it, item -> keys and values `[L, 2, P, G, C]` of the lower layers.
    """
    out: dict[int, list[int]] = {}
    items, config = list(begun), lower.base.config
    below, above = separate(lower.layers), separate(upper)
    _fill_past(lower, below, drafts, [i for i in items if i not in past], past)
    for chosen in batches_of([len(drafts[i].prompt) + len(begun[i]) for i in items]):
        batch = [items[k] for k in chosen]
        ids = [drafts[i].prompt + begun[i] for i in batch]
        rows, length = fit(len(batch), shapes().rows), fit(max(map(len, ids)), shapes().cached)
        entered = np.zeros((rows, length, config.width), np.float32)
        shape = (lower.depth, 2, 1, rows, length + LONGEST_ANSWER, config.kv_heads, config.head_width)
        known = np.zeros(shape, np.float32)
        for row, (i, tokens) in enumerate(zip(batch, ids, strict=True)):
            size = len(tokens) - 1
            entered[row, :size] = hidden[i][:size]
            known[:, :, 0, row, :size] = past[i][:, :, :size]
        cache = [model.Cache(jnp.asarray(keys), jnp.asarray(values)) for keys, values in known]
        x = jnp.asarray(entered)
        for layer in above:
            x, found = _whole_layer(layer, x, config=config)
            cache.append(found)
        answers = _go_on(lower, below + above, ids, [begun[i] for i in batch], cache, labels)
        out |= dict(zip(batch, answers, strict=True))
    return out


def _fill_past(
    lower: Lower,
    layers: list[dict[str, Any]],
    drafts: list[Sequence],
    items: list[int],
    past: dict[int, np.ndarray],
) -> None:
    """Adds to `past` what `layers` make of the drafts of `items`."""
    for chosen in batches_of([len(drafts[i].tokens) for i in items]):
        batch = [items[k] for k in chosen]
        rows = fit(len(batch), shapes().rows)
        length = fit(max(len(drafts[i].tokens) for i in batch), shapes().cached)
        tokens = pad([drafts[i].tokens for i in batch] + [[]] * (rows - len(batch)), length, lower.base.stop)
        x, found = model.embed(lower.outer, jnp.asarray(tokens)), []
        for layer in layers:
            x, cache = _whole_layer(layer, x, config=lower.base.config)
            found.append(np.stack([np.asarray(cache.keys)[0], np.asarray(cache.values)[0]]))
        for row, i in enumerate(batch):
            past[i] = np.stack([y[:, row, : len(drafts[i].tokens)] for y in found])


def _go_on(
    lower: Lower,
    layers: list[dict[str, Any]],
    ids: list[list[int]],
    begun: list[list[int]],
    cache: list[model.Cache],
    labels: Labels,
) -> list[list[int]]:
    """Answers that begin with `begun`, token by token; `cache` holds all but the last of `ids` per row."""
    stop, answers = lower.base.stop, [list(answer) for answer in begun]
    rows, at = list(range(len(ids))), np.array([len(row) - 1 for row in ids])
    last, where = np.array([row[-1] for row in ids]), list(range(len(ids)))
    while rows:
        if (size := fit(len(rows), shapes().rows)) < cache[0].keys.shape[1]:
            kept = np.resize(where, size)
            cache = [model.Cache(x.keys[:, kept], x.values[:, kept]) for x in cache]
            where = list(range(len(rows)))
        wide = cache[0].keys.shape[1]
        tokens, positions = np.full(wide, stop), np.zeros(wide, int)
        tokens[where], positions[where] = last[rows], at[rows]
        x = model.embed(lower.outer, jnp.asarray(tokens)[:, None])
        for i, layer in enumerate(layers):
            x, cache[i] = _one_layer(layer, x, positions, cache[i], config=lower.base.config)
        best, left = labels.candidates(_head(lower.outer, x, config=lower.base.config)), []
        for row, place in zip(rows, where, strict=True):
            answers[row].append(labels.choose(best[place], answers[row]))
            forced = labels.complete(answers[row])
            answers[row] = forced if forced[-1] == stop else answers[row]
            last[row], at[row] = answers[row][-1], at[row] + 1
            if last[row] != stop and len(answers[row]) < LONGEST_ANSWER:
                left.append((row, place))
        rows, where = [row for row, _ in left], [place for _, place in left]
    return [answer[:-1] if answer[-1] == stop else answer for answer in answers]


@partial(jax.jit, static_argnames="config")
def _answer_logits(outer, upper, batch, *, config):
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
