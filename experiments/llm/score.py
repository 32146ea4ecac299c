"""Scores the base (zero-shot) and every task's own adapter on its test and dev items.

    python -m experiments.llm.score --data DATA --regime shared
    python -m experiments.llm.score --data DATA --regime zero-shot
    python -m experiments.llm.score --data DATA --regime zero-shot --tasks asset --rescore

One JSON per task in results/REGIME, with the score of every item; the answers themselves stay in the cache
folder, where the drafts of `stores` are read from. Scores that are there already are left alone, and only
answers of own adapters that are missing are made again.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.llm import adapters
from experiments.llm.activations import Lower, place
from experiments.llm.base import DEFAULT, cache_folder, load_base
from experiments.llm.decoding import Labels, decode
from experiments.llm.metrics import METRICS, interval, resample
from experiments.llm.tasks import TASKS, Sequence, Task, load_sequences

HERE = Path(__file__).parent
ITEMS = {"test": 100, "dev": 50}


def labels_of(task: Task, data: Path, lower: Lower) -> Labels:
    """The labels that a classification's answers are restricted to; no restriction for other tasks."""
    base = lower.base
    texts = task.labels(data) if task.labels else ()
    return Labels([[*base.tokenizer.encode(text, add_special_tokens=False).ids, base.stop] for text in texts])


def item_scores(task: Task, lower: Lower, answers: list[list[int]], sequences: list[Sequence]) -> list[float]:
    """The task's metric of every answer."""
    metric = METRICS[task.metric]
    texts = [lower.base.tokenizer.decode(answer).strip() for answer in answers]
    return [round(metric(text, s.references, s.source), 4) for text, s in zip(texts, sequences, strict=True)]


def with_deltas(upper: dict[str, Any], deltas: dict[str, np.ndarray]) -> dict[str, Any]:
    """The upper layers with `deltas` `[L, in, out]` added to their projections."""
    return upper | {name: upper[name] + jnp.asarray(delta) for name, delta in deltas.items()}


def digest_of(folder: Path) -> str:
    """Short name of the adapter in `folder`."""
    return hashlib.sha256((folder / adapters.WEIGHTS).read_bytes()).hexdigest()[:12]


def answers_path(base: str, task: str, folder: Path | None = None) -> Path:
    """Where the answers to a task of the adapter in `folder`, or of the base, are kept."""
    source = digest_of(folder) if folder else "zero-shot"
    return cache_folder() / f"answers-{base.replace('/', '_')}-{source}-{task}.json"


def score(
    task: Task,
    lower: Lower,
    upper: dict[str, Any],
    data: Path,
    regime: str,
    kept: dict[str, list[list[int]]] | None = None,
) -> tuple[dict[str, Any], dict[str, list[list[int]]]]:
    """Scores per split of the model with `upper` for its upper layers, for a results file; its answers.

    Answers are decoded, or those `kept` per split.
    """
    splits = load_sequences(task, data, lower.base.tokenizer, lower.base.stop)
    labels = labels_of(task, data, lower)
    out: dict[str, Any] = {
        "task": task.name,
        "regime": regime,
        "base": lower.base.name,
        "metric": task.metric,
    }
    answers = dict(kept or {})
    for split, count in ITEMS.items():
        sequences = splits[split][:count]
        if split not in answers:
            answers[split] = decode(lower, upper, [(s.prompt, []) for s in sequences], labels)
        scores = item_scores(task, lower, answers[split], sequences)
        spread = interval(resample(np.array(scores)[:, None])[:, 0])
        out[split] = {"score": round(float(np.mean(scores)), 4), "interval": spread, "items": scores}
    return out, answers


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' files (see sources)")
    parser.add_argument("--base", default=DEFAULT, help="hub id or folder of a Llama-architecture model")
    parser.add_argument("--regime", choices=("zero-shot", *adapters.REGIMES), required=True)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--adapters", type=Path, default=HERE / "adapters", help="where train wrote")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--layers", type=int, default=8, help="upper layers that are adapted")
    parser.add_argument(
        "--rescore", action="store_true", help="score kept answers again, after a change of metric"
    )
    given = parser.parse_args(argv)
    lower = place(load_base(given.base), given.layers)
    for name in given.tasks:
        path = given.results / given.regime / f"{name}.json"
        folder = given.adapters / given.regime / name
        own = given.regime != "zero-shot"
        if own and not (folder / adapters.WEIGHTS).exists():
            print(f"{given.regime} {name}: no adapter in {folder}", flush=True)
            continue
        made = {"base": lower.base.name}
        if own and (folder / "log.json").exists():
            adapters.check_made(folder / "log.json", "--adapters", **made)
        made |= {"adapter": digest_of(folder)} if own else {}
        if path.exists():
            adapters.check_made(path, "--results", **made)
        at = answers_path(lower.base.name, name, folder if own else None)
        scored, known = path.exists(), at.exists()
        if given.rescore and not (scored and known):
            what, where = ("kept answers", at) if scored else ("score", path)
            print(f"{given.regime} {name}: no {what} in {where}", flush=True)
            continue
        if scored and not given.rescore and (known or not own):
            print(f"{given.regime} {name}: is in {path}", flush=True)
            continue
        upper = with_deltas(lower.upper, adapters.load_deltas(folder) if own else {})
        kept = json.loads(at.read_text()) if given.rescore else None
        found, answers = score(TASKS[name], lower, upper, given.data, given.regime, kept)
        found |= made
        at.write_text(json.dumps(answers))
        if scored and not given.rescore:
            before = json.loads(path.read_text())["test"]["score"]
            now = found["test"]["score"]
            print(f"{given.regime} {name}: {before:.3f} is in {path}", flush=True)
            print(f"  its answers are again in {at}, of score {now:.3f}", flush=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found) + "\n")
        print(
            f"{given.regime} {name}: test {found['test']['score']:.3f}, dev {found['dev']['score']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
