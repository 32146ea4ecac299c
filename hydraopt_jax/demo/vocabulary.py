"""The vocabulary: token strings to ids and back."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hydraopt_jax.demo.tasks import END, PAD, SEPARATOR, UNKNOWN, Item, answer, prompt

SPECIAL: tuple[str, ...] = (PAD, UNKNOWN, SEPARATOR, END)
PAD_ID, UNKNOWN_ID, SEPARATOR_ID, END_ID = range(4)


class Vocabulary(NamedTuple):
    """Tokens by id, and ids by token."""

    tokens: tuple[str, ...]
    ids: dict[str, int]


class Items(NamedTuple):
    """Encoded held-out items of T tasks, N each.

    Rows beyond a task's number of items have `valid` False. Targets end in `<end>` and are padded. A target
    token outside the vocabulary is -1: no model can write it, and the item counts as missed.
    """

    prompts: np.ndarray  # [T, N, P] int32
    targets: np.ndarray  # [T, N, G] int32
    valid: np.ndarray  # [T, N] bool


def from_tokens(tokens: Iterable[str]) -> Vocabulary:
    """The vocabulary of tokens in the order of their ids.

    >>> from_tokens(["<pad>", "a"]).ids["a"]
    1
    """
    ordered = tuple(tokens)
    ids = {token: i for i, token in enumerate(ordered)}
    if len(ids) != len(ordered):
        raise ValueError("a vocabulary lists each token once, but this one repeats some")
    return Vocabulary(ordered, ids)


def token_ids(vocabulary: Vocabulary, tokens: Iterable[str], *, unknown: int = UNKNOWN_ID) -> list[int]:
    """Ids of tokens; `unknown` for tokens outside the vocabulary.

    >>> token_ids(from_tokens([*SPECIAL, "a", "b"]), ("a", "b", "<end>", "c"))
    [4, 5, 3, 1]
    """
    return [vocabulary.ids.get(token, unknown) for token in tokens]


def pad_rows(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Rows of different lengths as one padded array `[N, width]`.

    >>> pad_rows([[5], [6, 7]], 3).tolist()
    [[5, 0, 0], [6, 7, 0]]
    """
    out = np.full((len(rows), width), PAD_ID, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def encode_items(
    vocabulary: Vocabulary,
    items: dict[str, Sequence[Item]],
    *,
    limit: int | None = None,
) -> Items:
    """Held-out items of several tasks as arrays.

    Args:
        vocabulary: the model's tokens.
        items: task -> its items, in the order of the result.
        limit: number of first items to take per task; None for all.

    Returns:
        `Items` with arrays [T, N, ...]; N is the largest number of items of a task.

    >>> v = from_tokens([*SPECIAL, "a", "b"])
    >>> encode_items(v, {"correct-en": [Item(("a",), ("b",))]}).prompts.shape
    (1, 1, 4)
    """
    chosen = {name: list(rows)[:limit] for name, rows in items.items()}
    prompts = [[token_ids(vocabulary, prompt(name, i)) for i in rows] for name, rows in chosen.items()]
    targets = [[token_ids(vocabulary, answer(i), unknown=-1) for i in rows] for rows in chosen.values()]
    p, g = (max((len(r) for rows in side for r in rows), default=1) for side in (prompts, targets))
    n = max(len(rows) for rows in chosen.values())
    shape = len(chosen), n
    out = Items(np.zeros((*shape, p), np.int32), np.zeros((*shape, g), np.int32), np.zeros(shape, bool))
    for t, (asked, wanted) in enumerate(zip(prompts, targets, strict=True)):
        out.prompts[t, : len(asked)] = pad_rows(asked, p)
        out.targets[t, : len(wanted)] = pad_rows(wanted, g)
        out.valid[t, : len(asked)] = True
        # padding rows need one real token: a softmax over none is not defined
        out.prompts[t, len(asked) :, 0] = SEPARATOR_ID
    return out
