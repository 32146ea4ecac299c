"""The exception that callers catch for bad input, its subclasses, and parts of their messages."""

import difflib
from collections.abc import Iterable
from typing import Any


class HydraOptError(ValueError):
    """Bad input or bad use. The message is one line: the file, tensor or option, and what to do."""


class TooLarge(HydraOptError):
    """A store would exceed its byte limit."""


class DamagedStore(HydraOptError):
    """A store does not match its checksums, or lacks a part."""


def suggest(name: object, known: Iterable[str]) -> str:
    """Advice on an unknown name: similar names, or all names if none is similar.

    >>> suggest("tie", ["linear", "ties", "dare"]), suggest("x", ["linear", "ties"])
    ("did you mean 'ties'?", 'must be one of linear, ties')
    """
    names = list(known)
    close = difflib.get_close_matches(str(name), names, 3)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"must be one of {', '.join(names)}"


def near(name: object, known: Iterable[str]) -> str:
    """Similar names, for a message; the first ones if none is similar."""
    names = list(known)
    return ", ".join(map(repr, difflib.get_close_matches(str(name), names, 3, 0.3) or names[:3])) or "none"


def one_line(error: object, limit: int | None = None) -> str:
    """The text of an error on one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]


def system_error(place: Any, done: str, error: Exception, advice: str = "") -> HydraOptError:
    """The error for a file that cannot be "read" or "written", with the system's reason."""
    what = one_line(getattr(error, "strerror", None) or error)
    return HydraOptError(f"{place}: cannot be {done}: {what}{advice}")


def exists(place: Any) -> HydraOptError:
    """The error for an output that is there and may not be replaced."""
    return HydraOptError(
        f"{place}: exists: choose another path, or replace what is there (--overwrite, overwrite=True)"
    )


def damaged(path: Any, what: str) -> DamagedStore:
    """The error for a damaged store, at a path or None."""
    at = "" if path is None else f"{path}: "
    return DamagedStore(f"{at}damaged store: {what}: restore it from a copy or compress again")
