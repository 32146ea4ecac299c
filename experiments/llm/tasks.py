"""The sixteen tasks: prompts, splits that share nothing, and token sequences.

Input and output take at most 64 tokens; of tasks with plenty of items, the whole sequence with its template
does.

A prompt is one user turn without a system turn. It states the form of the answer, so that the zero-shot
score does not suffer from a missing description of the format; classification answers are restricted to the
labels for every model.
"""

import hashlib
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from experiments.llm import readers
from experiments.llm.readers import Item, Splits

LONGEST = 64
LONGEST_SCARCE = 88
COUNTS = {"train": 4000, "dev": 100, "test": 150}


class Task(NamedTuple):
    """One task: its application, instruction (with `{}` for the input), reader, metric, and labels if it
    classifies.

    `longest` bounds the tokens of prompt, template and answer together.
    """

    name: str
    application: str
    prompt: str
    read: Callable[[Path], Splits]
    metric: str
    labels: Callable[[Path], tuple[str, ...]] | None = None
    train_references: int = 1
    longest: int = LONGEST


def _labels(*names: str) -> Callable[[Path], tuple[str, ...]]:
    return lambda data: names


def _translate(source: str, target: str, language: str) -> Task:
    return Task(
        f"{source}-{target}",
        "translate",
        f"Translate to {language}:\n{{}}",
        partial(readers.read_translation, source=source, target=target),
        "chrf",
    )


def _tweets(name: str, question: str, labels: tuple[str, ...]) -> Task:
    read = partial(readers.read_tweets, name=name, labels=labels)
    return Task(name, "classify", f"{question}\n{{}}", read, "accuracy", _labels(*labels))


_ANSWER, _ASK = partial(readers.read_xquad, ask=False), partial(readers.read_xquad, ask=True)
_TO_SHELL, _EXPLAIN = (
    partial(readers.read_nl2bash, explain=False),
    partial(readers.read_nl2bash, explain=True),
)

TASKS = {
    task.name: task
    for task in (
        _tweets(
            "emotion",
            "Which emotion: anger, joy, optimism or sadness?",
            ("anger", "joy", "optimism", "sadness"),
        ),
        _translate("en", "fr", "French"),
        Task(
            "clinc",
            "classify",
            "Name the intent of the request in a few words.\n{}",
            readers.read_clinc,
            "accuracy",
            readers.clinc_labels,
        ),
        Task(
            "typos",
            "correct",
            "Correct the spelling. Reply with the sentence only.\n{}",
            readers.read_typos,
            "exact",
        ),
        Task("shell", "answer", "Write a bash command. Reply with the command only.\n{}", _TO_SHELL, "chrf"),
        Task(
            "e2e",
            "rephrase",
            "Describe the place in a sentence.\n{}",
            readers.read_e2e,
            "rouge",
            train_references=8,
            longest=LONGEST_SCARCE,
        ),
        Task(
            "jfleg",
            "correct",
            "Correct the grammar. Reply with the sentence only.\n{}",
            readers.read_jfleg,
            "chrf",
            train_references=2,
            longest=LONGEST_SCARCE,
        ),
        Task(
            "answer",
            "answer",
            "{}\nAnswer with words from the text only.",
            _ANSWER,
            "exact",
            longest=LONGEST_SCARCE,
        ),
        _translate("en", "de", "German"),
        Task(
            "asset",
            "rephrase",
            "Simplify. Reply with the sentence only.\n{}",
            readers.read_asset,
            "sari",
            train_references=10,
            longest=LONGEST_SCARCE,
        ),
        Task("explain", "answer", "Explain the command in one sentence.\n{}", _EXPLAIN, "rouge"),
        _tweets("offensive", "Is the text offensive? Answer yes or no.", ("no", "yes")),
        _translate("fr", "en", "English"),
        Task(
            "ask",
            "answer",
            "Ask one question about the text that the last line answers.\n{}",
            _ASK,
            "rouge",
            longest=LONGEST_SCARCE,
        ),
        _tweets("irony", "Is the text ironic? Answer yes or no.", ("no", "yes")),
        _translate("en", "cs", "Czech"),
    )
}


class Sequence(NamedTuple):
    """Token ids of a prompt and its answer (with the id that ends it); references and input of its score."""

    prompt: list[int]
    answer: list[int]
    references: tuple[str, ...]
    source: str

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt + self.answer


def chat(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a user turn `text`, up to where the assistant speaks."""
    if tokenizer.token_to_id("<|im_start|>") is not None:
        text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    else:
        header = "<|start_header_id|>{}<|end_header_id|>\n\n"
        text = f"<|begin_of_text|>{header.format('user')}{text}<|eot_id|>{header.format('assistant')}"
    return tokenizer.encode(text, add_special_tokens=False).ids


def key(text: str) -> str:
    """Lower-case letters and digits of `text`, or all of it if it has none: equal texts share it."""
    return re.sub(r"[\W_]+", "", text.lower()) or text


def separate(splits: Splits, *, labeled: bool) -> Splits:
    """Splits without what occurs on an earlier side: test comes first, then dev, then train.

    An item is dropped where its input, one of its references (unless those are labels), or the first line
    of a many-lined input (a passage that several questions share) stands on an earlier side.
    """
    seen: set[str] = set()
    out: Splits = {}
    for split in ("test", "dev", "train"):
        marks = {item: _marks(item, labeled=labeled) for item in dict.fromkeys(splits[split])}
        out[split] = [item for item, found in marks.items() if not found & seen]
        seen |= {mark for item in out[split] for mark in marks[item]}
    return out


def _marks(item: Item, *, labeled: bool) -> set[str]:
    texts = {item.source, item.source.split("\n")[0]} | (set() if labeled else set(item.references))
    return {key(text) for text in texts}


def load_items(task: Task, data: Path) -> Splits:
    """Items of `task` per split, none on two sides; in a seeded order, balanced ones in their reader's."""
    splits = separate(task.read(data), labeled=task.labels is not None)
    if task.labels is None:
        for split, items in splits.items():
            random.Random(f"{task.name} {split}").shuffle(items)
    return splits


def load_sequences(task: Task, data: Path, tokenizer: Tokenizer, stop: int) -> dict[str, list[Sequence]]:
    """Token sequences of `task` per split, none too long, as many as COUNTS allows.

    Training items with several references become as many sequences as the task trains on.
    """
    out: dict[str, list[Sequence]] = {}
    for split, items in load_items(task, data).items():
        found: list[Sequence] = []
        for item in items:
            if len(found) >= COUNTS[split]:
                break
            prompt = chat(tokenizer, task.prompt.format(item.source))
            for reference in item.references[: task.train_references if split == "train" else 1]:
                answer = [*tokenizer.encode(reference, add_special_tokens=False).ids, stop]
                content = len(tokenizer.encode(item.source, add_special_tokens=False).ids) + len(answer) - 1
                if content <= LONGEST and len(prompt) + len(answer) <= task.longest:
                    found.append(Sequence(prompt, answer, item.references, item.source))
        out[split] = found[: COUNTS[split]]
    return out


def digest(sequences: list[Sequence]) -> str:
    """Short name of what `sequences` hold, for caches of what is computed from them."""
    return hashlib.sha256(repr([s.tokens for s in sequences]).encode()).hexdigest()[:12]
