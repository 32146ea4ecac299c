"""What the functions that write the pages' regions have in common: reading results, tables, numbers."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def read(path: str) -> Any:
    """The content of a JSON file in `experiments/`."""
    return json.loads((ROOT / "experiments" / path).read_text())


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(markdown(["a", "b"], [["1", "2"]]), end="")
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [heads, *rows]
    out = ["| " + " | ".join(x).rstrip() + " |" for x in lines]
    return "\n".join([out[0], "|---" * len(heads) + "|", *out[1:]]) + "\n"


def error(value: float) -> str:
    """An error with four decimals, or two significant digits below a thousandth.

    >>> error(0.00496786), error(0.0885929), error(0.000266525), error(8.46e-7), error(0.541368)
    ('0.0050', '0.0886', '0.00027', '8.5e-7', '0.5414')
    """
    return f"{value:.4f}" if value >= 0.001 else f"{value:.2g}".replace("e-0", "e-")


def megabytes(value: float) -> str:
    """Bytes as MB of 10^6: three significant digits, all digits from 100 on.

    >>> megabytes(1092144023), megabytes(83668992), megabytes(3269831)
    ('1,092', '83.7', '3.27')
    """
    return f"{value / 1e6:,.0f}" if value >= 1e8 else f"{value / 1e6:.3g}"


def percent(value: float, digits: int = 1) -> str:
    """A fraction in per cent.

    >>> percent(0.0125, 2), percent(-0.00001, 2)
    ('1.25%', '0.00%')
    """
    return f"{100 * value + 0:.{digits}f}%".replace("-0.00%", "0.00%")


def wrapped(words: Iterable[str], width: int = 120) -> str:
    """Sentences as lines of at most `width` characters.

    >>> wrapped(["One.", "Two."], width=6)
    'One.\\nTwo.\\n'
    """
    lines = [""]
    for word in " ".join(words).split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines) + "\n"
