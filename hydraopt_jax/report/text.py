"""Numbers with units, shortened names, and empty tables for 80 columns."""

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.table import Table

# width of a name in a table, and in the narrowest terminal
NAME, LEAST = 32, 8


def format_bytes(count: float) -> str:
    """Text of a byte count in decimal units, three significant digits.

    >>> format_bytes(999), format_bytes(47_535_094), format_bytes(2e9)
    ('999 B', '47.5 MB', '2.00 GB')
    """
    units = ["B", "kB", "MB", "GB", "TB"]
    size = float(count)
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    digits = 0 if units[0] == "B" or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:.{digits}f} {units[0]}"


def format_share(value: float) -> str:
    """Text of a fraction in per cent, three significant digits.

    >>> format_share(0.12449), format_share(4.773), format_share(9.78e-7), format_share(0.0)
    ('12.4%', '477%', '0.0000978%', '0%')
    """
    percent = 100 * float(value)
    if percent == 0:
        return "0%"
    if abs(percent) < 1e-7:
        return f"{percent:.1e}%"
    digits = max(2 - int(np.floor(np.log10(abs(percent)))), 0)
    return f"{percent:.{digits}f}%"


def format_error(value: float) -> str:
    """Text of a relative squared error in per cent; empty if it is not known.

    >>> format_error(0.0), format_error(0.00123456), format_error(float("nan"))
    ('lossless', '0.123%', '')
    """
    return "" if not np.isfinite(value) else "lossless" if value == 0 else format_share(value)


def format_brief(value: float) -> str:
    """Text of a relative squared error in at most seven characters.

    >>> format_brief(0.0826), format_brief(1.518), format_brief(2.9e-4), format_brief(9.8e-7)
    ('8.3%', '152%', '0.029%', '<0.001%')
    """
    if value == 0:
        return "0%"
    if value < 1e-5:
        return "<0.001%"
    digits = max(1 - int(np.floor(np.log10(100 * value))), 0)
    return f"{100 * value:.{digits}f}%"


def format_rate(value: float | None) -> str:
    """Text of a Bjontegaard-delta rate: difference in bytes at the same error.

    >>> format_rate(-91.94), format_rate(3.0), format_rate(None)
    ('-91.9%', '+3.0%', 'no error in common')
    """
    return "no error in common" if value is None else f"{value:+.1f}%"


def times_smaller(before: float, after: float) -> str:
    """Text of the ratio of two sizes.

    >>> times_smaller(19.5e6, 1.24e6), times_smaller(1e3, 2e3)
    ('15.7x smaller', '2.0x larger')
    """
    low, high = sorted((max(before, 1.0), max(after, 1.0)))
    ratio = high / low
    number = f"{ratio:.0f}" if ratio >= 99.5 else f"{ratio:.1f}"
    return f"{number}x {'larger' if after > before else 'smaller'}"


def shorten(text: str, limit: int = NAME) -> str:
    """A name in at most `limit` characters; longer names lose their middle.

    >>> shorten("model.layers.11.self_attn.q_proj", 20), shorten("legal")
    ('model.la…attn.q_proj', 'legal')
    """
    if len(text) <= limit:
        return text
    tail = limit // 2 + limit // 11
    return f"{text[: limit - 1 - tail]}…{text[-tail:]}"


def shorten_path(text: str, limit: int = NAME) -> str:
    """A path in at most `limit` characters; longer paths keep their end.

    >>> shorten_path("/home/me/adapters/legal", 16), shorten_path("adapters/legal")
    ('…adapters/legal', 'adapters/legal')
    """
    if len(text) <= limit:
        return text
    tail = text[-(limit - 1) :]
    return f"…{tail[tail.find('/') + 1 :] if '/' in tail else tail}"


def columns(*headings: str, title: str = "") -> Table:
    """An empty table with headings; `>` before a heading aligns its column to the right, as numbers are.

    In a narrow terminal the other columns shrink first.

    >>> columns("task", ">bytes").columns[1].justify
    'right'
    """
    table = Table(box=SIMPLE_HEAD, title=title or None, show_edge=False, pad_edge=False)
    for heading in headings:
        right = heading.startswith(">")
        table.add_column(heading.removeprefix(">"), justify="right" if right else "left", no_wrap=right)
    return table


def least_width(table: Table) -> int:
    """Characters that a table of `columns` takes at least: numbers stay whole, names shrink to `LEAST`.

    >>> least_width(columns("a name of 20 letters", ">bytes"))
    16
    """
    widest = [max(cell_len(str(cell)) for cell in (x.header, *x.cells)) for x in table.columns]
    kept = [n if x.no_wrap else min(n, LEAST) for n, x in zip(widest, table.columns, strict=True)]
    return sum(kept) + 3 * (len(kept) - 1)


def off_diagonal(matrix: np.ndarray) -> float:
    """Mean of the off-diagonal entries of a `[T, T]` matrix; its only entry if T = 1.

    >>> off_diagonal(np.array([[1.0, 0.2], [0.4, 1.0]]))
    0.3
    """
    tasks = len(matrix)
    other = ~np.eye(tasks, dtype=bool)
    return float(round(float(matrix[other].mean() if tasks > 1 else matrix[0, 0]), 7))
