"""Positions of a model family's layers in each library: one table per family and library.

A row maps a module of the Hugging Face model to a parameter of a library's model. The axes of its two sides
are those of the library: `H` is the size of a head, `N` the number of heads, `I` and `O` a whole side. Rows
with one path share a parameter, each with its own slot of a first output axis (keys and values, gate and up).

Sources: the weight maps of google-tunix 0.1.7 and MaxText 0.2.5 (`param_mapping`), and the parameters of
models made by google-tunix 0.1.7 with qwix 0.1.8, MaxText 0.2.5 and gemma 3.3.0.
"""

from typing import NamedTuple

# of a layer: the module's name, or those of modules that share its kernel, side by side along its outputs
Name = str | tuple[str, ...]


class ModuleRow(NamedTuple):
    """One module.

    Attributes:
      module: its name below a layer in Hugging Face's model.
      path: the library's parameter below a layer, segments split at "/".
      inputs, outputs: axes of the two sides.
      slot, slots: position along, and length of, an axis that several modules share; 0 slots for none.
      interleaved: whether the library interleaves rotary pairs, `x0 y0 x1 y1`; Hugging Face has halves,
        `x0 x1 y0 y1`.
      scaled: whether the library's weight contains the factor `head_dim ** -0.5`.
    """

    module: str
    path: str
    inputs: str = "I"
    outputs: str = "O"
    slot: int = 0
    slots: int = 0
    interleaved: bool = False
    scaled: bool = False


class Table(NamedTuple):
    """One family in one library.

    Attributes:
      rows: a row per module.
      layer: path of layer `n`; fields `n`, `block` = n // period, `slot` = n % period.
      fused: rows that replace those of the same modules if queries, keys and values have one shape.
      scanned: path of a stack of layers, with blocks along axis 1; "" if the library has none.
      period: layers per block.
      kinds: slot -> value of `{kind}` in a row's path.
      remainder: path of the layers after the last complete block, which are not stacked.
    """

    rows: tuple[ModuleRow, ...]
    layer: str
    fused: tuple[ModuleRow, ...] = ()
    scanned: str = ""
    period: int = 1
    kinds: tuple[str, ...] = ("",)
    remainder: str = ""


class Library(NamedTuple):
    """The layout of a library's parameters and checkpoints.

    Attributes:
      dialect: a key of `dialects.DIALECTS`.
      factor: path of a factor, with fields `path` and `side`.
      item: name of the parameters in an Orbax checkpoint.
      numbered: whether a checkpoint is a folder inside the run's folder, named by its step.
      boxed: whether a checkpoint has a level "value" below each factor.
    """

    dialect: str
    factor: str
    item: str
    numbered: bool = True
    boxed: bool = True


LIBRARIES = {
    "tunix": Library("qwix", "{path}_lora_{side}", "model_params"),
    "maxtext": Library("maxtext", "{path}_lora_{side}", "items"),
    "gemma": Library("gemma", "{path}/lora/{side}", "default", numbered=False, boxed=False),
}

_GATED = (
    ModuleRow("mlp.gate_proj", "mlp/gate_proj/kernel"),
    ModuleRow("mlp.up_proj", "mlp/up_proj/kernel"),
    ModuleRow("mlp.down_proj", "mlp/down_proj/kernel"),
)
_TUNIX = (
    ModuleRow("self_attn.q_proj", "attn/q_proj/w", outputs="N H"),
    ModuleRow("self_attn.k_proj", "attn/k_proj/w", outputs="N H"),
    ModuleRow("self_attn.v_proj", "attn/v_proj/w", outputs="N H"),
    ModuleRow("self_attn.o_proj", "attn/o_proj/w", inputs="N H"),
    *_GATED,
)
_TUNIX_GEMMA = (
    ModuleRow("self_attn.q_proj", "attn/q_einsum/w", outputs="N H"),
    ModuleRow("self_attn.k_proj", "attn/kv_einsum/w", outputs="N H", slot=0, slots=2),
    ModuleRow("self_attn.v_proj", "attn/kv_einsum/w", outputs="N H", slot=1, slots=2),
    ModuleRow("self_attn.o_proj", "attn/attn_vec_einsum/w", inputs="N H"),
    *_GATED,
)
_TUNIX_GEMMA_FUSED = (
    ModuleRow("self_attn.q_proj", "attn/qkv_einsum/w", outputs="N H", slot=0, slots=3),
    ModuleRow("self_attn.k_proj", "attn/qkv_einsum/w", outputs="N H", slot=1, slots=3),
    ModuleRow("self_attn.v_proj", "attn/qkv_einsum/w", outputs="N H", slot=2, slots=3),
)
# flax names the layers that `gm.nn.LoRA` puts around others
_GEMMA = (
    ModuleRow("self_attn.q_proj", "attn/q_einsum/_LoRAEinsum_0", outputs="N H"),
    ModuleRow("self_attn.k_proj", "attn/kv_einsum/_LoRAEinsum_0", outputs="N H", slot=0, slots=2),
    ModuleRow("self_attn.v_proj", "attn/kv_einsum/_LoRAEinsum_0", outputs="N H", slot=1, slots=2),
    ModuleRow("self_attn.o_proj", "attn/attn_vec_einsum/_LoRAEinsum_0", inputs="N H"),
    ModuleRow("mlp.gate_proj", "mlp/_LoRAEinsum_gating_einsum", slot=0, slots=2),
    ModuleRow("mlp.up_proj", "mlp/_LoRAEinsum_gating_einsum", slot=1, slots=2),
    ModuleRow("mlp.down_proj", "mlp/_LoRAEinsum_linear"),
)
_GEMMA_FUSED = (
    ModuleRow("self_attn.q_proj", "attn/qkv_einsum/_LoRAEinsum_0", outputs="N H", slot=0, slots=3),
    ModuleRow("self_attn.k_proj", "attn/qkv_einsum/_LoRAEinsum_0", outputs="N H", slot=1, slots=3),
    ModuleRow("self_attn.v_proj", "attn/qkv_einsum/_LoRAEinsum_0", outputs="N H", slot=2, slots=3),
)
# qwix has no axes for the heads of MaxText's dense layers
_MAXTEXT = (
    ModuleRow("self_attn.q_proj", "self_attention{kind}/query/kernel"),
    ModuleRow("self_attn.k_proj", "self_attention{kind}/key/kernel"),
    ModuleRow("self_attn.v_proj", "self_attention{kind}/value/kernel"),
    ModuleRow("self_attn.o_proj", "self_attention{kind}/out/kernel"),
    ModuleRow("mlp.gate_proj", "mlp{kind}/wi_0/kernel"),
    ModuleRow("mlp.up_proj", "mlp{kind}/wi_1/kernel"),
    ModuleRow("mlp.down_proj", "mlp{kind}/wo/kernel"),
)
_QUERY, _KEY, *_OTHERS = _MAXTEXT
_MAXTEXT_LLAMA = (
    _QUERY._replace(interleaved=True, scaled=True),
    _KEY._replace(interleaved=True),
    *_OTHERS,
)
# experts have no LoRA: qwix adapts no kernel that is stacked over them
_MAXTEXT_MIXTRAL = (_QUERY._replace(scaled=True), _KEY, *(x for x in _OTHERS if "mlp" not in x.path))
_MAXTEXT_GEMMA2 = (_QUERY._replace(scaled=True), _KEY, *_OTHERS)

_OF_TUNIX = Table(_TUNIX, "layers/{n}")
_OF_GEMMA = {
    "tunix": Table(_TUNIX_GEMMA, "layers/{n}", fused=_TUNIX_GEMMA_FUSED),
    "gemma": Table(_GEMMA, "layer_{n}", fused=_GEMMA_FUSED),
}

FAMILIES: dict[str, dict[str, Table]] = {
    "llama": {
        "tunix": _OF_TUNIX,
        "maxtext": Table(_MAXTEXT_LLAMA, "decoder/layers_{n}", scanned="decoder/layers"),
    },
    "qwen": {
        "tunix": _OF_TUNIX,
        "maxtext": Table(_MAXTEXT, "decoder/layers_{n}", scanned="decoder/layers"),
    },
    "mixtral": {
        "maxtext": Table(_MAXTEXT_MIXTRAL, "decoder/layers_{n}", scanned="decoder/layers"),
    },
    "gemma": _OF_GEMMA,
    "gemma2": {
        **_OF_GEMMA,
        "maxtext": Table(
            _MAXTEXT_GEMMA2,
            "decoder/layers_{block}",
            scanned="decoder/layers",
            period=2,
            kinds=("_local", "_global"),
        ),
    },
    "gemma3": {
        **_OF_GEMMA,
        "maxtext": Table(
            _MAXTEXT,
            "decoder/layers_{n}",
            scanned="decoder/layers/layers_{slot}",
            period=6,
            remainder="decoder/layers_remainder/layers_{slot}",
        ),
    },
}
