"""Regions of the pages on what a store survives, see `experiments.figures`."""

from collections.abc import Callable

from experiments.markdown import markdown, read


def survived() -> str:
    """What was done to stores, how often, and what was lost or not found."""
    found = read("reliability/run.json")
    kills = {k: x for k, x in found.items() if k.startswith("kill ")}
    damage = [x for k, x in found.items() if k.startswith("damage ")]
    names = ", ".join(f"`{x.removeprefix('kill ')}`" for x in sorted(kills))
    rows = []
    for kind, text in (
        ("random instants", f"SIGKILL at a random instant of {names}"),
        ("renames", "SIGKILL before and after each of their renames"),
        ("removals", "SIGKILL before every third removal of a file"),
    ):
        tried = sum(x["tried"].get(kind, 0) for x in kills.values())
        rows.append([text, tried, sum(y.startswith(kind) for x in kills.values() for y in x["lost"])])
    lost = sum(len(x["lost"]) for x in damage)
    stores = ", ".join(k.removeprefix("damage ") for k in found if k.startswith("damage "))
    for kind, text in (
        ("bits", f"a bit flipped in each byte of stores ({stores})"),
        ("files cut short or removed", "files of them cut short or removed"),
    ):
        tried = [x["tried"][kind] for x in damage if kind in x["tried"]]
        count = sum(x["tried"] for x in tried)
        missed = count - sum(x.get("verify: named", 0) for x in tried)
        rows.append([f"{text}, named by `verify`", count, missed])
    both = rows[-1][1] + rows[-2][1]
    rows.append(["the same damage, opened and decoded: read with other numbers, or a crash", both, lost])
    for kind, text in (
        (
            "mutations",
            "mutated configurations, headers, manifests, leaves, portable stores, options",
        ),
        ("fuzz", "inputs of the coverage-guided fuzzer (atheris, a minute)"),
    ):
        if kind in found:
            rows.append([text, sum((found[kind]["tried"] or {}).values()), len(found[kind]["lost"])])
    if "races" in found:
        x = found["races"]["tried"]
        text = (
            f"reads of a folder, then of a file, that two processes replace ({x['writes']} times; "
            f"{x['writers told to wait']} times one was told to wait; {x['readers told to open it again']} "
            "reads were told to open it again)"
        )
        rows.append([text, x["reads"], len(found["races"]["lost"])])
    cells = [[a, f"{b:,}" if isinstance(b, int) else b, str(c)] for a, b, c in rows]
    return markdown(["tried", "times", "lost or not found"], cells)


def stream() -> str:
    """Errors of a stream of adds against a fit of all at once and K-Merge."""
    rows = []
    for x in read("reliability/stream.json")["rows"]:
        merged = x["k-merge"]
        more = merged["bytes"] / x["bytes"]
        errors = [f"{x[key]:.5f}" for key in ("stream", "at once", "estimate")]
        slots = f"{merged['error']:.3f} ({merged['setting']}, {more:.1f} times the bytes)"
        due = "yes" if x["due"] else "no"
        rows.append([str(x["order"]), f"{x['fraction']:.3f}", *errors, due, slots])
    heads = ["order", "bytes / fp16", "stream", "at once", "estimate", "refit due", "K-Merge"]
    return markdown(heads, rows)


REGIONS: dict[str, Callable[[], str]] = {
    "what stores survive": survived,
    "a stream of adds": stream,
}
