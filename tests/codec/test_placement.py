"""Where coding runs: on the processor, also beside a GPU; decoding follows the thread's device."""

import jax
import numpy as np
import pytest

from hydraopt_jax import compress, devices, serving
from hydraopt_jax.codec import encode, lanes, rans, trellis

RNG = np.random.default_rng(5)
VALUES = [(3 * RNG.laplace(size=n)).astype(np.float32) for n in (300, 5000)]
CONTEXTS = [np.full(len(x), 3, np.uint8) for x in VALUES]
FREQUENCIES = np.ones((encode.COUNT, 2, trellis.SYMBOLS))


def coded():
    symbols = encode.quantize_streams(VALUES, CONTEXTS, FREQUENCIES, encode.MULTIPLIER)
    table = encode.frequency_tables.from_counts(encode.streams.histogram(symbols))
    return lanes.encode(symbols, table)


@pytest.fixture
def a_gpu(monkeypatch):
    """JAX's default device as if it were a GPU's; a device that is named is what it is."""
    monkeypatch.setattr(devices, "platform", lambda: "gpu" if devices.current() is None else "cpu")


@pytest.fixture
def seen(monkeypatch):
    """The devices that the trellis and the coder of lanes are called on."""
    found = set()
    for module, name in ((trellis, "quantize"), (lanes, "encode_block")):
        call = getattr(module, name)

        def spied(*args, call=call, name=name):
            found.add((name, devices.current()))
            return call(*args)

        monkeypatch.setattr(module, name, spied)
    return found


@pytest.mark.usefixtures("a_gpu")
def test_its_scans_run_on_the_processor_of_a_gpu(seen):
    found = coded()
    processor = jax.local_devices(backend="cpu")[0]
    assert seen == {("quantize", processor), ("encode_block", processor)}
    assert devices.current() is None
    with jax.default_device(processor):
        assert coded() == found


@pytest.mark.usefixtures("a_gpu")
def test_a_process_without_the_processor_as_a_device_codes_where_it_is(seen, monkeypatch):
    def none(backend=None):
        raise RuntimeError(f"Unknown backend {backend}")

    here = coded()
    seen.clear()
    monkeypatch.setattr(jax, "local_devices", none)
    assert coded() == here
    assert seen == {("quantize", None), ("encode_block", None)}


def test_elsewhere_nothing_is_moved(seen):
    coded()
    assert seen == {("quantize", None), ("encode_block", None)}


def test_the_platform_is_that_of_the_thread_s_device():
    assert devices.platform() == jax.default_backend()
    with jax.default_device(jax.devices("cpu")[0]):
        assert devices.platform() == "cpu"
    with jax.default_device("cpu"):
        assert devices.platform() == "cpu"


@pytest.mark.usefixtures("a_gpu")
def test_factors_are_decoded_on_the_device_that_they_are_loaded_to(small, monkeypatch):
    calls = []
    for name, module in (("JAX", lanes), ("NumPy", rans)):
        decode = module.decode
        spied = lambda *args, name=name, decode=decode: calls.append(name) or decode(*args)  # noqa: E731
        monkeypatch.setattr(module, "decode", spied)
    store = compress(small, budget=0.9)
    calls.clear()
    serving.load(store)
    assert set(calls) == {"JAX"}
    calls.clear()
    with jax.default_device("cpu"):
        serving.load(store)
    assert set(calls) == {"NumPy"}
