"""Every number of the experiment, in one place."""

from __future__ import annotations

from typing import NamedTuple


class Pretraining(NamedTuple):
    """Stopped early on purpose: the base should do each task a little, as a language model can."""

    seed: int = 0
    steps: int = 1500
    batch: int = 64
    balance: float = 0.5  # a task is drawn in proportion to its size to this power
    peak: float = 2e-3  # learning rate: linear warm-up, constant, then a linear decay to zero
    warmup: int = 100
    decay: int = 300
    weight_decay: float = 0.01
    clip: float = 1.0
    chunk: int = 50  # steps in one compiled scan, between two lines of progress
    save: int = 500


class Adapting(NamedTuple):
    """LoRA on the six projections of each layer, all tasks in one compiled step."""

    seed: int = 1
    rank: int = 8
    alpha: float = 16.0
    steps: int = 650
    batch: int = 24
    peak: float = 1e-3
    warmup: int = 20
    chunk: int = 10
    save: int = 50


class Data(NamedTuple):
    """How items are made from the files."""

    seed: int = 0
    longest: int = 36  # tokens of prompt and answer together; longer items are dropped
    minimum: int = 5  # a token seen less often in training is unknown
    held_out: int = 1000  # dev and test words of the pronunciation data, each
    edits: int = 3  # misspellings of each training word
    sample: int = 48  # test items a task that ship with the package


class Refining(NamedTuple):
    """Output-level refinement of a store on unlabeled prompts."""

    budgets: tuple[float, ...] = (0.125, 0.0625, 0.03)  # that second moments are used at, and refinement
    steps: tuple[int, ...] = (600, 2700, 2700)  # at each of them
    rates: tuple[float, ...] = (0.02, 0.05, 0.05)  # likewise, in quantizer steps
    prompts: tuple[int, ...] = (1056, 4832, 4832)  # of the train split, a task, likewise
    check: int = 32  # of them that are not refined on, to see what is bought
    moments: int = 64  # of them that second moments are taken of
    batch: int = 8  # prompts a task and step
    save: int = 50
    seeds: tuple[int, ...] = (0, 1, 2)  # order of the prompts; others than the first at the first budget
