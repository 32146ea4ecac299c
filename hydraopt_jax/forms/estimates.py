"""Expected errors at a given size: reverse water-filling under Gaussian models of a collection.

For independent Gaussian components, n_i samples of variance v_i each, the least distortion at a rate is
reached by one water level `w`: `D = sum n_i min(v_i, w)`, `R = sum n_i / 2 log2(max(v_i / w, 1))` bits.

A singular direction of energy e is a product of two vectors. Coded with relative distortions p and q it
keeps `e (1 - p) (1 - q)`, and costs `I / 2 log2(1 / p) + O / 2 log2(1 / q)` bits if its entries are Gaussian.
Two models:

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
from jax import Array

from hydraopt_jax.linalg import decompose
from hydraopt_jax.linalg.decompose import HostSvd, Svd

# bisections of the logarithm of the water level
BISECTIONS = 50
# rounds of the two sides' stationarity conditions
ROUNDS = 40


class Directions(NamedTuple):
    """Singular directions of deltas relative to their norm.

    Attributes:
      energy: `[N]`.
      inputs, outputs: `[N]` number of samples on either side.
    """

    energy: Array
    inputs: Array
    outputs: Array


class Sides(NamedTuple):
    """Correlated factors of the modules of one shape.

    Attributes:
      left, right: `[M, N]` eigenvalues of the Gram matrices of the scaled singular vectors.
      inputs, outputs: samples of each component, scalars.
    """

    left: Array
    right: Array
    inputs: Array
    outputs: Array


def separate_curve(x: Directions, level: Array) -> tuple[Array, Array]:
    """Distortion and bits of independent directions at a water level (distortion per sample).

    Stationary points of `e (1 - p) (1 - q) - 2 level R` with `R` in nats satisfy `p = I level / (e (1 - q))`
    and the same for q. A direction without one, or one that saves less than its bits cost, is left out.
    """
    # a direction below the level is left out; a larger ratio would overflow in derivatives
    above = x.energy > level
    unit = jnp.where(above, level / jnp.where(above, x.energy, 1.0), 1.0)

    def settle(_: int, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        p, q = pair
        p = jnp.minimum(x.inputs * unit / jnp.maximum(1 - q, 1e-6), 1.0)
        return p, jnp.minimum(x.outputs * unit / jnp.maximum(1 - p, 1e-6), 1.0)

    start = jnp.zeros_like(x.energy)
    p, q = jax.lax.fori_loop(0, ROUNDS, settle, (start, start))
    kept = x.energy * (1 - p) * (1 - q)
    nats = -0.5 * (x.inputs * jnp.log(jnp.maximum(p, 1e-30)) + x.outputs * jnp.log(jnp.maximum(q, 1e-30)))
    live = kept > 2 * level * nats
    bits = jnp.sum(jnp.where(live, nats, 0.0)) / jnp.log(2.0)
    return jnp.sum(x.energy - jnp.where(live, kept, 0.0)), bits


def joint_curve(x: Sides, level: Array) -> tuple[Array, Array]:
    """Distortion and bits of correlated factors at a water level.

    Components below the level are missing, the others are noisy. The parts that the two sides miss are
    assumed to coincide (the best case). The noise of the sides is independent.
    """
    energy = jnp.maximum(x.left.sum(-1), 1e-30)
    bits, most, clean = jnp.zeros(()), jnp.zeros_like(energy), jnp.ones_like(energy)
    for values, count in ((x.left, x.inputs), (x.right, x.outputs)):
        live = values > count * level
        missing = jnp.where(live, 0.0, values).sum(-1)
        noise = count * level * live.sum(-1, dtype=values.dtype)
        most = jnp.maximum(most, missing)
        clean = clean * (1 - noise * decompose.safe_inverse(jnp.maximum(energy - missing, 0.0), 1e-30))
        bits = bits + 0.5 * count * jnp.log2(jnp.maximum(values / count / level, 1.0)).sum()
    return jnp.sum(energy - (energy - most) * clean), bits


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

    def divide(slope: Callable[[Array], Array], change: Array) -> Array:
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


def errors_by_model(deltas: Sequence[Svd | HostSvd], sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Mean relative squared error that each model predicts at given sizes: estimates, not bounds.

    Args:
      deltas: for the modules of each shape, decompositions `[M, T, ...]` of relative deltas (norm 1, times
        the root of the task's weight); zero where a task lacks a module.
      sizes: `[P]` bytes.

    Returns:
      `separate` and `joint`, each `[P]`: mean over the existing (task, module) pairs.
    """
    alone, sides, pairs = [], [], 0
    for x in deltas:
        inputs, outputs = x.u.shape[-2], x.v.shape[-1]
        energy = np.asarray(x.s, np.float32).ravel() ** 2
        alone.append((energy, np.full_like(energy, inputs), np.full_like(energy, outputs)))
        u, s, v = (np.asarray(y, np.float32) for y in x)
        left, right = (component_energies(y, s) for y in (u, v.swapaxes(2, 3)))
        sides.append(Sides(*jax.device_put((left, right, np.float32(inputs), np.float32(outputs)))))
        pairs += int((np.asarray(x.s).max(-1) > 0).sum())
    bits = jax.device_put(list(np.asarray(8.0 * np.asarray(sizes), np.float32)[:, None]))
    directions = Directions(*jax.device_put([np.concatenate(x) for x in zip(*alone, strict=True)]))
    # one size at a time: any number of sizes shares a program
    found = [(separate_estimate(directions, x), joint_estimate(tuple(sides), x)) for x in bits]
    separate, joint = (np.concatenate(x) / max(pairs, 1) for x in zip(*jax.device_get(found), strict=True))
    return {"separate": separate, "joint": joint}
