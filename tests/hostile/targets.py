"""What strangers' bytes go into: each target takes any bytes and may only return or raise HydraOptError."""

import contextlib
import functools
import hashlib
import json
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np

from hydraopt_jax import compression, formats, merging, store, synthetic
from hydraopt_jax.changes import add
from hydraopt_jax.cli.common import parse_numbers
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import Hydra
from hydraopt_jax.rate_control.budget import parse_budget
from hydraopt_jax.store import folder, manifest, segment_data

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


# an index, JSON: the manifest and the header of every segment, without what seals them; and leaves' bytes
Opened = tuple[dict, list[bytes]]


@functools.cache
def small_store() -> Opened:
    """A small plain store of one segment."""
    made = synthetic.collection(tasks=["one", "../two"], modules={"q": (6, 4)}, rank=2, dtype="float32")
    return opened(compression.compress(made, form=Hydra(heads=1)))


@functools.cache
def segmented_store() -> Opened:
    """The same of a store of two segments, a task each."""
    made = synthetic.collection(tasks=["one", "../two"], modules={"q": (24, 16)}, rank=2, dtype="float32")
    one, two = (compression.compress([x], max_error=0.05) for x in made)
    return opened(
        one.replace(
            segments=(*one.segments, *two.segments),
            tasks=(*one.tasks, *two.tasks),
            sources=(*one.sources, *two.sources),
        )
    )


@functools.cache
def coded_store() -> Opened:
    """The same of a coded store of three tasks, the last one added; factors are predicted in it."""
    made = synthetic.collection(
        tasks=["one", "two", "new"], modules={"q": (24, 16)}, rank=2, likeness=0.95, dtype="float32"
    )
    return opened(add(compression.compress(made[:2], max_error=0.01), made[2]))


def opened(content: store.Store) -> Opened:
    """A store's index, and the leaves of each segment in one."""
    said = manifest.as_json(content, [segment_data.entry_of(x)._asdict() for x in content.segments])
    said["segments"] = [{"id": f"s{n}", **row} | {"id": f"s{n}"} for n, row in enumerate(said["segments"])]
    for row in said["segments"]:
        for key in ("bytes", "header", "sha256"):
            del row[key]
    headers = [json.loads(zlib.decompress(segment_data.deflated_header(x)[0])) for x in content.segments]
    bodies = [b"".join(np.asarray(v).tobytes() for v in x.leaves.values()) for x in content.segments]
    return json.loads(json.dumps({"manifest": said, "headers": headers})), bodies


def seal(header, body: bytes) -> tuple[bytes, dict]:
    """A segment's run whose every checksum holds, and what a manifest says of it."""
    text = json.dumps(header).encode()
    head, digests, at = zlib.compress(text), b"", 0
    with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
        for _, size in header["leaves"]:
            digests += hashlib.sha256(body[at : at + size]).digest()[: segment_data.DIGEST]
            at += size
    run = head + body + digests
    sha = hashlib.sha256(head + digests).hexdigest()
    return run, {"bytes": len(run), "header": [len(head), len(text)], "sha256": sha}


def restore(data: bytes, bodies: list[bytes] | None = None) -> store.Store:
    """Everything of a store in one file, sealed, of any index."""
    try:
        index = json.loads(data)
        said, headers = index["manifest"], index["headers"]
        rows = said["segments"]
        sealed = [seal(*x) for x in zip(headers, bodies or small_store()[1], strict=False)]
        tensors, at = {}, 0
        for row, (run, known) in zip(rows, sealed, strict=False):
            row |= {k: v for k, v in known.items() if k not in row}
            tensors[str(row["id"])] = {
                "dtype": "U8",
                "shape": [len(run)],
                "data_offsets": [at, at := at + len(run)],
            }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise HydraOptError("no index") from None
    spoken = json.dumps(said)
    meta = {"hydraopt": spoken, "hydraopt_sha256": hashlib.sha256(spoken.encode()).hexdigest()}
    text = json.dumps({"__metadata__": meta, **tensors}).encode()
    path = place() / "store.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(run for run, _ in sealed))
    return decoded(path)


def decoded(path: Path) -> store.Store:
    """A store with everything read: each leaf, each task."""
    content = store.open(path).load()
    for task in content.tasks:
        found = store.decode(content, task)
        assert all(np.asarray(x).dtype != object for x in found.extras.values())
    return content


@functools.cache
def large_store() -> tuple[Path, dict]:
    """A small store in a folder, of several arrays, and its manifest."""
    made = synthetic.collection(tasks=["one", "../two"], modules={"q": (40, 24)}, rank=2, dtype="float32")
    path = place() / "large"
    before, folder.ARRAY_BYTES = folder.ARRAY_BYTES, 500
    try:
        store.save(path, compression.compress(made, form=Hydra(heads=1)), zstd=False)
    finally:
        folder.ARRAY_BYTES = before
    return path, folder.read_manifest(path)


def describe(path: Path, said) -> store.Store:
    """Read a folder with another manifest."""
    text = json.dumps(said).encode()
    (path / folder.MANIFEST).write_bytes(manifest.gzipped(text))
    return decoded(path)


def config(data: bytes) -> None:
    """adapter_config.json."""
    guarded(lambda: read(data, weights()))


def safetensors(data: bytes) -> None:
    """adapter_model.safetensors."""
    guarded(lambda: read(json.dumps(CONFIG).encode(), data))


def index(data: bytes, bodies: list[bytes] | None = None) -> None:
    """A store's index; what it names may not lead out of a folder, nor hold anything but numbers."""

    def run():
        for task in restore(data, bodies).tasks:
            name = formats.adapter_folder.folder_name(task)
            assert "/" not in name and name not in ("", ".", "..")  # noqa: PT018

    guarded(run)


def changed(bodies: list[bytes], data: bytes) -> list[bytes]:
    """Leaves whose bytes begin with others."""
    out = []
    for body in bodies:
        out.append((data + body[len(data) :])[: len(body)])
        data = data[len(body) :]
    return out


def leaves(data: bytes) -> None:
    """Leaves of a coded store (of a segmented one where the first byte is odd), sealed again."""
    found, bodies = segmented_store() if data[:1] and data[0] % 2 else coded_store()
    guarded(lambda: restore(json.dumps(found).encode(), changed(bodies, data[1:])))


def description(data: bytes) -> None:
    """A folder's manifest, as it lies."""
    path = place() / "described"
    path.mkdir(exist_ok=True)
    (path / folder.MANIFEST).write_bytes(data)
    guarded(lambda: decoded(path))


def portable(data: bytes) -> None:
    """A store's file, as it lies."""
    path = place() / "portable.safetensors"
    path.write_bytes(data)
    guarded(lambda: decoded(path))


def options(data: bytes) -> None:
    """Option strings."""
    text = data.decode(errors="replace")
    for parse in (parse_budget, lambda x: parse_numbers("--weight", [x]), merging.curves.parse_names):
        guarded(functools.partial(parse, text))


def guarded(run) -> None:
    """Run it; the one exception it may raise is HydraOptError."""
    with contextlib.suppress(HydraOptError):
        run()


TARGETS = {x.__name__: x for x in (config, safetensors, index, leaves, description, portable, options)}


def file_of(given: Opened) -> bytes:
    """A store's file."""
    restore(json.dumps(given[0]).encode(), given[1])
    return (place() / "store.safetensors").read_bytes()


def seeds() -> dict[str, bytes]:
    """The corpus: a valid input for each target."""
    return {
        "config": json.dumps({**CONFIG, "rank_pattern": {"q": 2}, "alpha_pattern": {".*q": 3}}).encode(),
        "safetensors": weights(),
        "index": json.dumps(small_store()[0]).encode(),
        "leaves": b"\0" + b"".join(coded_store()[1]),
        "description": manifest.gzipped(
            json.dumps({**small_store()[0]["manifest"], "segments": []}).encode()
        ),
        "portable": file_of(small_store()),
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
