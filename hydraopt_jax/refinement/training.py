"""Refinement of a store by Optax with its rounding in the loop, shared and per-task factors jointly.

The loss is that of the stored factors. Each stored factor has an unrounded counterpart. A step rounds all of
them as the store would (a cast, or the trellis quantizer with its tables and predictions), takes the gradient
of the loss at the rounded factors, and moves the unrounded ones by it (straight-through estimator). Bytes do
not grow: the quantizer's price of a bit is adjusted. A basis that no task reads for itself stays as it is:
only what is predicted from it moves.

The loss is the mean over tasks and tokens of `KL(p_adapter || p_store)`, the divergence of the stored
adapters' next-token distributions from the original ones', on unlabeled batches (distillation). Tasks have
the weights that the store was made with. The error of the weights is not refined: the fit has made it as
small as its bytes allow.

The quantizer minimizes `D + price * R`, squared error in steps and bits. Factors move by the gradient of

    loss + h * price * R,     h = loss / D

with the loss of the last steps, and D the squared steps from the given store to the unrounded factors at the
start: the same compromise, as the loss sees it.

References: Bengio et al., Estimating or propagating gradients through stochastic neurons, arXiv 1308.3432;
Balle et al., End-to-end optimized image compression, arXiv 1611.01704 (rate in the loss).
"""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from orbax.checkpoint import v1 as ocp

from hydraopt_jax.adapters import Adapter, check_types
from hydraopt_jax.checkpoints import save_context
from hydraopt_jax.errors import HydraOptError, system_error
from hydraopt_jax.forms import descent
from hydraopt_jax.refinement.moving_segment import start_moving, with_factors
from hydraopt_jax.refinement.objectives import Forward, Lora, all_tasks, divergence, originals, stacked
from hydraopt_jax.refinement.rounding import Indices, Modules, indices_of, trainable_arrays, with_indices
from hydraopt_jax.static import Static
from hydraopt_jax.store import Segment, Store, lossless, segment_data
from hydraopt_jax.store.store import given_weights

LEARNING_RATE = 0.03
# share of the steps after which the quantizer's tables are fixed
SETTLED = 0.8
# steps whose mean loss tells what a squared quantizer step costs
RECENT = 20


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
    """Adam with a cosine decay to zero; the rate is in quantizer steps, or in tenths of a plain factor's rms.

    Equal arguments give the same object, so that a second refinement compiles nothing.
    """
    return optax.adam(optax.cosine_decay_schedule(rate, steps), b2=0.99)


@functools.lru_cache(maxsize=64)
def accumulating(optimizer: optax.GradientTransformation, batches: int) -> optax.MultiSteps:
    """The optimizer with one step per so many batches; equal arguments give the same object."""
    return optax.MultiSteps(optimizer, batches)


class Rows(NamedTuple):
    """The tasks of a segment: their positions in the store `[T]`, and which factors they use."""

    places: np.ndarray
    indices: Indices


def moved_loss(loss: Any, rows: Sequence[Rows], original: Lora, moved: Any, batch: Any) -> Array:
    """The loss of the moved factors of some segments."""
    parts = [stacked(with_indices(x.indices, own)) for x, own in zip(rows, moved, strict=True)]
    tasks = len(next(iter(original.values()))[0])
    found = all_tasks(parts, [jnp.asarray(x.places) for x in rows], tasks)
    # a module that is zero for all tasks has no terms
    zero = {n: (0 * a[..., :1], 0 * b[:, :1]) for n, (a, b) in original.items() if n not in found}
    return loss({**found, **zero}, original, batch)


class Around(NamedTuple):
    """What a step is taken around: arrays like the unrounded ones in their units.

    Attributes:
      rounded: the rounded factors.
      slope: derivative of the rounded factors by the unrounded ones.
      rate: derivative of the price of the bits, in units of the loss.
    """

    rounded: Any
    slope: Any
    rate: Any


def step(
    chain: optax.MultiSteps,
    loss: Any,
    rows: Sequence[Rows],
    original: Lora,
    around: Around,
    state: descent.DescentState,
    batch: Any,
) -> tuple[descent.DescentState, Array]:
    """One step of `chain` on unrounded factors, by the gradients of the loss at the rounded ones and of the
    rate; and the loss."""

    def through(factors: Any, around: Around, batch: Any) -> Array:
        straight = jax.tree.map(straight_through, factors, around.rounded, around.slope)
        lost = moved_loss(loss, rows, original, straight, batch)
        spent = sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), around.rate, factors)))
        return lost + (spent - jax.lax.stop_gradient(spent))

    return descent.step(through, chain, state, around, batch)


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
    folder: str | os.PathLike[str] | None = None,
    save: int = 25,
    progress: Callable[[float], None] = lambda loss: None,
) -> tuple[Store, Refined]:
    """Refine a store so that the model's outputs with it diverge least; the bytes of its factors do not grow.

    Bytes go where the outputs on the batches depend on them: other factors shrink, and their errors of
    weights grow. So the batches should be like what the adapters will see.

    The loss needs all modules of a task at once: all factors are in memory in float32, also those of a store
    that was coded in several segments. `at_once` bounds what the model takes.

    More than eight arguments: a training run: model, data, optimizer, checkpoints. Most have a default.

    Args:
      store: plain or coded (made under a budget), all tasks of it.
      collection: the adapters it was made of.
      forward: `(lora, batch) -> logits [..., V]` for one task, `lora` module -> `(a: [I, S], b: [S, O])`;
        with a model's weights bound by `jax.tree_util.Partial(forward, weights)`, see `divergence`.
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
      folder: for saved steps, from which a stopped run with the same arguments resumes; None to save nothing.
      save: number of steps between saves, at least.
      progress: called with the loss of every step.

    Returns:
      The refined store, or the given store if nothing was gained; and `Refined`.

    Raises:
      HydraOptError: adapters that are not those of the store, no batches, a store whose tasks have changed
        since it was fitted, a folder with steps of another store or of another number of steps or that cannot
        be written, or a saved step that cannot be read.
    """
    ordered = in_order(store, collection)
    if not callable(batches) and not len(batches):
        raise HydraOptError("refine: needs batches of inputs")
    if min(accumulate, save) < 1:
        raise HydraOptError("refine: accumulate and save must be at least 1")
    if store.report.get("form") == lossless.FORM:
        raise HydraOptError("refine: the store keeps the adapters bit for bit: there is nothing to gain")
    if any(x.references or x.removed or x.tables >= 0 for x in store.segments):
        raise HydraOptError("refine: tasks were added or removed since the store was fitted: refit it first")
    parts = [n for n, x in enumerate(store.segments) if x.modules]
    home = None if folder is None else Path(folder)
    batch_at = batches if callable(batches) else lambda i: batches[i % len(batches)]
    given = Given(
        calibration=calibration,
        loss=divergence(forward, mask, at_once=at_once, weights=given_weights(store)),
        batch_at=batch_at,
        check=batch_at(0) if check is None else check,
        optimizer=accumulating(optimizer or default_optimizer(max(steps // accumulate, 1)), accumulate),
        steps=steps,
        accumulate=accumulate,
        folder=home,
        save=save,
        progress=progress,
    )
    if home is not None:
        claim(home, [segment_data.entry_of(x).sha256 for x in store.segments], steps, accumulate)
    segments, found = refine_segments(store, parts, ordered, given)
    if not found.after < found.before:
        return store, found
    account = {"steps": steps} | {k: float(f"{getattr(found, k):.6g}") for k in ("before", "after")}
    refined = store.replace(segments=tuple(segments))
    report = {**store.report, "refinement": account}
    if refined.output_errors is None and store.output_errors is not None:
        # of errors that are no longer known
        report.pop("estimate", None)
    return refined.replace(report=Static(report)), found


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


def refine_segments(
    store: Store, parts: Sequence[int], ordered: Sequence[Adapter], given: Given
) -> tuple[list[Segment], Refined]:
    """Refine some segments of a store together; the same ones where nothing was gained."""
    segments, place = list(store.segments), {t: k for k, t in enumerate(store.tasks)}
    places = [np.array([place[t] for t in segments[n].tasks]) for n in parts]
    opened = [
        start_moving(segments[n], [ordered[k] for k in at], given.calibration, len(parts))
        for n, at in zip(parts, places, strict=True)
    ]
    loss, folder, chain = given.loss, given.folder, given.optimizer
    # compiled for this call alone: a cache that outlives it would keep the model that `forward` closes over
    measure, take = jax.jit(lambda *x: moved_loss(*x)), jax.jit(lambda *x: step(*x), static_argnums=0)
    original = originals(ordered)
    slope = [x.slope for x in opened]
    rows = [Rows(at, indices_of(x.kept)) for at, x in zip(places, opened, strict=True)]
    before = float(measure(loss, rows, original, arrays_of([x.kept for x in opened]), given.check))
    factors = [x.start for x in opened]
    begin = RefinementState(factors, chain.init(factors), [x.rounding.tables for x in opened])
    state, done, trace = resume(begin, folder)
    # with all batches of a step: the tables are those after its rounding
    every = -(-given.save // given.accumulate) * given.accumulate
    # 0 where all factors are plain, which have no rate
    distortion = sum(x.distortion() for x in opened)
    around: Any = None
    for i in range(done, given.steps):
        if around is None or i % given.accumulate == 0:
            rounded = [
                x.rounding.round(x.factors(own), tables, i >= SETTLED * given.steps)
                for x, own, tables in zip(opened, state.factors, state.tables, strict=True)
            ]
            state = state._replace(tables=[x.tables for x in rounded])
            cost = np.mean([x for x in trace[-RECENT:] if np.isfinite(x)] or [before])
            weight = np.float32(cost / distortion if distortion > 0 else 0.0)
            rate = [jax.tree.map(lambda x, w=weight: w * x, y.slopes) for y in rounded]
            around = Around(arrays_of([x.factors for x in rounded]), slope, jax.device_put(rate))
        at = descent.DescentState(state.factors, state.optimizer)
        (factors, memory, _), lost = take(chain, loss, rows, original, around, at, given.batch_at(i))
        state = RefinementState(factors, memory, state.tables)
        trace.append(float(lost))
        given.progress(trace[-1])
        if folder is not None and ((i + 1) % every == 0 or i + 1 == given.steps):
            keep_step(state, i + 1, trace, folder)
    ends = [x.finished(*y) for x, *y in zip(opened, state.factors, state.tables, strict=True)]
    # decoded for the tasks: a basis that none reads for itself is no longer among the factors
    read = [Rows(at, indices_of(x)) for at, (x, _, _) in zip(places, ends, strict=True)]
    after = float(measure(loss, read, original, arrays_of([x for x, _, _ in ends]), given.check))
    if not after < before or not any(fits for _, _, fits in ends):
        return segments, Refined(before, before, np.array(trace))
    for n, part, (modules, leaves, fits) in zip(parts, opened, ends, strict=True):
        if fits:
            segments[n] = with_factors(part, modules, leaves)
    return segments, Refined(before, after, np.array(trace))


def arrays_of(parts: Sequence[Modules]) -> Any:
    """The arrays of each part in float32 on the device."""
    moved = [trainable_arrays(x) for x in parts]
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(np.float32)), moved)


def in_order(store: Store, collection: Sequence[Adapter]) -> list[Adapter]:
    """The adapters in the order of the store's tasks."""
    check_types(collection)
    known = {x.task: x for x in collection}
    missing = [t for t in store.tasks if t not in known]
    if missing:
        raise HydraOptError(f"refine: no adapter for the task {missing[0]!r} of the store")
    return [known[t] for t in store.tasks]


def claim(folder: Path, segments: Sequence[str], steps: int, accumulate: int) -> None:
    """Note in a folder whose steps it keeps; raise if it has those of another refinement."""
    said = {"segments": list(segments), "steps": steps, "accumulate": accumulate}
    file = folder / "refinement.json"
    if saved(folder):
        if not file.exists() or json.loads(file.read_bytes()) != said:
            raise HydraOptError(
                f"{folder}: has steps of another refinement (of another store, or another number of steps): "
                "give another folder, or remove it"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(said))
    except OSError as error:
        raise system_error(folder, "written", error) from None


def saved(folder: Path) -> list[int]:
    """Numbers of the steps that a folder keeps."""
    return [int(p.name) for p in folder.glob("*") if p.name.isdigit()]


def keep_step(state: RefinementState, done: int, trace: Sequence[float], folder: Path) -> None:
    """Save a step, from which a run can resume."""
    tree = {"state": state, "trace": np.array(trace)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with save_context():
            ocp.save((folder / str(done)).resolve(), tree, overwrite=True)
    except OSError as error:
        raise system_error(folder, "written", error) from None


def resume(state: RefinementState, folder: Path | None) -> tuple[RefinementState, int, list[float]]:
    """The newest saved state, its step and trace; or the given state at step 0."""
    done = saved(folder) if folder is not None else []
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
