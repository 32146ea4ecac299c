"""The five word-level tasks in eight languages, and how an item becomes a prompt.

An item is a pair of token sequences. A prompt is `task language input... <sep>`, and what the model has to
write is `output... <end>`. Characters are tokens by themselves; morphological features (`feature:PST`) and
phonemes (`phoneme:t͡s`) are whole tokens with a prefix, so that the letter `a` and the phoneme `a` differ.
"""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

TASKS: tuple[str, ...] = ("inflect", "lemmatise", "analyse", "correct", "pronounce")
LANGUAGES: dict[str, str] = {
    "en": "english",
    "de": "german",
    "fr": "french",
    "es": "spanish",
    "it": "italian",
    "pt": "portuguese",
    "nl": "dutch",
    "pl": "polish",
}
PAD, UNKNOWN, SEPARATOR, END = "<pad>", "<unk>", "<sep>", "<end>"


class Item(NamedTuple):
    """One question and its answer, as token strings."""

    input: tuple[str, ...]
    output: tuple[str, ...]


def task_name(task: str, language: str) -> str:
    """Name of one adapter.

    >>> task_name("inflect", "de")
    'inflect-de'
    """
    return f"{task}-{language}"


def characters(text: str) -> tuple[str, ...]:
    """Text as its NFC code points.

    >>> characters("Öl")
    ('Ö', 'l')
    """
    return tuple(unicodedata.normalize("NFC", text))


def features(text: str) -> tuple[str, ...]:
    """A UniMorph bundle as feature tokens.

    >>> features("V;PST")
    ('feature:V', 'feature:PST')
    """
    return tuple(f"feature:{part}" for part in text.split(";"))


def phonemes(text: str) -> tuple[str, ...]:
    """A space-separated transcription as phoneme tokens.

    >>> phonemes("k a ts")
    ('phoneme:k', 'phoneme:a', 'phoneme:ts')
    """
    return tuple(f"phoneme:{part}" for part in unicodedata.normalize("NFC", text).split())


def prompt(name: str, item: Item) -> tuple[str, ...]:
    """What the model is given for one item of the task called `name`.

    >>> prompt("analyse-en", Item(("r", "a", "n"), ("feature:V", "feature:PST")))
    ('task:analyse', 'language:en', 'r', 'a', 'n', '<sep>')
    """
    task, language = name.rsplit("-", 1)
    return (f"task:{task}", f"language:{language}", *item.input, SEPARATOR)


def answer(item: Item) -> tuple[str, ...]:
    """What the model has to write.

    >>> answer(Item(("r", "a", "n"), ("feature:V", "feature:PST")))
    ('feature:V', 'feature:PST', '<end>')
    """
    return (*item.output, END)
