"""Scores of stacked adapters: greedy answers, exact match, character error rate.

Letters: T tasks, N items, P and G padded prompt and answer lengths, I/O in/out, S stored rank, V vocabulary.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hydraopt_jax import serving
from hydraopt_jax.demo.model import Base, Branches, Lora, bind
from hydraopt_jax.demo.vocabulary import END_ID, PAD_ID, Items, pad_rows
from hydraopt_jax.serving.mixed_tasks import Module, Term

Adapted = Lora | Mapping[str, Module]


class Scores(NamedTuple):
    """Scores per task."""

    exact: np.ndarray  # [T] fraction of items answered exactly
    error: np.ndarray  # [T] character error rate: edits / length of the true answers


def greedy(base: Base, lora: Branches, prompts: Array, longest: int) -> Array:
    """Greedy answers to prompts, decoded with cached keys and values.

    The cache has P columns for the prompts and one column per answered token. Unused prompt columns of a row
    stay masked, and rotary positions continue from the row's own length. Padding does not change the answers.

    Args:
        lora: module -> `(a [I, S], b [S, O])`, or `{}`.
        prompts: [N, P], padded on the right.
        longest: upper limit of answered tokens, `<end>` included (static).

    Returns:
        Answers [N, longest]: tokens up to `<end>`, then padding.
    """
    model = bind(base)
    n, p = prompts.shape
    lengths = jnp.sum(prompts != PAD_ID, -1)
    columns = jnp.arange(p + longest)
    seen = columns < lengths[:, None]  # [N, P + G]
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((p, p), bool)), (n, p, p))
    x, cache = model(prompts, jnp.broadcast_to(jnp.arange(p), (n, p)), mask, lora)
    room = ((0, 0), (0, longest), (0, 0), (0, 0))
    cache = [(jnp.pad(k, room), jnp.pad(v, room)) for k, v in cache]
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, 1)[:, 0]
    first = jnp.argmax(model.readout(last), -1).astype(jnp.int32)

    def unfinished(carry):
        step, _, _, ended, _ = carry
        return (step < longest) & ~jnp.all(ended)

    def advance(carry):
        step, token, answers, ended, cache = carry
        token = jnp.where(ended, PAD_ID, token)
        answers = jax.lax.dynamic_update_slice_in_dim(answers, token[:, None], step, 1)
        ended = ended | (token == END_ID)
        new = (columns >= p) & (columns <= p + step)
        x, cache = model(
            token[:, None], (lengths + step)[:, None], (seen | new)[:, None], lora, cache, p + step
        )
        following = jnp.argmax(model.readout(x[:, 0]), -1).astype(jnp.int32)
        return step + 1, following, answers, ended, cache

    empty = jnp.full((n, longest), PAD_ID, jnp.int32)
    start = (jnp.int32(0), first, empty, jnp.zeros(n, bool), cache)
    return jax.lax.while_loop(unfinished, advance, start)[2]


@functools.partial(jax.jit, static_argnames="longest")
def greedy_tasks(base: Base, lora: Lora, prompts: Array, longest: int) -> Array:
    """Answers of `greedy` for every task with its own adapter.

    Args:
        lora: module -> `(a [T, I, S], b [T, S, O])`, or `{}`.
        prompts: [T, N, P].

    Returns:
        [T, N, longest].
    """
    return jax.vmap(greedy, in_axes=(None, 0, 0, None))(base, lora, prompts, longest)


@functools.partial(jax.jit, static_argnames="longest")
def greedy_served(base: Base, modules: Mapping[str, Module], prompts: Array, longest: int) -> Array:
    """Answers of `greedy` for the items of all tasks in one mixed batch, through `serving.branches`.

    Args:
        modules: modules of a store of T tasks, from `serving.load`.
        prompts: [T, N, P].

    Returns:
        [T, N, longest].
    """
    tasks, items, width = prompts.shape
    ids = jnp.repeat(jnp.arange(tasks), items)[:, None]
    found = greedy(base, serving.branches(modules, ids), prompts.reshape(-1, width), longest)
    return found.reshape(tasks, items, longest)


def edit_distance(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Levenshtein distances of pairs of sequences; each ends before its first `<end>` or padding token.

    Args:
        found: [N, F].
        wanted: [N, G].

    Returns:
        [N].

    >>> edit_distance(np.array([[9, 8, 3]]), np.array([[9, 7, 8, 6, 3]]))
    array([2])
    """
    n_found, n_wanted = _lengths(found), _lengths(wanted)
    rows = np.arange(len(found))
    table = np.zeros((found.shape[1] + 1, wanted.shape[1] + 1, len(found)), np.int64)
    table[:, 0] = np.arange(found.shape[1] + 1)[:, None]
    table[0, :] = np.arange(wanted.shape[1] + 1)[:, None]
    for i in range(1, table.shape[0]):
        for j in range(1, table.shape[1]):
            replaced = table[i - 1, j - 1] + (found[:, i - 1] != wanted[:, j - 1])
            table[i, j] = np.minimum(replaced, np.minimum(table[i - 1, j], table[i, j - 1]) + 1)
    return table[n_found, n_wanted, rows]


def _lengths(rows: np.ndarray) -> np.ndarray:
    stops = (rows == END_ID) | (rows == PAD_ID)
    return np.where(stops.any(-1), stops.argmax(-1), rows.shape[-1])


def answer_all(
    base: Base, lora: Adapted, prompts: np.ndarray, *, longest: int = 32, block: int = 32
) -> np.ndarray:
    """Greedy answers [T, N, longest] to prompts [T, N, P], computed for `block` items per task at a time.

    All blocks have one shape, so that the function compiles once.
    """
    n = prompts.shape[1]
    block = min(block, n)
    answers = []
    served = any(isinstance(term, Term) for terms in lora.values() for term in terms)
    answer: Any = greedy_served if served else greedy_tasks
    for start in range(0, n, block):
        part = prompts[:, start : start + block]
        missing = block - part.shape[1]
        part = np.concatenate([part, np.repeat(part[:, :1], missing, 1)], 1)
        answers.append(np.asarray(answer(base, lora, part, longest))[:, : block - missing])
    return np.concatenate(answers, 1)


def evaluate(base: Base, lora: Adapted, items: Items, *, longest: int = 32, block: int = 32) -> Scores:
    """Exact match and character error rate of every task.

    `exact[t]` is the fraction of valid items of task t whose answer is the true one. `error[t]` is the sum of
    edit distances over the sum of lengths; a feature or a phoneme counts as one character.

    Args:
        base: the transformer.
        lora: module -> `(a [T, I, S], b [T, S, O])` in the order of the tasks of `items`, scale folded in, of
            any S; `{}` for the base alone. Modules of a store from `serving.load` are answered in mixed
            batches.
        items: encoded held-out items.
        longest: upper limit of answered tokens; a longer true answer counts as missed.
        block: items per task decoded together; fewer need less memory.

    Returns:
        `Scores` with arrays [T], NaN for a task without items.

    Raises:
        ValueError: the adapters and the items differ in the number of tasks.
    """
    tasks = len(items.prompts)
    for name, terms in lora.items():
        counts = {len(x.a_of) if isinstance(x, Term) else x.shape[0] for x in terms}
        if counts != {tasks}:
            raise ValueError(f"{name}: factors of {sorted(counts)} tasks for items of {tasks} tasks")
    # a block takes as long as its longest answer: sort items by length
    order = np.argsort(_lengths(items.targets.reshape(-1, items.targets.shape[-1])).reshape(tasks, -1), 1)
    items = jax.tree.map(lambda x: x[np.arange(tasks)[:, None], order], items)
    answers = answer_all(base, lora, items.prompts, longest=longest, block=block)
    width = max(longest, items.targets.shape[-1])
    found = pad_rows(answers.reshape(-1, longest).tolist(), width).reshape(*answers.shape[:2], width)
    wanted = np.full_like(found, PAD_ID)
    wanted[..., : items.targets.shape[-1]] = items.targets
    right = np.all(found == wanted, -1)
    distance = np.zeros(right.shape, np.int64)
    distance[~right] = edit_distance(found[~right], wanted[~right])
    length = _lengths(wanted.reshape(-1, width)).reshape(right.shape)
    valid = items.valid
    with np.errstate(invalid="ignore"):
        exact = np.sum(right & valid, 1) / np.sum(valid, 1)
        error = np.sum(distance * valid, 1) / np.sum(length * valid, 1)
    return Scores(exact, error)
