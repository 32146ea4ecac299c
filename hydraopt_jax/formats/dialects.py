"""Positions of LoRA factors in the parameter trees of JAX libraries: one row per library.

All of them compute `x @ a @ b`, `a: [in..., R]`, `b: [R, out...]`, times a scale that is not stored with the
parameters. Einsum layers keep their axes. levanter saves PEFT's transposed layout.
"""

import re
from typing import NamedTuple

from hydraopt_jax.errors import HydraOptError


class Dialect(NamedTuple):
    """One library's layout.

    Attributes:
      library: its name, for messages.
      key: regular expression of a factor's key, path segments joined by "/", with groups `module` and `side`,
        and `weight` if the name of the adapted parameter is part of the key.
      place: the path of a new factor, segments split at "/": fields `module`, `side`.
      scale: where a user finds the scale.
      join: separator of a module's path in a flat tree; "" if trees are nested.
      transposed: whether factors have PEFT's layout, `[R, in]` and `[out, R]`.
      boxed: whether Orbax checkpoints of it have a level "value" below each parameter.
    """

    library: str
    key: re.Pattern[str]
    place: str
    scale: str
    join: str = ""
    transposed: bool = False
    boxed: bool = False


_APPLIED_PLAIN = "it adds x @ a @ b as it is, so give 1.0 unless the code around it multiplies"

DIALECTS = {
    "flax_nnx": Dialect(
        "flax nnx",
        re.compile(r"(?P<module>.+?)(?:/lora)?/lora_(?P<side>[ab])"),
        "{module}/lora/lora_{side}",
        _APPLIED_PLAIN,
        boxed=True,
    ),
    "qwix": Dialect(
        "qwix",
        re.compile(r"(?P<module>.+)/(?P<weight>[^/]+)_lora_(?P<side>[ab])"),
        "{module}/kernel_lora_{side}",
        "it is alpha / rank of the LoraRule",
    ),
    "gemma": Dialect(
        "gemma.peft",
        re.compile(r"(?P<module>.+)/lora/(?P<side>[ab])"),
        "{module}/lora/{side}",
        _APPLIED_PLAIN,
    ),
    "maxtext": Dialect(
        "MaxText",
        re.compile(r"(?P<module>.+)/(?:(?P<weight>[^/]+)_)?lora_(?P<side>[ab])(?:\.kernel)?"),
        "{module}/lora_{side}.kernel",
        "it is lora_alpha / r of the adapter's adapter_config.json, or alpha / rank of the LoraRule",
    ),
    "easydel": Dialect(
        "EasyDeL",
        re.compile(r"(?P<module>.+)[/.]lora_(?P<side>[ab])"),
        "{module}/lora_{side}",
        _APPLIED_PLAIN,
    ),
    "keras": Dialect(
        "Keras",
        re.compile(r"(?P<module>.+)/lora_(?P<weight>kernel|embeddings)_(?P<side>[ab])"),
        "{module}/lora_kernel_{side}",
        "it is the layer's lora_alpha / lora_rank",
        join="/",
    ),
    "levanter": Dialect(
        "levanter",
        re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight"),
        "base_model.model.{module}.lora_{side}.weight",
        "it is alpha / r of the LoraConfig",
        join=".",
        transposed=True,
    ),
}


def dialect(name: str) -> Dialect:
    """A dialect by name.

    Raises:
      HydraOptError: an unknown name; the known names are listed.
    """
    if name not in DIALECTS:
        raise HydraOptError(f"dialect {name!r}: must be one of {', '.join(DIALECTS)}")
    return DIALECTS[name]
