"""Scores: SARI against the values that its authors' code and a metric card state."""

import pytest

pytest.importorskip("sacrebleu", reason="needs the extra: pip install -e '.[llm]'")

from experiments.llm.metrics import METRICS, sari

SOURCE = "About 95 species are currently accepted ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]


def test_sari_has_the_published_value():
    # Hugging Face's metric card: 26.953601953601954
    assert sari("About 95 you now get in .", REFERENCES, SOURCE) == pytest.approx(0.26953601953601954)


def test_sari_has_the_published_value_for_one_reference():
    # Hugging Face's wiki_split card: 21.805555555555557
    assert sari("About 95 you now get in .", REFERENCES[:1], SOURCE) == pytest.approx(0.21805555555555557)


def test_sari_orders_a_reference_a_near_one_and_a_copy():
    scores = [
        sari(text, REFERENCES, SOURCE)
        for text in (REFERENCES[1], "About 95 species are now agreed .", SOURCE)
    ]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("name", METRICS)
def test_scores_of_an_only_reference_are_1(name):
    assert METRICS[name](
        "now we see a red house", ["now we see a red house"], "then we saw it"
    ) == pytest.approx(1)


@pytest.mark.parametrize("name", METRICS)
def test_an_empty_answer_has_a_score(name):
    assert 0 <= METRICS[name]("", ["a red house"], "a house that is red") < 1
