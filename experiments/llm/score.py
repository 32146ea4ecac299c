"""Scores the base (zero-shot) and every task's own adapter on its test and dev items.

    python -m experiments.llm.score --data DATA --regime shared
    python -m experiments.llm.score --data DATA --regime zero-shot
    python -m experiments.llm.score --data DATA --regime zero-shot --tasks asset --rescore

One JSON per task in results/REGIME, with the score of every item; the answers themselves stay in the cache
folder, where the drafts of `stores` are read from. Tasks that are scored already are left alone.
"""

import argparse
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


def answers_path(base: str, regime: str, task: str) -> Path:
    """Where the answers of a task's own adapter (or of the base) are kept."""
    return cache_folder() / f"answers-{base.replace('/', '_')}-{regime}-{task}.json"


def score(
    task: Task,
    lower: Lower,
    upper: dict[str, Any],
    data: Path,
    regime: str,
    given: dict[str, list[list[int]]] | None = None,
) -> dict[str, Any]:
    """Scores per split of the model with `upper` for its upper layers, as they go into a results file.

    Answers are decoded, or those `given` per split.
    """
    splits = load_sequences(task, data, lower.base.tokenizer, lower.base.stop)
    labels = labels_of(task, data, lower)
    out: dict[str, Any] = {
        "task": task.name,
        "regime": regime,
        "base": lower.base.name,
        "metric": task.metric,
    }
    kept = {}
    for split, count in ITEMS.items():
        sequences = splits[split][:count]
        if given is None:
            kept[split] = decode(lower, upper, [(s.prompt, []) for s in sequences], labels)
        else:
            kept[split] = given[split]
        scores = item_scores(task, lower, kept[split], sequences)
        spread = interval(resample(np.array(scores)[:, None])[:, 0])
        out[split] = {"score": round(float(np.mean(scores)), 4), "interval": spread, "items": scores}
    answers_path(lower.base.name, regime, task.name).write_text(json.dumps(kept))
    return out


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
        trained = given.regime == "zero-shot" or (folder / "log.json").exists()
        if not trained or path.exists() != given.rescore:
            continue
        deltas = {} if given.regime == "zero-shot" else adapters.load_deltas(folder)
        upper, answers = with_deltas(lower.upper, deltas), None
        if given.rescore:
            answers = json.loads(answers_path(lower.base.name, given.regime, name).read_text())
        found = score(TASKS[name], lower, upper, given.data, given.regime, answers)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found) + "\n")
        print(
            f"{given.regime} {name}: test {found['test']['score']:.3f}, dev {found['dev']['score']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
