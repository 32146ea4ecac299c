"""Regions of the pages on accelerators, see `experiments.figures`."""

from collections.abc import Callable

from experiments.markdown import markdown, read


def seconds(value: float) -> str:
    """Seconds, or milliseconds below a tenth.

    >>> seconds(63.667), seconds(0.0004)
    ('63.7 s', '0.4 ms')
    """
    return f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.3g} ms"


def table() -> str:
    """Warm and cold calls on the accelerator and on its machine's processor, and their ratios."""
    rows = []
    for part in read("accelerator/results.json").values():
        for x in part["rows"]:
            row = [x["what"]]
            for when in ("warm", "cold"):
                row += [seconds(x["seconds"][m][when]) for m in ("accelerator", "processor")]
                row.append(f"{x['times faster'][when]:.3g}")
            rows.append(row)
    heads = ["what", "warm: accelerator", "processor", "times faster", "cold: accelerator", "processor"]
    return markdown([*heads, "times faster"], rows)


def machine() -> str:
    """The machine of the table."""
    found = read("accelerator/results.json")["batches"]["machine"]
    device, cores = found["device"], found["cores"]
    return f"One {device} beside {cores} cores of its machine, JAX {found['jax']}, float32.\n"


REGIONS: dict[str, Callable[[], str]] = {"an accelerator": table, "machine of the accelerator": machine}
