"""How good the mode decision is: what it estimates and what is paid, and what oracles would save.

    python -m experiments.frontier.decisions gpt2=FOLDER forty=FOLDER llm=FOLDER \\
        --json experiments/frontier/decisions.json

At a step near each budget:

- draft over paid: bytes of all leaves as the search estimates them, over those of `serialize`, less 1;
- modules, mean and spread: cost by the mode decision over that of what was coded (squared error, bits
  by context), less 1: mean and standard deviation over modules;
- leaves, largest: bits by context and side information of a leaf over its bytes, less 1, the largest of all;
- every form coded: bytes saved at equal error if each module is coded in all forms and the cheapest is taken;
- each side its own form: the same by the cost model, each side with its own reference or basis.

Needs no model.
"""

from typing import Any

import numpy as np

from experiments.frontier.ablation import saved
from experiments.frontier.named import Named
from hydraopt_jax.codec import encode, syntax
from hydraopt_jax.codec.encode import MULTIPLIER
from hydraopt_jax.rate_control import coding, mode_decision, search
from hydraopt_jax.rate_control.analysis import Spectrum
from hydraopt_jax.rate_control.coding import Trial
from hydraopt_jax.rate_control.mode_decision import DIRECTION_BITS, FORM_BITS
from hydraopt_jax.rate_control.problem import Problem

NEARBY = 1.05


def coded_as(problem: Problem, step: float, frequencies: np.ndarray, chosen: dict[str, int]) -> Trial:
    """The collection with each module in a form of its own, by its place among the candidates."""
    decide = mode_decision.decide_modes

    def forced(x: Spectrum, step: float, no_joint: Any = (), alone: bool = False) -> mode_decision.Plan:
        options = mode_decision.candidates(x, step)
        return mode_decision.pick(options, np.array([min(chosen[n], len(options) - 1) for n in x.modules]))

    mode_decision.decide_modes = forced
    try:
        return coding.encode_at_step(problem, step, frequencies)
    finally:
        mode_decision.decide_modes = decide


def point(trial: Trial) -> dict[str, float]:
    """Logarithms of bytes and error."""
    return {"bytes": float(np.log(trial.bytes)), "error": float(np.log(np.nanmean(trial.errors)))}


def leaves_off(trial: Trial) -> float:
    """Largest relative difference of a leaf's estimate to its bytes."""
    coded, each = trial.coded, encode.context_bits(trial.coded.counts)
    sides, paid = encode.sides(coded, trial.gains), encode.serialize(coded, trial.gains, coded_tables(trial))
    off = []
    for leaf in coded.leaves:
        members = [i for i, x in enumerate(coded.pieces) if x.leaf == leaf]
        rows = [coded.pieces[i] for i in members]
        of = syntax.code_contexts(
            rows, [coded.contexts[i] for i in members], [coded.offsets[i] for i in members]
        )
        bits = float(each[of].sum())
        off.append((bits / 8 + len(sides[leaf])) / len(paid[leaf]) - 1)
    return float(max(off, key=abs))


def coded_tables(trial: Trial) -> np.ndarray:
    """The tables of a trial, so that no leaf has their bytes."""
    return encode.frequency_tables.from_counts(trial.coded.counts)


def by_side(x: Spectrum, step: float) -> tuple[float, float]:
    """Cost of the modules of one shape by the model: both sides in one form, and each side in its own."""
    sizes = x.deltas.u.shape[-2], x.deltas.v.shape[-1]
    energy = np.asarray(x.deltas.s, np.float64) ** 2 / step**2
    none = [mode_decision.cost(n, energy / n)[0] for n in sizes]
    keep = none[0] + none[1] + MULTIPLIER * DIRECTION_BITS < energy
    zero = np.zeros(len(energy))
    sides = []
    for k, count in enumerate(sizes):
        options = [(none[k], zero)]
        for c, task in enumerate(x.references):
            options.append((one_side(x.cosines[k][..., c, :], task, energy, keep, count), zero))
        if x.joint:
            found = mode_decision.joint_side(x.joint[k], energy, keep, count)
            options.append((found[0], found[2]))
        sides.append(options)
    table = np.array(
        [
            [
                np.minimum(a + b + MULTIPLIER * DIRECTION_BITS, energy).sum((1, 2))
                + a_base
                + b_base
                + MULTIPLIER * FORM_BITS * (i + j > 0)
                for j, (b, b_base) in enumerate(sides[1])
            ]
            for i, (a, a_base) in enumerate(sides[0])
        ]
    )
    same = np.array([table[i, i] for i in range(len(table))]).min(0)
    return float(same.sum()), float(table.min((0, 1)).sum())


def one_side(cosines: np.ndarray, task: int, energy: np.ndarray, keep: np.ndarray, count: int) -> np.ndarray:
    """Cost `[M, T, R]` of the vectors of a side, predicted from those that a task codes for itself."""
    of = mode_decision.Reference(np.full(len(energy), task), cosines, cosines)
    base = keep[:, task]
    explained = np.minimum(np.einsum("mtrs,ms->mtr", cosines, base * of.known(energy, count)), 1.0)
    rest = energy / count * (1 - explained)
    extra = mode_decision.coefficient_bits(explained * energy, base.sum(-1)[:, None, None], rest)
    after = mode_decision.cost(count, rest)[0] + MULTIPLIER * extra
    before = mode_decision.cost(count, energy / count)[0]
    return np.where(of.others(energy.shape[1]), np.minimum(before, after), before)


def paid_costs(problem: Problem, trial: Trial) -> np.ndarray:
    """`[M]` costs of what was coded, in squared steps."""
    lost = np.nansum(trial.errors * problem.weights, 1) / trial.step**2
    return np.asarray(lost + MULTIPLIER * encode.module_bits(trial.coded))


def measure(problem: Problem, size: float) -> dict[str, float]:
    """All figures of a collection near `size` bytes."""
    start = search.first_step(problem, size)
    found = search.find_step(problem, lambda x: float(np.log(x.bytes / size)), -1.0, start)
    step, frequencies = found.last.step, found.frequencies
    costs: dict[str, np.ndarray] = {}
    for x in problem.spectra:
        each = mode_decision.candidates(x, step)
        costs |= {n: np.array([o[0][m] for o in each]) for m, n in enumerate(x.modules)}
    expected = np.array([costs[n] for n in problem.order])
    decided = dict(zip(problem.order, expected.argmin(1).tolist(), strict=True))
    own = coded_as(problem, step, frequencies, decided)
    near = coded_as(problem, NEARBY * step, frequencies, decided)
    here, there = point(own), point(near)
    slope = (there["error"] - here["error"]) / (there["bytes"] - here["bytes"])
    tried = np.stack(
        [
            paid_costs(problem, coded_as(problem, step, frequencies, dict.fromkeys(problem.order, k)))
            for k in range(expected.shape[1])
        ]
    )
    best = coded_as(
        problem, step, frequencies, dict(zip(problem.order, tried.argmin(0).tolist(), strict=True))
    )
    ratio = expected.min(1) / paid_costs(problem, own) - 1
    same, each_side = np.sum([by_side(x, step) for x in problem.spectra], 0)
    paid = sum(map(len, encode.serialize(own.coded, own.gains).values()))
    figures = {
        "draft over paid": own.bytes / paid - 1,
        "modules, mean": float(ratio.mean()),
        "modules, spread": float(ratio.std()),
        "leaves, largest": leaves_off(own),
        "every form coded": saved({**point(best), "slope": slope}, {**here, "slope": slope}),
        "each side its own form": (same - each_side) / (MULTIPLIER * 8 * own.bytes),
    }
    return {k: round(float(v), 4) for k, v in figures.items()}


def main() -> None:
    """Measure the collections that are named."""
    Named(__doc__).measure(measure)


if __name__ == "__main__":
    main()
