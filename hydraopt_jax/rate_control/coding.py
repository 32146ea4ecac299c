"""Code a collection at one quantizer step: choose forms, quantize, solve for gains, measure errors."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hydraopt_jax.codec import contexts, encode, syntax
from hydraopt_jax.codec.encode import Coded
from hydraopt_jax.factors import Factors
from hydraopt_jax.linalg import decompose
from hydraopt_jax.rate_control import mode_decision
from hydraopt_jax.rate_control.metrics import Metrics
from hydraopt_jax.rate_control.parts import pick_names
from hydraopt_jax.rate_control.problem import Problem
from hydraopt_jax.rate_control.terms import terms_in_steps
from hydraopt_jax.rate_control.unweighing import shapes_noise, to_code
from hydraopt_jax.store.decoding import all_terms

# tables and rate-distortion decisions depend on each other: rounds of fitting, how far beyond its count the
# logarithm of a frequency moves in each, and the limit of that; entries of the modules of a sample,
# minimum of modules, and of a module's factors of each side
MOMENTUM, FASTEST = (2, 2, 2, 1, 1), 2.0
TABLE_CODES = 1 << 18
LEAST_MODULES, LEAST_FACTORS = 3, 8
# entries of factors up to which a store's tables may take more than sharing saves
FEW_CODES = 1 << 14
# weight of the prior in fitted tables
PRIOR_COUNTS = 8
# approximate fraction that rounding of gains adds to a task's error
ROUNDED = 3e-4
LEAST_GAIN_BITS, MOST_GAIN_BITS = 3, 20


class Trial(NamedTuple):
    """Codes and errors of a collection at one step.

    Attributes:
      step: the quantizer step.
      coded: the codes.
      gains: task -> decoded gains in the codec's order.
      side: leaf -> what it holds beside its stream, see `encode.sides`.
      errors: `[M, T]` relative squared errors, NaN where absent.
      bytes: estimated bytes of the payload.
      choices: module -> form.
    """

    step: float
    coded: Coded
    gains: dict[int, list[np.ndarray]]
    side: dict[str, bytes]
    errors: np.ndarray
    bytes: float
    choices: dict[str, mode_decision.Choice]


def solve_gains(
    terms: Sequence[Factors], live: np.ndarray, deltas: decompose.HostSvd, metrics: Metrics = (None, None)
) -> tuple[np.ndarray, ...]:
    """Gains of lowest error for the decoded factors of one module, for all tasks and all terms jointly.

    Args:
      terms: decoded factors in units of the step.
      live: `[T, S]` bool, coded directions of each task, terms concatenated.
      deltas: relative decompositions, `u: [T, I, R]`.
      metrics: metrics of the module's inputs and outputs.

    Returns:
      Gains `[T, S]`, and the quadratic form of the error: `gram: [T, S, S]`, `cross: [T, S]`, energies `[T]`.
      All come from the same arrays, so that cancellation does not hide small errors.
    """
    a = np.concatenate([np.asarray(x.a, np.float64)[np.maximum(x.a_of, 0)] for x in terms], 2)
    b = np.concatenate([np.asarray(x.b, np.float64)[np.maximum(x.b_of, 0)] for x in terms], 1)
    a, b = a * live[:, None, :], b.swapaxes(1, 2) * live[:, None, :]
    one, two = (
        x.swapaxes(1, 2) @ x if y is None else y.gram(x) for x, y in zip((a, b), metrics, strict=True)
    )
    gram = one * two
    a, b = (x if y is None else y.weigh(x) for x, y in zip((a, b), metrics, strict=True))
    b = b.swapaxes(1, 2)
    left, right = np.asarray(deltas.u * deltas.s[:, None, :]), np.asarray(deltas.v)
    cross = np.einsum("tsr,trs->ts", a.swapaxes(1, 2) @ left, right @ b.swapaxes(1, 2))
    energy = ((left.swapaxes(1, 2) @ left) * (right @ right.swapaxes(1, 2))).sum((1, 2))
    diagonal = np.einsum("tss->ts", gram)
    ridge = np.where(live, 1e-9 * diagonal, 1.0) + np.where(diagonal > 0, 0.0, 1.0)
    system = gram + ridge[:, :, None] * np.eye(gram.shape[1])
    return np.linalg.solve(system, cross[..., None])[..., 0] * live, gram, cross, energy


def terms_at_step(
    problem: Problem, step: float, forms_at: float | None = None
) -> tuple[dict[str, tuple[encode.TermInSteps, ...]], dict[str, mode_decision.Choice]]:
    """Module -> terms in steps, and module -> form, which is chosen for `forms_at` or `step`."""
    goals: dict[str, tuple[encode.TermInSteps, ...]] = {}
    choices: dict[str, mode_decision.Choice] = {}
    for x in problem.spectra:
        chosen = mode_decision.decide_modes(x, forms_at or step, problem.no_joint, problem.alone)
        for name, terms in terms_in_steps(x, chosen, step).items():
            metrics = problem.metrics.get(name, (None, None))
            goals[name] = tuple(unweighed(t, metrics) for t in terms)
        choices |= dict(zip(x.modules, chosen.choices, strict=True))
    return {n: goals[n] for n in problem.order}, choices


def unweighed(term: encode.TermInSteps, metrics: Metrics) -> encode.TermInSteps:
    """The term with the factors that tasks read as they are coded, and the filters of their errors; a joint
    basis is in these coordinates already."""
    sides, filters = [], []
    factors, uses = (term.a, term.b), (term.shape.a_of, term.shape.b_of)
    for metric, x, of in zip(metrics, factors, uses, strict=True):
        read = np.isin(np.arange(len(x)), of)
        found, mine = to_code(metric, x, read)
        sides.append(np.where(read[:, None, None], found, x))
        filters.append(mine)
    return term._replace(a=sides[0], b=sides[1], filters=(filters[0], filters[1]))


def prior_tables() -> np.ndarray:
    """Prior frequencies, which sum to 1 for each context."""
    prior = contexts.gaussian()
    return prior / prior.sum(-1, keepdims=True)


def fitted_tables(counts: np.ndarray) -> np.ndarray:
    """Frequencies for rate-distortion decisions, from counts at a nearby step."""
    return counts + PRIOR_COUNTS * prior_tables()


def fit_tables(problem: Problem, step: float) -> np.ndarray:
    """Frequencies for decisions at a step: quantization and counting alternate on a sample of modules.

    Logarithms of frequencies move further than those of the counts, which takes a third of the rounds. Only
    the last one has noise shaping, which takes most of the time.
    """
    few = problem.take(sample(problem, TABLE_CODES))
    goals, _ = terms_at_step(few, step)
    codes = sum(y.size for terms in goals.values() for x in terms for y in (x.a, x.b))
    share = TABLE_CODES / max(codes, 1)
    goals = {n: tuple(first_factors(x, share) for x in terms) for n, terms in goals.items()}
    plain = {n: tuple(x._replace(filters=(None, None)) for x in terms) for n, terms in goals.items()}
    frequencies = fitted_tables(encode.quantize(plain, prior_tables()).counts)
    rounds = [plain] * (len(MOMENTUM) - 1) + [goals]
    for given, power in zip(rounds, MOMENTUM, strict=True):
        counted = fitted_tables(encode.quantize(given, frequencies).counts)
        change = shares(counted) / shares(frequencies)
        frequencies = counted * np.clip(change, 1 / FASTEST, FASTEST) ** power
    return frequencies


def first_factors(x: encode.TermInSteps, share: float) -> encode.TermInSteps:
    """A share of a term's factors, the first ones, and the tasks that read them."""
    most = max(LEAST_FACTORS, round(share * max(len(x.a), len(x.b))))
    pairs = [
        (i, o) if max(i, o) < most else (-1, -1) for i, o in zip(x.shape.a_of, x.shape.b_of, strict=True)
    ]
    a_of, b_of = zip(*pairs, strict=True)
    one, two = (f and f._replace(of=f.of[:most]) for f in x.filters)
    shape = x.shape._replace(a_of=a_of, b_of=b_of)
    return encode.TermInSteps(shape, x.a[:most], x.b[:most], (one, two))


def shares(frequencies: np.ndarray) -> np.ndarray:
    """Positive relative frequencies per context and quantizer."""
    floor = np.maximum(frequencies, 1e-9)
    return floor / floor.sum(-1, keepdims=True)


def sample(problem: Problem, codes: int) -> list[str]:
    """Names of at least `LEAST_MODULES` modules whose vectors have about `codes` entries in total."""
    rank = max(x.deltas.s.shape[-1] for x in problem.spectra)
    sizes = {
        n: x.norms.shape[1] * rank * (x.deltas.u.shape[-2] + x.deltas.v.shape[-1])
        for x in problem.spectra
        for n in x.modules
    }
    wanted = max(LEAST_MODULES, round(len(sizes) * codes / max(sum(sizes.values()), 1)))
    return pick_names(problem.order, wanted)


class Quantized(NamedTuple):
    """Codes of a collection at one step, and module -> form."""

    step: float
    coded: Coded
    choices: dict[str, mode_decision.Choice]


def quantize_at_step(
    problem: Problem, step: float, frequencies: np.ndarray, forms_at: float | None = None
) -> Quantized:
    """The collection quantized at one step.

    Args:
      problem: the collection.
      step: the quantizer step.
      frequencies: rate model of the quantizer.
      forms_at: the step that forms are chosen for; None for `step`. For fixed forms bytes and errors are
        smooth in the step.
    """
    goals, choices = terms_at_step(problem, step, forms_at)
    return Quantized(step, encode.quantize(goals, frequencies), choices)


def measure(problem: Problem, found: Quantized) -> Trial:
    """What was quantized, with the gains of least error, and the errors and bytes with these."""
    gains, errors = gains_and_errors(problem, found.coded)
    side = encode.sides(found.coded, gains)
    size = encode.estimate_bytes(found.coded, side)
    return Trial(found.step, found.coded, gains, side, errors, size, found.choices)


def encode_at_step(
    problem: Problem, step: float, frequencies: np.ndarray | None = None, forms_at: float | None = None
) -> Trial:
    """The collection coded at one step, with its errors: `quantize_at_step`, then `measure`; without
    frequencies these are fitted at the step."""
    if frequencies is None:
        frequencies = fit_tables(problem, step)
    return measure(problem, quantize_at_step(problem, step, frequencies, forms_at))


def settle_forms(problem: Problem, step: float, frequencies: np.ndarray) -> Problem:
    """The problem without what trials show to be dearer: joint bases, see `disable_joint`, and of few codes
    all that is shared.

    The mode decision counts no tables. Of few codes these are much of the bytes, and remainders, of many
    sizes, need more of them than vectors that are coded as they are.
    """
    problem = disable_joint(problem, step, frequencies)
    codes = sum(x.deltas.u.size + x.deltas.v.size for x in problem.spectra)
    if codes > FEW_CODES:
        return problem
    plans = [mode_decision.decide_modes(x, step, problem.no_joint) for x in problem.spectra]
    if all(mode_decision.is_alone(c) for x in plans for c in x.choices):
        return problem
    tried = (problem, problem._replace(alone=True))
    return min(tried, key=lambda x: lagrangian(x, encode_at_step(x, step, frequencies)))


def lagrangian(problem: Problem, trial: Trial) -> float:
    """Squared error in steps, and bits at the usual price."""
    lost = np.nansum(trial.errors * problem.weights) / trial.step**2
    return float(lost + encode.MULTIPLIER * 8 * trial.bytes)


def disable_joint(problem: Problem, step: float, frequencies: np.ndarray) -> Problem:
    """The problem without the joint basis where it raises the Lagrangian cost, see `dearer_joint`.

    The chosen modules are encoded with and without the joint basis. This comparison includes the filter by
    second moments and quantization; the estimate of the mode decision does not. Of those with noise shaping,
    which takes longest and leaves little for a basis to save, a few are asked first: where none of these
    keeps its basis, none of the others does.
    """
    chosen = [
        n
        for x in problem.spectra
        for n, c in zip(x.modules, mode_decision.decide_modes(x, step, problem.no_joint).choices, strict=True)
        if c.form == "joint"
    ]
    shaped = [n for n in chosen if any(shapes_noise(x) for x in problem.metrics.get(n, ()))]
    few = pick_names(shaped, LEAST_MODULES)
    rest = [n for n in shaped if n not in few]
    off = dearer_joint(problem, [n for n in chosen if n not in rest], step, frequencies)
    off |= frozenset(rest) if off.issuperset(few) else dearer_joint(problem, rest, step, frequencies)
    return problem._replace(no_joint=problem.no_joint | off)


def dearer_joint(
    problem: Problem, chosen: Sequence[str], step: float, frequencies: np.ndarray
) -> frozenset[str]:
    """Those of the chosen modules whose Lagrangian cost the joint basis raises; all, if the whole is cheaper
    without."""
    if not chosen:
        return frozenset()
    few = problem.take(chosen)
    costs, whole = [], []
    for tried in (few, few._replace(no_joint=few.no_joint.union(chosen))):
        trial = encode_at_step(tried, step, frequencies)
        lost = np.nansum(trial.errors * tried.weights, 1) / step**2
        costs.append(lost + encode.MULTIPLIER * encode.module_bits(trial.coded))
        whole.append(lagrangian(tried, trial))
    dearer = (costs[0] > costs[1]) | (whole[0] > whole[1])
    return frozenset(n for n, x in zip(few.order, dearer, strict=True) if x)


def gains_and_errors(problem: Problem, coded: Coded) -> tuple[dict[int, list[np.ndarray]], np.ndarray]:
    """Task -> decoded gains, and errors `[M, T]` with these gains."""
    tasks = problem.weights.shape[1]
    decoded = all_terms(coded.shapes, coded.pieces, coded.values)
    live = [syntax.live_directions(coded.shapes, coded.contexts, t) for t in range(tasks)]
    place = {n: (x, m) for x in problem.spectra for m, n in enumerate(x.modules)}
    solved: dict[str, tuple[np.ndarray, ...]] = {}
    for name in problem.order:
        x, m = place[name]
        if not any(len(y.a) for y in decoded[name]):
            continue
        mask = np.stack(
            [
                np.concatenate(
                    [live[t].get((name, k), np.zeros(y.rank, bool)) for k, y in enumerate(coded.shapes[name])]
                )
                for t in range(tasks)
            ]
        )
        deltas = decompose.HostSvd(*(np.asarray(y[m], np.float64) for y in x.deltas))
        metrics = problem.metrics.get(name, (None, None))
        solved[name] = (*solve_gains(decoded[name], mask, deltas, metrics), mask)
    gains: dict[int, list[np.ndarray]] = {}
    for t in range(tasks):
        rows = []
        for name, k in live[t]:
            x, m = place[name]
            start = sum(y.rank for y in coded.shapes[name][:k])
            mine = solved[name][0][t, start : start + coded.shapes[name][k].rank]
            rows.append(mine[live[t][name, k]] * x.scales[m, t])
        gains[t] = syntax.round_gains(rows, gain_bits([x for n, x in solved.items() if (n, 0) in live[t]], t))
    errors = np.full((len(problem.order), tasks), np.nan)
    readers = {t: iter(gains[t]) for t in range(tasks)}
    for row, name in enumerate(problem.order):
        x, m = place[name]
        for t in range(tasks):
            if x.norms[m, t] == 0:
                errors[row, t] = 0.0 if problem.present[row, t] else np.nan
                continue
            if name in solved:
                _, gram, cross, energies, mask = solved[name]
                energy = energies[t]
                g = np.zeros(mask.shape[1])
                g[mask[t]] = (
                    np.concatenate(
                        [next(readers[t]) for k in range(len(coded.shapes[name])) if (name, k) in live[t]]
                    )
                    / x.scales[m, t]
                )
                left = energy - 2 * g @ cross[t] + g @ gram[t] @ g
            else:
                left = float((np.asarray(x.deltas.s[m, t], np.float64) ** 2).sum())
            errors[row, t] = max(left, 0.0) / problem.weights[row, t]
    return gains, errors


def gain_bits(solved: Sequence[tuple[np.ndarray, ...]], task: int) -> int:
    """Bits of a task's gains after the leading one, such that rounding adds about `ROUNDED` to its error.

    Args:
      solved: results of `solve_gains`, per module.
      task: its position.
    """
    error = energy = 0.0
    for gains, gram, cross, energies, *_ in solved:
        g = gains[task]
        error += max(float(energies[task] - 2 * g @ cross[task] + g @ gram[task] @ g), 0.0)
        energy += float(g**2 @ np.diagonal(gram[task]))
    if not min(error, energy) > 0:
        return MOST_GAIN_BITS if energy > 0 else LEAST_GAIN_BITS
    wanted = np.ceil(np.log2(energy / (12 * ROUNDED * error)) / 2)
    return int(np.clip(wanted, LEAST_GAIN_BITS, MOST_GAIN_BITS))
