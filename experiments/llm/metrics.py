"""Scores of one answer between 0 and 1, and bootstrap intervals of their means."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

_ROUGE = RougeScorer(["rougeL"])
_TOKENS = Tokenizer13a()


def exact(answer: str, references: Sequence[str], source: str = "") -> float:
    """1 where the answer is one of the references, but for case, spaces and a final stop.

    >>> exact("the  Alps.", ["The Alps"]), exact("Alps", ["The Alps"])
    (1.0, 0.0)
    """
    return float(_plain(answer) in {_plain(reference) for reference in references})


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".").lower()


def chrf(answer: str, references: Sequence[str], source: str = "") -> float:
    """Character n-gram F-score (chrF2 of sacrebleu, sentence level), the best of the references."""
    return sacrebleu.sentence_chrf(answer, list(references)).score / 100


def rouge(answer: str, references: Sequence[str], source: str = "") -> float:
    """ROUGE-L F1 of rouge-score, the best of the references."""
    return max(_ROUGE.score(reference, answer)["rougeL"].fmeasure for reference in references)


def sari(answer: str, references: Sequence[str], source: str) -> float:
    """How well a simplification adds, keeps and deletes the n-grams that its references do; copying is poor.

    `(F1_add + F1_keep + P_deleted) / 3`, each the mean of n = 1 to 4; an n-gram that is kept or deleted
    counts as often as references agree. Tokens are sacrebleu's (13a), in lower case. Reference: Xu et al.,
    Optimizing statistical machine translation for text simplification, TACL 4, 2016.

    >>> references = ["About 95 species are currently known.", "About 95 species are now accepted."]
    >>> references.append("95 species are now accepted.")
    >>> round(sari("About 95 you now get in.", references, "About 95 species are currently accepted."), 6)
    0.269536
    """
    found = [_operations(answer, references, source, n) for n in range(1, 5)]
    return sum(map(sum, found)) / (3 * len(found))


def _operations(answer: str, references: Sequence[str], source: str, n: int) -> tuple[float, float, float]:
    """F1 of added, F1 of kept and precision of deleted n-grams."""
    given, written = (
        Counter({k: v * len(references) for k, v in _ngrams(x, n).items()}) for x in (source, answer)
    )
    wanted = sum((_ngrams(reference, n) for reference in references), Counter())
    added, right = set(written) - set(given), set(wanted) - set(given)
    add = _f1(_share(len(added & right), len(added)), _share(len(added & right), len(right)))
    kept, worth = given & written, given & wanted
    agreed = kept & wanted
    precision = _share(sum(agreed[k] / kept[k] for k in kept), len(kept))
    keep = _f1(precision, _share(agreed.total(), worth.total()))
    deleted = given - written
    rightly = deleted - wanted
    return add, keep, _share(sum(rightly[k] / deleted[k] for k in deleted), len(deleted))


def _ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = _TOKENS(text.lower()).split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _share(part: float, whole: float) -> float:
    """`part / whole`, 1 where there is nothing to find."""
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


METRICS = {"accuracy": exact, "exact": exact, "chrf": chrf, "rouge": rouge, "sari": sari}


def resample(scores: np.ndarray, *, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Means `[draws, S]` of `scores` `[N, S]` over items drawn with replacement, the same for all columns."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(scores), size=(draws, len(scores)))
    return scores[chosen].mean(axis=1)


def interval(values: np.ndarray, level: float = 0.95) -> list[float]:
    """The central interval of `values` that holds `level` of them."""
    low = (1 - level) / 2
    return [round(float(v), 5) for v in np.quantile(values, [low, 1 - low])]
