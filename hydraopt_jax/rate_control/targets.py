"""What the codec is to code: a module's factors in quantizer steps, by the form chosen for it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hydraopt_jax.codec.encode import MULTIPLIER, Target
from hydraopt_jax.codec.layout import PROJECTED, TermShape
from hydraopt_jax.linalg.decompose import Svd
from hydraopt_jax.rate_control.analysis import SHARED_WIDTH, Joint, Spectrum, shared_factors
from hydraopt_jax.rate_control.mode_decision import DIRECTION_BITS, Choice, Plan, cost


def targets(x: Spectrum, chosen: Plan, step: float) -> dict[str, tuple[Target, ...]]:
    """What the codec is to code: every module's factors in steps, by its chosen form."""
    out = {}
    for m, (name, choice) in enumerate(zip(x.modules, chosen.choices, strict=True)):
        one = Svd(*(y[m] for y in x.deltas))
        if choice.form == "separate":
            out[name] = separate_target(one, choice.reference, chosen.live[m], step)
        elif choice.form == "joint" and x.joint is not None:
            bases = [Joint(*(y[m] for y in side)) for side in x.joint]
            out[name] = joint_target(one, bases, choice.widths, chosen.live[m], step)
        else:
            out[name] = hydra_target(one, choice, x.labels[m][x.cuts.index(choice.heads)], step)
    return out


def separate_target(deltas: Svd, reference: int, live: np.ndarray, step: float) -> tuple[Target, ...]:
    """Each task's live singular directions; the reference's factors come first."""
    present = np.flatnonzero(np.asarray(deltas.energy) > 0)
    first = [reference] if reference >= 0 else []
    order = np.array([*first, *(t for t in present if t != reference)], int)
    if not len(order):
        return ()
    rank = max(int(live[present].sum(-1).max(initial=0)), 1)
    a, b = directions(deltas, live, rank, step)
    of = np.full(len(live), -1)
    of[order] = np.arange(len(order))
    predicted = PROJECTED if reference >= 0 else 0
    shape = TermShape(tuple(of.tolist()), tuple(of.tolist()), a.shape[1], rank, b.shape[1], predicted)
    return (Target(shape, a[order], b[order]),)


def directions(deltas: Svd, live: np.ndarray, rank: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    """The strongest `rank` live directions of each task in steps, `[T, I, S]` and `[T, O, S]`."""
    s = np.where(live, deltas.s, 0.0) / step
    pick = np.argsort(-s, axis=-1, kind="stable")[:, :rank]
    amplitude = np.take_along_axis(s, pick, 1)
    a = np.take_along_axis(np.asarray(deltas.u), pick[:, None, :], 2) * amplitude[:, None, :]
    b = np.take_along_axis(np.asarray(deltas.v).swapaxes(1, 2), pick[:, None, :], 2) * amplitude[:, None, :]
    return a.astype(np.float32), b.astype(np.float32)


def joint_target(
    deltas: Svd,
    bases: Sequence[Joint],
    widths: Sequence[int],
    live: np.ndarray,
    step: float,
) -> tuple[Target, ...]:
    """The basis of each side as factor 0, which no task reads, then each task's live directions."""
    present = np.flatnonzero(np.asarray(deltas.energy) > 0)
    energy = np.where(live, np.asarray(deltas.s, np.float64) ** 2, 0.0)
    rank = max(int(live[present].sum(-1).max(initial=0)), *widths, 1)
    sides = []
    for own, base, width in zip(directions(deltas, live, rank, step), bases, widths, strict=True):
        center = np.einsum("trs,tr->s", np.asarray(base.part, np.float64), energy)[:width]
        first = np.zeros((1, own.shape[1], rank), np.float32)
        first[0, :, :width] = np.asarray(base.basis)[:, :width] * np.sqrt(center) / step
        own = np.pad(own, ((0, 0), (0, 0), (0, rank - own.shape[2])))
        sides.append(np.concatenate([first, own[present]]))
    a, b = sides
    of = np.full(len(live), -1)
    of[present] = 1 + np.arange(len(present))
    use = tuple(of.tolist())
    return (Target(TermShape(use, use, a.shape[1], rank, b.shape[1], PROJECTED), a, b),)


fit_shared = jax.jit(shared_factors, static_argnames="rank")


def hydra_target(deltas: Svd, choice: Choice, labels: np.ndarray, step: float) -> tuple[Target, ...]:
    """One shared factor and the heads, only the vectors that are worth their bits."""
    one = deltas if choice.side == "in" else deltas.mT
    width = min(one.s.shape[0] * one.s.shape[1], one.u.shape[-2], SHARED_WIDTH * one.s.shape[1])
    a, b, mass = (np.asarray(y, np.float64) for y in fit_shared(one, jnp.asarray(labels), rank=width))
    present = np.asarray(one.energy) > 0
    used_heads, numbered = np.unique(labels[present], return_inverse=True)
    labels = np.zeros_like(labels)
    labels[present] = numbered
    b, mass = b[used_heads], mass[used_heads]
    heads = mass[:, None] * (b**2).sum(-1)
    paid = cost(b.shape[-1], heads / b.shape[-1] / step**2)[0] + MULTIPLIER * DIRECTION_BITS
    live = paid < heads / step**2
    leaves = np.where(live, paid, heads / step**2).sum(0)
    center = heads.sum(0)
    own = cost(a.shape[0], center / a.shape[0] / step**2)[0] + MULTIPLIER * DIRECTION_BITS
    used = np.flatnonzero(leaves + own < center / step**2)
    if not len(used):
        used = np.array([0])
        live[:] = False
        center = np.zeros_like(center)
    shared = (a * np.sqrt(center))[None, :, used] / step
    scaled = (b * np.sqrt(mass)[:, None, None] * live[..., None])[:, used].swapaxes(1, 2) / step
    zero = tuple(np.where(present, 0, -1).tolist())
    head_of = tuple(np.where(present, labels, -1).tolist())
    used_a, used_b = shared.astype(np.float32), scaled.astype(np.float32)
    if choice.side == "out":
        shape = TermShape(head_of, zero, used_b.shape[1], len(used), used_a.shape[1], 0)
        return (Target(shape, used_b, used_a),)
    shape = TermShape(zero, head_of, used_a.shape[1], len(used), used_b.shape[1], 0)
    return (Target(shape, used_a, used_b),)
