"""Streams: what is encoded comes back, at the rate that the entropy promises; damage is found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydraopt_jax.codec import bitstream, contexts, encode, frequency_tables, lanes, streams, trellis
from hydraopt_jax.codec.bitstream import Damaged, Reader
from hydraopt_jax.codec.contexts import COUNT, ESCAPE, MAX_MAGNITUDE, RAW_BITS, SYMBOLS, WIDE
from hydraopt_jax.codec.rans import PERIOD
from hydraopt_jax.codec.syntax import join


def laplacian(rng, count, spread):
    return (rng.laplace(size=count) * spread).astype(np.float32)


def in_contexts(vectors, side=1):
    """A stream of vectors: values in a row and the context of each."""
    own = [contexts.classify(np.sqrt((v**2).mean(keepdims=True)), side)[0] for v in vectors]
    context = [np.full(len(v), c, np.uint8) for v, c in zip(vectors, own, strict=True)]
    return join(vectors, np.float32), join(context, np.uint8)


@pytest.fixture(scope="module")
def quantized():
    """Three streams of unlike lengths and scales, one of them empty."""
    rng = np.random.default_rng(0)
    made = [
        in_contexts([laplacian(rng, n, 2.0 ** rng.uniform(0, 9)) for n in lengths])
        for lengths in ([300, 700, 50000], [], [64, 90])
    ]
    values, context = zip(*made, strict=True)
    return encode.quantize_streams(values, context, contexts.gaussian(), encode.MULTIPLIER)


def decoded(*given):
    """All values of streams."""
    return [x.take(len(c)) for x, c in zip(streams.decode(*given), given[1], strict=True)]


@pytest.fixture(scope="module")
def coded(quantized):
    """Their table, and the bytes of each."""
    table = frequency_tables.from_counts(streams.histogram(quantized))
    return table, lanes.encode(quantized, table)


def round_trip(symbols):
    table = frequency_tables.from_counts(streams.histogram(symbols))
    blobs = lanes.encode(symbols, table)
    read = frequency_tables.unpack_tables(Reader(frequency_tables.pack_tables(table)))
    return blobs, decoded(blobs, [x.context for x in symbols], read)


def test_streams_decode_to_what_was_encoded(quantized):
    _, back = round_trip(quantized)
    for symbols, values in zip(quantized, back, strict=True):
        np.testing.assert_array_equal(streams.values(symbols), values)
    assert quantized[0].lanes > 1
    assert len(back[1]) == 0


def test_a_stream_alone_decodes_as_beside_others(quantized, coded):
    table, blobs = coded
    alone = lanes.encode(quantized[:1], table)
    assert alone[0] == blobs[0]
    (back,) = decoded(alone, [quantized[0].context], table)
    np.testing.assert_array_equal(back, streams.values(quantized[0]))


def test_coded_size_is_the_entropy_within_a_per_cent(quantized):
    counts = streams.histogram(quantized)
    blobs, _ = round_trip(quantized)
    raw = (
        sum(
            RAW_BITS[x.context].sum() + np.count_nonzero((x.magnitude > 0) | WIDE[x.context])
            for x in quantized
        )
        / 8
    )
    share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    bits = -counts * np.log2(np.where(share > 0, share, 1))
    ideal = (bits.sum() - bits[WIDE].sum() / 2) / 8 + raw
    assert ideal < sum(map(len, blobs)) < 1.01 * ideal + 8 * sum(x.lanes for x in quantized) + 16


def test_lanes_take_less_than_half_a_per_cent(monkeypatch):
    rng = np.random.default_rng(5)
    # enough codes for 32 lanes; one lane of them takes a step of Python per code, so that none is decoded
    values, context = in_contexts([laplacian(rng, 3 << 17, 1.5)])

    def coded():
        symbols = encode.quantize_streams([values], [context], contexts.gaussian(), encode.MULTIPLIER)
        return symbols[0].lanes, len(
            *lanes.encode(symbols, frequency_tables.from_counts(streams.histogram(symbols)))
        )

    count, size = coded()
    monkeypatch.setattr(streams, "MAX_LANES", 1)
    assert count >= 32
    one, alone = coded()
    assert one == 1
    assert size < 1.005 * alone


@pytest.mark.parametrize("count", [1, 2, 7])
def test_lanes_longer_than_the_period(count, monkeypatch):
    """The trellis begins anew in every lane after `PERIOD` codes, for encoder and decoder alike."""
    rng = np.random.default_rng(6)
    values, context = in_contexts([laplacian(rng, 2 * count * PERIOD + 5, 3.0)])
    monkeypatch.setattr(streams, "lane_count", lambda codes, bits: count)
    (symbols,) = encode.quantize_streams([values], [context], contexts.gaussian(), encode.MULTIPLIER)
    assert symbols.lanes == count
    _, (back,) = round_trip([symbols])
    np.testing.assert_array_equal(streams.values(symbols), back)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_magnitudes_in_any_context_come_back(data):
    """Whatever the encoder chooses, also magnitudes that no symbol of the context has."""
    count = data.draw(st.integers(1, 40))
    magnitude = data.draw(
        st.lists(
            st.one_of(st.integers(0, 3), st.integers(0, 300), st.integers(0, MAX_MAGNITUDE)),
            min_size=count,
            max_size=count,
        )
    )
    context = data.draw(
        st.lists(st.sampled_from([1, 10, 20, 30, 75, 77, 100, COUNT - 1]), min_size=count, max_size=count)
    )
    lanes = data.draw(st.integers(1, count))
    magnitude, context = np.array(magnitude, np.int32), np.array(context, np.uint8)
    negative = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    quantizer = np.zeros(count, np.uint8)
    for lane in np.split(np.arange(count), np.cumsum(streams.lane_lengths(count, lanes))[:-1]):
        state = 0
        for i in lane:
            quantizer[i] = state % 2
            state = trellis.NEXT[state, magnitude[i] % 2]
    symbols = streams.Symbols(magnitude, quantizer, context, negative, lanes)
    _, (back,) = round_trip([symbols])
    size = 2 * magnitude.astype(np.int64) - quantizer * (magnitude > 0)
    want = np.where(negative, -size, size)
    np.testing.assert_array_equal(back, want)


def test_spiky_vectors_are_coded_by_escapes():
    """One entry of a million steps among small ones: an escape, not a wide context for all."""
    vector = np.random.default_rng(1).normal(size=900).astype(np.float32) * 5
    vector[17] = 3e6
    context = np.full(900, contexts.classify(np.array([5.0]), 0)[0], np.uint8)
    (symbols,) = encode.quantize_streams([vector], [context], contexts.gaussian(), encode.MULTIPLIER)
    assert np.flatnonzero(contexts.symbol(symbols.magnitude, RAW_BITS[context]) >= ESCAPE).tolist() == [17]
    (blob,), (back,) = round_trip([symbols])
    assert np.abs(back - vector).max() < 8
    assert len(blob) < 900


@pytest.mark.parametrize("seed", range(40))
def test_damaged_streams_are_found_or_harmless(quantized, coded, seed):
    """A flipped byte is told as damage, or (in a sign) decodes to other numbers; nothing else happens."""
    table, blobs = coded
    rng = np.random.default_rng(seed)
    data = bytearray(blobs[0])
    data[rng.integers(len(data) if seed % 2 else 40)] ^= 1 << rng.integers(8)
    cut = bytes(data[: rng.integers(len(data))]) if seed % 4 == 3 else bytes(data)
    try:
        (back,) = decoded([cut], [quantized[0].context], table)
    except Damaged:
        return
    assert back.shape == (len(quantized[0].context),)


def test_trellis_beats_the_scalar_quantizer_of_its_rate():
    """At a high rate the trellis leaves less error than a uniform quantizer of the same entropy."""
    rng = np.random.default_rng(1)
    y = (rng.normal(size=40960) * 60).astype(np.float32)
    y, context = in_contexts([y], 0)
    frequencies = contexts.gaussian()
    for _ in range(3):
        (symbols,) = encode.quantize_streams([y], [context], frequencies, encode.MULTIPLIER)
        frequencies = streams.histogram([symbols]) + 8 * contexts.gaussian()
    bits = 8 * len(round_trip([symbols])[0][0]) / len(y)
    error = np.mean((y - streams.values(symbols)) ** 2)
    step = 60 * np.sqrt(2 * np.pi * np.e) / 2**bits
    assert error < 0.9 * step**2 / 12


def test_viterbi_is_optimal_against_all_paths():
    rng = np.random.default_rng(2)
    y = (rng.normal(size=6) * 1.5).astype(np.float32)
    context = np.full(6, contexts.classify(np.array([1.5]), 0)[0])
    bits = trellis.costs(contexts.gaussian())
    magnitude, _ = trellis.quantize(y[:, None], context[:, None], trellis.prices(bits, 0.5))

    def total(path):
        state, out = 0, 0.0
        for value, c, k in zip(y, context, path, strict=True):
            q = state % 2
            out += (abs(value) - (2 * k - q * (k > 0))) ** 2 + 0.5 * bits[c, q, k]
            state = trellis.NEXT[state, k % 2]
        return out

    best = min(total(path) for path in np.ndindex(*[4] * 6))
    np.testing.assert_allclose(total(np.asarray(magnitude)[:, 0]), best, rtol=1e-5)


@pytest.mark.parametrize(("quantizer", "parity"), list(np.ndindex(2, 2)))
def test_costs_of_candidates_are_those_of_exact_arithmetic(quantizer, parity):
    """Around every edge between magnitudes, too; no cost is so large that the integer of a path overflows."""
    edges = np.nextafter(
        np.arange(64, dtype=np.float32).repeat(3), np.tile([0, 64, 64], 64).astype(np.float32)
    )
    value = np.concatenate([edges, np.random.default_rng(0).uniform(0, 64, 2000).astype(np.float32)])
    context = np.random.default_rng(1).integers(1, 18, len(value)).astype(np.int32)
    bits = trellis.costs(contexts.gaussian())
    bits -= bits.min((1, 2), keepdims=True)
    places = trellis.places_of(value, context)
    found = trellis.candidates(places, quantizer, parity, trellis.prices(bits, 0.4))

    value = value.astype(np.float64)

    def cost(k):
        return (value - (2 * k - quantizer * (k > 0))) ** 2 + np.minimum(
            0.4 * bits[context, quantizer, k], trellis.DEAREST
        )

    near = np.maximum(np.rint((value + quantizer - 2 * parity) / 4).astype(int) * 2 + parity, parity)
    at, below = (np.asarray(x) / 2**18 for x in found)
    np.testing.assert_allclose(at, cost(near), atol=0.02)
    np.testing.assert_allclose(below[near > 1], cost(near - 2)[near > 1], atol=0.04)
    assert (below >= at)[near < 2].all()
    most = int(trellis.FORBIDDEN + trellis.TOGETHER * at.max()) << trellis.FINER + trellis.TOGETHER
    assert most < 2**31
    assert 5 * at.max() < trellis.FORBIDDEN


def test_values_between_two_magnitudes_are_coded():
    """Integers are where the nearest magnitude of a parity changes; decoded factors have no others."""
    rng = np.random.default_rng(4)
    value = rng.integers(-40, 40, 9000).astype(np.float32) * rng.integers(0, 2, 9000)
    context = rng.integers(1, 30, 9000).astype(np.uint8)
    (symbols,) = encode.quantize_streams([value], [context], contexts.gaussian(), encode.MULTIPLIER)
    assert symbols.magnitude.min() == 0
    _, (back,) = round_trip([symbols])
    np.testing.assert_array_equal(back, streams.values(symbols))
    assert np.abs(back - value).max() < 6


def test_the_trellis_is_a_shift_register():
    rng = np.random.default_rng(3)
    state, q, parities = 0, [], [0, 0, *rng.integers(2, size=50)]
    for i in range(50):
        # parities begin two places before the quantizers
        known = (q[i - 3] if i >= 3 else 0) ^ (q[i - 5] if i >= 5 else 0) ^ (parities[i] if i >= 2 else 0)
        assert state % 2 == known
        q.append(known)
        state = trellis.NEXT[state, parities[i + 2]]


def test_tables_sum_and_keep_what_occurs():
    rng = np.random.default_rng(3)
    counts = rng.poisson(0.4, (COUNT, 2, SYMBOLS)).astype(float)
    counts[7] = 0
    table = frequency_tables.from_counts(counts)
    both = np.where(WIDE[:, None, None], counts.sum(1, keepdims=True), counts)
    both[0] = both[COUNT // 2] = 0
    np.testing.assert_array_equal(table.sum(-1), np.where(both.sum(-1) > 0, frequency_tables.SLOTS, 0))
    assert ((table > 0) == (both > 0)).all()
    assert (table % 2 == 0).all()
    np.testing.assert_array_equal(
        frequency_tables.unpack_tables(Reader(frequency_tables.pack_tables(table))), table
    )


def test_a_store_that_claims_much_inflates_little():
    """Deflated data that would grow beyond what is asked for is refused before it is made."""
    bomb = bitstream.deflate(bytes(1 << 24))
    with pytest.raises(Damaged, match="in place of 100"):
        bitstream.inflate(bomb, 100)
    with pytest.raises(Damaged, match="tables of"):
        frequency_tables.unpack_tables(Reader(bitstream.number(1 << 24) + bitstream.number(len(bomb)) + bomb))


@pytest.mark.parametrize("multiplier", [1e8, 1e20])
def test_no_price_of_a_bit_starts_the_trellis_in_another_state(multiplier):
    rng = np.random.default_rng(9)
    values, context = in_contexts([laplacian(rng, 600, 1e6)])
    (symbols,) = encode.quantize_streams([values], [context], contexts.gaussian(), multiplier)
    _, (back,) = round_trip([symbols])
    np.testing.assert_array_equal(streams.values(symbols), back)


@pytest.mark.parametrize("place", [0, 3, 5000, -1])
def test_quantizers_that_no_decoder_derives_are_not_written(quantized, place):
    np.testing.assert_array_equal(streams.expected_quantizers(quantized[0]), quantized[0].quantizer)
    other = quantized[0].quantizer.copy()
    other[place] ^= 1
    wrong = quantized[0]._replace(quantizer=other)
    with pytest.raises(RuntimeError, match="please report"):
        lanes.encode([wrong], frequency_tables.from_counts(streams.histogram([wrong])))


def test_symbols_without_slots_are_not_written(quantized, coded):
    """A symbol that its table lacks ends in a state that the encoder refuses."""
    table = coded[0].copy()
    context, quantizer = int(quantized[0].context[0]), int(quantized[0].quantizer[0])
    table[context, quantizer] = 0
    with pytest.raises(RuntimeError, match="please report"):
        lanes.encode(quantized[:1], table)


@pytest.mark.parametrize("frequency", [1, 2, 3, 4094, 4095])
def test_states_at_the_edges_are_encoded_exactly(frequency):
    """Lanes of few symbols against exact integers: quotients near a power of two are where floats err."""
    rng = np.random.default_rng(frequency)
    frequencies = np.array([frequency, 4096 - frequency])
    start = np.array([0, frequency])
    index = rng.integers(2, size=(700, 5)).astype(np.int32)
    lengths = np.array([700, 699, 512, 3, 0])
    state, words, count = lanes.encode_lanes(index, lengths, frequencies, start)
    ends = np.cumsum(count)
    for lane, length in enumerate(lengths.tolist()):
        x, expected = 1 << 16, []
        for k in reversed(range(length)):
            f, c = int(frequencies[index[k, lane]]), int(start[index[k, lane]])
            while x >= f << 20:
                expected.append(x & 0xFFFF)
                x >>= 16
            x = (x // f << 12) + x % f + c
        assert x == state[lane]
        assert expected[::-1] == words[ends[lane] - count[lane] : ends[lane]].tolist()
