"""What to share and what to keep: the cheapest form of every module at one quantiser step.

All modules, tasks, directions and forms are weighed in one currency, squared steps: a direction that is
coded costs its distortion and `multiplier * bits` by the Gaussian rate-distortion function, one that is left
out costs its energy. With one step for the whole collection this is the Lagrangian optimum of reverse
water-filling, so choosing per module is choosing for the collection. The step alone moves along the curve.

Reference: Shoham and Gersho, Efficient bit allocation for an arbitrary set of quantizers, 1988; Cover and
Thomas, Elements of Information Theory, section 10.3 (reverse water-filling).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hydraopt_jax import algebra, cluster
from hydraopt_jax.algebra import Svd, matmul
from hydraopt_jax.coding.codec import DISTORTION, MULTIPLIER, Target
from hydraopt_jax.layout import TermShape

# class and gain of a direction
DIRECTION_BITS = 24
# bits that a module pays for any form but the plainest: structure in the index
FORM_BITS = 64
# tasks tried as the one that others are predicted from
REFERENCES = 8
# width of a shared factor over the adapters' rank
SHARED_WIDTH = 4


class Choice(NamedTuple):
    """A form: `separate`, predicted from task `reference` or from none (-1); or `hydra`."""

    form: str
    reference: int = -1
    side: str = ""
    heads: int = 0


class Shared(NamedTuple):
    """Spectrum of HydraOpt's form at every candidate number of heads, one module and side.

    Attributes:
      centre: `[K, S]` energy of each shared vector.
      heads: `[K, T, S]` energy of each head's vectors, zero rows beyond K heads.
      missed: `[K]` energy that the form cannot reach: scatter and tail.
    """

    centre: Array
    heads: Array
    missed: Array


class Spectrum(NamedTuple):
    """What the choice depends on, for the M modules of one shape.

    Attributes:
      modules: names.
      deltas: decompositions, `s` relative to the task's norm and times the root of its weight, `[M, T, ...]`.
      norms: `[M, T]` Frobenius norms, zero for an absent task.
      scales: `[M, T]` what a relative delta is multiplied with to give the true one.
      cosines: squared cosines of every singular vector with those of the candidate references, input
        side and output side, `[M, T, R, C, R]`.
      references: the C candidate tasks.
      cuts: numbers of heads tried.
      labels: `[M, K, T]` head of each task at each cut.
      shared: spectrum with the input side shared and with the output side shared; None where one task is all.
    """

    modules: tuple[str, ...]
    deltas: Svd
    norms: np.ndarray
    scales: np.ndarray
    cosines: tuple[np.ndarray, np.ndarray]
    references: tuple[int, ...]
    cuts: tuple[int, ...]
    labels: np.ndarray
    shared: tuple[Shared, Shared] | None


def cuts(tasks: int) -> tuple[int, ...]:
    """Numbers of heads worth trying: all up to 8 tasks, powers of two and all tasks beyond."""
    if tasks <= 8:
        return tuple(range(1, tasks + 1))
    return (*(1 << k for k in range(tasks.bit_length()) if 1 << k < tasks), tasks)


def shared_factors(deltas: Svd, labels: Array, rank: int) -> tuple[Array, Array, Array]:
    """The best shared input factor and heads for given labels.

    Args:
      deltas: T decompositions, one module.
      labels: `[T]`.
      rank: S.

    Returns:
      Orthonormal `a: [I, S]`, heads `b: [T, S, O]` (zero beyond the last head), and head masses `[T]`.
    """
    tasks = deltas.s.shape[0]
    weights = (deltas.energy > 0).astype(jnp.float32)
    q, reduced = algebra.reduce(deltas.u * deltas.s[:, None, :])
    basis, _ = algebra.top_eigenvectors(cluster.between(reduced, deltas.v, labels, weights, tasks), rank)
    average, mass = cluster.membership(labels, weights, tasks)
    projected = matmul(basis.T, reduced)
    b = jnp.einsum("kt,tsr,tro->kso", average, projected, deltas.v, precision="highest")
    return matmul(q, basis), b, mass


@functools.partial(jax.jit, static_argnames="rank")
def shared_spectrum(deltas: Svd, labels: Array, rank: int) -> Shared:
    """`Shared` of modules of one shape: deltas `[M, T, ...]`, labels `[M, K, T]`."""

    def one(deltas: Svd, labels: Array) -> tuple[Array, Array, Array]:
        _, b, mass = shared_factors(deltas, labels, rank)
        heads = mass[:, None] * jnp.sum(b**2, -1)
        centre = heads.sum(0)
        return centre, heads, jnp.maximum(deltas.energy.sum() - centre.sum(), 0.0)

    return Shared(*jax.vmap(jax.vmap(one, (None, 0)))(deltas, labels))


@jax.jit
def hierarchies(deltas: Svd) -> Array:
    """Ward's cuts `[M, T, T]` of relative deltas."""

    def one(x: Svd) -> Array:
        return cluster.hierarchy(algebra.gram(x.u * x.s[:, None, :], x.v), (x.energy > 0).astype(jnp.float32))

    return jax.vmap(one)(deltas)


@jax.jit
def squared_cosines(x: Array, references: Array) -> Array:
    """Squared inner products of `[M, T, I, R]` with the references' `[M, C, I, R]`: `[M, T, R, C, R]`."""
    return jnp.einsum("mtir,mcis->mtrcs", x, references, precision="highest") ** 2


def spectrum(modules: Sequence[str], deltas: Svd, weights: np.ndarray, *, share: bool = True) -> Spectrum:
    """Analyse the modules of one shape.

    Args:
      modules: M names.
      deltas: decompositions of the true deltas, `u: [M, T, I, R]`.
      weights: `[M, T]` of the relative errors.
      share: whether tasks may share anything.
    """
    norms = np.asarray(jnp.sqrt(deltas.energy))
    root = np.sqrt(weights)
    scales = norms / root
    s = deltas.s * jnp.asarray(np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 0))[..., None]
    # directions at round-off are none
    s = jnp.where(s > 1e-6 * s[..., :1], s, 0.0)
    relative = Svd(deltas.u, s, deltas.v)
    tasks = norms.shape[1]
    if not share or tasks == 1:
        empty = np.zeros((*s.shape, 0, s.shape[-1]), np.float32)
        host = Svd(*(np.asarray(x) for x in relative))  # type: ignore[arg-type]
        return Spectrum(tuple(modules), host, norms, scales, (empty, empty), (), (), np.zeros((0,)), None)
    gram = np.asarray(jax.vmap(lambda x: algebra.gram(x.u * x.s[:, None, :], x.v))(relative))
    central = np.argsort(-(gram**2).sum((0, 2)), kind="stable")[:REFERENCES]
    left = squared_cosines(relative.u, relative.u[:, central])
    right = squared_cosines(relative.v.mT, relative.v.mT[:, central])
    tried = cuts(tasks)
    labels = hierarchies(relative)[:, np.array(tried) - 1]
    sides = []
    for x in (relative, relative.mT):
        width = min(tasks * x.s.shape[-1], x.u.shape[-2], SHARED_WIDTH * x.s.shape[-1])
        sides.append(jax.device_get(shared_spectrum(x, labels, width)))
    host = Svd(*(np.asarray(x) for x in relative))  # type: ignore[arg-type]
    return Spectrum(
        tuple(modules),
        host,
        norms,
        scales,
        (np.asarray(left), np.asarray(right)),
        tuple(central.tolist()),
        tried,
        np.asarray(labels),
        (sides[0], sides[1]),
    )


def cost(count: int, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cost in squared steps, and bits, of `count` Gaussian coefficients of a variance in squared steps."""
    bits = 0.5 * count * np.log2(np.maximum(variance / DISTORTION, 1))
    return count * np.minimum(variance, DISTORTION) + MULTIPLIER * bits, bits


class Plan(NamedTuple):
    """The form of every module of one shape at one step.

    Attributes:
      choices: M forms.
      live: `[M, T, R]` directions coded, where the form is separate.
      cost: `[M]` in squared steps.
      bytes: `[M]` estimate.
    """

    choices: tuple[Choice, ...]
    live: np.ndarray
    cost: np.ndarray
    bytes: np.ndarray


def plan(x: Spectrum, step: float) -> Plan:
    """Choose the cheapest form of each module at a quantiser step."""
    inputs, outputs = x.deltas.u.shape[-2], x.deltas.v.shape[-1]
    energy = np.asarray(x.deltas.s, np.float64) ** 2 / step**2
    options: list[Any] = []
    left, right = cost(inputs, energy / inputs), cost(outputs, energy / outputs)
    alone = left[0] + right[0] + MULTIPLIER * DIRECTION_BITS
    bits = left[1] + right[1] + DIRECTION_BITS
    keep: np.ndarray = np.asarray(alone < energy)
    total = np.where(keep, alone, energy).sum((1, 2))
    modules = range(len(x.modules))
    options.append((total, (bits * keep).sum((1, 2)), [Choice("separate")] * len(modules), keep))
    for c, task in enumerate(x.references):
        options.append(predicted(x, c, task, energy, keep, (inputs, outputs)))
    for side, found in zip(("in", "out"), x.shared or (), strict=False):
        sizes = (inputs, outputs) if side == "in" else (outputs, inputs)
        for k, heads in enumerate(x.cuts):
            paid, rate = hydra_cost(found, k, sizes, step)
            options.append((paid, rate, [Choice("hydra", side=side, heads=heads)] * len(modules), keep))
    table = np.stack([option[0] for option in options])
    table[1:] += MULTIPLIER * FORM_BITS
    best = table.argmin(0)
    return Plan(
        tuple(options[k][2][m] for m, k in enumerate(best)),
        np.stack([options[k][3][m] for m, k in enumerate(best)]),
        table.min(0),
        np.stack([options[k][1][m] for m, k in enumerate(best)]) / 8,
    )


def predicted(
    x: Spectrum, c: int, task: int, energy: np.ndarray, keep: np.ndarray, sizes: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, list[Choice], np.ndarray]:
    """Cost of `separate` with every other task predicted from candidate reference c."""
    base: np.ndarray = keep[:, task]
    rate = np.full(energy.shape, float(DIRECTION_BITS))
    paid = MULTIPLIER * rate
    others = np.arange(energy.shape[1]) != task
    extra = 8 * (base.sum(-1) + 2)[:, None, None]
    for count, cosines in zip(sizes, x.cosines, strict=True):
        variance = energy / count
        explained = np.minimum(np.einsum("mtrs,ms->mtr", cosines[..., c, :], base), 1.0)
        # the reference is itself known only up to its distortion
        rest = variance * (1 - explained) + explained * np.minimum(variance, DISTORTION)
        before, after = cost(count, variance), cost(count, rest)
        known = np.asarray(base.any(-1))[:, None, None]
        use = (after[0] + MULTIPLIER * extra < before[0]) & others[:, None] & known
        paid = paid + np.where(use, after[0] + MULTIPLIER * extra, before[0])
        rate = rate + np.where(use, after[1] + extra, before[1])
    live = paid < energy
    live[:, task] = base
    total = np.where(live, paid, energy).sum((1, 2))
    return total, (rate * live).sum((1, 2)), [Choice("separate", reference=task)] * len(x.modules), live


def hydra_cost(found: Shared, k: int, sizes: tuple[int, int], step: float) -> tuple[np.ndarray, np.ndarray]:
    """Cost of HydraOpt's form at cut k: a shared vector is worth it when the heads that use it are."""
    heads = np.asarray(found.heads[:, k], np.float64) / step**2
    centre = np.asarray(found.centre[:, k], np.float64) / step**2
    paid, rate = cost(sizes[1], heads / sizes[1])
    paid = paid + MULTIPLIER * DIRECTION_BITS
    live = paid < heads
    leaves = np.where(live, paid, heads).sum(1)
    own, own_rate = cost(sizes[0], centre / sizes[0])
    own = own + MULTIPLIER * DIRECTION_BITS
    used = leaves + own < centre
    total = np.where(used, leaves + own, centre).sum(-1) + np.asarray(found.missed[:, k]) / step**2
    bits = ((rate + DIRECTION_BITS) * live * used[:, None]).sum((1, 2)) + ((own_rate + 16) * used).sum(-1)
    return total, bits


def targets(x: Spectrum, chosen: Plan, step: float) -> dict[str, tuple[Target, ...]]:
    """What the codec is to code: every module's factors in steps, by its chosen form."""
    out = {}
    for m, (name, choice) in enumerate(zip(x.modules, chosen.choices, strict=True)):
        one = Svd(*(y[m] for y in x.deltas))
        if choice.form == "separate":
            out[name] = separate_target(one, choice.reference, chosen.live[m], step)
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
    s = np.where(live, deltas.s, 0.0) / step
    pick = np.argsort(-s, axis=-1, kind="stable")[:, :rank]
    amplitude = np.take_along_axis(s, pick, 1)
    a = np.take_along_axis(np.asarray(deltas.u), pick[:, None, :], 2) * amplitude[:, None, :]
    b = np.take_along_axis(np.asarray(deltas.v).swapaxes(1, 2), pick[:, None, :], 2) * amplitude[:, None, :]
    of = np.full(len(live), -1)
    of[order] = np.arange(len(order))
    shape = TermShape(tuple(of.tolist()), tuple(of.tolist()), a.shape[1], rank, b.shape[1], reference >= 0)
    return (Target(shape, a[order].astype(np.float32), b[order].astype(np.float32)),)


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
    centre = heads.sum(0)
    own = cost(a.shape[0], centre / a.shape[0] / step**2)[0] + MULTIPLIER * DIRECTION_BITS
    used = np.flatnonzero(leaves + own < centre / step**2)
    if not len(used):
        used = np.array([0])
        live[:] = False
        centre = np.zeros_like(centre)
    shared = (a * np.sqrt(centre))[None, :, used] / step
    scaled = (b * np.sqrt(mass)[:, None, None] * live[..., None])[:, used].swapaxes(1, 2) / step
    zero = tuple(np.where(present, 0, -1).tolist())
    head_of = tuple(np.where(present, labels, -1).tolist())
    used_a, used_b = shared.astype(np.float32), scaled.astype(np.float32)
    if choice.side == "out":
        shape = TermShape(head_of, zero, used_b.shape[1], len(used), used_a.shape[1], False)
        return (Target(shape, used_b, used_a),)
    shape = TermShape(zero, head_of, used_a.shape[1], len(used), used_b.shape[1], False)
    return (Target(shape, used_a, used_b),)
