"""Terms to be coded: a module's factors in quantizer steps, in its chosen form."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hydraopt_jax.codec.encode import TermInSteps
from hydraopt_jax.codec.layout import PROJECTED, TermShape
from hydraopt_jax.linalg.decompose import HostSvd
from hydraopt_jax.rate_control.analysis import Joint, Spectrum
from hydraopt_jax.rate_control.mode_decision import Plan
from hydraopt_jax.rate_control.precision import base_scales, reference_scales


def terms_in_steps(x: Spectrum, chosen: Plan, step: float) -> dict[str, tuple[TermInSteps, ...]]:
    """Module -> factors in steps, in the chosen forms."""
    out = {}
    for m, (name, choice) in enumerate(zip(x.modules, chosen.choices, strict=True)):
        one = HostSvd(*(y[m] for y in x.deltas))
        if choice.form == "separate":
            cosines = None
            if choice.reference >= 0:
                at = x.references.index(choice.reference)
                cosines = [y[m, :, :, at] for y in x.cosines]
            out[name] = separate_terms(one, choice.reference, chosen.live[m], step, cosines)
        else:
            assert x.joint is not None
            bases = [Joint(*(y[m] for y in side)) for side in x.joint]
            out[name] = joint_term(one, bases, choice.widths, chosen.live[m], step)
    return out


def separate_terms(
    deltas: HostSvd,
    reference: int,
    live: np.ndarray,
    step: float,
    cosines: Sequence[np.ndarray] | None = None,
) -> tuple[TermInSteps, ...]:
    """Each task's coded singular directions; the reference's factors come first.

    Args:
      deltas: `s` `[T, R]` relative.
      reference: the task that others are predicted from; -1 for none.
      live: `[T, R]` bool, coded directions.
      step: the quantizer step.
      cosines: `[T, R, R]` squared, of input-side and of output-side vectors with those of the reference.
    """
    present = np.flatnonzero(deltas.energy > 0)
    first = [reference] if reference >= 0 else []
    order = np.array([*first, *(t for t in present if t != reference)], int)
    if not len(order):
        # the module's shape, and no factors
        none = tuple(-1 for _ in live)
        shape = TermShape(none, none, deltas.u.shape[-2], 1, deltas.v.shape[-1], 0)
        a, b = (np.zeros((0, n, 1), np.float32) for n in (shape.inputs, shape.outputs))
        return (TermInSteps(shape, a, b),)
    rank = max(int(live[present].sum(-1).max(initial=0)), 1)
    scales = [np.ones(live.shape, np.float32) for _ in range(2)]
    if cosines is not None:
        energy = np.asarray(deltas.s, np.float64) ** 2 / step**2
        sizes = deltas.u.shape[-2], deltas.v.shape[-1]
        for scale, each, size in zip(scales, cosines, sizes, strict=True):
            scale[reference] = reference_scales(energy, each, live, reference, size)
    a, b = directions(deltas, live, rank, step, scales)
    of = np.full(len(live), -1)
    of[order] = np.arange(len(order))
    predicted = PROJECTED if reference >= 0 else 0
    shape = TermShape(tuple(of.tolist()), tuple(of.tolist()), a.shape[1], rank, b.shape[1], predicted)
    return (TermInSteps(shape, a[order], b[order]),)


def directions(
    deltas: HostSvd, live: np.ndarray, rank: int, step: float, scales: Sequence[Any] = (1.0, 1.0)
) -> tuple[np.ndarray, ...]:
    """The strongest `rank` coded directions of each task in steps, `[T, I, S]` and `[T, O, S]`, times the
    scales of each side, `[T, R]`."""
    s = np.where(live, deltas.s, 0.0) / step
    pick = np.argsort(-s, axis=-1, kind="stable")[:, :rank]
    vectors = deltas.u, deltas.v.swapaxes(1, 2)
    out = []
    for x, scale in zip(vectors, scales, strict=True):
        amplitude = np.take_along_axis(s * scale, pick, 1)
        out.append((np.take_along_axis(x, pick[:, None, :], 2) * amplitude[:, None, :]).astype(np.float32))
    return tuple(out)


def joint_term(
    deltas: HostSvd,
    bases: Sequence[Joint],
    widths: Sequence[int],
    live: np.ndarray,
    step: float,
) -> tuple[TermInSteps, ...]:
    """The basis of each side as factor 0, which no task reads, then each task's coded directions."""
    present = np.flatnonzero(deltas.energy > 0)
    energy = np.where(live, np.asarray(deltas.s, np.float64) ** 2, 0.0)
    rank = max(int(live[present].sum(-1).max(initial=0)), *widths, 1)
    sides = []
    for own, base, width in zip(directions(deltas, live, rank, step), bases, widths, strict=True):
        part = np.asarray(base.part, np.float64)[..., :width]
        along = part[live] * energy[live][:, None] / step**2
        rest = np.maximum(energy[live] / step**2 - along.sum(1), 0) / own.shape[1]
        center = along.sum(0)
        scale = base_scales(along, rest, center, own=False)
        first = np.zeros((1, own.shape[1], rank), np.float32)
        first[0, :, :width] = np.asarray(base.basis)[:, :width] * np.sqrt(center) * scale
        own = np.pad(own, ((0, 0), (0, 0), (0, rank - own.shape[2])))
        sides.append(np.concatenate([first, own[present]]))
    a, b = sides
    of = np.full(len(live), -1)
    of[present] = 1 + np.arange(len(present))
    use = tuple(of.tolist())
    return (TermInSteps(TermShape(use, use, a.shape[1], rank, b.shape[1], PROJECTED), a, b),)
