"""Regions of the pages on large collections, see `experiments.figures`."""

from collections.abc import Callable
from typing import Any

from experiments.markdown import markdown, megabytes, read, wrapped

JOBS = {"slice": "4 modules of 2048 x 2048", "8b": "8B model, 32 layers x 7 modules"}


def asked(job: dict[str, Any]) -> str:
    """The options of a job of rank-16 adapters."""
    return "rank 16" if job["budget"] is None else f"`--budget {job['budget']:g}`"


def peak(job: dict[str, Any]) -> str:
    """Peak memory of the whole process in MB."""
    return megabytes(job["baseline_bytes"] + job["peak_beyond_baseline_bytes"])


def jobs() -> str:
    """Memory, time, size and error of jobs, input rising."""
    found = list(read("scale/results.json")["runs"])
    found.append(read("scale/large.json"))
    rows = []
    for x in found:
        rows.append(
            [
                f"{x['tasks']:,} adapters, {JOBS[x['model']]}",
                asked(x),
                megabytes(x["input_bytes"]),
                megabytes(x["largest_bucket_bytes"]),
                peak(x),
                f"{x['seconds']:.3g}",
                megabytes(x["store_bytes"]),
                f"{x['error']:.2g}" if x.get("error") is not None else "",
            ]
        )
    sizes = ["input MB", "largest bucket MB", "peak MB"]
    return markdown(["collection", "asked", *sizes, "seconds", "store MB", "error"], rows)


def roofline() -> str:
    """What shares of a matrix product's rate the steps reach."""
    found = read("scale/roofline.json")
    share = found["share of matmul"]
    both = [1000 * min(found["seconds"][x]) for x in ("gram", "projection")]
    return wrapped(
        [
            f"On the idle machine (`roofline.json`) the best Gram step reached {share['gram']:.2f} of the",
            f"rate of the best large matrix product, the best projection step {share['projection']:.2f};",
            f"they take {both[0]:.0f} and {both[1]:.0f} ms.",
        ]
    )


def verbs(**files: str) -> str:
    """Processor seconds and peak memory of every verb, a pair of columns for each file of `living`."""
    found = {label: read(f"scale/{name}.json") for label, name in files.items()}
    names = dict.fromkeys(verb for x in found.values() for verb in x["verbs"])
    rows = []
    for verb in names:
        row = [f"`{verb}`" if verb != "nothing" else "Python, JAX and one product"]
        for x in found.values():
            took = x["verbs"].get(verb)
            good = took is not None and not took.get("failed")
            row += (
                [f"{took['cpu_seconds']:.1f}", f"{took['peak_memory_bytes'] / 1e6:.0f}"] if good else ["", ""]
            )
        rows.append(row)
    heads = [f"{label}: {y}" for label in found for y in ("cpu s", "peak MB")]
    return markdown(["verb", *heads], rows)


def lorashare() -> str:
    """This package beside lorashare on large collections."""
    rows = []
    for name, said in (("8b-900", "one 8B layer"), ("0.5b-1024", "24 layers 896 wide")):
        found = read(f"scale/lorashare-{name}.json")
        size = megabytes(found["input_bytes"])
        what = f"{found['tasks']:,} of {said}, {found['modules']} modules, {size} MB"
        for tool, x in found["results"].items():
            rows.append(
                [
                    what,
                    tool,
                    f"{x['seconds']:.1f}",
                    f"{x['cpu_seconds']:.0f}",
                    megabytes(x["peak_memory_bytes"]),
                    megabytes(x["bytes_on_disk"]),
                    f"{x['error']:.3f}",
                ]
            )
    return markdown(["adapters", "tool", "s", "cpu s", "peak MB", "store MB", "error"], rows)


def times() -> str:
    """Lorashare's time and memory over this package's."""
    said = []
    for name, shape in (("8b-900", "8B"), ("0.5b-1024", "896-wide")):
        x = read(f"scale/lorashare-{name}.json")["lorashare_over_hydraopt"]
        said.append(
            f"On the {shape} shape lorashare takes {x['seconds']:.1f} times the seconds and "
            f"{x['peak_memory_bytes']:.1f} times the memory."
        )
    return wrapped(said)


REGIONS: dict[str, Callable[[], str]] = {
    "jobs on large collections": jobs,
    "shares of the roofline": roofline,
    "verbs on 999 adapters": lambda: verbs(**{"5d9d005": "living-5d9d005", "now": "living"}),
    "verbs on 299 adapters": lambda: verbs(f68485a="living-300-f68485a", now="living-300"),
    "verbs on 299 adapters at a budget": lambda: verbs(
        **{"5d9d005": "living-budget-5d9d005", "now": "living-budget"}
    ),
    "large collections by lorashare": lorashare,
    "lorashare over this package": times,
}
