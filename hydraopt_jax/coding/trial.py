"""A collection coded at one step: decompose once, then plan, quantise, solve the gains and measure.

With second moments of the modules' inputs, `C = E[x x.T] = L @ L.T`, decompositions are those of
`L.T @ delta`, so that choices, gains and errors are those of the modules' outputs; what is stored is in the
original coordinates.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from hydraopt_jax import algebra
from hydraopt_jax.adapters import Adapters
from hydraopt_jax.coding import classes, codec, plan
from hydraopt_jax.coding.codec import Coded
from hydraopt_jax.coding.plan import Spectrum
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import Factors

# rate-distortion decisions and the tables they are charged by shape each other: rounds until they agree,
# on this many modules
TRAINING_ROUNDS = 5
TRAINING_MODULES = 8


class Metric(NamedTuple):
    """The second moment of a module's inputs, scaled to a mean eigenvalue of 1.

    Attributes:
      values: `[I]` eigenvalues.
      vectors: `[I, I]` eigenvectors.
    """

    values: np.ndarray
    vectors: np.ndarray

    @property
    def forward(self) -> np.ndarray:
        """The symmetric root `[I, I]`: in its coordinates errors of `a` are those of the output."""
        return (self.vectors * np.sqrt(self.values)) @ self.vectors.T


def unweigh(metric: Metric, a: np.ndarray) -> np.ndarray:
    """Vectors to be coded for given vectors in output coordinates, both in steps.

    The plain inverse would spend bits on what inputs never excite. Keeping the part along an eigenvector of
    value l costs bits in proportion to the energy `e / l` that it adds, and is worth e: with the factor
    `g = l / (l + r)` on that part, `r = multiplier / (2 ln 2 variance)`, error plus bits are least.

    Args:
      metric: of the module's inputs.
      a: `[A, I, S]`.
    """
    parts = metric.vectors.T @ a
    plain = parts / np.sqrt(metric.values)[:, None]
    variance = np.maximum((plain**2).mean(-2, keepdims=True), 1e-9)
    ridge = codec.MULTIPLIER / (2 * np.log(2) * variance)
    values = metric.values[:, None]
    return (metric.vectors @ (plain * values / (values + ridge))).astype(np.float32)


class Problem(NamedTuple):
    """A collection made ready to be coded at any step.

    Attributes:
      spectra: one a bucket.
      metrics: module -> its metric; empty without calibration.
      order: module names in the collection's order.
      weights: `[T]`.
    """

    spectra: tuple[Spectrum, ...]
    metrics: Mapping[str, Metric]
    order: tuple[str, ...]
    weights: np.ndarray


class Trial(NamedTuple):
    """The collection coded at one step.

    Attributes:
      step: the quantiser step.
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
    choices: dict[str, plan.Choice]


def metric(moment: np.ndarray, name: str, inputs: int) -> Metric:
    """The metric of a second moment; a small ridge keeps directions never seen from being free."""
    moment = np.asarray(moment, np.float64)
    moment = np.diag(moment) if moment.ndim == 1 else moment
    if moment.shape != (inputs, inputs):
        raise HydraOptError(
            f"calibration: {name} has shape {list(moment.shape)}, its module needs {[inputs, inputs]}"
        )
    if not np.isfinite(moment).all() or not np.trace(moment) > 0:
        raise HydraOptError(f"calibration: {name} is not a second moment (NaN, infinite or zero)")
    values, vectors = np.linalg.eigh((moment + moment.T) / 2 * inputs / np.trace(moment))
    return Metric(np.maximum(values, 0) + 1e-4, vectors)


def prepare(
    inputs: Adapters,
    order: Sequence[str],
    weights: np.ndarray,
    calibration: Mapping[str, np.ndarray] | None = None,
    share: bool = True,
) -> Problem:
    """Decompose and compare a collection once, for any step.

    Raises:
      HydraOptError: a second moment that is missing, of a wrong shape, or none.
    """
    metrics: dict[str, Metric] = {}
    if calibration is not None:
        missing = [n for n in order if n not in calibration]
        if missing:
            more = f" and {len(missing) - 1} more modules" if len(missing) > 1 else ""
            raise HydraOptError(f"calibration: no second moment of {missing[0]}{more}")
        for bucket in inputs.buckets:
            for n in bucket.modules:
                metrics[n] = metric(calibration[n], n, bucket.a.shape[2])
    spectra = []
    for bucket in inputs.buckets:
        a = bucket.a
        if metrics:
            forward = np.stack([metrics[n].forward for n in bucket.modules]).astype(np.float32)
            a = np.einsum("mij,mtjr->mtir", forward, a)
        deltas = algebra.batched_svd(jnp.asarray(a), jnp.asarray(bucket.b))
        spectra.append(plan.spectrum(bucket.modules, deltas, weights, share=share))
    return Problem(tuple(spectra), metrics, tuple(order), weights)


def solve_gains(
    terms: Sequence[Factors], live: np.ndarray, deltas: algebra.Svd, forward: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gains of least error for given decoded factors of one module, all tasks, all terms jointly.

    Args:
      terms: decoded factors in steps.
      live: `[T, S]` directions that each task has, terms side by side.
      deltas: relative decompositions, `u: [T, I, R]`.
      forward: metric of the inputs, or None.

    Returns:
      Gains `[T, S]`, and the quadratic form of the error, `gram: [T, S, S]` and `cross: [T, S]`.
    """
    a = np.concatenate([np.asarray(x.a, np.float64)[np.maximum(x.a_of, 0)] for x in terms], 2)
    b = np.concatenate([np.asarray(x.b, np.float64)[np.maximum(x.b_of, 0)] for x in terms], 1)
    if forward is not None:
        a = forward @ a
    a, b = a * live[:, None, :], b * live[:, :, None]
    gram = (a.swapaxes(1, 2) @ a) * (b @ b.swapaxes(1, 2))
    left = a.swapaxes(1, 2) @ (deltas.u * deltas.s[:, None, :])
    cross = np.einsum("tsr,trs->ts", left, deltas.v @ b.swapaxes(1, 2))
    diagonal = np.einsum("tss->ts", gram)
    ridge = np.where(live, 1e-9 * diagonal, 1.0) + np.where(diagonal > 0, 0.0, 1.0)
    system = gram + ridge[:, :, None] * np.eye(gram.shape[1])
    return np.linalg.solve(system, cross[..., None])[..., 0] * live, gram, cross


def aims(problem: Problem, step: float) -> tuple[dict[str, tuple[codec.Target, ...]], dict[str, plan.Choice]]:
    """What is to be coded at a step, module by module, and the form chosen for it."""
    goals: dict[str, tuple[codec.Target, ...]] = {}
    choices: dict[str, plan.Choice] = {}
    for x in problem.spectra:
        chosen = plan.plan(x, step)
        for name, terms in plan.targets(x, chosen, step).items():
            goals[name] = tuple(
                t._replace(a=unweigh(problem.metrics[name], t.a)) if problem.metrics else t for t in terms
            )
        choices |= dict(zip(x.modules, chosen.choices, strict=True))
    return {n: goals[n] for n in problem.order}, choices


def train(problem: Problem, step: float) -> np.ndarray:
    """Frequencies to decide with near a step: quantisation and counting alternate on some of the modules."""
    goals, _ = aims(problem, step)
    few = list(goals)[:: max(len(goals) // TRAINING_MODULES, 1)]
    prior = classes.gaussian()
    frequencies = prior = prior / prior.sum(-1, keepdims=True)
    for _ in range(TRAINING_ROUNDS):
        frequencies = codec.quantise({n: goals[n] for n in few}, frequencies).counts + 8 * prior
    return frequencies


def attempt(problem: Problem, step: float, frequencies: np.ndarray) -> Trial:
    """Code the collection at one step and measure it."""
    goals, choices = aims(problem, step)
    coded = codec.quantise(goals, frequencies)
    gains, errors = measure(problem, coded)
    size = codec.sizes(coded, gains)
    return Trial(step, coded, gains, errors, size, choices)


def measure(problem: Problem, coded: Coded) -> tuple[dict[int, list[np.ndarray]], np.ndarray]:
    """Gains as they will be read, and the errors that they leave, `[M, T]`."""
    tasks = len(problem.weights)
    decoded = codec.factors(coded)
    live = [codec.live_directions(coded.shapes, coded.pieces, coded.classes, t) for t in range(tasks)]
    place = {n: (x, m) for x in problem.spectra for m, n in enumerate(x.modules)}
    solved: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = {}
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
        deltas = algebra.Svd(*(np.asarray(y[m], np.float64) for y in x.deltas))  # type: ignore[arg-type]
        forward = problem.metrics[name].forward if problem.metrics else None
        solved[name] = (*solve_gains(decoded[name], mask, deltas, forward), mask)
    gains: dict[int, list[np.ndarray]] = {}
    for t in range(tasks):
        rows = []
        for name, k in live[t]:
            x, m = place[name]
            start = sum(y.rank for y in coded.shapes[name][:k])
            mine = solved[name][0][t, start : start + coded.shapes[name][k].rank]
            rows.append(mine[live[t][name, k]] * x.scales[m, t])
        gains[t] = codec.round_gains(rows)
    errors = np.full((len(problem.order), tasks), np.nan)
    readers = {t: iter(gains[t]) for t in range(tasks)}
    for row, name in enumerate(problem.order):
        x, m = place[name]
        for t in range(tasks):
            if x.norms[m, t] == 0:
                errors[row, t] = 0.0 if name in solved and (name, 0) in live[t] else np.nan
                continue
            energy = float((np.asarray(x.deltas.s[m, t], np.float64) ** 2).sum())
            if name in solved:
                _, gram, cross, mask = solved[name]
                g = np.zeros(mask.shape[1])
                g[mask[t]] = (
                    np.concatenate(
                        [next(readers[t]) for k in range(len(coded.shapes[name])) if (name, k) in live[t]]
                    )
                    / x.scales[m, t]
                )
                left = energy - 2 * g @ cross[t] + g @ gram[t] @ g
            else:
                left = energy
            errors[row, t] = max(left, 0.0) / problem.weights[t]
    return gains, errors


def task_errors(errors: np.ndarray) -> np.ndarray:
    """Mean over the modules that a task has, `[M, T] -> [T]`; 0 for a task with none."""
    present = ~np.isnan(errors)
    return np.where(present, errors, 0.0).sum(0) / np.maximum(present.sum(0), 1)
