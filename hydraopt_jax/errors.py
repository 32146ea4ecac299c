"""The exception that callers catch for bad input, and its subclasses."""

import difflib
from collections.abc import Iterable
from typing import Any


class HydraOptError(ValueError):
    """Bad input or bad use. The message is one line: the file, tensor or option, and what to do."""


class TooLarge(HydraOptError):
    """A store would exceed its byte limit."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Advice on an unknown name: similar names, or all names if none is similar.

    >>> suggest("tie", ["linear", "ties", "dare"]), suggest("x", ["linear", "ties"])
    ("did you mean 'ties'?", 'must be one of linear, ties')
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, 3)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"must be one of {', '.join(names)}"


def damaged(path: Any, what: str) -> HydraOptError:
    """The error for a damaged store, at a path or None."""
    at = "" if path is None else f"{path}: "
    return HydraOptError(f"{at}damaged store: {what}: restore it from a copy or compress again")
