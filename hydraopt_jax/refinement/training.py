"""Refinement of a store by Optax with its rounding in the loop, shared and per-task factors jointly.

The loss is that of the stored factors. Each stored factor has an unrounded counterpart. A step rounds all of
them as the store would (a cast, or the trellis quantizer with its tables and predictions), takes the gradient
of the loss at the rounded factors, and moves the unrounded ones by it (straight-through estimator). Bytes do
not
grow: the quantizer's price of a bit is adjusted.

The loss is the mean over tasks and tokens of `KL(p_adapter || p_store)`, the divergence of the stored
adapters' next-token distributions from the original ones', on unlabeled batches (distillation). The error of
the weights is not refined: the fit has made it as small as its bytes allow.

Reference: Bengio et al., Estimating or propagating gradients through stochastic neurons, arXiv 1308.3432.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from orbax.checkpoint import v1 as ocp

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import descent
from hydraopt_jax.rate_control.distortion import error_table, segment_terms
from hydraopt_jax.rate_control.metrics import Metrics, metrics_of
from hydraopt_jax.refinement import rounding
from hydraopt_jax.refinement.objectives import Forward, Lora, divergence, originals, stacked
from hydraopt_jax.refinement.rounding import Indices, Modules, indices_of, trainable_arrays, with_indices
from hydraopt_jax.static import Static
from hydraopt_jax.store import Segment, Store, plain
from hydraopt_jax.store.store import make_segment, tensors_at

LEARNING_RATE = 0.03
# share of the steps after which the quantizer's tables are fixed
SETTLED = 0.8


class Refined(NamedTuple):
    """Losses of a refinement.

    Attributes:
      before: the loss of the given store on the check batch.
      after: the loss of the result on the check batch; never above `before`.
      trace: `[steps]` the loss of every step, on its own batch.
    """

    before: float
    after: float
    trace: np.ndarray


class RefinementState(NamedTuple):
    """State of a refinement: unrounded factors in their units, optimizer state, the coder's tables."""

    factors: Any
    optimizer: Any
    tables: Any


@jax.custom_jvp
def straight_through(x: Array, rounded: Array, slope: Array) -> Array:
    """`rounded`, with `slope` as its derivative with respect to `x` (Bengio et al. 2013)."""
    return rounded


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    _, rounded, slope = primals
    return rounded, slope * tangents[0]


@functools.lru_cache(maxsize=64)
def default_optimizer(steps: int, rate: float = LEARNING_RATE) -> optax.GradientTransformation:
    """Adam with a cosine decay to zero; the rate is in quantizer steps (coded) or in a factor's rms.

    Equal arguments give the same object, so that a second refinement compiles nothing.
    """
    return optax.adam(optax.cosine_decay_schedule(rate, steps), b2=0.99)


@functools.lru_cache(maxsize=64)
def accumulating(optimizer: optax.GradientTransformation, batches: int) -> optax.MultiSteps:
    """The optimizer with one step per so many batches; equal arguments give the same object."""
    return optax.MultiSteps(optimizer, batches)


def moved_loss(loss: Any, indices: Indices, original: Lora, moved: Any, batch: Any) -> Array:
    """The loss of moved factors."""
    return loss(stacked(with_indices(indices, moved)), original, batch)


def step(
    chain: optax.MultiSteps,
    loss: Any,
    indices: Indices,
    original: Lora,
    slope: Any,
    state: descent.DescentState,
    moved: Any,
    batch: Any,
) -> tuple[descent.DescentState, Array]:
    """One step of `chain` on unrounded factors, by the gradient at the rounded ones, `moved`."""

    def through(factors: Any, moved: Any, batch: Any) -> Array:
        straight = jax.tree.map(straight_through, factors, moved, slope)
        return moved_loss(loss, indices, original, straight, batch)

    return descent.step(through, chain, state, moved, batch)


def units(modules: Modules, coded: bool) -> Any:
    """The unit of each factor: a quantizer step, or the rms of a plain factor; for cores their own size."""

    def rms(x: Any, axes: Any) -> np.ndarray:
        wide = np.asarray(x, np.float32)
        found = np.sqrt(np.mean(wide**2, axes, keepdims=True))
        return np.where(found > 0, found, 1.0)

    out = {}
    for name, terms in modules.items():
        rows = []
        for x in terms:
            side = (np.float32(1.0), np.float32(1.0)) if coded else (rms(x.a, None), rms(x.b, None))
            core: Any = () if x.core is None else rms(x.core, tuple(range(1, np.ndim(x.core))))
            if coded:
                # as much as one step is of a vector
                core = np.abs(np.asarray(x.core, np.float32)) / max(float(rms(x.a, None).max()), 1.0)
                core = np.where(core > 0, core, 1.0)
            rows.append((*side, core))
        out[name] = tuple(rows)
    return out


def refine(
    store: Store,
    collection: Sequence[Adapter],
    *,
    forward: Forward,
    batches: Callable[[int], Any] | Sequence[Any],
    calibration: Mapping[str, np.ndarray] | None = None,
    mask: Callable[[Any], Array] | None = None,
    check: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 100,
    accumulate: int = 1,
    at_once: int | None = None,
    folder: Path | None = None,
    save: int = 25,
    progress: Callable[[float], None] = lambda loss: None,
) -> tuple[Store, Refined]:
    """Refine a store so that the model's outputs with it diverge least; its bytes do not grow.

    Args:
      store: plain or coded (made under a budget), all tasks of it.
      collection: the adapters it was made of.
      forward: `(lora, batch) -> logits [..., V]` for one task, `lora` module -> `(a: [I, S], b: [S, O])`.
      batches: step -> batch, or a sequence that is gone through again and again; every leaf has a leading
        task axis. Unlabeled inputs.
      calibration: the second moments that the store was made with, if it was: what is stated of the errors of
        the modules' outputs is then measured anew.
      mask: `batch -> [...]` bool, the predictions that count; None for all.
      check: the batch on which `before` and `after` are measured; None for the first.
      optimizer: any Optax optimizer; None for `default_optimizer(steps)`.
      steps: number of batches.
      accumulate: batches per step of the optimizer.
      at_once: number of tasks computed in parallel; None for all, fewer need less memory.
      folder: for saved steps, from which a stopped run resumes; None to save nothing.
      save: number of steps between saves.
      progress: called with the loss of every step.

    Returns:
      The refined store, or the given store if nothing was gained; and `Refined`.

    Raises:
      HydraOptError: adapters that are not those of the store, no batches, a store in several parts, or a
        saved step that cannot be read.
    """
    ordered = in_order(store, collection)
    if not callable(batches) and not len(batches):
        raise HydraOptError("refine: needs batches of inputs")
    if any(x.references or x.removed for x in store.segments):
        raise HydraOptError("refine: tasks were added or removed since the store was fitted: refit it first")
    parts = [n for n, x in enumerate(store.segments) if x.modules]
    if len(parts) > 1:
        raise HydraOptError(
            "refine: a divergence needs all modules at once, and the store was coded in parts because it is "
            "large: compress fewer tasks"
        )
    batch_at: Callable[[int], Any] = batches if callable(batches) else cycle(batches)
    segments, (n,) = list(store.segments), parts
    given = Given(
        calibration=calibration,
        # compiled for this call alone: a cache that outlives it would keep the model that `forward` holds
        loss=jax.tree_util.Partial(divergence(forward, mask, at_once=at_once)),
        batch_at=batch_at,
        check=batch_at(0) if check is None else check,
        optimizer=accumulating(optimizer or default_optimizer(max(steps // accumulate, 1)), accumulate),
        steps=steps,
        accumulate=accumulate,
        folder=folder,
        save=save,
        progress=progress,
    )
    segments[n], found = refine_segment(segments[n], ordered, given)
    if segments[n] is store.segments[n]:
        return store, found
    account = {"steps": steps} | {k: float(f"{getattr(found, k):.6g}") for k in ("before", "after")}
    report = Static({**store.report, "refinement": account})
    return store.replace(segments=tuple(segments), report=report), found


class Given(NamedTuple):
    """Arguments of `refine`; `optimizer` takes the batches of a step one by one."""

    calibration: Mapping[str, np.ndarray] | None
    loss: Any
    batch_at: Callable[[int], Any]
    check: Any
    optimizer: optax.MultiSteps
    steps: int
    accumulate: int
    folder: Path | None
    save: int
    progress: Callable[[float], None]


def refine_segment(segment: Segment, ordered: Sequence[Adapter], given: Given) -> tuple[Segment, Refined]:
    """Refine a segment of all modules and tasks; the same one where nothing was gained."""
    kept = rounding.coded_terms(segment) if segment.coded else segment_terms(segment)
    metrics = {}
    if given.calibration is not None:
        shapes = {n: (v[0].a.shape[1], v[0].b.shape[2]) for n, v in kept.items()}
        metrics = metrics_of(shapes, given.calibration)
    loss, folder = given.loss, given.folder
    measure = jax.jit(lambda *x: moved_loss(*x))
    take = jax.jit(lambda *x: step(*x), static_argnums=0)
    original, unit = originals(ordered), units(kept, segment.coded)
    if segment.coded:
        rounded, begin = rounding.coded_rounding(segment, kept), rounding.unrounded(kept, ordered, metrics)
    else:
        rounded, begin = rounding.cast_rounding(kept), dict(kept)
    live = jax.tree.map(lambda x: np.asarray(np.abs(np.asarray(x, np.float32)) > 0), trainable_arrays(begin))
    if segment.coded:
        live = jax.tree.map(lambda x: x.any(-2, keepdims=True) if x.ndim == 3 else x, vectors(live))
        live = vectors(live)
    slope = jax.tree.map(lambda u, x: jnp.asarray(u * x, jnp.float32), unit, live)
    chain = given.optimizer
    indices = indices_of(kept)
    before = float(measure(loss, indices, original, to_float32(trainable_arrays(kept)), given.check))
    factors = jax.tree.map(
        lambda x, u: jnp.asarray(np.asarray(x, np.float32) / u), trainable_arrays(begin), unit
    )
    state, done, trace = resume(RefinementState(factors, chain.init(factors), rounded.tables), folder)
    moved: Any = None
    for i in range(done, given.steps):
        if moved is None or i % given.accumulate == 0:
            whole = with_indices(indices, times_units(state.factors, unit))
            found, tables = rounded.round(whole, state.tables, i >= SETTLED * given.steps)
            state, moved = state._replace(tables=tables), to_float32(trainable_arrays(found))
        at = descent.DescentState(state.factors, state.optimizer)
        (factors, memory, _), lost = take(chain, loss, indices, original, slope, at, moved, given.batch_at(i))
        state = RefinementState(factors, memory, state.tables)
        trace.append(float(lost))
        given.progress(trace[-1])
        if folder is not None and ((i + 1) % given.save == 0 or i + 1 == given.steps):
            keep_step(state, i + 1, trace, folder)
    modules, leaves = rounded.finish(with_indices(indices, times_units(state.factors, unit)), state.tables)
    after = float("inf")
    if modules:
        after = float(measure(loss, indices, original, to_float32(trainable_arrays(modules)), given.check))
    if not after < before:
        return segment, Refined(before, before, np.array(trace))
    return with_factors(segment, modules, leaves, ordered, metrics), Refined(before, after, np.array(trace))


def with_factors(
    segment: Segment,
    modules: Modules,
    leaves: Mapping[str, bytes] | None,
    ordered: Sequence[Adapter],
    metrics: Mapping[str, Metrics],
) -> Segment:
    """A segment with other factors (coded in `leaves`, or plain) and their measured errors."""
    schema: Any = segment.modules
    body: Any = leaves
    if leaves is None:
        schema, body = plain.to_leaves(modules)
    names = list(schema)
    # errors of outputs only if they can be measured: the former ones are no longer valid
    outputs = error_table(modules, ordered, names, metrics) if metrics else None
    errors = error_table(modules, ordered, names)
    carried = [tensors_at(segment, k) for k in range(len(segment.tasks))]
    return make_segment(segment.tasks, schema, body, errors, output_errors=outputs, tensors=carried)


def cycle(batches: Sequence[Any]) -> Callable[[int], Any]:
    """Step -> batch, cycling through the sequence."""
    return lambda i: batches[i % len(batches)]


def vectors(moved: Any) -> Any:
    """The arrays with `b` transposed, so that vectors lie along the second to last axis on both sides."""
    flip = lambda x: x.swapaxes(-1, -2)  # noqa: E731
    return {n: tuple((a, flip(b), core) for a, b, core in terms) for n, terms in moved.items()}


def to_float32(moved: Any) -> Any:
    """The arrays in float32 on the device."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(np.float32)), moved)


def times_units(factors: Any, unit: Any) -> Any:
    """Factors multiplied with their units, on the host."""
    return jax.tree.map(lambda x, u: np.asarray(x) * u, factors, unit)


def in_order(store: Store, collection: Sequence[Adapter]) -> list[Adapter]:
    """The adapters in the order of the store's tasks."""
    known = {x.task: x for x in collection}
    missing = [t for t in store.tasks if t not in known]
    if missing:
        raise HydraOptError(f"refine: no adapter for the task {missing[0]!r} of the store")
    return [known[t] for t in store.tasks]


def keep_step(state: RefinementState, done: int, trace: Sequence[float], folder: Path) -> None:
    """Save a step, from which a run can resume."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"state": state, "trace": np.array(trace)}
    ocp.save((folder / str(done)).resolve(), tree, overwrite=True)


def resume(state: RefinementState, folder: Path | None) -> tuple[RefinementState, int, list[float]]:
    """The newest saved state, its step and trace; or the given state at step 0."""
    done = [int(p.name) for p in folder.glob("*") if p.name.isdigit()] if folder is not None else []
    if not done:
        return state, 0, []
    assert folder is not None
    tree = {"state": state, "trace": np.zeros(max(done))}
    path = folder / str(max(done))
    try:
        found = ocp.load(path.resolve(), tree)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise HydraOptError(
            f"{path}: no saved step of this refinement can be read; remove it to go on from the one before"
        ) from error
    return found["state"], max(done), np.asarray(found["trace"]).tolist()
