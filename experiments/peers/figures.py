"""Regions of the pages on other tools and methods, see `experiments.figures`."""

from collections.abc import Callable
from typing import Any

from experiments.markdown import markdown, megabytes, percent, read, wrapped

TIMES = ("seconds_first", "seconds_later", "cpu_seconds_first", "cpu_seconds_later")
# what `compress_vs_others` compares -> how the text names it
COMPARED = {
    "cpu_seconds_first": "processor seconds, first run",
    "cpu_seconds_later": "later runs",
    "peak_memory_bytes": "memory",
    "bytes_on_disk": "bytes",
    "error_mean": "error",
}
# one adapter for all tasks has the bytes of one; a store keeps something of each
STORES = ("k-merge", "share", "jd-diag", "jd-full")
OWN = ("HydraOpt", "separate SVD", "hydraopt_jax", "merged (mean delta)")


def others() -> str:
    """This package beside lorashare and vlora on one collection."""
    rows = []
    for x in read("peers/compress_vs_others.json")["results"]:
        rows.append(
            [
                x["tool"],
                *(f"{x[key]:.1f}" for key in TIMES),
                megabytes(x["peak_memory_bytes"]),
                megabytes(x["bytes_on_disk"]),
                f"{x['error_mean']:.2g}",
                f"{x['error_worst']:.2g}",
            ]
        )
    times = ["s, first run", "later", "cpu s, first run", "later"]
    heads = ["tool", *times, "peak memory MB", "on disk MB", "mean error", "worst error"]
    return markdown(heads, rows)


def over_first() -> str:
    """Figures of the other rows over those of the first row."""
    found = read("peers/compress_vs_others.json")["times_the_first"]
    rows = [[name, *(f"{x[key]:.2g}" for key in COMPARED)] for name, x in found.items()]
    return markdown(["over the first row", *COMPARED.values()], rows)


def merging() -> str:
    """Merging here and by PEFT's own functions: seconds and errors."""
    rows = []
    for name, x in read("peers/merge_vs_peft.json")["methods"].items():
        if "seconds" not in x:
            continue
        theirs = [""] * 5
        if "peft" in x:
            ratios = f"{x['speedup']:.2g}, {x['speedup_cpu']:.2g}"
            seconds = [f"{x[key]:.3g}" for key in ("peft_seconds", "peft_cpu_seconds")]
            theirs = [x["peft"], *seconds, f"{x['peft_error']:.4g}", ratios]
        mine = [f"{x[key]:.3g}" for key in ("seconds_first", "seconds", "cpu_seconds")]
        rows.append([name, *mine, f"{x['error']:.4g}", *theirs])
    heads = ["ours", "s, first", "s, second", "cpu s", "error"]
    return markdown([*heads, "PEFT's", "s", "cpu s", "error", "times faster: wall, cpu"], rows)


def merging_notes() -> str:
    """What the table of merging leaves out: compilation, memory, a second run under load."""
    idle, loaded = (read(f"peers/merge_vs_peft{x}.json") for x in ("", "_loaded"))
    again_ties = loaded["methods"]["ties"]["cpu_seconds"]
    linear, again = (x["methods"]["linear"] for x in (idle, loaded))
    peaks = {k: megabytes(v) for k, v in idle["peak_memory_bytes"].items()}
    factors = idle["methods"]["peft ties of factors"]
    return wrapped(
        [
            f"With its compilation inside, `linear` is {linear['speedup_first']:.0f} times as fast as",
            "PEFT's svd.",
            f"Peak memory of the whole process is {peaks['hydraopt_jax']} MB,",
            f"PEFT's {peaks['peft']} MB.",
            f"PEFT's `ties`, on factors, has an error of {factors['peft_error']:.3f}.",
            "A second run (`merge_vs_peft_loaded.json`), with ten to thirty processes waiting for the",
            "two cores:",
            f"`linear` is {again['speedup']:.0f} times as fast by the wall clock,",
            f"{again['speedup_cpu']:.0f} by processor seconds;",
            f"`ties` takes {again_ties:.1f} processor seconds.",
        ]
    )


def memory() -> str:
    """Peak memory of every merging method, highest first."""
    found = read("peers/merge_memory.json")["methods"]
    rows = [
        [
            name,
            megabytes(x["peak_bytes"]),
            f"{x['beyond_baseline_bytes'] / 1e6:.0f}",
            f"{x['cpu_seconds']:.1f}",
        ]
        for name, x in sorted(found.items(), key=lambda item: -item[1]["peak_bytes"])
    ]
    return markdown(["method", "peak MB", "beyond the baseline MB", "cpu s"], rows)


def baselines() -> dict[str, list[dict[str, Any]]]:
    """Points of every merging method on the six GPT-2 adapters."""
    found = read("peers/baselines_gpt2.json")["curves"]
    return {k: v for k, v in found.items() if not k.startswith(OWN)}


def single() -> str:
    """Methods that make one adapter for all tasks, rescaled; lowest error first."""
    found = {k: v[0] for k, v in baselines().items() if k not in STORES}
    rows = [
        [name, f"{x['fraction']:.3f}", f"{x['mean']:.3f}", f"{x['worst']:.3f}"]
        for name, x in sorted(found.items(), key=lambda item: item[1]["mean"])
    ]
    return markdown(["one adapter for all, rescaled", "bytes", "mean error", "worst"], rows)


def several() -> str:
    """Methods that keep something of every task."""
    rows = [
        [f"{name}, {x['setting']}", f"{x['fraction']:.3f}", f"{x['mean']:.2g}", f"{x['worst']:.2g}"]
        for name in STORES
        for x in baselines()[name]
    ]
    return markdown(["keeps something of every task", "bytes", "mean error", "worst"], rows)


def beside() -> str:
    """The mean's truncation, and this package's own points in the same run."""
    curves = read("peers/baselines_gpt2.json")["curves"]
    budgets = [x for x in curves["hydraopt_jax"] if x["setting"] in ("budget 0.125", "budget 0.25")]
    own = [f"{x['mean']:.2g} at {x['fraction']:.3f} of the bytes" for x in budgets]
    return wrapped([f"In the same run this package's own store has an error of {' and of '.join(own)}."])


def general() -> str:
    """What general compressors make of fp16 factors."""
    found = read("peers/general.json")
    names = list(next(iter(found.values())))
    rows = [[name, *(percent(1 - x[name]) for x in found.values())] for name in names]
    return markdown(["compressor", *(f"saved of {x}" for x in found)], rows)


def most_general() -> str:
    """The most that a general compressor saved, in a sentence."""
    found = read("peers/general.json")
    saved = {name: max(1 - x[name] for x in found.values()) for name in next(iter(found.values()))}
    plain, planes = (
        max(v for k, v in saved.items() if k.endswith("byte planes") == split) for split in (False, True)
    )
    return wrapped(
        [
            f"General compressors saved at most {percent(plain)} of the fp16 bytes of the factors,",
            f"and at most {percent(planes)} with the high bytes before the low ones",
            "(zlib, zstd, xz; `experiments/peers`).",
        ]
    )


REGIONS: dict[str, Callable[[], str]] = {
    "other tools": others,
    "other tools over the first row": over_first,
    "merging against PEFT": merging,
    "notes on merging against PEFT": merging_notes,
    "memory of merging": memory,
    "one adapter for six tasks": single,
    "merged stores of six tasks": several,
    "this package beside merging": beside,
    "general compressors": general,
    "the best general compressor": most_general,
}
