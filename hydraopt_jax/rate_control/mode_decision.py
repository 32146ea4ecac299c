"""Mode decision: the form of least Lagrangian cost for every module at one quantizer step.

All costs are in squared steps. A coded direction costs its distortion plus `multiplier * bits` by the
Gaussian rate-distortion function. A direction that is not coded costs its energy. With one step for the whole
collection this is the Lagrangian optimum of reverse water-filling, so decisions per module are optimal for
the collection. The step selects the point on the rate-distortion curve.

Reference: Shoham and Gersho, Efficient bit allocation for an arbitrary set of quantizers, 1988; Cover and
Thomas, Elements of Information Theory, section 10.3 (reverse water-filling).
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax.codec.encode import DISTORTION, MULTIPLIER
from hydraopt_jax.codec.prediction import coefficient_bits
from hydraopt_jax.rate_control.analysis import Joint, Spectrum

# bits of a direction's context and gain
DIRECTION_BITS = 24
# bits of any form but the simplest one, for its description in the header
FORM_BITS = 64
# bits of a coefficient along one more vector
FURTHER_BITS = 2


class Choice(NamedTuple):
    """The form of a module.

    Attributes:
      form: `separate`: each task's own directions; `joint`: these directions, predicted from a basis per side
        that all tasks share.
      reference: `separate`: the task that others are predicted from, or none (-1).
      widths: `joint`: vectors of the basis on the input side and on the output side, 0 for none.
    """

    form: str
    reference: int = -1
    widths: tuple[int, int] = (0, 0)


def is_alone(choice: Choice) -> bool:
    """Whether a module shares nothing."""
    return choice.form == "separate" and choice.reference < 0


def cost(count: int, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cost in squared steps, and bits, of `count` Gaussian coefficients with a variance in squared steps."""
    bits = 0.5 * count * np.log2(np.maximum(variance / DISTORTION, 1))
    return count * np.minimum(variance, DISTORTION) + MULTIPLIER * bits, bits


class Plan(NamedTuple):
    """The form of every module of one shape at one step.

    Attributes:
      choices: M forms.
      live: `[M, T, R]` bool, coded directions of the form `separate`.
      cost: `[M]` in squared steps.
      bytes: `[M]` estimate.
    """

    choices: tuple[Choice, ...]
    live: np.ndarray
    cost: np.ndarray
    bytes: np.ndarray


Candidate = tuple[np.ndarray, np.ndarray, list[Choice], np.ndarray]
"""Cost `[M]`, bits `[M]`, forms `[M]` and coded directions `[M, T, R]` of one kind of form."""


def decide_modes(x: Spectrum, step: float, no_joint: Collection[str] = (), alone: bool = False) -> Plan:
    """The cheapest form of each module at a quantizer step; modules in `no_joint` get no joint basis, and
    `alone` none anything that is shared."""
    options = candidates(x, step)
    if alone:
        options = options[:1]
    elif x.joint:
        options[-1][0][[n in no_joint for n in x.modules]] = np.inf
    return pick(options, np.stack([option[0] for option in options]).argmin(0))


def pick(options: Sequence[Candidate], chosen: np.ndarray) -> Plan:
    """The plan of the chosen candidate of each module, `[M]`."""
    at = list(enumerate(chosen.tolist()))
    return Plan(
        tuple(options[k][2][m] for m, k in at),
        np.stack([options[k][3][m] for m, k in at]),
        np.array([options[k][0][m] for m, k in at]),
        np.array([options[k][1][m] for m, k in at]) / 8,
    )


def candidates(x: Spectrum, step: float) -> list[Candidate]:
    """Every kind of form: nothing shared, each reference, and last, where there are any, joint bases."""
    sizes = x.deltas.u.shape[-2], x.deltas.v.shape[-1]
    energy = np.asarray(x.deltas.s, np.float64) ** 2 / step**2
    left, right = (cost(n, energy / n) for n in sizes)
    alone = left[0] + right[0] + MULTIPLIER * DIRECTION_BITS
    bits = left[1] + right[1] + DIRECTION_BITS
    keep: np.ndarray = np.asarray(alone < energy)
    modules = len(x.modules)
    options: list[Candidate] = []
    for c, task in enumerate(x.references):
        reference = Reference(np.full(modules, task), *(y[..., c, :] for y in x.cosines))
        base = helpful(reference, energy, keep, alone, sizes)
        options.append(predicted_cost(reference, energy, base, sizes))
    if x.joint:
        options.append(joint(x.joint, energy, keep, sizes))
    for option in options:
        option[0][:] += MULTIPLIER * FORM_BITS
    total = np.where(keep, alone, energy).sum((1, 2))
    return [(total, (bits * keep).sum((1, 2)), [Choice("separate")] * modules, keep), *options]


class Reference(NamedTuple):
    """The task of each module that others are predicted from.

    Attributes:
      task: `[M]` positions.
      left, right: `[M, T, R, R]` squared cosines of all vectors with those of the reference, by side.
    """

    task: np.ndarray
    left: np.ndarray
    right: np.ndarray

    def others(self, tasks: int) -> np.ndarray:
        """Bool `[M, T, 1]`, the tasks that may be predicted."""
        return (np.arange(tasks) != self.task[:, None])[..., None]

    def known(self, energy: np.ndarray, count: int) -> np.ndarray:
        """Share `[M, R]` of each direction's energy that its decoded vector of `count` entries has, as least
        squares from decoded vectors, which have a distortion of their own, find it."""
        own = energy[np.arange(len(energy)), self.task]
        return own / (own + count * DISTORTION)


def predicted_cost(of: Reference, energy: np.ndarray, base: np.ndarray, sizes: tuple[int, int]) -> Candidate:
    """Cost of `separate` with all others predicted from the directions `base: [M, R]` of a reference."""
    rate = np.full(energy.shape, float(DIRECTION_BITS))
    paid = MULTIPLIER * rate
    known: np.ndarray = np.asarray(base.any(-1))
    may = of.others(energy.shape[1]) & known[:, None, None]
    vectors = base.sum(-1)[:, None, None]
    for count, cosines in zip(sizes, (of.left, of.right), strict=True):
        variance = energy / count
        explained = np.minimum(np.einsum("mtrs,ms->mtr", cosines, base * of.known(energy, count)), 1.0)
        rest = variance * (1 - explained)
        extra = coefficient_bits(explained * energy, vectors, rest)
        before, after = cost(count, variance), cost(count, rest)
        use = (after[0] + MULTIPLIER * extra < before[0]) & may
        paid = paid + np.where(use, after[0] + MULTIPLIER * extra, before[0])
        rate = rate + np.where(use, after[1] + extra, before[1])
    live: np.ndarray = np.asarray(paid < energy)
    live[np.arange(len(energy)), of.task] = base
    total = np.where(live, paid, energy).sum((1, 2))
    choices = [Choice("separate", reference=t) for t in of.task.tolist()]
    return total, (rate * live).sum((1, 2)), choices, live


def helpful(
    of: Reference, energy: np.ndarray, keep: np.ndarray, alone: np.ndarray, sizes: tuple[int, int]
) -> np.ndarray:
    """The directions of a reference that are coded for themselves or cost less than they save the others,
    `[M, R]` bool.

    Args:
      of: the reference.
      energy: `[M, T, R]` in squared steps.
      keep: `[M, T, R]` bool, directions that are coded if nothing is predicted.
      alone: `[M, T, R]` cost of each direction that is not predicted.
      sizes: entries of a vector, by side.
    """
    modules = np.arange(len(energy))
    base = keep[modules, of.task]
    own = energy[modules, of.task]
    left_out = (~base & (own > 0)).any(-1)
    users = np.nonzero(keep & of.others(energy.shape[1]) & left_out[:, None, None])
    of_user, counts = users[0], np.bincount(users[0], minlength=len(energy))
    saved = np.zeros(base.shape)
    if not len(of_user):
        return base
    for count, cosines in zip(sizes, (of.left, of.right), strict=True):
        known = of.known(energy, count).astype(np.float32)
        variance = (energy[users] / count / DISTORTION).astype(np.float32)[:, None]
        share = variance * cosines[users] * known[of_user]
        rest = variance - np.einsum("nr,nr->n", share, base[of_user].astype(np.float32))[:, None]
        bits = np.log2(np.maximum(rest, 1)) - np.log2(np.maximum(rest - share, 1))
        starts = (np.cumsum(counts) - counts)[counts > 0]
        saved[counts > 0] += count / 2 * np.add.reduceat(bits, starts)
        saved -= FURTHER_BITS * counts[:, None]
    return np.asarray(base | (left_out[:, None] & (MULTIPLIER * saved > alone[modules, of.task] - own)))


def joint(
    bases: tuple[Joint, Joint],
    energy: np.ndarray,
    keep: np.ndarray,
    sizes: tuple[int, int],
) -> Candidate:
    """Cost of directions predicted from joint bases, with the best width per side, which may be 0."""
    for _ in range(2):
        found = [joint_side(x, energy, keep, n) for x, n in zip(bases, sizes, strict=True)]
        paid = sum(x[0] for x in found) + MULTIPLIER * DIRECTION_BITS
        keep = paid < energy
    rate = sum(x[1] for x in found) + DIRECTION_BITS
    base = [sum(x[k] for x in found) for k in (2, 3)]
    total = np.where(keep, paid, energy).sum((1, 2)) + base[0]
    widths = np.stack([x[4] for x in found], -1).tolist()
    choices = [Choice("joint", widths=(w_in, w_out)) for w_in, w_out in widths]
    return total, (rate * keep).sum((1, 2)) + base[1], choices, keep


def joint_side(
    found: Joint, energy: np.ndarray, keep: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Costs and bits of one side: of every direction `[M, T, R]`, of the basis `[M]`; and its width `[M]`."""
    part = np.asarray(found.part, np.float64)
    along = part * (energy * keep)[..., None]
    center = along.sum((1, 2))
    # each vector of the basis is known up to a distortion, shared by those who use it
    noise = DISTORTION * np.cumsum(
        np.divide(along, center[:, None, None], out=np.zeros_like(along), where=center[:, None, None] > 0), -1
    )
    explained = np.minimum(np.cumsum(part, -1), 1.0)
    base_paid, base_rate = cost(count, center / count)
    base_paid = np.cumsum(base_paid + MULTIPLIER * DIRECTION_BITS, -1)
    base_rate = np.cumsum(base_rate + DIRECTION_BITS, -1)
    variance = energy / count
    before = cost(count, variance)
    none = np.zeros(len(energy))
    options: list[Any] = [(*before, none, none, none.astype(int))]
    for w in widths(part.shape[-1]):
        share = explained[..., w - 1]
        rest = variance * (1 - share) + noise[..., w - 1]
        after = cost(count, rest)
        extra = coefficient_bits(share * energy, np.array(w), rest)
        use = after[0] + MULTIPLIER * extra < before[0]
        paid = np.where(use, after[0] + MULTIPLIER * extra, before[0])
        rate = np.where(use, after[1] + extra, before[1])
        options.append((paid, rate, base_paid[:, w - 1], base_rate[:, w - 1], none.astype(int) + w))
    best = np.argmin([(x[0] * keep).sum((1, 2)) + x[2] for x in options], 0)
    pick = lambda k: np.stack([options[o][k][m] for m, o in enumerate(best)])  # noqa: E731
    return pick(0), pick(1), pick(2), pick(3), pick(4)


def widths(limit: int) -> list[int]:
    """Widths of a joint basis to try: each about a third larger than the last, up to the limit."""
    return sorted({*(min(round(2 * 1.35**k), limit) for k in range(16)), limit})
