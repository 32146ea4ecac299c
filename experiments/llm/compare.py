"""Scores stored adapters against their originals, task by task.

    python -m experiments.llm.compare --data DATA --regime shared --only 'budget*'

Needs every task's own answers (`score`). A row's answers are exact greedy answers, found by verifying the
own adapter's (see `decoding`). Beside the score stand companions with little noise: the share of the
log-likelihood gain on the references that is kept, and on the own adapter's answers the divergence
KL(own || stored) per token and the share of tokens with the same best one. One JSON per regime and row, saved
task by task: the same command goes on.
"""

import argparse
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.llm import adapters, stores
from experiments.llm.activations import Lower, hidden_of, place
from experiments.llm.base import DEFAULT, cache_folder, load_base
from experiments.llm.decoding import (
    LONGEST_ANSWER,
    Labels,
    answer_logits,
    decode,
    decode_from_drafts,
    first_difference,
)
from experiments.llm.distill import teach
from experiments.llm.moments import moments
from experiments.llm.score import ITEMS, answers_path, item_scores, labels_of, with_deltas
from experiments.llm.tasks import TASKS, Sequence, Task, load_sequences
from experiments.selection import add_only, selected

HERE = Path(__file__).parent
REFERENCES = 16
CHOOSING = 16


class Problem(NamedTuple):
    """What all rows of a task share: items, drafts, cached activations, own log-probabilities.

    `past` holds what the lower layers made of drafts that some row left, see `decode_from_drafts`.
    """

    task: Task
    labels: Labels
    sequences: list[Sequence]
    drafts: list[Sequence]
    draft_hidden: list[np.ndarray]
    reference_hidden: list[np.ndarray]
    own: list[jax.Array]
    own_scores: list[float]
    losses: dict[str, float]
    past: dict[int, np.ndarray]


@jax.jit
def _losses(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Summed negative log-likelihood of `targets` `[A]`."""
    return -(jax.nn.log_softmax(logits)[jnp.arange(len(targets)), targets] * weights).sum()


@jax.jit
def _companions(own: jax.Array, stored: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Summed KL(own || stored) and number of equal best tokens of log-probabilities and logits `[A, V]`."""
    divergence = (jnp.exp(own) * (own - jax.nn.log_softmax(stored))).sum(-1)
    same = own.argmax(-1) == stored.argmax(-1)
    return (divergence * weights).sum(), (same * weights).sum()


def reference_loss(
    lower: Lower, upper: dict[str, Any], sequences: list[Sequence], hidden: list[np.ndarray]
) -> float:
    """Mean negative log-likelihood per token of the references."""
    total = count = 0.0
    for _, batch, logits in answer_logits(lower, upper, sequences, hidden):
        total += float(_losses(logits, batch.targets, batch.weights))
        count += float(batch.weights.sum())
    return total / count


def gain_kept(base: float, own: float, stored: float) -> float:
    """The share of the log-likelihood gain that a stored adapter keeps, from mean losses per token.

    >>> gain_kept(3.0, 1.0, 1.5)
    0.75
    """
    return (base - stored) / (base - own)


def prepare(task: Task, lower: Lower, data: Path, folder: Path, items: int) -> Problem:
    """The first `items` test items of a task, drafts and logits of its own adapter in `folder`."""
    base = lower.base
    sequences = load_sequences(task, data, base.tokenizer, base.stop)["test"][:items]
    kept = answers_path(base.name, task.name, folder)
    if not kept.exists():
        raise SystemExit(
            f"{task.name}: no answers of its own adapter in {kept}: python -m experiments.llm.score with the "
            "same --data, --base, --regime, --layers and --adapters makes them"
        )
    answers = json.loads(kept.read_text())["test"][: len(sequences)]
    # An answer cut at its greatest length has no end to predict.
    ended = [answer if len(answer) >= LONGEST_ANSWER else [*answer, base.stop] for answer in answers]
    drafts = [s._replace(answer=draft) for s, draft in zip(sequences, ended, strict=True)]
    upper = with_deltas(lower.upper, adapters.load_deltas(folder))
    references = sequences[:REFERENCES]
    draft_hidden = hidden_of(lower, drafts, dtype=np.float32)
    reference_hidden = hidden_of(lower, references, dtype=np.float32)
    own = [jax.nn.log_softmax(x) for _, _, x in answer_logits(lower, upper, drafts, draft_hidden)]
    losses = {
        name: reference_loss(lower, layers, references, reference_hidden)
        for name, layers in (("base", lower.upper), ("own", upper))
    }
    scores = item_scores(task, lower, answers, sequences)
    labels = labels_of(task, data, lower)
    return Problem(task, labels, sequences, drafts, draft_hidden, reference_hidden, own, scores, losses, {})


def go_on(
    problem: Problem, lower: Lower, upper: dict[str, Any], begun: dict[int, list[int]]
) -> dict[int, list[int]]:
    """Greedy answers to the items of `begun`, item -> the beginning of its answer.

    An accelerator runs the lower layers again sooner than it is given what they made of the drafts.
    """
    if jax.default_backend() == "cpu":
        return decode_from_drafts(
            lower, upper, problem.drafts, problem.draft_hidden, begun, problem.past, problem.labels
        )
    prefixes = [(problem.drafts[i].prompt, answer) for i, answer in begun.items()]
    return dict(zip(begun, decode(lower, upper, prefixes, problem.labels), strict=True))


def compare(
    problem: Problem, lower: Lower, deltas: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], list[list[int]]]:
    """Score and companions of one stored adapter, and its answers with the ids that end them."""
    upper = with_deltas(lower.upper, dict(deltas))
    answers: list[list[int]] = [[] for _ in problem.drafts]
    divergence = same = count = 0.0
    changed: list[int] = []
    batches = answer_logits(lower, upper, problem.drafts, problem.draft_hidden)
    for own, (chosen, batch, logits) in zip(problem.own, batches, strict=True):
        found = _companions(own, logits, batch.weights)
        divergence, same = divergence + float(found[0]), same + float(found[1])
        count += float(batch.weights.sum())
        best_tokens, start = problem.labels.candidates(logits), 0
        for i in chosen:
            draft = problem.drafts[i].answer
            best = [problem.labels.choose(best_tokens[start + k], draft[:k]) for k in range(len(draft))]
            start += len(draft)
            at = first_difference(best, draft)
            answers[i] = draft if at is None else [*draft[:at], best[at]]
            changed += [] if at is None else [i]
    stop = lower.base.stop
    open_ended = [i for i in changed if answers[i][-1] != stop and len(answers[i]) < LONGEST_ANSWER]
    if open_ended:
        begun = {i: answers[i] for i in open_ended}
        for i, answer in go_on(problem, lower, upper, begun).items():
            answers[i] = answer if len(answer) >= LONGEST_ANSWER else [*answer, stop]
    references = problem.sequences[:REFERENCES]
    loss = reference_loss(lower, upper, references, problem.reference_hidden)
    plain = [answer[:-1] if answer[-1] == stop else answer for answer in answers]
    scores_of = item_scores(problem.task, lower, plain, problem.sequences)
    found = {
        "score": round(float(np.mean(scores_of)), 4),
        "items": scores_of,
        "changed_answers": len(changed),
        "gain_kept": round(gain_kept(problem.losses["base"], problem.losses["own"], loss), 5),
        "kl": round(divergence / count, 6),
        "same_token": round(same / count, 5),
    }
    return found, answers


def stored_answers_path(collection: list[Any], slug: str, task: str) -> Path:
    """Where the answers of a stored adapter are kept."""
    return stores_folder(collection) / f"answers-{slug}-{task}.json"


def stored_answers(collection: list[Any], row: str, task: str) -> list[list[int]]:
    """The answers of a stored adapter that are kept here; without them, a line that says how to make them."""
    path = stored_answers_path(collection, slug_of(row), task)
    if not path.exists():
        raise SystemExit(
            f"{path}: no such file: run `python -m experiments.llm.compare --only {row!r}` first, with "
            "--results of its own if that row has its scores"
        )
    found: list[list[int]] = json.loads(path.read_text())
    return found


def stores_folder(collection: list[Any]) -> Path:
    """Where the stores of a collection are kept."""
    folder = cache_folder() / "stores" / stores.digest(collection)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def slug_of(row: str) -> str:
    """A row's name in files.

    >>> slug_of("HydraOpt K = 16, closed form")
    'hydraopt-k-16-closed-form'
    """
    return re.sub(r"[^a-z0-9.]+", "-", row.lower())


def start_result(path: Path, facts: dict[str, Any], row: stores.Row, fp16_bytes: int) -> dict[str, Any]:
    """What `path` holds with these facts, by the codec of `row`; or a result without tasks."""
    asked = facts if row.format is None else facts | {"format": row.format}
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        if asked.items() <= kept.items():
            return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    return asked | {"bytes": row.bytes, "fp16_bytes": fp16_bytes, "tasks": {}}


def choose_scale(row: stores.Row, lower: Lower, data: Path, tasks: list[str]) -> float:
    """The one of `stores.SCALES` at which one adapter for all tasks has the lowest mean dev loss."""
    losses = np.zeros((len(tasks), len(stores.SCALES)))
    for i, name in enumerate(tasks):
        dev = load_sequences(TASKS[name], data, lower.base.tokenizer, lower.base.stop)["dev"][:CHOOSING]
        hidden = hidden_of(lower, dev, dtype=np.float32)
        deltas = stores.deltas_of(row.tasks[name])
        for k, scale in enumerate(stores.SCALES):
            upper = with_deltas(lower.upper, {module: scale * delta for module, delta in deltas.items()})
            losses[i, k] = reference_loss(lower, upper, dev, hidden)
    return stores.SCALES[int(losses.mean(0).argmin())]


def make_stores(collection: list[Any], patterns: list[str]) -> None:
    """Makes the rows that are kept on disk and need no model, so that others find them there."""
    for name, make in selected(stores.plan(collection), patterns).items():
        if name.startswith(("HydraOpt", "budget")):
            print(f"{name}: {make(stores_folder(collection) / slug_of(name)).bytes} bytes", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' files (see sources)")
    parser.add_argument("--base", default=DEFAULT, help="hub id or folder of a Llama-architecture model")
    parser.add_argument("--regime", choices=adapters.REGIMES, required=True)
    parser.add_argument("--adapters", type=Path, default=HERE / "adapters", help="where train wrote")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--layers", type=int, default=8, help="upper layers that are adapted")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS), help="the collection")
    add_only(parser)
    parser.add_argument("--items", type=int, default=ITEMS["test"], help="test items per task")
    parser.add_argument("--make", action="store_true", help="only make the stores that need no model")
    given = parser.parse_args(argv)
    if given.make:
        make_stores(stores.read_collection(given.adapters / given.regime, given.tasks), given.only)
        return
    lower = place(load_base(given.base), given.layers)
    folder = given.adapters / given.regime
    for log in (folder / task / "log.json" for task in given.tasks):
        if log.exists():
            adapters.check_made(log, "--adapters", base=lower.base.name)
    collection = stores.read_collection(folder, given.tasks)
    rows, results = {}, {}
    measured = partial(moments, lower, folder, given.tasks, given.data)
    teaching = partial(teach, lower, given.tasks, given.data)
    makers = selected(stores.plan(collection, measured, teaching), given.only)
    paths = {name: given.results / f"stores-{given.regime}" / f"{slug_of(name)}.json" for name in makers}
    asked = {"adapters": stores.digest(collection), "test_items": given.items}
    for path in paths.values():
        if path.exists():
            adapters.check_made(path, "--results", **asked)
    for name, make in makers.items():
        rows[name] = make(stores_folder(collection) / slug_of(name))
        path, said = paths[name], {"row": name, "regime": given.regime} | asked
        facts = start_result(path, said, rows[name], stores.fp16_bytes(collection))
        if name.startswith("merged"):
            if "scale" not in facts:
                facts["scale"] = choose_scale(rows[name], lower, given.data, given.tasks)
            rows[name] = stores.scaled(rows[name], facts["scale"])
        path.write_text(json.dumps(facts) + "\n")
        results[name] = path, facts
        print(f"{name}: {facts['bytes'] / facts['fp16_bytes']:.4f} of the bytes", flush=True)
    for name in given.tasks:
        left = [row for row in rows if name not in results[row][1]["tasks"]]
        if not left:
            continue
        problem = prepare(TASKS[name], lower, given.data, folder / name, given.items)
        own = float(np.mean(problem.own_scores))
        for row in left:
            path, result = results[row]
            found, answers = compare(problem, lower, stores.deltas_of(rows[row].tasks[name]))
            stored_answers_path(collection, path.stem, name).write_text(json.dumps(answers))
            result["tasks"][name] = found | {"own": own, "own_items": problem.own_scores}
            path.write_text(json.dumps(result) + "\n")
            print(
                f"{name}, {row}: {found['score']:.3f} of {own:.3f}; gain kept {found['gain_kept']:.4f}, "
                f"KL {found['kl']:.5f}, same token {found['same_token']:.4f}, "
                f"changed answers {found['changed_answers']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
