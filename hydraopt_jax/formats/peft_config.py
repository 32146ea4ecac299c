"""PEFT's adapter_config.json: its allowed fields, the scale that it implies, the base model that it names."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydraopt_jax import strict_json
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.errors import HydraOptError, one_line, system_error
from hydraopt_jax.formats import patterns

CONFIG_FILE = "adapter_config.json"
# what PEFT puts before the names of a model's modules
PREFIX = "base_model.model."

# PEFT's own defaults, for fields that old versions did not write.
_DEFAULT_RANK = 8
_DEFAULT_ALPHA = 8

# Scales beyond the range of float32 are refused.
LARGEST = 1e38

# Fields that restrict the adapted modules, in addition to target_modules.
_TARGETS = ("layers_to_transform", "layers_pattern", "exclude_modules")

# Fields with which an adapter is not base + scale * B @ A, with the reason.
_REFUSED_FIELDS = {
    "use_dora": "DoRA rescales the merged weight, which is no plain low-rank delta: retrain without it",
    "target_parameters": "it adapts stacked expert parameters, whose factors are laid out differently: "
    "retrain with target_modules only",
    "lora_bias": "it adds a bias to lora_B, which a low-rank delta cannot hold: retrain without it",
    "alora_invocation_tokens": "aLoRA switches the delta on part of the way through a prompt: use plain LoRA",
    "layer_replication": "it changes the base model's layers: use an adapter of an unchanged base",
    "kasa_config": "KaSA truncates the base weights and adds a diagonal: use plain LoRA",
    "use_qalora": "QALoRA pools the module's inputs: use plain LoRA",
    "use_bdlora": "BD-LoRA stores block-diagonal factors: use plain LoRA",
    "monteclora_config": "MonteCLoRA samples its factors on each pass: use plain LoRA",
    "arrow_config": "Arrow routes between several adapters: pass each of those adapters by itself",
}

# Fields named like a switch of a variant that do not change the forward pass.
_HARMLESS_FIELDS = frozenset(
    {
        "use_rslora",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "loftq_config",
        "megatron_config",
        "runtime_config",
        "velora_config",
    }
)

# Initializations of the factors that do not change the base weights.
_PLAIN_INITS = frozenset({"true", "false", "gaussian", "eva", "orthogonal", "mica"})

_PEFT_INIT_HINT = (
    "convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...), or, if the "
    "base you load already has the changed weights, set init_lora_weights to true"
)
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value != []


def _check_rank(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise HydraOptError(f"{where} is {value!r}: the rank must be a positive integer")


def _check_alpha(value: Any, where: str) -> None:
    # an integer beyond every float is not finite either, and cannot even be asked
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
    if not number:
        raise HydraOptError(f"{where} is {value!r}: it must be a finite number")


def _check_pattern(config: Mapping[str, Any], field: str, source: str) -> None:
    pattern = config.get(field)
    if pattern is None:
        return
    if not isinstance(pattern, dict):
        raise HydraOptError(f"{source}: {field} is {pattern!r}: it must map module names to numbers")
    check_value = _check_rank if field == "rank_pattern" else _check_alpha
    for key, value in pattern.items():
        check_value(value, f"{source}: {field}[{key!r}]")
    try:
        patterns.compile_keys(tuple(pattern))
    except HydraOptError as error:
        raise HydraOptError(f"{source}: {field} {error}") from None


def check_config(config: Any, source: str) -> None:
    """Check that a PEFT configuration, read from `source`, describes plain LoRA deltas.

    Raises:
      HydraOptError: not a JSON object, not LoRA, a malformed field, or a variant that is not
        `base + scale * B @ A`; the message says which one and what to do.
    """
    if not isinstance(config, dict):
        raise HydraOptError(
            f"{source}: is not a JSON object: pass a folder that PEFT's save_pretrained wrote"
        )
    kind = config.get("peft_type")
    if kind != "LORA":
        raise HydraOptError(f"{source}: peft_type is {kind!r}: only LORA adapters can be read")
    for field, reason in _REFUSED_FIELDS.items():
        if _is_set(config.get(field)):
            raise HydraOptError(f"{source}: {field} is set: {reason}")
    for field, value in config.items():
        # A variant newer than this table must not be read as plain LoRA without a word.
        variant = field.startswith("use_") or field.endswith("_config")
        if variant and field not in _HARMLESS_FIELDS and _is_set(value):
            raise HydraOptError(
                f"{source}: {field} is set: this LoRA variant is not known here: use plain LoRA"
            )
    init = str(config.get("init_lora_weights", True)).lower()
    if init not in _PLAIN_INITS:
        change = "changes" if init.startswith(_BASE_CHANGING_INITS) else "is not known here and may change"
        raise HydraOptError(
            f"{source}: init_lora_weights {init!r} {change} the base weights: {_PEFT_INIT_HINT}"
        )
    rslora = config.get("use_rslora")
    if rslora is not None and not isinstance(rslora, bool):
        raise HydraOptError(f"{source}: use_rslora is {rslora!r}: it must be true or false")
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise HydraOptError(f"{source}: base_model_name_or_path is {base!r}: it must be a string")
    _check_rank(config.get("r", _DEFAULT_RANK), f"{source}: r")
    _check_alpha(config.get("lora_alpha", _DEFAULT_ALPHA), f"{source}: lora_alpha")
    _check_pattern(config, "rank_pattern", source)
    _check_pattern(config, "alpha_pattern", source)


def read_config(path: Path) -> dict[str, Any]:
    """The checked fields of a folder's adapter_config.json, unchanged.

    Raises:
      HydraOptError: no file, not JSON; see `check_config`.
    """
    try:
        config = strict_json.loads(path.read_bytes())
    except FileNotFoundError:
        raise HydraOptError(
            f"{path}: no such file: pass a folder that PEFT's save_pretrained wrote"
        ) from None
    except OSError as error:
        raise system_error(path, "read", error) from None
    except ValueError as error:
        raise HydraOptError(f"{path}: is not JSON: {one_line(error)}") from None
    check_config(config, str(path))
    return config


def _by_pattern(config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    # PEFT takes the first key in file order that matches the end of the name on a dot's boundary.
    pattern = config.get(field) or {}
    found = patterns.first_match(tuple(pattern), module)
    return default if found is None else list(pattern.values())[found]


def module_rank(config: Mapping[str, Any], module: str) -> int:
    """The rank of a module in a configuration: rank_pattern's first matching key, else `r`."""
    return _by_pattern(config, "rank_pattern", module, config.get("r", _DEFAULT_RANK))


def module_scale(config: Mapping[str, Any], module: str) -> float:
    """Scale of a module's delta: alpha / r, or alpha / sqrt(r) with use_rslora; patterns are of full names.

    >>> module_scale({"r": 4, "lora_alpha": 8}, "layers.0.q")
    2.0
    >>> module_scale({"r": 4, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"q": 6}}, "layers.0.q")
    3.0
    """
    rank = module_rank(config, module)
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha", _DEFAULT_ALPHA))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _is_pattern(config: Mapping[str, Any]) -> bool:
    """Whether a configuration selects modules by regular expressions instead of names."""
    targets, layers = config.get("target_modules"), config.get("layers_pattern") or ()
    if isinstance(config.get("exclude_modules"), str):
        return True
    if isinstance(targets, str) and targets != "all-linear":
        return True
    return not all(str(x).isidentifier() for x in ([layers] if isinstance(layers, str) else layers))


def unit_scale_config(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """A configuration with which PEFT gives each module its own rank and scale 1.

    Args:
      config: the configuration to start from; its other fields are kept. May be empty.
      ranks: module name -> rank.

    Returns:
      The new configuration: `r` is the widest module's rank, alpha equals the rank everywhere, patterns name
      full modules only, and none where all have one rank.
    """
    # servers that ignore patterns make room for `r`: the widest module's rank; the scale is 1 either way
    widest = max(ranks.values())
    # "^" keeps PEFT's optional "anything." prefix empty: layers.1.q must not match model.layers.1.q.
    pattern = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != widest}
    defaults = {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "task_type": None,
    }
    result = {**defaults, **config}
    if _is_pattern(config):
        # what they match is known, and PEFT would match them by an engine that may take for ever
        result |= dict.fromkeys(_TARGETS) | {"target_modules": sorted(ranks)}
    # How the factors were first drawn says nothing about these, and could forbid their rank.
    unused = {field: None for field in ("eva_config", "corda_config", "lora_ga_config") if field in config}
    return (
        result
        | unused
        | {
            "peft_type": "LORA",
            "r": widest,
            "lora_alpha": widest,
            "use_rslora": False,
            "rank_pattern": pattern,
            "alpha_pattern": dict(pattern),
            "init_lora_weights": True,
        }
    )


def base_name(config: Mapping[str, Any]) -> str:
    """Name or path of the base model in a configuration; "" if it has none."""
    return config.get("base_model_name_or_path") or ""


def _base_key(name: str, suffixes: Sequence[str]) -> str:
    name = name.rstrip("/")
    # A hub id has at most one slash; two local paths may end alike and be different models.
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and "\\" not in name:
        name = name.split("/")[1]
    while True:
        suffix = max((x for x in suffixes if x and name.endswith(x) and name != x), key=len, default="")
        if not suffix:
            return name
        name = name.removesuffix(suffix)


def same_base(one: str, other: str, suffixes: Sequence[str] = ()) -> bool:
    """Whether two names denote one base model; organization and given suffixes may differ.

    >>> same_base("openai-community/gpt2", "gpt2"), same_base("gpt2", "gpt2-medium"), same_base("", "gpt2")
    (True, False, False)
    """
    return _base_key(one, suffixes) == _base_key(other, suffixes)


def check_base(source: str, own: str, served: str, advice: str = "use its own base model") -> None:
    """Raise if the names of the trained and the present base model differ."""
    if not same_base(own, served):
        named = repr(own) if own else "no base model"
        raise HydraOptError(f"{source}: names {named}, but the model is {served!r}: {advice}")


def check_same_base(
    adapters: Sequence[Adapter], *, any_base: bool = False, base_suffixes: Sequence[str] = ()
) -> None:
    """Check by name that adapters were trained on one base model.

    Names that differ only by an organization prefix (gpt2, openai-community/gpt2) are one base.

    Args:
      adapters: the collection.
      any_base: accept different names; shapes must still agree (`adapters.check`).
      base_suffixes: endings that mark a quantized mirror of a base, such as "-bnb-4bit".

    Raises:
      HydraOptError: two adapters name different bases, or one names none.
    """
    if any_base:
        return
    for adapter in adapters[1:]:
        names = base_name(adapters[0].config), base_name(adapter.config)
        if not same_base(*names, base_suffixes):
            first, second = (repr(x) if x else "no base model" for x in names)
            raise HydraOptError(
                f"{adapters[0].source or adapters[0].task} names {first} and "
                f"{adapter.source or adapter.task} names {second}: adapters of one store must adapt one base "
                "model; pass --any-base if they do"
            )
