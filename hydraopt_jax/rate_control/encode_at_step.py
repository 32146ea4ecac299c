"""A collection coded at one step: decompose once, then plan, quantize, solve the gains and measure.

With second moments of the modules' inputs, `C = E[x x.T]`, decompositions are those of `C^(1/2) @ delta`, so
that choices, gains and errors are those of the modules' outputs. With those of the gradients at their
outputs too, `G = E[g g.T]`, they are those of `C^(1/2) @ delta @ G^(1/2)`, whose squared norm is twice the
Kronecker-factored estimate of the KL divergence of the model's outputs (Martens and Grosse,
arXiv 1503.05671), and a module counts as much as it matters to them. What is stored is in the original
coordinates.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from hydraopt_jax.adapters import Adapters
from hydraopt_jax.calibration import OUTPUT
from hydraopt_jax.codec import contexts, encode, syntax
from hydraopt_jax.codec.encode import Coded
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import Factors
from hydraopt_jax.linalg import decompose
from hydraopt_jax.rate_control import mode_decision, targets
from hydraopt_jax.rate_control.analysis import Spectrum, spectrum
from hydraopt_jax.rate_control.terms import coded_factors

# rate-distortion decisions and the tables they are charged by shape each other: rounds until they agree,
# on modules of about this many codes
TRAINING_ROUNDS = 5
TRAINING_MODULES = 2
TRAINING_CODES = 1 << 21


class Metric(NamedTuple):
    """A second moment, scaled to a mean eigenvalue of 1.

    Attributes:
      values: `[n]` eigenvalues.
      vectors: `[n, n]` eigenvectors.
      scale: mean eigenvalue of the moment itself.
    """

    values: np.ndarray
    vectors: np.ndarray
    scale: float

    @property
    def root(self) -> np.ndarray:
        """The symmetric root `[n, n]`: in its coordinates errors count alike."""
        return (self.vectors * np.sqrt(self.values)) @ self.vectors.T


Metrics = tuple[Metric | None, Metric | None]


def unweigh(metric: Metric | None, a: np.ndarray) -> np.ndarray:
    """Vectors to be coded for given vectors in the metric's coordinates, both in steps.

    The plain inverse would spend bits on what inputs never excite. Keeping the part along an eigenvector of
    value l costs bits in proportion to the energy `e / l` that it adds, and is worth e: with the factor
    `g = l / (l + r)` on that part, `r = multiplier / (2 ln 2 variance)`, error plus bits are least.

    Args:
      metric: of that side of the module, None for none.
      a: `[A, n, S]`.
    """
    if metric is None:
        return a
    parts = metric.vectors.T @ a
    plain = parts / np.sqrt(metric.values)[:, None]
    variance = np.maximum((plain**2).mean(-2, keepdims=True), 1e-9)
    ridge = encode.MULTIPLIER / (2 * np.log(2) * variance)
    values = metric.values[:, None]
    return (metric.vectors @ (plain * values / (values + ridge))).astype(np.float32)


# the ridge of `unweigh` at a few bits a coefficient, for choices that are made before a step is known
USUAL_RIDGE = 0.07


def coordinates(metrics: Sequence[Metric | None], x: np.ndarray) -> np.ndarray:
    """Unit vectors `[M, T, I, R]` of M modules, about as `unweigh` will have them coded."""
    if metrics[0] is None:
        return x
    filters = [
        (y.vectors * (np.sqrt(y.values) / (y.values + USUAL_RIDGE))) @ y.vectors.T for y in metrics if y
    ]
    return np.einsum("mij,mtjr->mtir", np.stack(filters).astype(np.float32), x, optimize=True)


class Problem(NamedTuple):
    """A collection made ready to be coded at any step.

    Attributes:
      spectra: one a bucket.
      metrics: module -> metrics of its inputs and of its outputs; empty without calibration.
      order: module names in the collection's order.
      weights: `[M, T]` of the relative errors, in that order.
      barred: modules that a trial showed to be dearer with a joint basis.
    """

    spectra: tuple[Spectrum, ...]
    metrics: Mapping[str, Metrics]
    order: tuple[str, ...]
    weights: np.ndarray
    barred: frozenset[str] = frozenset()


class Trial(NamedTuple):
    """The collection coded at one step.

    Attributes:
      step: the quantizer step.
      coded: its codes.
      gains: task -> gains in the codec's order, as they will be read.
      errors: `[M, T]` relative squared errors, NaN where absent.
      bytes: estimate of its payload.
      choices: form of each module.
    """

    step: float
    coded: Coded
    gains: dict[int, list[np.ndarray]]
    errors: np.ndarray
    bytes: float
    choices: dict[str, mode_decision.Choice]


def metric(moment: np.ndarray, name: str, size: int) -> Metric:
    """The metric of a second moment; a small ridge keeps directions never seen from being free."""
    moment = np.asarray(moment, np.float64)
    moment = np.diag(moment) if moment.ndim == 1 else moment
    if moment.shape != (size, size):
        raise HydraOptError(
            f"calibration: {name} has shape {list(moment.shape)}, its module needs {[size, size]}"
        )
    if not np.isfinite(moment).all() or not np.trace(moment) > 0:
        raise HydraOptError(f"calibration: {name} is not a second moment (NaN, infinite or zero)")
    scale = float(np.trace(moment)) / size
    values, vectors = np.linalg.eigh((moment + moment.T) / (2 * scale))
    return Metric(np.maximum(values, 0) + 1e-4, vectors, scale)


def metrics_of(
    inputs: Adapters, order: Sequence[str], calibration: Mapping[str, np.ndarray]
) -> dict[str, Metrics]:
    """The metrics of every module, checked against the collection."""
    wanted = [*order]
    if any(n + OUTPUT in calibration for n in order):
        wanted += [n + OUTPUT for n in order]
    missing = [n for n in wanted if n not in calibration]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise HydraOptError(f"calibration: no second moment of {missing[0]}{more}")
    out: dict[str, Metrics] = {}
    for bucket in inputs.buckets:
        for n in bucket.modules:
            left = metric(calibration[n], n, bucket.a.shape[2])
            right = calibration.get(n + OUTPUT)
            out[n] = left, None if right is None else metric(right, n + OUTPUT, bucket.b.shape[3])
    return out


def importance(metrics: Mapping[str, Metrics], modules: Sequence[str], norms: np.ndarray) -> np.ndarray:
    """Energy of each delta in the units of the model's outputs, `[M, T]`; ones where that is not known."""
    scales = np.zeros(len(modules))
    for i, n in enumerate(modules):
        left, right = metrics.get(n, (None, None))
        if left is None or right is None:
            return np.ones_like(norms)
        scales[i] = left.scale * right.scale
    return scales[:, None] * norms.astype(np.float64) ** 2


def prepare(
    inputs: Adapters,
    order: Sequence[str],
    weights: np.ndarray,
    calibration: Mapping[str, np.ndarray] | None = None,
    share: bool = True,
    deep: bool = True,
) -> Problem:
    """Decompose and compare a collection once, for any step.

    Args:
      inputs: the collection.
      order: module names.
      weights: `[T]` of the tasks' errors.
      calibration: second moments, as in a calibration file; None for none.
      share, deep: as `spectrum`.

    Raises:
      HydraOptError: a second moment that is missing, of a wrong shape, or none.
    """
    metrics = {} if calibration is None else metrics_of(inputs, order, calibration)
    decomposed: list[decompose.Svd] = []
    important: dict[str, np.ndarray] = {}
    for bucket in inputs.buckets:
        deltas = decompose.batched_svd(*weighed(metrics, bucket.modules, bucket.a, bucket.b))
        decomposed.append(deltas)
        norms = np.asarray(jnp.sqrt(deltas.energy))
        important |= dict(zip(bucket.modules, importance(metrics, bucket.modules, norms), strict=True))
    table = np.stack([important[n] for n in order])
    table = np.where(table > 0, table / table[table > 0].mean(), 1.0) * weights
    rows = {n: table[i] for i, n in enumerate(order)}
    spectra = []
    for x, deltas in zip(inputs.buckets, decomposed, strict=True):
        left, right = zip(*(metrics.get(n, (None, None)) for n in x.modules), strict=True)
        coded = (
            coordinates(left, np.asarray(deltas.u)),
            coordinates(right, np.asarray(deltas.v).swapaxes(2, 3)),
        )
        weight = np.stack([rows[n] for n in x.modules])
        spectra.append(spectrum(x.modules, deltas, weight, coded, share=share, deep=deep))
    return Problem(tuple(spectra), metrics, tuple(order), table)


def weighed(
    metrics: Mapping[str, Metrics], modules: Sequence[str], a: np.ndarray, b: np.ndarray
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Factors `[M, T, I, R]` and `[M, T, R, O]` in the metrics' coordinates."""
    for side in (0, 1):
        chosen = [metrics[n][side] if n in metrics else None for n in modules]
        roots = [x.root.astype(np.float32) for x in chosen if x is not None]
        if roots and side == 0:
            a = np.einsum("mij,mtjr->mtir", np.stack(roots), a, optimize=True)
        elif roots:
            b = np.einsum("mtro,mop->mtrp", b, np.stack(roots), optimize=True)
    return jnp.asarray(a), jnp.asarray(b)


def solve_gains(
    terms: Sequence[Factors], live: np.ndarray, deltas: decompose.Svd, metrics: Metrics = (None, None)
) -> tuple[np.ndarray, ...]:
    """The gains of least error for given decoded factors of one module, all tasks, all terms jointly.

    Args:
      terms: decoded factors in steps.
      live: `[T, S]` directions that each task has, terms side by side.
      deltas: relative decompositions, `u: [T, I, R]`.
      metrics: of the module's inputs and outputs.

    Returns:
      Gains `[T, S]`, and the quadratic form of the error, `gram: [T, S, S]`, `cross: [T, S]` and the energies
      `[T]` of the very arrays that the others are made of, so that small errors survive the cancellation.
    """
    a = np.concatenate([np.asarray(x.a, np.float64)[np.maximum(x.a_of, 0)] for x in terms], 2)
    b = np.concatenate([np.asarray(x.b, np.float64)[np.maximum(x.b_of, 0)] for x in terms], 1)
    if metrics[0] is not None:
        a = metrics[0].root @ a
    if metrics[1] is not None:
        b = b @ metrics[1].root
    a, b = a * live[:, None, :], b * live[:, :, None]
    gram = (a.swapaxes(1, 2) @ a) * (b @ b.swapaxes(1, 2))
    left, right = np.asarray(deltas.u * deltas.s[:, None, :]), np.asarray(deltas.v)
    cross = np.einsum("tsr,trs->ts", a.swapaxes(1, 2) @ left, right @ b.swapaxes(1, 2))
    energy = ((left.swapaxes(1, 2) @ left) * (right @ right.swapaxes(1, 2))).sum((1, 2))
    diagonal = np.einsum("tss->ts", gram)
    ridge = np.where(live, 1e-9 * diagonal, 1.0) + np.where(diagonal > 0, 0.0, 1.0)
    system = gram + ridge[:, :, None] * np.eye(gram.shape[1])
    return np.linalg.solve(system, cross[..., None])[..., 0] * live, gram, cross, energy


def aims(
    problem: Problem, step: float
) -> tuple[dict[str, tuple[encode.Target, ...]], dict[str, mode_decision.Choice]]:
    """What is to be coded at a step, module by module, and the form chosen for it."""
    goals: dict[str, tuple[encode.Target, ...]] = {}
    choices: dict[str, mode_decision.Choice] = {}
    for x in problem.spectra:
        chosen = mode_decision.plan(x, step, problem.barred)
        for name, terms in targets.targets(x, chosen, step).items():
            left, right = problem.metrics.get(name, (None, None))
            goals[name] = tuple(
                t._replace(a=unweigh_own(left, t.a, t.shape.a_of), b=unweigh_own(right, t.b, t.shape.b_of))
                for t in terms
            )
        choices |= dict(zip(x.modules, chosen.choices, strict=True))
    return {n: goals[n] for n in problem.order}, choices


def unweigh_own(metric: Metric | None, a: np.ndarray, of: Sequence[int]) -> np.ndarray:
    """`unweigh` of the factors that tasks read; a joint basis is in the coded coordinates already."""
    read = np.isin(np.arange(len(a)), of)
    return np.where(read[:, None, None], unweigh(metric, a), a)


def train(problem: Problem, step: float) -> np.ndarray:
    """Frequencies to decide with near a step: quantization and counting alternate on some of the modules."""
    goals, _ = aims(problem, step)
    few = sample(goals)
    prior = contexts.gaussian()
    frequencies = prior = prior / prior.sum(-1, keepdims=True)
    for _ in range(TRAINING_ROUNDS):
        frequencies = encode.quantize({n: goals[n] for n in few}, frequencies).counts + 8 * prior
    return frequencies


def sample(goals: Mapping[str, Sequence[encode.Target]]) -> list[str]:
    """Every n-th module, so many that they have `TRAINING_CODES` codes; at least `TRAINING_MODULES`."""
    names = [n for n, terms in goals.items() if terms]
    codes = sum(int(x.any(1).sum()) * x.shape[1] for n in names for t in goals[n] for x in (t.a, t.b))
    wanted = max(TRAINING_MODULES, round(len(names) * TRAINING_CODES / max(codes, 1)))
    return names[:: max(len(names) // wanted, 1)]


def attempt(problem: Problem, step: float, frequencies: np.ndarray) -> Trial:
    """Code the collection at one step and measure it."""
    goals, choices = aims(problem, step)
    coded = encode.quantize(goals, frequencies)
    gains, errors = measure(problem, coded)
    size = encode.sizes(coded, gains)
    return Trial(step, coded, gains, errors, size, choices)


def bar(problem: Problem, step: float, frequencies: np.ndarray | None = None) -> Problem:
    """Code every module with and without a joint basis at a step, and bar those that are dearer with it; all,
    where that is cheaper for the whole. Tables are trained for either, unless they are given.

    The plan's estimate is made before vectors are filtered by second moments and quantized; this is after.
    """
    if not any(c.form == "joint" for x in problem.spectra for c in mode_decision.plan(x, step).choices):
        return problem
    costs, whole = [], []
    open_problem = problem._replace(barred=frozenset())
    for tried in (open_problem, problem._replace(barred=frozenset(problem.order))):
        trial = attempt(tried, step, train(tried, step) if frequencies is None else frequencies)
        lost = np.nansum(trial.errors * problem.weights, 1) / step**2
        costs.append(lost + encode.MULTIPLIER * encode.module_bits(trial.coded))
        whole.append(lost.sum() + encode.MULTIPLIER * 8 * trial.bytes)
    dearer = (costs[0] > costs[1]) | (whole[0] > whole[1])
    return problem._replace(barred=frozenset(n for n, x in zip(problem.order, dearer, strict=True) if x))


def measure(problem: Problem, coded: Coded) -> tuple[dict[int, list[np.ndarray]], np.ndarray]:
    """Gains as they will be read, and the errors that they leave, `[M, T]`."""
    tasks = problem.weights.shape[1]
    decoded = coded_factors(coded)
    live = [syntax.live_directions(coded.shapes, coded.pieces, coded.contexts, t) for t in range(tasks)]
    place = {n: (x, m) for x in problem.spectra for m, n in enumerate(x.modules)}
    solved: dict[str, tuple[np.ndarray, ...]] = {}
    for name in problem.order:
        x, m = place[name]
        if not decoded[name]:
            continue
        mask = np.stack(
            [
                np.concatenate(
                    [live[t].get((name, k), np.zeros(y.rank, bool)) for k, y in enumerate(coded.shapes[name])]
                )
                for t in range(tasks)
            ]
        )
        deltas = decompose.Svd(*(np.asarray(y[m], np.float64) for y in x.deltas))  # type: ignore[arg-type]
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
        gains[t] = syntax.round_gains(rows)
    errors = np.full((len(problem.order), tasks), np.nan)
    readers = {t: iter(gains[t]) for t in range(tasks)}
    for row, name in enumerate(problem.order):
        x, m = place[name]
        for t in range(tasks):
            if x.norms[m, t] == 0:
                errors[row, t] = 0.0 if name in solved and (name, 0) in live[t] else np.nan
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


def task_errors(errors: np.ndarray) -> np.ndarray:
    """Mean over the modules that a task has, `[M, T] -> [T]`; 0 for a task with none."""
    present = ~np.isnan(errors)
    return np.where(present, errors, 0.0).sum(0) / np.maximum(present.sum(0), 1)
