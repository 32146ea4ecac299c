"""The exception that a caller needs to catch for bad input, and its kinds."""

from typing import Any


class HydraOptError(ValueError):
    """Bad input or bad use: one line that names the file, tensor or option and the way out."""


class TooLarge(HydraOptError):
    """A store that would exceed the bytes it may take."""


def damaged(path: Any, what: str) -> HydraOptError:
    """The error for a store, at a path or None, that is not what was written."""
    at = "" if path is None else f"{path}: "
    return HydraOptError(f"{at}damaged store: {what}: restore it from a copy or compress again")
