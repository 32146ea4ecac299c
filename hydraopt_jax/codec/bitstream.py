"""Reading and writing bytes: every read is checked against the available bytes, inflation is bounded."""

import zlib

import numpy as np

# byte planes of an integer, and parameters of Rice codes
PLANES, RICE = 4, 24
SHIFTS = np.arange(RICE, dtype=np.uint32)
# integers that are shifted by all of them at once
TOGETHER = 1 << 12


class Damaged(ValueError):
    """Bytes that no encoder of this format writes."""


def deflate(data: bytes) -> bytes:
    """Raw deflate at the highest level."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return packer.compress(data) + packer.flush()


def deflate_symbols(data: bytes) -> bytes:
    """Raw deflate with Huffman codes only, for bytes without repeats."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(data) + packer.flush()


def inflate(data: bytes, size: int) -> bytes:
    """Inflate raw deflated data to exactly `size` bytes; never allocates for more.

    Raises:
      Damaged: not deflated data, or of another size.

    >>> inflate(deflate(b"ab" * 40), 80) == b"ab" * 40
    True
    """
    if not size and not data:
        return b""
    reader = zlib.decompressobj(-15)
    try:
        out = reader.decompress(data, size + 1)
    except zlib.error as error:
        raise Damaged(f"deflated data: {error}") from None
    if len(out) != size or not reader.eof or reader.unused_data:
        raise Damaged(f"deflated data of {len(out)} bytes or more in place of {size}")
    return out


class Reader:
    """Bytes read from the front.

    >>> r = Reader(bytes([3, 0, 7]))
    >>> r.array("<u2", 1).tolist(), r.rest()
    ([3], b'\\x07')
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.at = memoryview(data), 0

    def take(self, size: int) -> bytes:
        """The next `size` bytes.

        Raises:
          Damaged: there are fewer.
        """
        if size < 0 or size > len(self.data) - self.at:
            raise Damaged(f"{len(self.data) - self.at} bytes left where {size} are needed")
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def array(self, dtype: str, count: int) -> np.ndarray:
        """The next `count` numbers."""
        return np.frombuffer(self.take(np.dtype(dtype).itemsize * count), dtype)

    def number(self) -> int:
        """An integer in base 128, low digits first; the top bit of a byte says that more follow."""
        value, shift = 0, 0
        while shift < 63:
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise Damaged("a number of more than 63 bits")

    def rest(self) -> bytes:
        """All remaining bytes."""
        return self.take(len(self.data) - self.at)


def number(value: int) -> bytes:
    """The bytes that `Reader.number` reads.

    >>> Reader(number(300)).number()
    300
    """
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def zigzag(values: np.ndarray) -> np.ndarray:
    """Signed integers as unsigned ones, small ones first: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..."""
    values = np.asarray(values, np.int64)
    return np.where(values < 0, -2 * values - 1, 2 * values)


def unzigzag(codes: np.ndarray) -> np.ndarray:
    """The inverse of `zigzag`."""
    codes = np.asarray(codes, np.int64)
    return np.where(codes & 1, -(codes + 1) // 2, codes // 2)


def pack_integers(values: np.ndarray) -> bytes:
    """Unsigned integers below 2^32, in the shorter of two forms.

    Byte planes, each deflated: tables of Huffman codes fit any statistics, but take some tens of bytes. Rice
    codes take none: a quotient by 2^k in unary, and k bits; so they suit few integers, or small ones.
    """
    codes = np.asarray(values).astype("<u4")
    planes = codes.view(np.uint8).reshape(-1, 4).T
    used = planes[: 1 + int(np.max(np.flatnonzero(planes.any(1)), initial=-1))]
    parts = [min(deflate_symbols(x.tobytes()), deflate(x.tobytes()), key=len) for x in used]
    whole = number(len(parts)) + b"".join(number(len(x)) + x for x in parts)
    # the bits of each parameter; what is longer than planes is not made
    sizes = (np.arange(RICE) + 1) * len(codes)
    for at in range(0, len(codes), TOGETHER):
        sizes += (codes[at : at + TOGETHER, None] >> SHIFTS).sum(0, dtype=np.int64)
    best = int(np.argmin(sizes))
    return min(whole, rice(codes, best), key=len) if len(codes) and sizes[best] < 8 * len(whole) else whole


def rice(codes: np.ndarray, k: int) -> bytes:
    """Rice codes of parameter k: lower bits of all integers, then unary quotients, zeros ended by a one."""
    quotient = (codes >> k).astype(np.int64)
    unary = np.zeros(int(quotient.sum()) + len(codes), np.uint8)
    unary[np.cumsum(quotient + 1) - 1] = 1
    low = (codes[:, None] >> np.arange(k - 1, -1, -1, dtype=np.uint32)) & 1
    ends = np.packbits(unary).tobytes()
    return number(PLANES + 1 + k) + number(len(ends)) + np.packbits(low.astype(np.uint8)).tobytes() + ends


def unpack_integers(reader: Reader, count: int) -> np.ndarray:
    """The inverse of `pack_integers`: `count` integers, int64.

    >>> unpack_integers(Reader(pack_integers(np.array([3, 70000]))), 2).tolist()
    [3, 70000]
    """
    form = reader.number()
    if form > PLANES:
        return unpack_rice(reader, count, form - PLANES - 1)
    out: np.ndarray = np.zeros(count, np.int64)
    for k in range(form):
        data = inflate(reader.take(reader.number()), count)
        out |= np.frombuffer(data, np.uint8).astype(np.int64) << 8 * k
    return out


def unpack_rice(reader: Reader, count: int, k: int) -> np.ndarray:
    """The inverse of `rice`, behind its parameter."""
    if k >= RICE:
        raise Damaged(f"integers of an unknown form {PLANES + 1 + k}")
    size = reader.number()
    low = (
        np.unpackbits(reader.array("u1", -(-count * k // 8)))[: count * k].reshape(count, k).astype(np.int64)
    )
    ends = np.flatnonzero(np.unpackbits(reader.array("u1", size)))
    if len(ends) != count or 8 * size - (int(ends[-1]) if count else -1) > 8:
        raise Damaged("another number of integers")
    out = np.diff(ends, prepend=-1) - 1 << k | low @ (1 << np.arange(k - 1, -1, -1))
    if out.max(initial=0) >> 32:
        raise Damaged("an integer of more than 32 bits")
    return out
