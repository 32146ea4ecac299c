"""Prediction of a factor's vectors from another factor, known before it.

A vector is predicted as `sum_s c_s e_s`, where the `e_s` are the vectors of the other factor, of unit length,
and the coefficients are whole numbers of quantiser steps: the coordinates of joint diagonalisation and of
Share, with what they miss coded on top.

Reference: Gabrielsson et al., Compress then Serve, arXiv 2407.00066.
"""

import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# side information of a vector beside its coefficients, in bits
VECTOR_BITS = 8
RIDGE = 1e-3


class Prediction(NamedTuple):
    """How a factor's vectors are predicted: `unit(base) @ coefficients` where used.

    Attributes:
      used: `[S]` bool.
      coefficients: `[D, S]` int32, one a vector of the base that is coded.
    """

    used: np.ndarray
    coefficients: np.ndarray


def unit(base: np.ndarray) -> np.ndarray:
    """The columns of `[n, D]` at length 1; zero ones stay zero."""
    length = np.sqrt((base.astype(np.float64) ** 2).sum(0))
    return (base / np.where(length > 0, length, 1.0)).astype(np.float32)


def coefficient_bits(energy: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Bits of `count` coefficients of a given energy in squared steps, in whole steps, and of their vector.

    >>> print(coefficient_bits(np.array(0.0), np.array(0)))
    8.0
    """
    variance = energy / np.maximum(count, 1)
    return 0.5 * count * np.log2(2 * np.pi * np.e * (variance + 1 / 12)) + VECTOR_BITS


def predict(target: np.ndarray, base: np.ndarray) -> tuple[Prediction | None, np.ndarray, float]:
    """Least-squares prediction of vectors from a decoded base, where it saves more bits than it costs.

    Args:
      target: `[n, S]` in steps.
      base: `[n, D]` the base's coded vectors.

    Returns:
      Prediction or None, the predicted part `[n, S]`, and the bits saved.
    """
    nothing: tuple[None, np.ndarray, float] = None, np.zeros_like(target), 0.0
    if not base.any() or not target.any():
        return nothing
    known = unit(base)
    gram = known.T.astype(np.float64) @ known
    exact = np.linalg.solve(gram + RIDGE * np.eye(len(gram)), known.T @ target)
    rounded = np.clip(np.rint(exact), -(2**30), 2**30).astype(np.int32)
    guess = known @ rounded.astype(np.float32)
    before, after = (target**2).mean(0), ((target - guess) ** 2).mean(0)
    spent = coefficient_bits((rounded.astype(np.float64) ** 2).sum(0), np.array(len(gram)))
    saved = len(target) / 2 * np.log2((before + 0.6) / (after + 0.6)) - spent
    used = (saved > 0) & target.any(0)
    if not used.any():
        return nothing
    return Prediction(used, rounded), (guess * used).astype(np.float32), float(saved[used].sum())


def weigh(base: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """The predicted vectors `[n, S]`."""
    return unit(base) @ coefficients.astype(np.float32)


def pack(found: Sequence[Prediction | None]) -> bytes:
    """The coefficients in use, vector by vector: zigzag, byte plane by byte plane, deflated."""
    rows = [x.coefficients[:, x.used].T.ravel() for x in found if x is not None and x.used.any()]
    flat = np.concatenate([np.zeros(0, np.int32), *rows]).astype(np.int64)
    if not len(flat):
        return b""
    code = np.where(flat < 0, -2 * flat - 1, 2 * flat).astype("<u4")
    planes = code.view(np.uint8).reshape(-1, 4).T
    out = b""
    for plane in planes[: 1 + max(np.flatnonzero(planes.any(1)), default=0)]:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        data = deflate.compress(plane.tobytes()) + deflate.flush()
        out += struct.pack("<I", len(data)) + data
    return out


def unpack(data: bytes, count: int) -> np.ndarray:
    """The inverse of `pack`: all `count` coefficients in a row, int64.

    >>> x = Prediction(np.array([True, False]), np.array([[-3, 9], [300, 9]], np.int32))
    >>> unpack(pack([None, x]), 2).tolist()
    [-3, 300]
    """
    code: np.ndarray = np.zeros(count, np.int64)
    at, shift = 0, 0
    while at < len(data) and count:
        (size,) = struct.unpack_from("<I", data, at)
        # never more than was asked for, whatever the bytes say
        plane = zlib.decompressobj(-15).decompress(data[at + 4 : at + 4 + size], count)
        code |= np.frombuffer(plane, np.uint8, count).astype(np.int64) << shift
        at, shift = at + 4 + size, shift + 8
    return np.where(code & 1, -(code + 1) // 2, code // 2)
