"""Files of words to items of 40 tasks, split so that no word sits on two sides."""

from __future__ import annotations

import random
import zlib
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.morphology.config import Data
from hydraopt_jax.demo.tasks import LANGUAGES, TASKS, Item, answer, characters, features, phonemes, prompt
from hydraopt_jax.demo.vocabulary import UNKNOWN_ID, Vocabulary, pad_rows, token_ids

PRONUNCIATIONS: dict[str, str] = {
    "en": "eng_latn_uk_broad_filtered",
    "de": "deu_latn_broad_filtered",
    "fr": "fra_latn_broad_filtered",
    "es": "spa_latn_ca_broad_filtered",
    "it": "ita_latn_broad_filtered",
    "pt": "por_latn_po_broad_filtered",
    "nl": "nld_latn_broad_filtered",
    "pl": "pol_latn_broad",
}
Splits = dict[str, list[Item]]  # "train", "dev", "test"


class Rows(NamedTuple):
    """Encoded training items of T tasks, laid end to end."""

    tokens: np.ndarray  # [total, L] uint16
    lengths: np.ndarray  # [total] of the prompts
    starts: np.ndarray  # [T]
    sizes: np.ndarray  # [T]


def read_table(path: Path, columns: int) -> list[tuple[str, ...]]:
    """Tab-separated lines; raises ValueError naming the first line of another shape."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = tuple(line.split("\t"))
        if len(row) != columns:
            raise ValueError(f"{path}:{number}: {len(row)} columns where {columns} are expected")
        rows.append(row)
    return rows


def misspell(word: tuple[str, ...], alphabet: list[str], rng: random.Random) -> tuple[str, ...]:
    """One edit at a random place: a letter dropped, doubled, put in, replaced, or two neighbors swapped.

    Edits that leave the word as it was are drawn again.

    >>> misspell(tuple("word"), list("xyz"), random.Random(3)) != tuple("word")
    True
    """
    while True:
        i = rng.randrange(len(word))
        edit = rng.choice(("drop", "double", "insert", "replace", "swap"))
        before, here, after = word[:i], word[i], word[i + 1 :]
        wrong = {
            "drop": before + after,
            "double": (*before, here, here, *after),
            "insert": (*before, rng.choice(alphabet), here, *after),
            "replace": (*before, rng.choice(alphabet), *after),
            "swap": (*before, *after[:1], here, *after[1:]),
        }[edit]
        if wrong and wrong != word:
            return wrong


def _first_of_each(items: list[Item]) -> list[Item]:
    """One item an input, so that no question is asked twice."""
    seen: dict[tuple[str, ...], Item] = {}
    for item in items:
        seen.setdefault(item.input, item)
    return list(seen.values())


def _items(task: str, rows: list[tuple[str, ...]], alphabet: list[str], rng: random.Random, edits: int):
    lemma_form = [(characters(lemma), characters(form), features(bundle)) for lemma, form, bundle in rows]
    if task == "inflect":
        return [Item(lemma + bundle, form) for lemma, form, bundle in lemma_form]
    if task == "lemmatise":
        return [Item(form, lemma) for lemma, form, _ in lemma_form]
    if task == "analyse":
        return [Item(form, bundle) for _, form, bundle in lemma_form]
    forms = sorted({form for _, form, _ in lemma_form})
    rng.shuffle(forms)
    return [Item(misspell(form, alphabet, rng), form) for form in forms for _ in range(edits)]


def morphology_splits(directory: Path, language: str, config: Data) -> dict[str, Splits]:
    """The four tasks made from inflection tables, for one language code.

    A training line whose form is also a dev or test form is dropped for all four tasks, and a dev line whose
    form is a test form likewise: what one task asks for, no other task has shown.
    """
    name = LANGUAGES[language]
    tables = {
        split: read_table(directory / "sigmorphon2018" / f"{name}-{file}", 3)
        for split, file in (("train", "train-high"), ("dev", "dev"), ("test", "test"))
    }
    held: set[str] = set()
    for split in ("test", "dev", "train"):
        tables[split] = [row for row in tables[split] if row[1] not in held]
        held |= {row[1] for row in tables[split]}
    letters = {c for _, form, _ in tables["train"] for c in characters(form) if c.islower()}
    alphabet = sorted(letters)
    out: dict[str, Splits] = {}
    for task in TASKS[:4]:
        # zlib, because Python's own hash of a string differs from run to run.
        rng = random.Random(zlib.crc32(f"{config.seed} {task} {language}".encode()))
        made = {
            split: _items(task, rows, alphabet, rng, config.edits if split == "train" else 1)
            for split, rows in tables.items()
        }
        questions: set[tuple[str, ...]] = set()
        for split in ("test", "dev", "train"):
            made[split] = [item for item in made[split] if item.input not in questions]
            questions |= {item.input for item in made[split]}
        out[task] = made | {s: _first_of_each(made[s]) for s in ("dev", "test")}
    return out


def pronunciation_splits(directory: Path, language: str, config: Data) -> Splits:
    """Spelling to phonemes, split by word.

    Words listed with several pronunciations are left out, as in the SIGMORPHON 2020 shared task on
    grapheme-to-phoneme conversion, and so are words of one letter or one phoneme.
    """
    table = read_table(directory / "wikipron" / f"{PRONUNCIATIONS[language]}.tsv", 2)
    spoken: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    for word, sounds in table:
        spoken[characters(word)].add(phonemes(sounds))
    items = [Item(word, min(said)) for word, said in sorted(spoken.items()) if len(said) == 1]
    items = [item for item in items if len(item.input) > 1 and len(item.output) > 1]
    random.Random(zlib.crc32(f"{config.seed} pronounce {language}".encode())).shuffle(items)
    n = min(config.held_out, len(items) // 10)
    return {"test": items[:n], "dev": items[n : 2 * n], "train": items[2 * n :]}


def fits(item: Item, config: Data) -> bool:
    """Whether prompt (task, language, input, separator) and answer (output, end) are short enough."""
    return len(item.input) + len(item.output) + 4 <= config.longest


def load_items(
    directory: Path,
    config: Data,
    *,
    tasks: tuple[str, ...] = TASKS,
    languages: tuple[str, ...] = tuple(LANGUAGES),
) -> dict[str, Splits]:
    """All tasks, task by task in every language, each with its train, dev and test items.

    Items that are too long are dropped from every split, at the same length for all.
    """
    made: dict[str, Splits] = {}
    for language in languages:
        for task, splits in morphology_splits(directory, language, config).items():
            made[f"{task}-{language}"] = splits
        made[f"pronounce-{language}"] = pronunciation_splits(directory, language, config)
    names = [f"{task}-{language}" for task in tasks for language in languages]
    out = {}
    for name in names:
        out[name] = {split: [i for i in items if fits(i, config)] for split, items in made[name].items()}
        # The test files are sorted by nothing in particular, but the first so many must be a fair sample.
        for split, items in out[name].items():
            random.Random(zlib.crc32(f"{config.seed} {name} {split}".encode())).shuffle(items)
    return out


def training_rows(items: dict[str, Splits], vocabulary: Vocabulary, config: Data) -> Rows:
    """Training items as arrays; those with an unknown token are left out, so `<unk>` is never an answer."""
    tokens: list[list[int]] = []
    lengths, sizes = [], []
    for name, splits in items.items():
        before = len(tokens)
        for item in splits["train"]:
            asked = token_ids(vocabulary, prompt(name, item))
            row = asked + token_ids(vocabulary, answer(item))
            if UNKNOWN_ID not in row:
                tokens.append(row)
                lengths.append(len(asked))
        sizes.append(len(tokens) - before)
        if not sizes[-1]:
            raise ValueError(f"{name} has no training items of {config.longest} tokens or fewer")
    starts = np.cumsum([0, *sizes[:-1]])
    return Rows(
        pad_rows(tokens, config.longest).astype(np.uint16),
        np.array(lengths, np.int32),
        starts.astype(np.int32),
        np.array(sizes, np.int32),
    )
