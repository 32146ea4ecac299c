"""Expected errors at a given size: reverse water-filling under Gaussian models of a collection.

For independent Gaussian components, n_i samples of variance v_i each, the least distortion at a rate is
reached by one water level `w`: `D = sum n_i min(v_i, w)`, `R = sum n_i / 2 log2(max(v_i / w, 1))` bits.

A singular direction of energy e is a product of two vectors. Coded with relative distortions p and q it
keeps `e (1 - p) (1 - q)`, and costs `I / 2 log2(1 / p) + O / 2 log2(1 / q)` bits if its entries are Gaussian
of one variance. In the coordinates of a second moment they have several (`Components`), and each vector has
a water level of its own: coder and decoder are assumed to know the moments. Two models:

- `separate`: every task's directions are independent; nothing is shared.
- `joint`: on each side the T R scaled singular vectors of a module are correlated. The variances of their
  components are the eigenvalues of the T R x T R Gram matrix. Any linear sharing or prediction between tasks
  could reach this if the transform itself cost nothing.

Both are estimates, not bounds. A bound of rate-distortion theory holds for the mean over a source. Here is
one collection, whose vectors need not be Gaussian, so a coder may have less error than either estimate.
`joint` treats the two sides of a delta separately and can lie above `separate`. For bounds see `forms.Info`.

Reference: Cover and Thomas, Elements of Information Theory, 2nd edition, section 10.3.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hydraopt_jax.factors import Array
from hydraopt_jax.linalg import decompose
from hydraopt_jax.linalg.decompose import HostSvd, Svd

# bisections of the logarithm of the water level
BISECTIONS = 50
# rounds of the two sides' stationarity conditions
ROUNDS = 40


class Components(NamedTuple):
    """Numbers of samples of unit vectors, by their variance: `sum(samples * variance)` is 1.

    Attributes:
      samples, variance: `[..., C]`.
    """

    samples: Array
    variance: Array

    def distortion(self, level: Array) -> Array:
        """Relative distortion `[...]` at water levels `[...]`.

        >>> print(white(jnp.array(4.0)).distortion(jnp.array(0.1)))
        0.4
        """
        return jnp.sum(self.samples * jnp.minimum(self.variance, level[..., None]), -1)

    def nats(self, level: Array) -> Array:
        """Nats `[...]` at water levels `[...]`."""
        ratio = self.variance / jnp.maximum(level[..., None], 1e-30)
        return 0.5 * jnp.sum(self.samples * jnp.log(jnp.maximum(ratio, 1.0)), -1)


def white(size: Array) -> Components:
    """The components of unit vectors of `size: [...]` samples of one variance."""
    return Components(size[..., None], 1 / size[..., None])


class Directions(NamedTuple):
    """Singular directions of deltas relative to their norm.

    Attributes:
      energy: `[N]` times the weight.
      weight: `[N]` of each one's distortion where bits are allocated; what is reported has no weights.
      inputs, outputs: components `[N, C]` of either side.
    """

    energy: Array
    weight: Array
    inputs: Components
    outputs: Components


class Sides(NamedTuple):
    """Correlated factors of the modules of one shape.

    Attributes:
      left, right: `[M, N]` eigenvalues of the Gram matrices of the scaled singular vectors.
      weight: `[M]` as in `Directions`, the mean of the tasks.
      inputs, outputs: components `[M, C]` of the vector that belongs to each eigenvalue.
    """

    left: Array
    right: Array
    weight: Array
    inputs: Components
    outputs: Components


def separate_curve(x: Directions, level: Array) -> tuple[Array, Array]:
    """Distortion and bits of independent directions at a water level (weighted distortion per sample).

    Stationary points of `e (1 - p) (1 - q) - 2 level R` with `R` in nats have the water level
    `level / (e (1 - q))` on the input side, and the like on the other. A direction without one, or one that
    saves less than its bits cost, is left out.
    """
    # a direction below the level is left out; a larger ratio would overflow in derivatives
    above = x.energy > level
    unit = jnp.where(above, level / jnp.where(above, x.energy, 1.0), 1.0)

    def settle(_: int, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        p = x.inputs.distortion(unit / jnp.maximum(1 - pair[1], 1e-6))
        return p, x.outputs.distortion(unit / jnp.maximum(1 - p, 1e-6))

    start = jnp.zeros_like(x.energy)
    p, q = jax.lax.fori_loop(0, ROUNDS, settle, (start, start))
    nats = x.inputs.nats(unit / jnp.maximum(1 - q, 1e-6)) + x.outputs.nats(unit / jnp.maximum(1 - p, 1e-6))
    kept = x.energy * (1 - p) * (1 - q)
    live = kept > 2 * level * nats
    bits = jnp.sum(jnp.where(live, nats, 0.0)) / jnp.log(2.0)
    return jnp.sum((x.energy - jnp.where(live, kept, 0.0)) / x.weight), bits


def joint_curve(x: Sides, level: Array) -> tuple[Array, Array]:
    """Distortion and bits of correlated factors at a water level.

    Components below the level are missing, the others are noisy. The parts that the two sides miss are
    assumed to coincide (the best case). The noise of the sides is independent.
    """
    energy = jnp.maximum(jnp.sum(x.left, -1), 1e-30)
    bits, most, clean = jnp.zeros(()), jnp.zeros_like(energy), jnp.ones_like(energy)
    for values, (samples, variance) in ((x.left, x.inputs), (x.right, x.outputs)):
        # `[M, N, C]`
        each, samples = values[..., None] * variance[:, None, :], samples[:, None, :]
        live = each > level
        missing = jnp.sum(jnp.where(live, 0.0, samples * each), (-1, -2))
        noise = level * jnp.sum(jnp.where(live, samples, 0.0), (-1, -2))
        most = jnp.maximum(most, missing)
        clean = clean * (1 - noise * decompose.safe_inverse(jnp.maximum(energy - missing, 0.0), 1e-30))
        bits = bits + jnp.sum(0.5 * samples * jnp.log2(jnp.maximum(each / level, 1.0)))
    return jnp.sum((energy - (energy - most) * clean) / x.weight), bits


def water_fill(curve: Callable[[Array], tuple[Array, Array]], bits: Array) -> Array:
    """Distortion at a rate: bisection of the water level of a `(distortion, bits)` curve.

    Derivatives are those of the implicit function, the level at fixed bits. Where the bits do not depend on
    the level (a rate of 0, or a rate beyond the range of the search) the derivative of the level is 0.

    >>> one = lambda w: (jnp.minimum(4.0, w), 0.5 * jnp.log2(jnp.maximum(4.0 / w, 1.0)))
    >>> print(water_fill(one, jnp.array(1.0)).round(4))
    1.0
    """

    def excess(level: Array) -> Array:
        return curve(jnp.exp(level))[1] - bits

    def bisect(excess: Callable[[Array], Array], start: Array) -> Array:
        def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = (low + high) / 2
            over = excess(middle) > 0
            return jnp.where(over, middle, low), jnp.where(over, high, middle)

        return jax.lax.fori_loop(0, BISECTIONS, halve, (start, jnp.float32(5.0)))[1]

    def divide(slope: Callable[[Array], jax.Array], change: Array) -> Array:
        return change * decompose.safe_inverse(slope(jnp.ones_like(change)))

    level = jax.lax.custom_root(excess, jnp.float32(-60.0), bisect, divide)
    return curve(jnp.exp(level))[0]


@jax.jit
def separate_estimate(x: Directions, bits: Array) -> Array:
    """Distortion `[P]` at rates `[P]` in bits, nothing shared."""
    return jax.lax.map(lambda b: water_fill(lambda w: separate_curve(x, w), b), bits)


@jax.jit
def joint_estimate(x: Sequence[Sides], bits: Array) -> Array:
    """Distortion `[P]` at rates `[P]` in bits, with joint coding of all tasks."""

    def total(level: Array) -> tuple[Array, Array]:
        parts = [joint_curve(y, level) for y in x]
        return sum((d for d, _ in parts), jnp.zeros(())), sum((b for _, b in parts), jnp.zeros(()))

    return jax.lax.map(lambda b: water_fill(total, b), bits)


def component_energies(vectors: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Eigenvalues `[M, T * R]` of the Gram matrices of all tasks' vectors `[M, T, I, R]` times `s`."""
    scaled = np.moveaxis(vectors * s[:, :, None, :], 1, 2)
    flat = scaled.reshape(*scaled.shape[:2], -1)
    return np.maximum(np.linalg.eigvalsh(flat.swapaxes(1, 2) @ flat), 0.0)


def errors_by_model(
    deltas: Sequence[Svd | HostSvd],
    sizes: np.ndarray,
    components: Sequence[tuple[Components, Components]] | None = None,
    weights: Sequence[np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Mean relative squared error that each model predicts at given sizes: estimates, not bounds.

    Args:
      deltas: for the modules of each shape, decompositions `[M, T, ...]` of relative deltas (norm 1, times
        the root of the task's weight); zero where a task lacks a module.
      sizes: `[P]` bytes.
      components: for each shape those of the modules' inputs and outputs, `[M, C]`; None for one variance.
      weights: for each shape `[M, T]`, positive: the deltas are already multiplied by their roots. They steer
        the allocation of bits, and are divided out of the mean; `joint` assumes that a module's tasks have
        equal relative errors.

    Returns:
      `separate` and `joint`, each `[P]`: mean over the existing (task, module) pairs.
    """
    alone, sides, pairs = [], [], 0
    for k, x in enumerate(deltas):
        u, s, v = (np.asarray(y, np.float32) for y in x)
        rows = np.ones(len(u), np.float32)
        both = [white(n * rows) for n in (u.shape[-2], v.shape[-1])] if components is None else components[k]
        weight = np.ones(s.shape[:2], np.float32) if weights is None else np.float32(weights[k])
        each = np.repeat(weight.ravel(), s.shape[2])
        spread = [Components(*(np.repeat(y, s[0].size, 0) for y in one)) for one in both]
        alone.append(Directions(s.ravel() ** 2, each, *spread))
        left, right = (component_energies(y, s) for y in (u, v.swapaxes(2, 3)))
        present = s.max(-1) > 0
        mean = (weight * present).sum(1) / np.maximum(present.sum(1), 1)
        mean = np.where(mean > 0, mean, 1).astype(np.float32)
        sides.append(Sides(*jax.device_put((left, right, mean)), *jax.device_put(both)))
        pairs += int(present.sum())
    bits = jax.device_put(list(np.asarray(8.0 * np.asarray(sizes), np.float32)[:, None]))
    directions = jax.device_put(jax.tree.map(lambda *y: np.concatenate(y), *alone))
    # one size at a time: any number of sizes shares a program
    found = [(separate_estimate(directions, x), joint_estimate(tuple(sides), x)) for x in bits]
    separate, joint = (np.concatenate(x) / max(pairs, 1) for x in zip(*jax.device_get(found), strict=True))
    return {"separate": separate, "joint": joint}
