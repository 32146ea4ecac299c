"""Readers of the tasks' files: each returns raw items per split, `{"train" | "dev" | "test": [Item, ...]}`.

An item is an input, the references its answer is scored against, and a group: items of one group (an
article, a set of attributes) stay on one side where a file has to be split here. Splits are seeded by the
task's name.
"""

import csv
import gzip
import itertools
import json
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple


class Item(NamedTuple):
    """An input, the references of its answer (the first is trained on), and what must not be split."""

    source: str
    references: tuple[str, ...]
    group: str


Splits = dict[str, list[Item]]


def lines(path: Path) -> list[str]:
    """Lines of a text file, packed or not."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [line.strip() for line in raw.decode("utf-8").strip().split("\n")]


def split_groups(items: list[Item], shares: dict[str, float], seed: str) -> Splits:
    """Items divided by group: each split gets its share of the groups, the last one the remainder."""
    groups = sorted({item.group for item in items})
    random.Random(seed).shuffle(groups)
    where: dict[str, str] = {}
    start = 0
    for split, share in shares.items():
        stop = len(groups) if split == list(shares)[-1] else start + round(share * len(groups))
        where |= dict.fromkeys(groups[start:stop], split)
        start = stop
    out: Splits = {split: [] for split in shares}
    for item in items:
        out[where[item.group]].append(item)
    return out


def detokenize(text: str) -> str:
    """Text without the spaces that a tokenizer put before punctuation and around quotes.

    >>> detokenize("It is n't so , he said .")
    "It isn't so, he said."
    """
    text = re.sub(r" ([.,!?;:%)\]]|n't|'s|'re|'ve|'ll|'d|'m)(?= |$)", r"\1", text)
    return re.sub(r"([(\[]) ", r"\1", re.sub(r"\s+", " ", text)).strip()


def read_jfleg(data: Path) -> Splits:
    """Learners' sentences and four corrections each; the dev file is trained on, an eighth of it held out."""
    sides = {}
    for split in ("dev", "test"):
        folder = data / "jfleg" / split
        rows = zip(
            *(
                map(detokenize, lines(folder / f"{split}.{part}"))
                for part in ("src", "ref0", "ref1", "ref2", "ref3")
            ),
            strict=True,
        )
        sides[split] = [Item(source, tuple(dict.fromkeys(refs)), source) for source, *refs in rows]
    return split_groups(sides["dev"], {"dev": 0.125, "train": 0.875}, "jfleg") | {"test": sides["test"]}


def add_typos(text: str, rng: random.Random) -> str:
    """`text` with one letter dropped, doubled, swapped or replaced in one to three of its longer words."""
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    for i in rng.sample(long, min(len(long), rng.randint(1, 3))):
        word, at = words[i], rng.randrange(1, len(words[i]) - 1)
        words[i] = rng.choice(
            [
                word[:at] + word[at + 1 :],
                word[:at] + word[at] + word[at:],
                word[:at] + word[at + 1] + word[at] + word[at + 2 :],
                word[:at] + rng.choice("etaoinshrdlu") + word[at + 1 :],
            ]
        )
    return " ".join(words)


MULTI30K = {"train": "train", "dev": "val", "test": "test_2016_flickr"}


def _captions(data: Path, language: str) -> dict[str, list[str]]:
    folder = data / "dataset" / "data" / "task1" / "raw"
    return {split: lines(folder / f"{stem}.{language}.gz") for split, stem in MULTI30K.items()}


def read_typos(data: Path) -> Splits:
    """English captions with seeded typos, and the captions."""
    rng = random.Random("typos")
    out: Splits = {}
    for split, captions in _captions(data, "en").items():
        pairs = ((add_typos(caption, rng), caption) for caption in captions)
        out[split] = [Item(source, (caption,), caption) for source, caption in pairs if source != caption]
    return out


def read_translation(data: Path, source: str, target: str) -> Splits:
    """Captions in two languages."""
    sides = _captions(data, source), _captions(data, target)
    return {
        split: [Item(a, (b,), a) for a, b in zip(sides[0][split], sides[1][split], strict=True)]
        for split in MULTI30K
    }


def read_asset(data: Path) -> Splits:
    """Sentences and their ten simplifications, without repeated and unchanged ones; the validation file is
    trained on, a tenth of it held out."""
    sides: Splits = {}
    for split in ("valid", "test"):
        folder = data / "asset" / "dataset"
        stems = ("orig", *(f"simp.{i}" for i in range(10)))
        rows = zip(*(lines(folder / f"asset.{split}.{stem}") for stem in stems), strict=True)
        rng = random.Random("asset")
        sides[split] = []
        for source, *refs in rows:
            changed = [ref for ref in dict.fromkeys(refs) if ref != source]
            rng.shuffle(changed)
            if changed:
                sides[split].append(Item(source, tuple(changed), source))
    return split_groups(sides["valid"], {"dev": 0.1, "train": 0.9}, "asset") | {"test": sides["test"]}


def read_e2e(data: Path) -> Splits:
    """Attributes of a restaurant and descriptions; the dev file is trained on, an eighth held out."""
    sides: dict[str, dict[str, list[str]]] = {}
    for stem in ("devset", "testset_w_refs"):
        found = defaultdict(list)
        with (data / "e2e-dataset" / f"{stem}.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                found[re.sub(r"(\w+)\[([^\]]*)\]", r"\1: \2", row["mr"])].append(row["ref"])
        sides[stem] = found
    dev = [Item(mr, tuple(dict.fromkeys(refs)), mr) for mr, refs in sides["devset"].items()]
    test = [Item(mr, tuple(dict.fromkeys(refs)), mr) for mr, refs in sides["testset_w_refs"].items()]
    return split_groups(dev, {"dev": 0.125, "train": 0.875}, "e2e") | {"test": test}


def _sentence_at(context: str, at: int) -> str:
    """The sentence of `context` that holds the character at `at`."""
    cuts = [0, *(m.end() for m in re.finditer(r"(?<=[a-z0-9)\"])[.!?]\s+(?=[A-Z\"])", context)), len(context)]
    return next(context[a:b].strip() for a, b in itertools.pairwise(cuts) if a <= at < b)


def read_xquad(data: Path, *, ask: bool) -> Splits:
    """A sentence with a question and its answer, or (`ask`) the reverse; articles stay on one side."""
    items = []
    for number, article in enumerate(
        json.loads((data / "xquad" / "xquad.en.json").read_text("utf-8"))["data"]
    ):
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answer = qa["answers"][0]
                sentence = _sentence_at(paragraph["context"], answer["answer_start"])
                asked, given = (qa["question"], answer["text"]) if ask else (answer["text"], qa["question"])
                if answer["text"] in sentence:
                    items.append(Item(f"{sentence}\n{given}", (asked,), f"article {number}"))
    return split_groups(items, {"test": 0.2, "dev": 0.12, "train": 0.68}, "xquad")


def read_nl2bash(data: Path, *, explain: bool) -> Splits:
    """A request and its shell command, or the reverse."""
    folder = data / "nl2bash" / "data" / "bash"
    items = []
    for text, command in zip(lines(folder / "all.nl"), lines(folder / "all.cm"), strict=True):
        source, answer = (command, text) if explain else (text, command)
        items.append(Item(source, (answer,), source))
    merged: dict[str, Item] = {}
    for item in items:
        known = merged.get(item.source, item._replace(references=()))
        merged[item.source] = known._replace(
            references=tuple(dict.fromkeys(known.references + item.references))
        )
    return split_groups(list(merged.values()), {"test": 0.1, "dev": 0.05, "train": 0.85}, "nl2bash")


def read_tweets(data: Path, name: str, labels: tuple[str, ...]) -> Splits:
    """Tweets and their label, as many of each label as of the rarest."""
    folder = data / "tweeteval" / "datasets" / name
    out: Splits = {}
    for split, stem in {"train": "train", "dev": "val", "test": "test"}.items():
        by_label = defaultdict(list)
        for text, label in zip(
            lines(folder / f"{stem}_text.txt"), lines(folder / f"{stem}_labels.txt"), strict=True
        ):
            by_label[labels[int(label)]].append(Item(text, (labels[int(label)],), text))
        out[split] = balance(by_label, f"{name} {split}")
    return out


def balance(by_label: dict[str, list[Item]], seed: str) -> list[Item]:
    """Items of all labels in turn, so that every prefix is as balanced as it can be."""
    rng = random.Random(seed)
    for label in sorted(by_label):
        rng.shuffle(by_label[label])
    rows = list(zip(*(by_label[label] for label in sorted(by_label)), strict=False))
    return [item for row in rows for item in rng.sample(row, len(row))]


def read_clinc(data: Path) -> Splits:
    """Requests and their intent, out of 150, every intent as often."""
    stored = json.loads((data / "oos-eval" / "data" / "data_full.json").read_text("utf-8"))
    out: Splits = {}
    for split, key in {"train": "train", "dev": "val", "test": "test"}.items():
        by_label = defaultdict(list)
        for text, label in stored[key]:
            by_label[label.replace("_", " ")].append(Item(text, (label.replace("_", " "),), text))
        out[split] = balance(by_label, f"clinc {split}")
    return out


def clinc_labels(data: Path) -> tuple[str, ...]:
    """The 150 intents, in words."""
    stored = json.loads((data / "oos-eval" / "data" / "data_full.json").read_text("utf-8"))
    return tuple(sorted({label.replace("_", " ") for _, label in stored["train"]}))
