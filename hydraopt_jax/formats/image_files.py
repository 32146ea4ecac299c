"""LoRA files of image models: one safetensors file as diffusers or kohya's scripts write it.

kohya: `MODULE.lora_down.weight` `[R, I]`, `.lora_up.weight` `[O, R]` and `.alpha`, the scale times R. A
module without alpha has scale 1. diffusers: `COMPONENT.MODULE.lora_A.weight` and `.lora_B.weight` (older
files have other endings), with scales in the header's `lora_adapter_metadata`, or 1. If ranks are mixed and
scales are missing, diffusers derives scales from the most common rank. Therefore written files have one rank.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from hydraopt_jax import strict_json
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.errors import HydraOptError, exists, one_line
from hydraopt_jax.formats import peft, server
from hydraopt_jax.formats.lora_keys import DIALECT, ENDINGS, parse_key
from hydraopt_jax.formats.peft_config import PREFIX, check_config, module_scale
from hydraopt_jax.formats.tensor_files import disk_dtype, write_tensors
from hydraopt_jax.locks import locked
from hydraopt_jax.store.portable import KEY

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
# key of the header under which diffusers keeps the scales, by component
SCALES = "lora_adapter_metadata"
# keys of the header that describe the factors as they were: scales, kohya's ranks, alphas and checksums
_OF_FACTORS = (SCALES, "ss_network_dim", "ss_network_alpha", "sshs_model_hash", "sshs_legacy_hash")

_NOT_UNDERSTOOD = {
    ".hada_": "LoHa is no plain low-rank delta",
    ".lokr_": "LoKr is no plain low-rank delta",
    ".lora_mid.": "a convolution in Tucker form has three factors",
    ".dora_scale": "DoRA is no plain low-rank delta",
    ".lora_magnitude_vector": "DoRA is no plain low-rank delta",
    ".oft_": "OFT turns the weights and adds no delta",
}


def file_of(source: str | os.PathLike[str]) -> Path | None:
    """The LoRA file at a path, or in a folder without a PEFT configuration; None for neither."""
    at = Path(source)
    if at.suffix == ".safetensors" and at.is_file():
        return at
    inside = at / WEIGHTS_FILE
    return inside if inside.is_file() and not (at / peft.CONFIG_FILE).exists() else None


def sort_tensors(
    tensors: Iterator[tuple[str, Any]], source: str
) -> tuple[dict[str, dict[str, tuple[str, Any]]], dict[str, Any]]:
    """The result of `peft.sort_tensors` for a LoRA file; alphas belong to the configuration."""
    pairs: dict[str, dict[str, tuple[str, Any]]] = {}
    others: dict[str, Any] = {}
    for key, tensor in tensors:
        for part, reason in _NOT_UNDERSTOOD.items():
            if part in key:
                raise HydraOptError(f"{source}: {key}: {reason}: leave this file out")
        if key.endswith(".bias") and parse_key(f"{key.removesuffix('.bias')}.weight"):
            raise HydraOptError(f"{source}: {key}: {peft.FACTOR_BIAS}")
        found = parse_key(key)
        if found is None:
            others[key] = tensor
            continue
        module, side, _ = found
        peft.add_factor(pairs, module, side, key, tensor, source)
    return pairs, {k: x for k, x in others.items() if k.removesuffix(".alpha") not in pairs}


def config_of(file: Path) -> dict[str, Any]:
    """A configuration that gives each module of a LoRA file its rank and its scale.

    Raises:
      HydraOptError: not a LoRA file, or scales that are not finite.
    """
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            keys = list(opened.keys())
            if any(k.startswith(PREFIX) for k in keys):
                raise HydraOptError(
                    f"{file}: is the weights file of a PEFT adapter: give its folder, which has the scale"
                )
            if KEY in (opened.metadata() or {}):
                raise HydraOptError(
                    f"{file}: is a store, not an adapter: hydraopt export writes its adapters as folders"
                )
            metadata = {k: v for k, v in (opened.metadata() or {}).items() if k != "format"}
            lows = {m[0]: k for k in keys if (m := parse_key(k)) and m[1] == "A"}
            ranks = {m: opened.get_slice(k).get_shape()[0] for m, k in lows.items()}
            said = {m: opened.get_tensor(f"{m}.alpha") for m in ranks if f"{m}.alpha" in keys}
            alphas = {m: float(np.asarray(x, np.float32).reshape(-1)[0]) for m, x in said.items()}
    except (safetensors.SafetensorError, OSError, TypeError, LookupError, AttributeError) as error:
        # NumPy has no name for float8
        raise HydraOptError(f"{file}: is not a LoRA file ({one_line(error)}): copy it again") from None
    if not ranks:
        raise HydraOptError(f"{file}: holds no LoRA tensor: is it a LoRA file of diffusers or kohya?")
    scales = _said_scales(file, metadata)
    alphas = {m: alphas[m] if m in alphas else rank * scales(m) for m, rank in ranks.items()}
    config = {
        "peft_type": "LORA",
        DIALECT: "kohya" if said or any(k.endswith(ENDINGS[0][0]) for k in keys) else "diffusers",
        "base_model_name_or_path": metadata.get("ss_base_model_version") or None,
        "metadata": metadata,
        "without_alpha": sorted(ranks.keys() - said.keys()),
        **_with_patterns("r", "rank_pattern", ranks),
        **_with_patterns("lora_alpha", "alpha_pattern", alphas),
    }
    check_config(config, str(file))
    return config


def _with_patterns(field: str, patterns: str, values: Mapping[str, float]) -> dict[str, Any]:
    """The most common value, and patterns of full names for the others."""
    common = Counter(values.values()).most_common(1)[0][0]
    return {field: common, patterns: {f"^{re.escape(m)}": x for m, x in values.items() if x != common}}


def _said_scales(file: Path, metadata: Mapping[str, str]) -> Any:
    """Module -> scale in diffusers' part of the header; 1 if it has none."""
    if SCALES not in metadata:
        return lambda module: 1.0
    try:
        rows = strict_json.loads(metadata[SCALES])
        whole = {k: v for k, v in rows.items() if v is not None}
    except (ValueError, AttributeError) as error:
        raise HydraOptError(f"{file}: its {SCALES} is not a JSON object ({one_line(error)})") from None

    def scale(module: str) -> float:
        component, _, rest = module.partition(".")
        own = {k.removeprefix(f"{component}."): v for k, v in whole.items() if k.startswith(f"{component}.")}
        own, rest = (own, rest) if "r" in own else (dict(whole), module)
        if "r" not in own:
            return 1.0
        check_config({**own, "peft_type": "LORA"}, f"{file}: {SCALES}")
        return module_scale(own, rest)

    return scale


def contents(adapter: Adapter, dtype: str | None = None) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The header's metadata and the tensors by key of an adapter's LoRA file.

    Raises:
      HydraOptError: values that do not fit the dtype.
    """
    config, kohya = adapter.config, adapter.config[DIALECT] == "kohya"
    metadata = dict(config.get("metadata") or {})
    found = peft.as_came(adapter) if dtype is None else None
    if found is None:
        # scale 1, which is also the meaning of a missing scale
        found = adapter if kohya else server.fit_server(adapter, padded=True).adapter
        metadata = {k: v for k, v in metadata.items() if k not in _OF_FACTORS}
        tensors, ranks = peft.key_tensors(found, disk_dtype(dtype or adapter.dtype))
        alphas: dict[str, float] = dict(ranks)
    else:
        tensors, ranks = peft.key_tensors(found, None)
        silent = set(config.get("without_alpha") or ())
        alphas = {m: module_scale(config, m) * r for m, r in ranks.items() if m not in silent}
    out = {}
    for module in found.a:
        endings = ENDINGS[(found.layout.get(module) or {}).get("ending", 0)]
        for side, ending in zip("AB", endings, strict=True):
            out[f"{module}{ending}"] = tensors.pop(f"{PREFIX}{module}.lora_{side}.weight")
        if kohya and module in alphas:
            out[f"{module}.alpha"] = np.array(alphas[module], np.float32)
    return metadata, out | tensors


def write_lora_file(
    path: str | os.PathLike[str], adapter: Adapter, *, dtype: str | None = None, overwrite: bool = False
) -> None:
    """Write a LoRA file in the adapter's original dialect, completely or not at all.

    Args:
      path: a `.safetensors` file, or a folder for `pytorch_lora_weights.safetensors`.
      adapter, dtype, overwrite: see `peft.write_adapter`.

    Raises:
      HydraOptError: the file exists, cannot be written, or values do not fit the dtype.
    """
    target = Path(path).resolve()
    file = target if target.suffix == ".safetensors" else target / WEIGHTS_FILE
    if file.exists() and not overwrite:
        raise exists(file)
    try:
        metadata, tensors = contents(adapter, dtype)
        with peft.parents(file), locked(file):
            new = file.with_name(f".{file.name}.new")
            try:
                write_tensors(new, tensors, {**metadata, "format": "pt"})
                os.replace(new, file)
            finally:
                new.unlink(missing_ok=True)
    except HydraOptError:
        raise
    except (OSError, safetensors.SafetensorError, TypeError, ValueError) as error:
        raise HydraOptError(f"{file}: cannot be written: {one_line(error)}") from None
