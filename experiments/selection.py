"""Which rows of an experiment a command makes: `--only` takes their names, or patterns of them."""

import argparse
import fnmatch
from collections.abc import Mapping, Sequence
from typing import TypeVar

Maker = TypeVar("Maker")


def add_only(parser: argparse.ArgumentParser) -> None:
    """Give a command the option `--only`; without it, it makes all rows."""
    parser.add_argument(
        "--only", nargs="*", default=["*"], help="names of rows, or patterns such as 'budget*'"
    )


def selected(rows: Mapping[str, Maker], only: Sequence[str]) -> dict[str, Maker]:
    """The rows, name -> maker, that are named or match a pattern (`fnmatch`), in their order.

    Raises:
      SystemExit: a pattern that no row matches.

    >>> selected({"budget 0.5": 1, "budget 0.5, refined": 2, "merged": 3}, ["merged", "budget ?.?"])
    {'budget 0.5': 1, 'merged': 3}
    """
    for pattern in only:
        if not fnmatch.filter(rows, pattern):
            raise SystemExit(f"--only: no row is called {pattern!r}; the rows are: {'; '.join(rows)}")
    return {
        name: make
        for name, make in rows.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in only)
    }
