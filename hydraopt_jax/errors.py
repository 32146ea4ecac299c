"""The exception that a caller needs to catch for bad input, and its kinds."""

import difflib
from collections.abc import Iterable
from typing import Any


class HydraOptError(ValueError):
    """Bad input or bad use: one line that names the file, tensor or option and the way out."""


class TooLarge(HydraOptError):
    """A store that would exceed the bytes it may take."""


def suggest(name: str, known: Iterable[str]) -> str:
    """What to write in place of a name that is not known: near names, or all where none is near.

    >>> suggest("tie", ["linear", "ties", "dare"]), suggest("x", ["linear", "ties"])
    ("did you mean 'ties'?", 'must be one of linear, ties')
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, 3)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"must be one of {', '.join(names)}"


def damaged(path: Any, what: str) -> HydraOptError:
    """The error for a store, at a path or None, that is not what was written."""
    at = "" if path is None else f"{path}: "
    return HydraOptError(f"{at}damaged store: {what}: restore it from a copy or compress again")
