"""The adapters' own answers to unlabeled prompts, and second moments on them.

No gold answer is used: each task's own adapter answers the prompts greedily. Refinement compares a stored
adapter with the original on these sequences. Calibration gathers inputs and output gradients on them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hydraopt_jax import calibration
from hydraopt_jax.demo.evaluate import answer_all
from hydraopt_jax.demo.model import Base, Lora, forward, low_rank, modules
from hydraopt_jax.demo.vocabulary import PAD_ID


class Sequences(NamedTuple):
    """Prompts with the adapters' own answers.

    Attributes:
      tokens: `[T, N, L]` int32, padded on the right.
      counts: `[T, N, L]` bool, positions whose next token belongs to the answer.
    """

    tokens: np.ndarray
    counts: np.ndarray


def answered(base: Base, lora: Lora, prompts: np.ndarray, *, longest: int = 24, keep: int = 36) -> Sequences:
    """Prompts `[T, N, P]` with the greedy answers of each task's own adapter, cut to `keep` tokens."""
    answers = answer_all(base, lora, prompts, longest=longest)
    tasks, count, width = prompts.shape
    tokens = np.full((tasks, count, width + longest), PAD_ID, np.int32)
    tokens[..., :width] = prompts
    lengths = (prompts != PAD_ID).sum(-1)
    where = lengths[..., None] + np.arange(longest)
    np.put_along_axis(tokens, where, answers, -1)
    at = np.arange(width + longest)
    following = np.roll(tokens, -1, -1)
    counts = (at >= lengths[..., None] - 1) & (at < width + longest - 1) & (following != PAD_ID)
    used = min(int((tokens != PAD_ID).any((0, 1)).sum()) - 1, keep)
    return Sequences(tokens[..., :used], counts[..., :used])


def batch(found: Sequences, start: int, size: int) -> Sequences:
    """Rows `start` to `start + size` of every task; after the last row the first one follows."""
    rows = (start + np.arange(size)) % found.tokens.shape[1]
    return Sequences(found.tokens[:, rows], found.counts[:, rows])


@functools.partial(jax.jit, static_argnames="names")
def sum_moments(
    base: Base, lora: Lora, tokens: Array, counts: Array, key: Array, names: tuple[str, ...]
) -> dict[str, tuple[Array, Array]]:
    """Sums of `x x.T` and `g g.T` over one batch of one task, by module.

    x are the module's inputs at all tokens. g are gradients at its outputs of the log-likelihood of next
    tokens that are drawn from the model itself.
    """
    shape = tokens.shape
    sizes = modules(base.config)
    probes = {n: jnp.zeros((*shape, sizes[n][1])) for n in names}
    real = tokens != PAD_ID

    def likelihood(probes: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        seen: dict[str, Array] = {}

        def branch(name: str) -> Any:
            def add(x: Array) -> Array:
                seen[name] = x
                return low_rank(x, *lora[name]) + probes[name]

            return add

        scores = jax.nn.log_softmax(forward(base, {n: branch(n) for n in names}, tokens))
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(scores))
        picked = jnp.take_along_axis(scores, drawn[..., None], -1)[..., 0]
        return jnp.sum(picked * counts), seen

    gradients, seen = jax.grad(likelihood, has_aux=True)(probes)
    out = {}
    for n in names:
        x = calibration.accumulate(calibration.start(sizes[n][0]), seen[n], real)
        g = calibration.accumulate(calibration.start(sizes[n][1]), gradients[n], real)
        out[n] = x.total, g.total
    return out


def moments(base: Base, lora: Lora, found: Sequences, key: Array) -> dict[str, np.ndarray]:
    """Second moments of every module's inputs and output gradients, by their names in a calibration file.

    Args:
      base: the transformer.
      lora: module -> `(a [T, I, R], b [T, R, O])`.
      found: answered prompts of the T tasks.
      key: PRNG key of the drawn tokens.
    """
    names = tuple(lora)
    total: dict[str, Any] = {}
    tokens = int((found.tokens != PAD_ID).sum())
    for t in range(len(found.tokens)):
        own = {n: (a[t], b[t]) for n, (a, b) in lora.items()}
        new = sum_moments(base, own, found.tokens[t], found.counts[t], jax.random.fold_in(key, t), names)
        total = new if not total else jax.tree.map(jnp.add, total, new)
    out = {}
    for n, (x, g) in total.items():
        out[n] = np.asarray(x) / tokens
        out[n + calibration.OUTPUT] = np.asarray(g) / tokens
    return out
