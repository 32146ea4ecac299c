"""Strict JSON. Python's reader also accepts NaN, infinities and unpaired surrogates; this one does not."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

# an escaped surrogate; complete pairs match too and are accepted
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def loads(data: bytes | str) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
      ValueError: not JSON, or nested too deeply; the message says what is wrong.

    >>> loads('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    >>> loads('{"a": [1, NaN]}')
    Traceback (most recent call last):
    ValueError: NaN is not JSON: write a finite number
    """
    text = data if isinstance(data, str) else data.decode()
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # invalid UTF-8 was refused above
    if isinstance(data, str) or _SURROGATE.search(text):
        found = fault(value)
        if found:
            raise ValueError(found)
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON: write a finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond every float: write a finite number")
    return value


def fault(value: Any) -> str:
    """The first number or text in a value that JSON cannot represent, with its position; "" for none.

    >>> fault({"config": {"dropout": float("nan")}})
    'config.dropout is nan: no finite number'
    """
    return next(_faults(value, ""), "")


def _faults(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _faults(key, f"the key {key!a}" if not where else f"a key of {where}")
            yield from _faults(inner, f"{where}.{key!s}" if where else str(key))
    elif isinstance(value, list | tuple):
        for n, inner in enumerate(value):
            yield from _faults(inner, f"{where}[{n}]")
    elif isinstance(value, str):
        if not value.isascii() and value.encode(errors="replace").decode() != value:
            yield f"{where or 'it'} is {value[:60]!a}: half of a surrogate pair, which is no text"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where or 'it'} is {value}: no finite number"
