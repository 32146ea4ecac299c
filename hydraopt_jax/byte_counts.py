"""Numbers with a unit, such as "3MB", as text has them."""

import math
import re

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def number_and_unit(text: str) -> tuple[float, str]:
    """The number, and in capitals what follows it; NaN and "?" where there is none.

    >>> number_and_unit("1.5 KiB"), number_and_unit("12.5%"), number_and_unit("0.125"), number_and_unit("ten")
    ((1.5, 'KIB'), (12.5, '%'), (0.125, ''), (nan, '?'))
    """
    match = re.fullmatch(r"\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e-?[0-9]+)?)\s*([A-Za-z%]*)\s*", text)
    return (math.nan, "?") if match is None else (float(match[1]), match[2].upper())


def count_of(number: float, unit: str) -> int | None:
    """Bytes of a number with a unit; None where the unit is none of bytes, or the number not finite.

    >>> count_of(1.5, "KIB"), count_of(12.5, "%")
    (1536, None)
    """
    return int(number * UNITS[unit]) if unit in UNITS and math.isfinite(number) else None
