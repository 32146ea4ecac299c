"""Keys of a module's two factors in LoRA files of image models."""

import re

# field of a configuration: dialect of a LoRA file, "kohya" or "diffusers"
DIALECT = "lora_file"
# endings of a module's two factors; the first pair is kohya's
ENDINGS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
)
_KEY = re.compile("(.+?)(" + "|".join(re.escape(x) for pair in ENDINGS for x in pair) + ")")


def parse_key(key: str) -> tuple[str, str, int] | None:
    """Module, side ("A" or "B") and position in `ENDINGS` of a factor's key; None for other keys.

    >>> parse_key("lora_unet_mid_block_to_k.lora_up.weight"), parse_key("lora_unet_mid_block_to_k.alpha")
    (('lora_unet_mid_block_to_k', 'B', 0), None)
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    n = next(n for n, pair in enumerate(ENDINGS) if match[2] in pair)
    return match[1], "AB"[ENDINGS[n].index(match[2])], n
