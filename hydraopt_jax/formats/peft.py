"""PEFT adapter folders: adapter_config.json with adapter_model.safetensors (or .bin, given torch).

PEFT stores `lora_A: [R, I]` and `lora_B: [O, R]` and adds `scale * B @ A` to a weight `[O, I]`. Here
`a = A.T: [I, R]` and `b = scale * B.T: [R, O]`, which adds `a @ b` to the kernel `[I, O]`.
"""

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.errors import HydraOptError, one_line, system_error
from hydraopt_jax.factors import FLOATS
from hydraopt_jax.formats import lora_keys
from hydraopt_jax.formats.adapter_folder import (
    PICKLE_FILE,
    WEIGHTS_FILE,
    check_output,
    parents,
    replace_folder,
    weights_file,
)
from hydraopt_jax.formats.peft_config import (
    CONFIG_FILE,
    PREFIX,
    module_rank,
    module_scale,
    read_config,
    unit_scale_config,
)
from hydraopt_jax.formats.tensor_files import disk_array, disk_dtype, read_tensors
from hydraopt_jax.locks import locked
from hydraopt_jax.network import client, explained, redact
from hydraopt_jax.remote import COMMIT
from hydraopt_jax.store import lossless

# beginning of an address of the web or of a bucket
ADDRESS = re.compile(r"\w+://")

# A factor's key, with the adapter's name where PEFT's state dict was saved without removing it.
_LINEAR_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight")
_EMBEDDING_KEY = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(\.[^.]+)?")
# VeLoRA's buffers serve its backward pass only.
_TRAINING_ONLY_KEY = re.compile(r".+\.lora_velora_[a-z]+(\.[^.]+)?")

FACTOR_BIAS = "a bias on a LoRA factor is no low-rank delta: retrain without lora_bias"
_NOT_UNDERSTOOD = (
    ("lora_magnitude_vector", "DoRA's magnitudes are no low-rank delta: retrain without DoRA"),
    (".bias", FACTOR_BIAS),
    ("lora_diag", "KaSA's diagonal is not supported: use plain LoRA"),
    ("lora_", "this LoRA tensor is not understood, and none is dropped silently: use plain LoRA"),
)

# tensors of one module: side, "A" or "B" -> key and tensor
_Pair = dict[str, tuple[str, np.ndarray]]


def _is_embedding(pair: _Pair) -> bool:
    return any(_EMBEDDING_KEY.fullmatch(key) for key, _ in pair.values())


def sort_tensors(
    tensors: Iterator[tuple[str, np.ndarray]], source: str
) -> tuple[dict[str, _Pair], dict[str, np.ndarray]]:
    """Sort tensors into LoRA pairs by module, and everything else by its own name."""
    pairs: dict[str, _Pair] = {}
    extras: dict[str, np.ndarray] = {}
    for key, tensor in tensors:
        if "lora_" not in key or _TRAINING_ONLY_KEY.fullmatch(key):
            extras[key] = tensor
            continue
        match = _LINEAR_KEY.fullmatch(key) or _EMBEDDING_KEY.fullmatch(key)
        if match is None:
            reason = next(reason for part, reason in _NOT_UNDERSTOOD if part in key)
            raise HydraOptError(f"{source}: {key}: {reason}")
        if not key.startswith(PREFIX):
            raise HydraOptError(
                f"{source}: {key} does not start with {PREFIX}, so PEFT would ignore it: rename the tensors"
            )
        add_factor(pairs, match["module"].removeprefix(PREFIX), match["side"], key, tensor, source)
    return pairs, extras


def add_factor(
    pairs: dict[str, _Pair], module: str, side: str, key: str, tensor: np.ndarray, source: str
) -> None:
    """Put a factor into the pair of its module."""
    if tensor.dtype not in FLOATS:
        raise HydraOptError(
            f"{source}: {key} is {tensor.dtype}: a LoRA factor must be float32, float16 or bfloat16"
        )
    pair = pairs.setdefault(module, {})
    entry = {side: (key, tensor)}
    if side in pair or (pair and _is_embedding(pair) != _is_embedding(entry)):
        other = pair.get(side, next(iter(pair.values())))[0]
        raise HydraOptError(
            f"{source}: {key} clashes with {other}: one file must hold one adapter, save them apart"
        )
    pair |= entry


def check_pair(module: str, pair: _Pair, config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """One module's layout, from the shapes of PEFT's A and B, which must fit each other and the config."""
    for side, other in (("A", "B"), ("B", "A")):
        if side not in pair:
            raise HydraOptError(
                f"{source}: {pair[other][0]} has no lora_{side} beside it: save the adapter again"
            )
    (key_a, low), (key_b, high) = pair["A"], pair["B"]
    layout: dict[str, Any] = {"kind": "embedding"} if _is_embedding(pair) else {}
    found = lora_keys.parse_key(key_a) if lora_keys.DIALECT in config else None
    ending = {} if found is None else {"ending": found[2]}
    for key, tensor in pair.values():
        if not 2 <= tensor.ndim <= (2 if layout else 5) or tensor.ndim != low.ndim:
            raise HydraOptError(
                f"{source}: {key} has shape {list(tensor.shape)}: a LoRA factor has 2 dimensions, a "
                "convolution's 3 to 5, and both sides as many"
            )
    rank = module_rank(config, module)
    if low.shape[0] != rank:
        raise HydraOptError(
            f"{source}: {key_a} has rank {low.shape[0]} but {CONFIG_FILE} says {rank}, so its scale is "
            "unknown: correct r or rank_pattern"
        )
    if low.ndim > 2:
        if 0 < high.shape[1] < rank and rank % high.shape[1] == 0:
            raise HydraOptError(
                f"{source}: {key_b} has shape {list(high.shape)}: a convolution with groups, whose delta "
                "is no product of two factors: leave that module out of target_modules"
            )
        if math.prod(high.shape[2:]) != 1:
            raise HydraOptError(
                f"{source}: {key_b} has shape {list(high.shape)}: its kernel must be of size 1"
            )
        layout = {"kind": "convolution", "kernel": list(low.shape[2:])}
    if high.shape[1] != rank:
        raise HydraOptError(
            f"{source}: {key_b} has rank {high.shape[1]} but {key_a} has rank {rank}: save the adapter again"
        )
    return layout | ending


def _factors(
    module: str, pair: _Pair, config: Mapping[str, Any], source: str
) -> tuple[np.ndarray, np.ndarray, float, dict[str, Any]]:
    """One module's `a: [I, R]`, `b: [R, O]`, scale and layout, from PEFT's A and B."""
    layout = check_pair(module, pair, config, source)
    (_, low), (_, high) = pair["A"], pair["B"]
    rank = low.shape[0]
    scale = float(np.float32(module_scale(config, module)))
    return low.reshape(rank, -1).T, high.reshape(high.shape[0], rank).T, scale, layout


def _fetch(name: str) -> Path:
    """The folder in the hub's cache with an adapter's files of one commit, downloaded if necessary."""
    hub = client(f"hf:{name}")
    repository, _, revision = name.partition("@")
    fetch = functools.partial(hub.hf_hub_download, repository)
    with explained(f"hf:{name}", "cannot be downloaded"):
        folder = Path(fetch(CONFIG_FILE, revision=revision or None)).parent
        # a branch may change between two files
        pinned = folder.name if COMMIT.fullmatch(folder.name) else revision or None
        try:
            fetch(WEIGHTS_FILE, revision=pinned)
        except hub.errors.EntryNotFoundError:
            fetch(PICKLE_FILE, revision=pinned)
    return folder


def fetch_folder(source: str) -> tuple[Path, str]:
    """An adapter's folder, fetched from the hub if necessary; and the name of its task."""
    if source.startswith("hf:"):
        return _fetch(source[3:]), source[3:]
    if ADDRESS.match(source):
        raise HydraOptError(
            f"{redact(source)}: adapters are not read from addresses, except hf:ORG/NAME: download it first"
        )
    folder = Path(source)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "no such folder"
        raise HydraOptError(f"{source}: {what}: pass a folder that PEFT's save_pretrained wrote")
    # not that of a link's target; "." and ".." have names, too
    return folder, Path(os.path.abspath(folder)).name


def look_into(source: str) -> tuple[dict[str, Any], Path, str]:
    """An adapter's configuration, its weights file, and the task's name, by default the folder's."""
    from hydraopt_jax.formats import image_files

    file = None if source.startswith("hf:") else image_files.file_of(source)
    if file is not None:
        own = Path(os.path.abspath(source))
        return image_files.config_of(file), file, own.stem if Path(source) == file else own.name
    folder, name = fetch_folder(source)
    return read_config(folder / CONFIG_FILE), weights_file(folder), name


def sorted_tensors(
    tensors: Iterator[tuple[str, np.ndarray]], config: Mapping[str, Any], source: str
) -> tuple[dict[str, _Pair], dict[str, np.ndarray]]:
    """`sort_tensors` of the dialect that a configuration is of."""
    from hydraopt_jax.formats import image_files

    sort = image_files.sort_tensors if lora_keys.DIALECT in config else sort_tensors
    return sort(tensors, source)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise system_error(path, "read", error) from None


def read_adapter(path: str | os.PathLike[str], *, task: str | None = None) -> Adapter:
    """The LoRA adapter in a PEFT folder, in a LoRA file, or on the Hugging Face hub.

    Args:
      path: a folder with adapter_config.json and adapter_model.safetensors (or adapter_model.bin, if torch
        is installed); a LoRA file of diffusers or kohya, see `image_files`; or
        `hf:organization/name[@revision]`, if huggingface_hub is installed.
      task: the task's name; by default the folder's name or the hub id.

    Returns:
      The adapter: `a` `[I, R]` in the dtype on disk, `b` `[R, O]` in float32, or float64 if that is on disk,
      with the exact scale folded in, all other tensors in `extras`. For an embedding I is the vocabulary. For
      a convolution I is inputs times kernel size; the kernel's shape is in `layout`. Modules of which the
      scale cannot be taken out again are in `raw`, too.

    Raises:
      HydraOptError: a missing, damaged or contradictory file, or a LoRA variant that is not a plain
        low-rank delta; the message names the file, tensor or field.
    """
    source = os.fspath(path)
    config, weights, name = look_into(source)
    pairs, extras = sorted_tensors(read_tensors(weights), config, str(weights))
    if not pairs:
        raise HydraOptError(f"{weights}: holds no LoRA tensor: was the right adapter saved?")
    dtypes = {tensor.dtype for pair in pairs.values() for _, tensor in pair.values()}
    # Float32 represents all values of the narrower dtypes exactly.
    dtype = dtypes.pop().name if len(dtypes) == 1 else "float32"
    a, b, layout, raw = {}, {}, {}, {}
    for module in list(pairs):
        # Popping frees each lora_B as its scaled copy is made.
        pair = pairs.pop(module)
        a[module], high, scale, layout[module] = _factors(module, pair, config, str(weights))
        b[module] = lossless.fold(high, scale)
        own = lossless.unfold(b[module], scale, dtype)
        if own is None or not lossless.same_bits(own, high):
            raw[module] = lossless.Raw(a[module], high, scale)
    digest = file_digest(weights)
    return Adapter(
        task=name if task is None else task,
        a=a,
        b=b,
        dtype=dtype,
        extras=extras,
        config=config,
        layout={name: value for name, value in layout.items() if value},
        source=source,
        digest=digest,
        raw=raw,
    )


def as_came(adapter: Adapter) -> Adapter | None:
    """The adapter with its file's factors, if its configuration gives their ranks and scales."""
    config, raw = adapter.config, adapter.raw
    if not raw or config.get("peft_type") != "LORA" or set(raw) != set(adapter.a):
        return None
    for name, (a, _, scale) in raw.items():
        if module_rank(config, name) != a.shape[1] or np.float32(module_scale(config, name)) != scale:
            return None
        # the factors may have been replaced since
        if not lossless.is_of(lossless.Raw(*raw[name]), adapter.a[name], adapter.b[name]):
            return None
    return adapter.replace(a={n: x[0] for n, x in raw.items()}, b={n: x[1] for n, x in raw.items()})


def key_tensors(adapter: Adapter, dtype: np.dtype | None) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """PEFT's tensors by key, in a given dtype or their own, and each module's rank."""
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module, a in adapter.a.items():
        b = adapter.b[module]
        layout = adapter.layout.get(module) or {}
        if a.shape[1] == 0:
            # PEFT knows no rank 0: a module whose delta is zero is written as one zero direction.
            a, b = np.zeros((a.shape[0], 1), a.dtype), np.zeros((1, b.shape[1]), b.dtype)
        ranks[module] = a.shape[1]
        low, high = a.T, b.T
        part, end = ("lora_", ".weight")
        if layout.get("kind") == "embedding":
            part, end = ("lora_embedding_", "")
        elif layout.get("kind") == "convolution":
            kernel = tuple(layout["kernel"])
            low = low.reshape(low.shape[0], -1, *kernel)
            high = high.reshape(*high.shape, *(1 for _ in kernel))
        for side, values in (("A", low), ("B", high)):
            key = f"{PREFIX}{module}.{part}{side}{end}"
            tensors[key] = disk_array(key, values, dtype or values.dtype)
    clash = next((key for key in adapter.extras if key in tensors), None)
    if clash is not None:
        raise HydraOptError(f"{clash}: is both a LoRA factor and a tensor of its own")
    return tensors | {key: np.array(x, order="C") for key, x in adapter.extras.items()}, ranks


def contents(adapter: Adapter, dtype: str | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """PEFT's configuration, and tensors by key, that `write_adapter` writes into a folder.

    Raises:
      HydraOptError: no factors, or values that do not fit the dtype.
    """
    if not adapter.a:
        raise HydraOptError(f"task {adapter.task!r} holds no LoRA factor: nothing to write")
    came = as_came(adapter) if dtype is None else None
    if came is not None:
        return dict(came.config), key_tensors(came, None)[0]
    tensors, ranks = key_tensors(adapter, disk_dtype(dtype or adapter.dtype))
    return unit_scale_config(adapter.config, ranks), tensors


def write_adapter(
    path: str | os.PathLike[str], adapter: Adapter, *, dtype: str | None = None, overwrite: bool = False
) -> None:
    """Write a folder that PEFT loads, atomically: completely or not at all.

    The configuration gives every module its own rank and scale 1, because `b` contains the scale. Other
    fields are kept. Factors are written unchanged: balance them first if they must fit float16. An adapter
    from a lossless store is written as the store has it, with its own configuration, unless a dtype is given;
    a store that the command made of files has their factors bit for bit.

    Args:
      path: the folder to write; missing parents are made.
      adapter: `a` `[I, R]` and `b` `[R, O]` by module, of any ranks; `extras` are written unchanged.
      dtype: of the factors on disk; None for the original dtype.
      overwrite: replace an existing adapter. Other files in its folder stay.

    Raises:
      HydraOptError: the path exists, cannot be written, or values do not fit the dtype.
    """
    if lora_keys.DIALECT in adapter.config:
        from hydraopt_jax.formats import image_files

        return image_files.write_lora_file(path, adapter, dtype=dtype, overwrite=overwrite)
    target = Path(path).resolve()
    try:
        check_output(target, overwrite)
        config, tensors = contents(adapter, dtype)
        text = json.dumps(config, indent=2, sort_keys=True)
        with parents(target), locked(target):
            check_output(target, overwrite)
            replace_folder(target, text, tensors)
    except HydraOptError:
        raise
    except (OSError, safetensors.SafetensorError, TypeError, ValueError) as error:
        # TypeError and ValueError: extras or configuration of a kind these formats cannot hold.
        raise HydraOptError(f"{target}: cannot be written: {one_line(error)}") from None
