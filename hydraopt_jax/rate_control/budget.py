"""The meaning of a budget: one rule for the command and for Python.

| given | means |
|---|---|
| text with a unit: `"3MB"`, `"1.5 KiB"` | bytes on disk |
| text without one, at most 10, or with `%`: `"0.125"`, `"12.5%"` | a fraction |
| a float, NumPy's too: `0.125`, `1.0` | a fraction |
| an integer of 1 to 10, NumPy's too | a fraction; no store has so few bytes |
| an integer above 10, NumPy's too: `9000` | bytes on disk |
| anything else, `True` among it | refused |

A fraction refers to the factors' bytes in half precision. A fraction of 1 or more stores the adapters bit for
bit in their original dtype. Float32 factors then take twice their half-precision bytes, and the store's
description is added.
"""

import numbers
from typing import Any

import numpy as np

from hydraopt_jax.byte_counts import count_of, number_and_unit
from hydraopt_jax.errors import HydraOptError

# a number up to this is a fraction
LARGEST_FRACTION = 10


def parse_budget(text: str) -> int | float:
    """Bytes as an integer or a fraction as a float, from text such as `0.125`, `12.5%` or `3MB`.

    >>> parse_budget("0.125"), parse_budget("12.5%"), parse_budget("3MB"), parse_budget("1.5 KiB")
    (0.125, 0.125, 3000000, 1536)
    """
    number, unit = number_and_unit(text)
    if unit == "" and number <= LARGEST_FRACTION:
        return number
    if unit == "%":
        return number / 100
    count = count_of(number, unit)
    if count is None:
        raise HydraOptError(
            f"budget {text!r}: give a fraction of the fp16 bytes (0.125, 12.5%) or bytes with a unit (3MB)"
        )
    if count <= LARGEST_FRACTION:
        raise HydraOptError(f"budget {text!r}: below the smallest store of any collection: give more bytes")
    return count


def read_budget(value: Any) -> int | float | None:
    """Bytes as an integer or a fraction as a float, from a number or text; None stays None.

    Raises:
      HydraOptError: the value is neither.

    >>> read_budget(1), read_budget(np.int64(5000)), read_budget("3MB"), read_budget(np.float32(0.5))
    (1.0, 5000, 3000000, 0.5)
    """
    if value is None:
        return None
    if isinstance(value, str):
        return parse_budget(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        count = int(value)
        return float(count) if 1 <= count <= LARGEST_FRACTION else count
    if isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_):
        return float(value)
    raise HydraOptError(
        f"budget = {value!r}: give a fraction of the fp16 bytes (0.125), bytes as an integer (3_000_000), or "
        "text ('3MB')"
    )


def keeps_all(value: object) -> bool:
    """Whether a budget, as `read_budget` returns it, means lossless storage.

    >>> keeps_all(1.0), keeps_all(0.99), keeps_all(5000)
    (True, False, False)
    """
    return isinstance(value, float) and value >= 1
