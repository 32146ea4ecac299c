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


def predict(target: np.ndarray, base: np.ndarray) -> tuple[Prediction | None, np.ndarray]:
    """Least-squares prediction of vectors from a decoded base, where it saves more bits than it costs.

    Args:
      target: `[n, S]` in steps.
      base: `[n, D]` the base's coded vectors.

    Returns:
      Prediction or None, and the predicted part `[n, S]`.
    """
    nothing: tuple[None, np.ndarray] = None, np.zeros_like(target)
    if not base.any() or not target.any():
        return nothing
    known = unit(base)
    gram = known.T.astype(np.float64) @ known
    exact = np.linalg.solve(gram + RIDGE * np.eye(len(gram)), known.T @ target)
    rounded = np.clip(np.rint(exact), -(2**30), 2**30).astype(np.int32)
    guess = known @ rounded.astype(np.float32)
    before, after = (target**2).mean(0), ((target - guess) ** 2).mean(0)
    saved = len(target) / 2 * np.log2((before + 0.6) / (after + 0.6))
    used = (
        saved > coefficient_bits((rounded.astype(np.float64) ** 2).sum(0), np.array(len(gram)))
    ) & target.any(0)
    if not used.any():
        return nothing
    return Prediction(used, rounded), (guess * used).astype(np.float32)


def pack(found: Sequence[Prediction | None]) -> bytes:
    """The coefficients in use, vector by vector: zigzag, byte plane by byte plane, deflated."""
    rows = [x.coefficients[:, x.used].T.ravel() for x in found if x is not None]
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


def unpack(data: bytes) -> np.ndarray:
    """The inverse of `pack`: all coefficients in a row, int64.

    >>> x = Prediction(np.array([True, False]), np.array([[-3, 9], [300, 9]], np.int32))
    >>> unpack(pack([None, x])).tolist()
    [-3, 300]
    """
    planes, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        planes.append(np.frombuffer(zlib.decompress(data[at + 4 : at + 4 + size], -15), np.uint8))
        at += 4 + size
    code: np.ndarray = np.zeros(len(planes[0]) if planes else 0, np.int64)
    for k, plane in enumerate(planes):
        code |= plane.astype(np.int64) << (8 * k)
    return np.where(code & 1, -(code + 1) // 2, code // 2)
