"""The decoder of JAX gives what the NumPy one does, bit for bit, with few compilations."""

import numpy as np
import pytest
from compilations import compiled
from test_streams import in_contexts, laplacian

from hydraopt_jax.codec import contexts, encode, frequency_tables, lanes, streams
from hydraopt_jax.codec.bitstream import Damaged
from hydraopt_jax.codec.contexts import WIDE
from hydraopt_jax.codec.rans import PERIOD


def coded(*lengths, seed=0):
    """Streams of vectors of so many entries: their bytes, contexts, tables and values."""
    rng = np.random.default_rng(seed)
    spread = 2.0 ** np.linspace(0, 9, 3)
    made = [
        in_contexts([laplacian(rng, n, s) for n, s in zip(x, spread, strict=False)], side=k % 2)
        for k, x in enumerate(lengths)
    ]
    # one entry that no symbol of its context has: an escape
    made[0][0][-1] = 1e6
    symbols = encode.quantize_streams(*zip(*made, strict=True), contexts.gaussian(), encode.MULTIPLIER)
    table = frequency_tables.from_counts(streams.histogram(symbols))
    return (
        lanes.encode(symbols, table),
        [x.context for x in symbols],
        table,
        [*map(streams.values, symbols)],
    )


@pytest.fixture(scope="module")
def several():
    """Unlike numbers of codes, one stream of none, one lane longer than the trellis's period."""
    return coded([300, 700, 5000], [], [64, 90], [PERIOD + 70])


def test_every_value_is_that_of_numpy(several):
    *given, values = several
    assert WIDE[given[1][0]].any()
    for way in (streams.rans.decode, lanes.decode):
        for got, want in zip(streams.decode(*given, way), values, strict=True):
            parts = [got.take(n) for n in (len(want) // 3, len(want) - len(want) // 3)]
            np.testing.assert_array_equal(np.concatenate(parts), want)


def verdict(*given):
    """The values of a damaged stream, or what is said of it."""
    try:
        return [x.take(len(y)).tolist() for x, y in zip(streams.decode(*given), given[1], strict=True)]
    except Damaged as error:
        return str(error)


@pytest.mark.parametrize("seed", range(12))
def test_damage_is_found_as_by_numpy(several, seed):
    blobs, context, table, _ = several
    rng = np.random.default_rng(seed)
    data = bytearray(blobs[0])
    data[rng.integers(len(data) if seed % 2 else 40)] ^= 1 << rng.integers(8)
    given = [bytes(data), *blobs[1:]], context, table
    assert verdict(*given, lanes.decode) == verdict(*given)


def test_other_sizes_share_compilations(several):
    streams.decode(*several[:3], lanes.decode)
    others = [coded([300 + n, 690, 5000 - n], [64], [64, 90], [PERIOD + 60 + n], seed=n) for n in range(6)]
    with compiled() as names:
        streams.decode(*several[:3], lanes.decode)
        for *given, values in others:
            got = streams.decode(*given, lanes.decode)[2].take(len(values[2]))
            np.testing.assert_array_equal(got, values[2])
    assert names in ([], ["jit(scan)"], ["jit(scan)"] * 2)


def test_no_lane_is_no_work():
    _, context, table, _ = coded([64])
    (none,) = streams.decode([b"\0"], [context[0][:0]], table, lanes.decode)
    assert len(none.take(0)) == 0
