"""Serves a store of all tasks in batches that mix them, and checks the answers against those of `compare`.

    python -m experiments.llm.serve --data DATA --regime shared --row "budget 0.125"

`compare` adds each stored adapter to the weights; here the base stays as it is and `hydraopt_jax.serving`
adds each row's own adapter. A batch holds items of all tasks, one after another, with the answers that
`compare` found: where the best token is the answer's at every position, decoding in this batch gives that
very answer.
Prints and writes results/serving-REGIME.json: items, and how many of them differ.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.llm import adapters, model, stores
from experiments.llm.activations import Lower, gather, hidden_of, place
from experiments.llm.base import DEFAULT, load_base
from experiments.llm.compare import slug_of, stored_answers, stores_folder
from experiments.llm.score import labels_of
from experiments.llm.tasks import TASKS, Sequence, load_sequences

HERE = Path(__file__).parent


@partial(jax.jit, static_argnames=("config", "first"))
def mixed_logits(outer, upper, modules, batch, ids, *, config, first):
    """Logits `[A, V]` of a batch whose sequences belong to tasks `ids` `[N]`; layers count from `first`."""
    x = batch.hidden
    for i in range(upper["q_proj"].shape[0]):

        def change(name: str, h: jax.Array, weights: model.Tree, layer: int = first + i) -> jax.Array:
            return stores.serve(h, modules, f"model.layers.{layer}.{model.GROUPS[name]}.{name}", ids[:, None])

        one = {name: weight[i : i + 1] for name, weight in upper.items()}
        x, _ = model.run_layers(one, x, config=config, change=change)
    return model.logits(outer, x.reshape(-1, config.width)[batch.at], config=config)


def differing(
    lower: Lower, row: Path, tasks: list[str], drafts: list[list[Sequence]], labels: list[Any]
) -> int:
    """Number of items whose answer differs when served with one item of each task per batch."""
    modules, index = stores.load_served(row, tasks)
    hidden = [hidden_of(lower, mine, dtype=np.float32) for mine in drafts]
    count = 0
    for turn in range(max(map(len, drafts))):
        present = [t for t in range(len(tasks)) if turn < len(drafts[t])]
        sequences = [drafts[t][turn] for t in present]
        batch = gather(sequences, [hidden[t][turn] for t in present], list(range(len(present))), len(tasks))
        ids = np.full(len(tasks), -1, np.int32)
        ids[: len(present)] = [index[t] for t in present]
        given = {"config": lower.base.config, "first": lower.depth}
        logits = np.asarray(mixed_logits(lower.outer, lower.upper, modules, batch, jnp.asarray(ids), **given))
        start = 0
        for t, sequence in zip(present, sequences, strict=True):
            answer = sequence.answer
            scores = labels[t].candidates(logits[start : start + len(answer)])
            best = [labels[t].choose(scores[k], answer[:k]) for k in range(len(answer))]
            count += best != answer
            start += len(answer)
    return count


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' files (see sources)")
    parser.add_argument("--base", default=DEFAULT, help="hub id or folder of a Llama-architecture model")
    parser.add_argument("--regime", choices=adapters.REGIMES, required=True)
    parser.add_argument(
        "--row", required=True, help="a row of compare that is a store on disk, such as 'budget 0.125'"
    )
    parser.add_argument("--adapters", type=Path, default=HERE / "adapters", help="where train wrote")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--layers", type=int, default=8, help="upper layers that are adapted")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS), help="the collection")
    given = parser.parse_args(argv)
    lower = place(load_base(given.base), given.layers)
    collection = stores.read_collection(given.adapters / given.regime, given.tasks)
    drafts, labels = [], []
    for name in given.tasks:
        items = load_sequences(TASKS[name], given.data, lower.base.tokenizer, lower.base.stop)["test"]
        answers = stored_answers(collection, given.row, name)
        pairs = zip(items[: len(answers)], answers, strict=True)
        drafts.append([s._replace(answer=answer) for s, answer in pairs])
        labels.append(labels_of(TASKS[name], given.data, lower))
    found = differing(lower, stores_folder(collection) / slug_of(given.row), given.tasks, drafts, labels)
    count = sum(map(len, drafts))
    path = given.results / f"serving-{given.regime}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[given.row] = {"items": count, "differing": found, "adapters": stores.digest(collection)}
    path.write_text(json.dumps(results) + "\n")
    print(f"{given.row}: {count} items in batches of {len(given.tasks)} tasks, {found} answers differ")


if __name__ == "__main__":
    main()
