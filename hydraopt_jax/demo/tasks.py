"""Five word-level tasks in eight languages, and the prompts of their items.

An item is a pair of token sequences. Its prompt is `task language input... <sep>`, its answer `output...
<end>`. A character is one token. A morphological feature (`feature:PST`) and a phoneme (`phoneme:t͡s`) are one
token each with a prefix: the letter `a` and the phoneme `a` differ.
"""

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
    """One question and its answer as token strings."""

    input: tuple[str, ...]
    output: tuple[str, ...]


def characters(text: str) -> tuple[str, ...]:
    """The NFC code points of a text.

    >>> characters("Öl")
    ('Ö', 'l')
    """
    return tuple(unicodedata.normalize("NFC", text))


def features(text: str) -> tuple[str, ...]:
    """The feature tokens of a UniMorph bundle.

    >>> features("V;PST")
    ('feature:V', 'feature:PST')
    """
    return tuple(f"feature:{part}" for part in text.split(";"))


def phonemes(text: str) -> tuple[str, ...]:
    """The phoneme tokens of a transcription, which spaces separate.

    >>> phonemes("k a ts")
    ('phoneme:k', 'phoneme:a', 'phoneme:ts')
    """
    return tuple(f"phoneme:{part}" for part in unicodedata.normalize("NFC", text).split())


def prompt(name: str, item: Item) -> tuple[str, ...]:
    """The prompt of an item of the task `name`.

    >>> prompt("analyse-en", Item(("r", "a", "n"), ("feature:V", "feature:PST")))
    ('task:analyse', 'language:en', 'r', 'a', 'n', '<sep>')
    """
    task, language = name.rsplit("-", 1)
    return (f"task:{task}", f"language:{language}", *item.input, SEPARATOR)


def answer(item: Item) -> tuple[str, ...]:
    """The tokens of an item's true answer.

    >>> answer(Item(("r", "a", "n"), ("feature:V", "feature:PST")))
    ('feature:V', 'feature:PST', '<end>')
    """
    return (*item.output, END)
