"""Sixteen tasks: splits share nothing, sequences are short enough, labels are theirs."""

import random
from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="needs the extra: pip install -e '.[llm]'")

from experiments.llm import readers
from experiments.llm.readers import Item
from experiments.llm.tasks import TASKS, key, load_items, separate

DATA = Path(__file__).parents[3] / "shared" / "llm-data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no task files at {DATA}")


def test_separate_drops_from_later_sides_what_an_earlier_one_has():
    splits = {
        "test": [Item("One.", ("x",), "")],
        "dev": [Item("one", ("y",), ""), Item("two", ("z",), "")],
        "train": [Item("three", ("Z!",), ""), Item("four", ("w",), "")],
    }
    kept = separate(splits, labeled=False)
    assert [[item.source for item in kept[s]] for s in ("test", "dev", "train")] == [
        ["One."],
        ["two"],
        ["four"],
    ]
    assert [item.source for item in separate(splits, labeled=True)["train"]] == ["three", "four"]


def test_separate_keeps_passages_on_one_side():
    splits = {
        "test": [Item("A passage.\nwhy", ("x",), "")],
        "dev": [],
        "train": [Item("A passage.\nwho", ("y",), "")],
    }
    assert separate(splits, labeled=False)["train"] == []


def test_typos_change_longer_words_alone():
    rng = random.Random(0)
    for _ in range(20):
        text = "a man in the large garden"
        assert readers.add_typos(text, rng).split(" ")[:4:2] == ["a", "in"]


@needs_data
@pytest.mark.parametrize("name", TASKS)
def test_splits_of_real_tasks_share_no_input_and_no_reference(name):
    task = TASKS[name]
    splits = load_items(task, DATA)
    assert all(splits.values())
    texts = {
        split: {
            key(text) for item in items for text in (item.source, *((), item.references)[task.labels is None])
        }
        for split, items in splits.items()
    }
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["dev"]
    assert not texts["dev"] & texts["test"]


@needs_data
def test_articles_stay_on_one_side():
    splits = load_items(TASKS["answer"], DATA)
    groups = [{item.group for item in splits[split]} for split in ("train", "dev", "test")]
    assert len(set.union(*groups)) == sum(map(len, groups))
