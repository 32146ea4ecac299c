"""Fixed-rate scalar quantization: codes of 2 to 8 bits, a half-precision scale per vector, packed into bytes.

It is for uses without entropy coding (random access, decoding inside a jitted computation). A vector `x` is
stored as integers `c` with `x ~= scale * c`, `|c| <= 2^(bits-1) - 1`. The scale is that of least squared
error among some clipping levels, which at few bits is well below the largest entry.

Reference: Max, Quantizing for minimum distortion, 1960; Banner et al., Post training 4-bit quantization of
convolutional networks, arXiv 1810.05723 (clipping).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hydraopt_jax.errors import HydraOptError

WIDTHS = (8, 6, 5, 4, 3, 2)
# clipping levels tried, as shares of the largest entry
CLIPS = tuple(round(0.2 + 0.05 * k, 2) for k in range(17))


class Quantized(NamedTuple):
    """Vectors along the last axis, quantized.

    Attributes:
      codes: `[..., n]` int8, between `-(2^(bits-1) - 1)` and its negative.
      scale: `[..., 1]` float16.
    """

    codes: Array
    scale: Array


def check_bits(bits: int) -> None:
    """Raise if a width is not one of `WIDTHS`."""
    if bits not in WIDTHS:
        raise HydraOptError(f"bits = {bits}: must be one of {', '.join(map(str, WIDTHS))}")


def quantize(x: Array, bits: int) -> Quantized:
    """Codes and scales of vectors along the last axis, with the scale of least squared error.

    Args:
      x: `[..., n]`.
      bits: 2 to 8, static.

    Returns:
      Codes and scales; a zero vector has scale 0.

    Raises:
      HydraOptError: a width that is not known.

    >>> import jax.numpy as jnp
    >>> q = quantize(jnp.array([[0.0, 1.0, -3.0]]), 3)
    >>> print(q.codes[0], dequantize(q)[0])
    [ 0  1 -3] [ 0.  1. -3.]
    """
    check_bits(bits)
    top = 2 ** (bits - 1) - 1
    x = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x), -1, keepdims=True)

    def at(clip: Array) -> tuple[Array, Array, Array]:
        scale = (peak * clip / top).astype(jnp.float16)
        wide = scale.astype(jnp.float32)
        codes = jnp.clip(jnp.round(x / jnp.where(wide > 0, wide, 1.0)), -top, top)
        return jnp.sum((x - codes * wide) ** 2, -1, keepdims=True), codes.astype(jnp.int8), scale

    def better(best: tuple[Array, Array, Array], clip: Array) -> tuple[tuple[Array, Array, Array], None]:
        tried = at(clip)
        take = tried[0] < best[0]
        return jax.tree.map(lambda new, old: jnp.where(take, new, old), tried, best), None

    (_, codes, scale), _ = jax.lax.scan(better, at(jnp.float32(1.0)), jnp.array(CLIPS, jnp.float32))
    return Quantized(codes, scale)


def dequantize(x: Quantized) -> Array:
    """`scale * codes` in float32."""
    return x.scale.astype(jnp.float32) * x.codes.astype(jnp.float32)


def rounded(x: Array, bits: int, axis: int = -1) -> Array:
    """The decoded values of vectors along an axis: `dequantize(quantize(x))`."""
    return jnp.moveaxis(dequantize(quantize(jnp.moveaxis(x, axis, -1), bits)), -1, axis)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes as a row of bytes, `bits` bits each, most significant first.

    >>> pack_codes(np.array([1, -1, 3, 0], np.int8), 3).tolist()
    [61, 128]
    """
    check_bits(bits)
    raw = codes.ravel().astype(np.uint8)[:, None]
    return np.packbits(np.unpackbits(raw, axis=1)[:, 8 - bits :])


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["bits", "length"]
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """Vectors along the last axis as packed codes, a pytree for use inside jitted computations.

    Attributes:
      codes: `[..., ceil(n * bits / 8)]` uint8, each vector from a byte of its own; int8 codes at 8 bits.
      scale: `[..., 1]` float16.
      bits: width of a code, static.
      length: n, static.
    """

    codes: Array
    scale: Array
    bits: int
    length: int


def packed(x: Array, bits: int) -> Packed:
    """Packed codes of vectors along the last axis, for `unpacked` inside a jitted computation.

    >>> import jax.numpy as jnp
    >>> p = packed(jnp.array([[0.0, 1.0, -3.0]]), 3)
    >>> print(p.codes.shape, unpacked(p)[0])
    (1, 2) [ 0.  1. -3.]
    """
    q = jax.jit(quantize, static_argnums=1)(x, bits)
    rows = np.asarray(q.codes).reshape(-1, x.shape[-1])
    data = np.stack([pack_codes(row, bits) for row in rows])
    return Packed(jnp.asarray(data.reshape(*x.shape[:-1], -1)), q.scale, bits, x.shape[-1])


def unpacked(x: Packed) -> Array:
    """The vectors of `packed` codes in float32, `[..., n]`; pure JAX."""
    shifts = jnp.arange(7, -1, -1, dtype=jnp.uint8)
    planes = (x.codes[..., None] >> shifts) & 1
    planes = planes.reshape(*x.codes.shape[:-1], -1)[..., : x.length * x.bits]
    planes = planes.reshape(*x.codes.shape[:-1], x.length, x.bits).astype(jnp.int8)
    # two's complement: the first bit counts negative
    place = jnp.array([-(2 ** (x.bits - 1)), *(2**k for k in range(x.bits - 2, -1, -1))], jnp.int8)
    codes = jnp.sum(planes * place, -1, dtype=jnp.int8)
    return dequantize(Quantized(codes, x.scale))


def size(vectors: int, length: int, bits: int) -> float:
    """Bytes of `vectors` vectors: codes and a half-precision scale each; 16 bits are stored without one.

    >>> size(3, 8, 4)
    18.0
    """
    return vectors * (length * bits / 8 + (2 if bits < 16 else 0))
