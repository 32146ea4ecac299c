"""Regions of the pages on the trade-off of six adapters, see `experiments.figures`."""

from collections.abc import Callable
from typing import Any

from experiments.markdown import error, markdown, read
from hydraopt_jax import report


def curve(label: str) -> list[dict[str, Any]]:
    """The points of one curve of the six GPT-2 adapters."""
    found = read("frontier/gpt2.json")
    return (found["curves"] | found["estimates"])[label]


def at(label: str) -> dict[str, str]:
    """Errors of a curve of budgets or of an estimate, by budget."""
    return {p["setting"].removeprefix("budget "): error(p["mean"]) for p in curve(label)}


def frontier() -> str:
    """Errors at each budget: this package with and without sharing, and both estimates."""
    labels = ("hydraopt_jax", "hydraopt_jax, nothing shared", *read("frontier/gpt2.json")["estimates"])
    columns = [at(x) for x in labels]
    rows = [[budget, *(x[budget] for x in columns)] for budget in columns[0]]
    heads = ["bytes", "this package", "nothing shared", *(x for x in labels[2:])]
    return markdown(heads, rows)


def against_plain() -> str:
    """Errors at each budget beside the best plain SVD and HydraOpt that are no larger."""
    mine, alone = at("hydraopt_jax"), at("hydraopt_jax, nothing shared")
    plain = [(bits, p) for bits in (16, 8, 4) for p in curve(f"separate SVD, {bits} bits")]
    rows = []
    for budget in list(mine)[1:]:
        # 1% of room: a plain row counts no container
        fits = [(p["mean"], bits, p) for bits, p in plain if p["fraction"] <= 1.01 * float(budget)]
        paper = [p for p in curve("HydraOpt, fp16") if p["fraction"] <= 1.01 * float(budget)]
        least = min(fits, key=lambda x: x[0], default=None)
        best = min(paper, key=lambda x: x["mean"], default=None)
        rows.append(
            [
                budget,
                mine[budget],
                alone[budget],
                f"{error(least[0])} ({least[1]} bits, {least[2]['setting']})" if least else "",
                f"{error(best['mean'])} ({best['setting']})" if best else "",
            ]
        )
    heads = ["bytes", "this package", "nothing shared", "best plain SVD at 16, 8 or 4 bits", "HydraOpt, fp16"]
    return markdown(heads, rows)


def rates() -> str:
    """Bjontegaard-delta rates against the other curves."""
    found = {
        name: f"{-value:.1f}% fewer bytes than {name}"
        for name, value in read("frontier/gpt2.json")["bjontegaard_delta_rate_percent"].items()
        if value is not None
    }
    return "At the same error (Bjontegaard-delta rate): " + "; ".join(found.values()) + ".\n"


def paper() -> str:
    """HydraOpt with all heads, and the rates against it and against SVDs at 4 bits."""
    last = curve("HydraOpt, fp16")[-1]
    rate = read("frontier/gpt2.json")["bjontegaard_delta_rate_percent"]
    most, bits = (f"{-rate[name]:.1f}%" for name in ("HydraOpt, fp16", "separate SVD, 4 bits"))
    return (
        f"HydraOpt with all six heads has {error(last['mean'])} at {last['fraction']:.3f}. At the same\n"
        f"error (Bjontegaard-delta rate) this package takes {most} fewer bytes than HydraOpt with\n"
        f"K = 1..6, {bits} fewer than SVDs at 4 bits.\n"
    )


def entropy() -> str:
    """Bytes of coders over the entropy of the same codes."""
    found = read("frontier/entropy.json")
    names = [x for x in next(iter(found.values())) if x != "entropy"]
    rows = [[budget, *(f"{100 * (x[n] - 1):.1f}%" for n in names)] for budget, x in found.items()]
    return markdown(["budget", *(f"{x}, bytes above the entropy" for x in names)], rows)


def ablation() -> str:
    """Bytes that the coder saves against one with one thing changed, per cent, and seconds of the search."""
    found = read("frontier/ablation.json")
    cells = [(name, budget, x) for name, budgets in found.items() for budget, x in budgets.items()]
    variants = [x for x in cells[0][2] if x != "error"]
    rows = []
    for variant in variants:
        saved = [f"{100 * x[variant]['saved']:.1f}" for _, _, x in cells]
        seconds = sorted(x[variant]["seconds"] for _, _, x in cells)
        rows.append([variant, *saved, f"{seconds[0]:.2f} to {seconds[-1]:.2f}"])
    heads = ["instead", *(f"{name}, {budget}" for name, budget, _ in cells), "processor seconds"]
    return markdown(heads, rows)


def decisions() -> str:
    """What the mode decision estimates over what is paid, and what oracles save, per cent."""
    return table_of("frontier/decisions.json", "figure")


def three() -> str:
    """Errors of three adapters with one initialization at each budget, and both estimates."""
    found = read("frontier/triple.json")
    curves = found["curves"] | found["estimates"]
    labels = ("hydraopt_jax", "hydraopt_jax, nothing shared", *found["estimates"])
    columns = [{p["setting"].removeprefix("budget "): p["mean"] for p in curves[x]} for x in labels]
    rows = [[budget, *(f"{x[budget]:.4g}" for x in columns)] for budget in columns[0]]
    return markdown(["bytes", "this package", "nothing shared", *labels[2:]], rows)


def ideas() -> str:
    """Bits that ideas could save, per cent."""
    return table_of("frontier/ideas.json", "idea")


def table_of(path: str, head: str) -> str:
    """A table of shares, per cent: a row per name, a column per collection and budget."""
    found = read(path)
    cells = [(name, budget, x) for name, budgets in found.items() for budget, x in budgets.items()]
    rows = [[each, *(f"{100 * x[each]:.1f}" for _, _, x in cells)] for each in cells[0][2]]
    return markdown([head, *(f"{name}, {budget}" for name, budget, _ in cells)], rows)


def symbols() -> str:
    """What richer statistics could save, per cent of the bytes."""
    return table_of("frontier/symbols.json", "share of the bytes")


def sentence() -> str:
    """What `hydraopt compress` ends with on the six adapters."""
    found = read("frontier/compress.json")
    before, after = found["bytes_before"], found["bytes_after"]
    return (
        f"```text\n{len(found['tasks'])} adapters, {report.format_bytes(before)} -> "
        f"{report.format_bytes(after)} ({report.times_smaller(before, after)}), error "
        f"{report.format_error(found['error']['mean'])}; estimate "
        f"{report.format_error(min(found['estimate'].values()))}\n```\n"
    )


REGIONS: dict[str, Callable[[], str]] = {
    "trade-off of six adapters": frontier,
    "trade-off against plain methods": against_plain,
    "rates of six adapters": rates,
    "HydraOpt on six adapters": paper,
    "coders and entropy": entropy,
    "what each part saves": ablation,
    "what ideas could save": ideas,
    "what richer statistics could save": symbols,
    "how good the mode decision is": decisions,
    "trade-off of three adapters": three,
    "what compress ends with": sentence,
}
