"""What ideas that are not in the coder could save at most, by models of Gaussian coefficients.

    python -m experiments.frontier.ideas gpt2=FOLDER forty=FOLDER llm=FOLDER \\
        --json experiments/frontier/ideas.json

For the directions that the mode decision keeps at a step near a budget, bits by the Gaussian rate-distortion
function at the coder's distortion, over those of directions coded alone:

- from one, two or three tasks: every other task predicted by least squares from their decoded vectors, module
  by module, coefficients paid; the tasks are chosen greedily and are not predicted themselves;
- from all before it: each vector predicted from all stronger ones of its module and side, coefficients paid;
- the same, coefficients free: no prediction within a module and side saves more at high rates;
- a variance for every entry: the mean over the other vectors of the module and side, at no cost;
- best reconstruction points: means of what was quantized to each of the six smallest magnitudes in each
  context, at no cost, measured on the coder's own codes.

Needs no model, codes nothing but for the last line.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.frontier.named import Named
from hydraopt_jax.codec import encode, streams
from hydraopt_jax.codec.encode import DISTORTION, MULTIPLIER
from hydraopt_jax.codec.prediction import coefficient_bits
from hydraopt_jax.rate_control import coding, mode_decision, search
from hydraopt_jax.rate_control.problem import Problem

MOST = 3
# weights, in vectors, of a flat variance in that of an entry
FLAT = (2, 4, 8, 16, 32, 64, 1e9)


def bits_of(count: int, variance: np.ndarray) -> np.ndarray:
    """Bits of `count` Gaussian coefficients of a variance in squared steps."""
    return count / 2 * np.log2(np.maximum(variance / DISTORTION, 1))


def sides(problem: Problem, step: float) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
    """For each module the task of each kept direction, and its vectors on both sides in steps, `[K, n]`."""
    for x in problem.spectra:
        live = mode_decision.decide_modes(x, step).live
        for m in range(len(x.modules)):
            task, rank = np.nonzero(live[m])
            size = np.asarray(x.deltas.s[m], np.float64)[task, rank, None] / step
            yield (
                task,
                (
                    np.asarray(x.deltas.u[m]).swapaxes(1, 2)[task, rank] * size,
                    np.asarray(x.deltas.v[m])[task, rank] * size,
                ),
            )


def from_tasks(vectors: Sequence[np.ndarray], task: np.ndarray, chosen: Sequence[int]) -> float:
    """Bits of a module with all other tasks predicted from the chosen ones."""
    total, base = 0.0, np.isin(task, chosen)
    for v in vectors:
        n = v.shape[1]
        gram = v @ v.T / n
        before = bits_of(n, np.diag(gram))
        cross = gram[base]
        explained = (
            cross * np.linalg.solve(gram[np.ix_(base, base)] + DISTORTION * np.eye(base.sum()), cross)
        ).sum(0)
        rest = np.maximum(np.diag(gram) - explained, 1e-9)
        after = bits_of(n, rest) + coefficient_bits(n * explained, base.sum(), rest)
        total += float(np.where(base, before, np.minimum(before, after)).sum())
    return total


def greedy(vectors: Sequence[np.ndarray], task: np.ndarray) -> list[float]:
    """Bits of a module from 0, 1, ... tasks."""
    found = [float(sum(bits_of(v.shape[1], (v**2).mean(1)).sum() for v in vectors))]
    chosen: list[int] = []
    for _ in range(MOST):
        tried = {t: from_tasks(vectors, task, [*chosen, t]) for t in set(task.tolist()) - set(chosen)}
        best = min(tried, key=tried.__getitem__, default=None)
        if best is None or tried[best] >= found[-1]:
            found.append(found[-1])
            continue
        chosen.append(best)
        found.append(tried[best])
    return found


def from_stronger(v: np.ndarray) -> tuple[float, float]:
    """Bits of a side of a module, vectors predicted from all stronger ones: coefficients paid, and free."""
    n = v.shape[1]
    gram = v @ v.T / n
    order = np.argsort(-np.diag(gram), kind="stable")
    gram = gram[np.ix_(order, order)]
    rest = np.diag(np.linalg.cholesky(gram + DISTORTION * np.eye(len(gram)))) ** 2 - DISTORTION
    rest, before = np.maximum(rest, 1e-9), bits_of(n, np.diag(gram))
    paid = bits_of(n, rest) + coefficient_bits(
        n * np.maximum(np.diag(gram) - rest, 0), np.arange(len(gram)), rest
    )
    return float(np.minimum(before, paid).sum()), float(bits_of(n, rest).sum())


def by_entry(v: np.ndarray) -> tuple[float, float]:
    """Bits of Gaussian entries with one variance per vector, and with one per entry."""
    square = v**2
    own = square.mean(1, keepdims=True)

    def length(variance: np.ndarray) -> float:
        known = variance + 2 * DISTORTION
        return float((np.log2(known) + (square + 2 * DISTORTION) / known / np.log(2)).sum() / 2)

    unit = square / np.where(own > 0, own, 1)
    each = [(unit.sum(0) - unit + flat) / (len(v) - 1 + flat) for flat in FLAT]
    whole = length(np.broadcast_to(own, v.shape))
    return whole, min(length(own * x / x.mean(1, keepdims=True)) for x in each) if len(v) > 1 else whole


def watched(problem: Problem, step: float) -> tuple[coding.Trial, list[tuple[np.ndarray, streams.Symbols]]]:
    """A collection coded at a step, and the values and codes of every stream that was quantized for it:
    those of fitted tables first."""
    kept: list[tuple[np.ndarray, streams.Symbols]] = []
    quantize = encode.quantize_streams

    def keep(values: Any, *given: Any) -> list[streams.Symbols]:
        found = quantize(values, *given)
        kept.extend(zip(values, found, strict=True))
        return found

    encode.quantize_streams = keep  # type: ignore[assignment]
    try:
        return coding.encode_at_step(problem, step), kept
    finally:
        encode.quantize_streams = quantize


def reconstruction(problem: Problem, step: float) -> float:
    """Share of the bits that reconstruction at the mean of each small magnitude, in its context, is worth."""
    trial, kept = watched(problem, step)
    error = np.concatenate([np.abs(v) * np.where((v < 0) == x.negative, 1, -1) for v, x in kept])
    error = error - np.concatenate([np.abs(streams.values(x)) for _, x in kept])
    place = np.concatenate(
        [(x.context * 2 + x.quantizer) * 4 + np.minimum(x.magnitude, 4) - 1 for _, x in kept]
    )
    some = np.concatenate([(x.magnitude > 0) & (x.magnitude < 4) for _, x in kept])
    sums, counts = (np.bincount(place[some], w) for w in (error[some], None))
    saved = float((sums**2 / np.maximum(counts, 1)).sum()) / MULTIPLIER
    return saved / (8 * trial.bytes)


def limits(problem: Problem, step: float) -> dict[str, float]:
    """Share of bits that each idea saves."""
    several, chain, entries = np.zeros(MOST + 1), np.zeros(2), np.zeros(2)
    for task, vectors in sides(problem, step):
        if not len(task):
            continue
        several += greedy(vectors, task)
        for v in vectors:
            chain += from_stronger(v)
            entries += by_entry(v)
    names = ("from one task", "from two tasks", "from three tasks")
    found = dict(zip(names, 1 - several[1:] / several[0], strict=True))
    found |= {"from all stronger vectors": 1 - chain[0] / several[0]}
    found |= {"the same, coefficients free": 1 - chain[1] / several[0]}
    found |= {"a variance for every entry": 1 - entries[1] / entries[0]}
    found |= {"best reconstruction points": reconstruction(problem, step)}
    return {k: round(float(v), 4) for k, v in found.items()}


def main() -> None:
    """Measure the collections that are named."""
    Named(__doc__).measure(lambda problem, size: limits(problem, search.first_step(problem, size)))


if __name__ == "__main__":
    main()
