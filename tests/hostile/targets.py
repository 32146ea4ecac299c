"""What strangers' bytes go into: each target takes any bytes and may only return or raise HydraOptError."""

import contextlib
import functools
import json
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np

from hydraopt_jax import compression, formats, merging, synthetic
from hydraopt_jax.cli.common import parse_weights
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.rate_control import navigate
from hydraopt_jax.rate_control.budget import parse_budget
from hydraopt_jax.store import Payload, Segment, changes, checkpoint, container, container_writer, packing

CORPUS = Path(__file__).parent / "corpus"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base"}
KEY = "base_model.model.q.lora_{}.weight"


@functools.cache
def place() -> Path:
    """A folder for this process."""
    keep = tempfile.TemporaryDirectory()
    place.keep = keep  # type: ignore[attr-defined]
    return Path(keep.name)


def header(fields) -> bytes:
    """A safetensors file of a header and 40 bytes."""
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + bytes(40)


def weights() -> bytes:
    """A whole safetensors file of one module, 3 x 7 at rank 2."""
    return header(
        {
            KEY.format("A"): {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]},
            KEY.format("B"): {"dtype": "F16", "shape": [7, 2], "data_offsets": [12, 40]},
        }
    )


def read(config: bytes, data: bytes):
    """An adapter of two files."""
    folder = place() / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(data)
    return formats.read_adapter(folder)


@functools.cache
def small_store() -> tuple[dict, bytes]:
    """The index of a small plain store, and what follows it."""
    made = synthetic.collection(tasks=["one", "../two"], modules={"q": (6, 4)}, rank=2, dtype="float32")
    return opened(compression.compress(made, compression.Options(heads=1)), "small")


@functools.cache
def segmented_store() -> tuple[dict, bytes]:
    """The same of a store of two segments, a task each."""
    made = synthetic.collection(tasks=["one", "../two"], modules={"q": (24, 16)}, rank=2, dtype="float32")
    alone = [navigate.compress([x], navigate.Options(max_error=0.05)) for x in made]
    parts = [Segment(x.payload.leaves, x.payload.shapes, (t,)) for t, x in enumerate(alone)]
    payload = Payload({}, {}, segments=tuple(parts))
    first = alone[0]._replace(
        tasks=tuple(x.task for x in made),
        sources=tuple(x.sources[0] for x in alone),
        errors=np.concatenate([x.errors for x in alone], 1),
        modules=packing.coded_terms(payload, (0, 1)),
        payload=payload,
    )
    return opened(first, "segmented")


def opened(content, name: str) -> tuple[dict, bytes]:
    """The index of a small store, and what follows it."""
    path = place() / name
    checkpoint.save(path, content, compress=False)
    packed = container.read_description(path)[0]["index"][0]
    data = (path / "state" / "data" / "0").read_bytes()
    return json.loads(zlib.decompress(data[:packed])), data[packed:]


def restore(index: bytes, tail: bytes | None = None):
    """A store whose every checksum holds, of any index."""
    path, tail = place() / "store", small_store()[1] if tail is None else tail
    head = zlib.compress(index)
    array = head + tail
    (path / "state" / "data").mkdir(parents=True, exist_ok=True)
    zarr = {
        "chunks": [len(array)], "compressor": None, "dtype": "|u1", "fill_value": None, "filters": None,
        "order": "C", "shape": [len(array)], "zarr_format": 2, "dimension_separator": ".",
    }  # fmt: skip
    (path / "state" / "data" / ".zarray").write_text(json.dumps(zarr))
    (path / "state" / "data" / "0").write_bytes(array)
    meta = {
        "format": "hydraopt",
        "schema": container.SCHEMA,
        "index": [len(head), len(index)],
        "chunks": [[[len(array), container.digest(array)]]],
        "files": {"state/data/.zarray": container.digest(json.dumps(zarr).encode())},
    }
    return describe(path, meta)


@functools.cache
def large_store() -> tuple[Path, dict]:
    """A small store of several arrays, and its description."""
    made = synthetic.collection(tasks=["one", "../two"], modules={"q": (40, 24)}, rank=2, dtype="float32")
    path = place() / "large"
    before = container_writer.ARRAY_BYTES
    container_writer.ARRAY_BYTES = 500
    try:
        checkpoint.save(path, compression.compress(made, compression.Options(heads=1)), compress=False)
    finally:
        container_writer.ARRAY_BYTES = before
    return path, container.read_description(path)[0]


def describe(path: Path, meta):
    """Restore a store with a description, sealed."""
    content = {"item_handlers": {"state": "x"}, "custom_metadata": {**meta, "seal": container.SEAL}}
    blank = json.dumps(content, separators=(",", ":"))
    sealed = blank.replace(f'"seal":"{container.SEAL}"', f'"seal":"{container.digest(blank.encode())}"')
    path.mkdir(exist_ok=True)
    (path / container.DESCRIPTION).write_text(sealed)
    return checkpoint.restore(path)


def config(data: bytes) -> None:
    """adapter_config.json."""
    guarded(lambda: read(data, weights()))


def safetensors(data: bytes) -> None:
    """adapter_model.safetensors."""
    guarded(lambda: read(json.dumps(CONFIG).encode(), data))


def index(data: bytes, tail: bytes | None = None) -> None:
    """A store's index; what it names may not lead out of a folder, nor hold anything but numbers."""

    def run():
        content = restore(data, tail)
        for task in content.tasks:
            name = formats.peft.folder_name(task)
            assert "/" not in name and name not in ("", ".", "..")  # noqa: PT018
        for source in content.sources:
            assert all(np.asarray(x).dtype != object for x in source.extras.values())

    guarded(run)


@functools.cache
def coded_store() -> tuple[dict, bytes]:
    """The same of a coded store of three tasks, the last one added; factors are predicted in it."""
    made = synthetic.collection(
        tasks=["one", "two", "new"], modules={"q": (24, 16)}, rank=2, likeness=0.95, dtype="float32"
    )
    kept = navigate.compress(made[:2], navigate.Options(max_error=0.01))
    return opened(changes.add(kept, made[2]), "coded")


def leaves(data: bytes) -> None:
    """Leaves of a coded store (of a segmented one where the first byte is odd), sealed again."""
    index, tail = segmented_store() if data[:1] and data[0] % 2 else coded_store()
    changed = (data[1:] + tail[len(data[1:]) :])[: len(tail)]
    guarded(lambda: restore(json.dumps(index).encode(), changed))


def description(data: bytes) -> None:
    """A store's description, as it lies."""
    path = place() / "described"
    path.mkdir(exist_ok=True)
    (path / container.DESCRIPTION).write_bytes(data)
    guarded(lambda: checkpoint.restore(path))


def options(data: bytes) -> None:
    """Option strings."""
    text = data.decode(errors="replace")
    for parse in (parse_budget, lambda x: parse_weights([x]), merging.curves.parse):
        guarded(functools.partial(parse, text))


def guarded(run) -> None:
    """Run it; the one exception it may raise is HydraOptError."""
    with contextlib.suppress(HydraOptError):
        run()


TARGETS = {x.__name__: x for x in (config, safetensors, index, leaves, description, options)}


def seeds() -> dict[str, bytes]:
    """The corpus: a valid input for each target."""
    return {
        "config": json.dumps({**CONFIG, "rank_pattern": {"q": 2}, "alpha_pattern": {".*q": 3}}).encode(),
        "safetensors": weights(),
        "index": json.dumps(small_store()[0]).encode(),
        "leaves": b"\0" + coded_store()[1],
        "description": json.dumps(
            {"item_handlers": {"state": ""}, "custom_metadata": {"schema": container.SCHEMA}}
        ).encode(),
        "options": b"12.5%",
    }


def write_corpus() -> None:
    """Write the committed corpus."""
    CORPUS.mkdir(exist_ok=True)
    for name, data in seeds().items():
        (CORPUS / name).mkdir(exist_ok=True)
        (CORPUS / name / "valid").write_bytes(data)


if __name__ == "__main__":
    write_corpus()
