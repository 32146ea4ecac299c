"""A segment in refinement: its factors, their units, its rounding, and the segment that comes out."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.factors import Factors
from hydraopt_jax.rate_control.distortion import error_table, segment_terms
from hydraopt_jax.rate_control.metrics import Metrics, metrics_of
from hydraopt_jax.rate_control.unweighing import shapes_noise
from hydraopt_jax.refinement import rounding
from hydraopt_jax.refinement.rounding import Modules, indices_of, trainable_arrays, with_indices
from hydraopt_jax.store import Segment, plain
from hydraopt_jax.store.store import make_segment, tensors_at

# of a plain factor's rms: what a quantizer step is to a coded one. Steps as large as a coded factor takes in
# its own units made the divergence of a language model larger, not smaller
PLAIN_UNIT = 0.1


class MovingSegment(NamedTuple):
    """A segment in refinement.

    Attributes:
      segment: as given.
      adapters: of its tasks, in their order.
      metrics: module -> its metrics, empty without calibration.
      kept: its decoded factors.
      rounding: how its factors are rounded.
      start: unrounded arrays in units, see `rounding.trainable_arrays`.
      unit: of each array, see `units`.
      slope: derivative of the factors by the arrays: the unit; 0 for vectors that stay zero.
    """

    segment: Segment
    adapters: Sequence[Adapter]
    metrics: Mapping[str, Metrics]
    kept: Modules
    rounding: rounding.Rounding
    start: Any
    unit: Any
    slope: Any

    def factors(self, moved: Any) -> Modules:
        """The unrounded factors of arrays in units, on the host."""
        whole = jax.tree.map(lambda x, u: np.asarray(x) * u, moved, self.unit)
        return with_indices(indices_of(self.kept), whole)

    def distortion(self) -> float:
        """Squared units between the factors as given and the unrounded ones at the start."""
        given = jax.tree.map(
            lambda x, u: np.asarray(x, np.float32) / u, trainable_arrays(self.kept), self.unit
        )
        off = jax.tree.map(lambda x, y: float(np.sum((x - np.asarray(y)) ** 2)), given, self.start)
        return sum(jax.tree.leaves(off))

    def finished(self, moved: Any, tables: Any) -> tuple[Modules, Mapping[str, bytes] | None, bool]:
        """The rounded factors of arrays in units and their leaves (None if plain); and whether they fit in
        the segment's bytes: if not, its own factors are returned."""
        modules, leaves = self.rounding.finish(self.factors(moved), tables)
        return (modules, leaves, True) if modules else (self.kept, None, False)


def start_moving(
    segment: Segment, adapters: Sequence[Adapter], calibration: Mapping[str, np.ndarray] | None, among: int
) -> MovingSegment:
    """The state of one `among` so many segments, for the adapters of its tasks and the moments that it was
    made with."""
    kept = rounding.coded_terms(segment) if segment.coded else segment_terms(segment)
    check_modules(kept, adapters)
    metrics = {}
    if calibration is not None:
        shapes = {n: (v[0].a.shape[1], v[0].b.shape[2]) for n, v in kept.items() if v}
        metrics = metrics_of(shapes, calibration)
    unit = units(kept, segment.coded)
    if segment.coded:
        # a calibrated segment states errors of outputs
        calibrated = "output_errors" in segment.leaves
        shaped = calibrated and any(shapes_noise(x) for sides in metrics.values() for x in sides)
        how = rounding.coded_rounding(segment, kept, -(-rounding.SPARE // among), shaped)
        begin = rounding.unrounded(kept, adapters, metrics, shaped)
    else:
        how, begin = rounding.cast_rounding(kept), dict(kept)
    live = jax.tree.map(lambda x: np.asarray(np.abs(np.asarray(x, np.float32)) > 0), trainable_arrays(begin))
    if segment.coded:
        live = jax.tree.map(lambda x: x.any(-2, keepdims=True) if x.ndim == 3 else x, vectors(live))
        live = vectors(live)
    slope = jax.tree.map(lambda u, x: jnp.asarray(u * x, jnp.float32), unit, live)
    start = jax.tree.map(
        lambda x, u: jnp.asarray(np.asarray(x, np.float32) / u), trainable_arrays(begin), unit
    )
    return MovingSegment(segment, adapters, metrics, kept, how, start, unit, slope)


def check_modules(kept: Modules, adapters: Sequence[Adapter]) -> None:
    """Raise unless the adapters have the modules that their tasks have in a store, in the same shapes."""
    for name, terms in kept.items():
        for t, x in enumerate(adapters):
            shapes = {(y.a.shape[-2], y.b.shape[-1]) for y in terms if y.a_of[t] >= 0}
            own = {(x.a[name].shape[0], x.b[name].shape[1])} if name in x.a else set()
            if not shapes <= own:
                raise HydraOptError(
                    f"refine: {name} of the adapter {x.task!r} is not that of the store: give the adapters "
                    "that it was made of"
                )


def units(modules: Modules, coded: bool) -> Any:
    """The unit of each array: a quantizer step, or `PLAIN_UNIT` of the rms of a plain factor or core."""

    def rms(x: Any, axes: Any = None) -> np.ndarray:
        found = np.sqrt(np.mean(np.asarray(x, np.float32) ** 2, axes, keepdims=True))
        return np.where(found > 0, found, 1.0)

    def plain_units(x: Factors) -> Any:
        core = () if x.core is None else PLAIN_UNIT * rms(x.core, tuple(range(1, np.ndim(x.core))))
        return PLAIN_UNIT * rms(x.a), PLAIN_UNIT * rms(x.b), core

    def coded_units(x: Factors) -> Any:
        # a core's is as much as one step is of a vector
        core = np.abs(np.asarray(x.core, np.float32)) / max(float(rms(x.a).max()), 1.0)
        return np.float32(1.0), np.float32(1.0), np.where(core > 0, core, 1.0)

    of = coded_units if coded else plain_units
    return {name: tuple(of(x) for x in terms) for name, terms in modules.items()}


def vectors(moved: Any) -> Any:
    """The arrays with `b` transposed, so that vectors lie along the second to last axis on both sides."""
    flip = lambda x: x.swapaxes(-1, -2)  # noqa: E731
    return {n: tuple((a, flip(b), core) for a, b, core in terms) for n, terms in moved.items()}


def with_factors(given: MovingSegment, modules: Modules, leaves: Mapping[str, bytes] | None) -> Segment:
    """The segment with other factors (coded in `leaves`, or plain) and their measured errors."""
    schema: Any = given.segment.modules
    body: Any = leaves
    if leaves is None:
        schema, body = plain.to_leaves(modules)
    names = list(schema)
    # errors of outputs only if they can be measured: the former ones are no longer valid
    outputs = error_table(modules, given.adapters, names, given.metrics) if given.metrics else None
    errors = error_table(modules, given.adapters, names)
    carried = [tensors_at(given.segment, k) for k in range(len(given.segment.tasks))]
    return make_segment(given.segment.tasks, schema, body, errors, output_errors=outputs, tensors=carried)
