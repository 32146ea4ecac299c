"""Scores of one answer between 0 and 1, and bootstrap intervals of their means."""

import re
from collections.abc import Sequence

import numpy as np
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

_ROUGE = RougeScorer(["rougeL"])


def exact(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references, but for case, spaces and a final stop.

    >>> exact("the  Alps.", ["The Alps"]), exact("Alps", ["The Alps"])
    (1.0, 0.0)
    """
    return float(_plain(answer) in {_plain(reference) for reference in references})


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".").lower()


def chrf(answer: str, references: Sequence[str]) -> float:
    """Character n-gram F-score (chrF2 of sacrebleu, sentence level), the best of the references."""
    return sacrebleu.sentence_chrf(answer, list(references)).score / 100


def rouge(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 of rouge-score, the best of the references."""
    return max(_ROUGE.score(reference, answer)["rougeL"].fmeasure for reference in references)


METRICS = {"accuracy": exact, "exact": exact, "chrf": chrf, "rouge": rouge}


def resample(scores: np.ndarray, *, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Means `[draws, S]` of `scores` `[N, S]` over items drawn with replacement, the same for all columns."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(scores), size=(draws, len(scores)))
    return scores[chosen].mean(axis=1)


def interval(values: np.ndarray, level: float = 0.95) -> list[float]:
    """The central interval of `values` that holds `level` of them."""
    low = (1 - level) / 2
    return [round(float(v), 5) for v in np.quantile(values, [low, 1 - low])]
