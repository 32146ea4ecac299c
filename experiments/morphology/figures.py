"""Regions of the pages on the forty adapters of morphology, see `experiments.figures`."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.markdown import markdown, percent, read, wrapped
from experiments.morphology.summary import drops
from hydraopt_jax.demo.tasks import LANGUAGES, TASKS

REGIMES = ("shared", "independent")
REFINED = "budget 0.125, output gradients, refined"
Row = dict[str, Any]


@functools.cache
def stored(regime: str) -> dict[str, Row]:
    """Stored rows of a regime by name: bytes, scores and drops on test items."""
    return drops(read(f"morphology/results/stores-{regime}.json"), "test")


def by_task(values: Row, key: str) -> np.ndarray:
    """Means over languages of a score that was measured for every task: `[5]`."""
    table = [[values[f"{task}-{language}"][key] for language in LANGUAGES] for task in TASKS]
    return np.array(table).mean(1)


def scores() -> str:
    """Exact match on test items without adapters and with those of both regimes."""
    found = {x: read(f"morphology/results/adapters-{x}.json") for x in REGIMES}
    named = {
        "zero-shot": found["shared"]["test_zero_shot"],
        "shared initialization": found["shared"]["test_adapter"],
        "independent initializations": found["independent"]["test_adapter"],
    }
    rows = []
    for name, values in named.items():
        exact = by_task(values, "exact")
        cells = [*exact, exact.mean(), by_task(values, "cer").mean()]
        rows.append([name, *(f"{x:.3f}" for x in cells)])
    return markdown(["", *TASKS, "mean of 40", "mean CER"], rows)


def lowest() -> str:
    """The task that is lowest with its adapter, and whether any fell below its zero-shot score."""
    found = {x: read(f"morphology/results/adapters-{x}.json") for x in REGIMES}
    below = 0
    for values in found.values():
        for split in ("dev", "test"):
            before, after = values[f"{split}_zero_shot"], values[f"{split}_adapter"]
            below += sum(after[x]["exact"] <= before[x]["exact"] for x in after)
    test = found["shared"]["test_adapter"]
    name = min(test, key=lambda x: test[x]["exact"])
    spread = [
        " and ".join(f"{found[x][f'{split}_adapter'][name]['exact']:.3f}" for x in REGIMES)
        for split in ("test", "dev")
    ]
    above = "Every task is" if not below else f"All but {below} scores are"
    return wrapped(
        [
            f"{above} above its zero-shot score on dev and test items in both regimes.",
            f"The lowest is `{name}`: {spread[0]} on test items, {spread[1]} on dev items",
            "(shared, independent).",
        ]
    )


def stores() -> str:
    """Stored rows of both regimes, bytes falling; seeds beyond the first are left out."""
    rows = []
    for regime in REGIMES:
        found = [(name, x) for name, x in stored(regime).items() if ", seed " not in name]
        for name, x in sorted(found, key=lambda row: -row[1]["fraction"]):
            moved = ["", ""]
            if name != "own adapters":
                moved = [percent(x["drop"], 2), f"{percent(x['worst'])} ({x['task']})"]
            rows.append([regime, name, f"{x['fraction']:.4f}", f"{x['score']:.3f}", *moved])
    return markdown(["regime", "stored", "bytes", "exact match", "mean drop", "worst task's drop"], rows)


def seeds() -> str:
    """The drops of refined stores, one sentence per regime, over orders of the prompts."""
    said = []
    for regime in REGIMES:
        same = [x for name, x in stored(regime).items() if name.startswith(REFINED)]
        if len(same) < 2:
            continue
        mean, worst = (sorted(100 * x[key] for x in same) for key in ("drop", "worst"))
        of_mean = 100 * (1 - np.mean([x["ratio"] for x in same], 0).min())
        said.append(
            f"{len(same)} orders of the prompts (seeds), {regime} regime, budget 0.125: "
            f"mean drops of {mean[0]:.2f} to {mean[-1]:.2f}%, worst tasks' drops of {worst[0]:.1f} to "
            f"{worst[-1]:.1f}%, worst task of the seeds' mean {of_mean:.1f}%."
        )
    return wrapped(said or ["Each refined row is of one order of the prompts (seed)."])


def on_both(regime: str, name: str) -> list[str]:
    """Mean drops of a row on dev and on test items."""
    result = read(f"morphology/results/stores-{regime}.json")
    return [percent(drops(result, split)[name]["drop"], 2) for split in ("dev", "test")]


def divergences() -> str:
    """What refinement did to the divergence of the logits on held-out prompts, and to the scores."""
    rows = []
    for regime in REGIMES:
        found = read(f"morphology/results/stores-{regime}.json")["rows"]
        for name, x in found.items():
            run = x.get("refinement")
            if run and ", seed " not in name:
                minutes = f"{x['seconds'] / 60:.0f}"
                said = [f"{run['before']:.2g}", f"{run['after']:.2g}", minutes]
                rows.append([regime, name, *said, *on_both(regime, name)])
    heads = ["regime", "stored", "divergence before", "after", "minutes", "mean drop on dev", "on test"]
    return markdown(heads, rows)


def mixture() -> str:
    """Divergence and error of weights by share of the moments in the metric, at each budget."""
    rows = read("morphology/results/mixture.json")["rows"]
    each = []
    for x in rows:
        measured = [f"{x[key]:.2g}" for key in ("divergence", "error")]
        each.append([f"{x['budget']:g}", f"{x['share_of_moments']:g}", *measured])
    return markdown(["budget", "share of the moments", "divergence", "error of the weights"], each)


def shaping() -> str:
    """Stores calibrated with output gradients, without and with noise shaping."""
    every = read("morphology/results/shaping.json")["rows"]
    plain = {x["budget"]: x for x in every if not x["shaped"]}
    rows = []
    for x in every:
        if x["shaped"]:
            pair = plain[x["budget"]], x
            cells = [" / ".join(f"{y[key]:.2g}" for y in pair) for key in ("output_error", "divergence")]
            less = percent(1 - x["bytes"] / x["bytes_without"])
            rows.append([f"{x['share']:.4f}", *cells, less, f"{pair[1]['seconds'] / pair[0]['seconds']:.1f}"])
    heads = ["bytes", "error of outputs", "divergence", "fewer bytes at the error", "times the seconds"]
    return markdown(heads, rows)


REGIONS: dict[str, Callable[[], str]] = {
    "scores of the forty adapters": scores,
    "lowest of the forty adapters": lowest,
    "stores of the forty adapters": stores,
    "seeds of the forty adapters": seeds,
    "refinement of the forty adapters": divergences,
    "noise shaping of the forty adapters": shaping,
    "mixtures of both metrics": mixture,
}
