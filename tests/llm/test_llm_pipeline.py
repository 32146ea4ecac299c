"""The experiment on a real LLM, small: a random two-layer model, two tasks, a few steps."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs the extra: pip install -e '.[llm]'")
pytest.importorskip("sacrebleu", reason="needs the extra: pip install -e '.[llm]'")
pytest.importorskip("rouge_score", reason="needs the extra: pip install -e '.[llm]'")

from tiny import write_model

from experiments.llm import (
    adapters,
    compare,
    distill,
    model,
    moments,
    score,
    serve,
    stores,
    table,
    train,
    training_study,
)
from experiments.llm.activations import gather, hidden_of, pad, place
from experiments.llm.base import load_base
from experiments.llm.decoding import answer_logits, decode
from experiments.llm.distill import Teaching
from experiments.llm.readers import Item
from experiments.llm.tasks import TASKS, Task, load_sequences
from hydraopt_jax import formats

# of one length, as the prompts are: few shapes to compile
WORDS = ("red", "sea", "sky", "sun", "ice", "oak")
UPPER, RANK, ALPHA, STEPS = 1, 2, 4.0, 80


def read_words(data, turned):
    """Pairs of words to turn round, or to name the first of."""
    pairs = [(a, b) for a in WORDS for b in WORDS if a != b]
    random.Random(0).shuffle(pairs)
    items = [Item(f"{a} {b}", (f"{b} {a}" if turned else a,), f"{a} {b}") for a, b in pairs]
    return {"train": items[:20], "dev": items[20:25], "test": items[25:]}


TOY = {
    "turn": Task("turn", "answer", "Turn it round:\n{}", lambda data: read_words(data, True), "chrf"),
    "first": Task(
        "first",
        "classify",
        "Say the first:\n{}",
        lambda data: read_words(data, False),
        "accuracy",
        lambda data: WORDS,
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two adapters trained, scored, and all that was written on the way."""
    root = tmp_path_factory.mktemp("llm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRAOPT_LLM_CACHE", str(root / "cache"))
        for name, task in TOY.items():
            patch.setitem(TASKS, name, task)
        base = str(write_model(root / "base", bias=True))
        common = ["--data", str(root), "--base", base, "--regime", "shared", "--layers", str(UPPER)]
        where = ["--tasks", *TOY]
        settings = ["--rank", str(RANK), "--alpha", str(ALPHA), "--steps", str(STEPS)]
        settings += ["--rate", "0.02", "--plus", "1", "--rows", "8"]
        train.main([*common, *where, *settings, "--out", str(root / "adapters")])
        for regime in ("zero-shot", "shared"):
            score.main(
                [
                    *("--data", str(root), "--base", base, "--regime", regime, "--layers", str(UPPER)),
                    *(*where, "--adapters", str(root / "adapters"), "--results", str(root / "results")),
                ]
            )
        compared = [*common, *where, "--adapters", str(root / "adapters"), "--results", str(root / "results")]
        compare.main([*compared, "--only", "*K = 1, closed*", "SVD rank 4*", "merged, linear"])
        yield root, place(load_base(base), UPPER)


def test_training_lowers_the_loss_and_keeps_a_log(trained):
    root, _ = trained
    for name in TOY:
        log = json.loads((root / "adapters" / "shared" / name / "log.json").read_text())
        assert len(log["train_loss"]) == STEPS
        assert log["dev_loss"][-1][1] < log["dev_loss"][0][1]
        assert 0.2 < log["cosine_of_a_to_start"] < 1


def test_a_study_of_a_training_says_how_far_it_went_and_what_is_kept(trained, tmp_path, monkeypatch):
    root, _ = trained
    # smaller than a store of so little can be
    monkeypatch.setattr(training_study, "BUDGETS", ())
    folder, where = str(root / "adapters" / "shared"), ["--data", str(root), "--results", str(tmp_path)]
    for chosen in (f":{','.join(TOY)}", f":{','.join(TOY)}", ":turn"):
        training_study.main([f"{folder}{chosen}", *where, "--base", str(root / "base")])
    both, one = json.loads((tmp_path / "training-study.json").read_text())
    assert (both["tasks"], one["tasks"]) == (list(TOY), ["turn"])
    assert both["layers"] == UPPER
    assert both["energy_of_two_directions"] == 1.0
    for name in TOY:
        log = json.loads((root / "adapters" / "shared" / name / "log.json").read_text())
        best = min(loss for _, loss in log["dev_loss"])
        assert both["loss"][name] == pytest.approx(best, abs=2e-3)
        assert both["base_loss"][name] == pytest.approx(log["dev_loss"][0][1], abs=2e-3)
    # one task shares its factor with none
    assert one["rows"]["HydraOpt K = 1, Adam from the mean"]["gain_kept"]["turn"] == pytest.approx(
        1, abs=0.01
    )
    kept = both["rows"]["HydraOpt K = 2, Adam from the mean"]["gain_kept"].values()
    assert all(0 < x < 1.01 for x in kept)


def test_a_broken_off_training_ends_like_a_whole_one(trained, tmp_path, monkeypatch):
    root, lower = trained
    monkeypatch.setattr(train, "EVERY", 4)
    splits = load_sequences(TOY["turn"], root, lower.base.tokenizer, lower.base.stop)
    start = adapters.initialize(adapters.key_of("shared", "turn", 0), lower.upper, RANK)
    settings = {"rate": 0.02, "plus": 1.0, "steps": 8, "rows": 8, "scale": ALPHA / RANK, "seed": 0}
    whole, log = train.train(lower, start, splits, saved=tmp_path / "whole.npz", **settings)

    def stop_at_six(*given, **more):
        stop_at_six.left -= 1
        if stop_at_six.left < 0:
            raise KeyboardInterrupt
        return update(*given, **more)

    update, stop_at_six.left = train.update, 6
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", stop_at_six)
        with pytest.raises(KeyboardInterrupt):
            train.train(lower, start, splits, saved=tmp_path / "broken.npz", **settings)
    resumed, again = train.train(lower, start, splits, saved=tmp_path / "broken.npz", **settings)
    assert again["train_loss"] == pytest.approx(log["train_loss"], abs=1e-3)
    assert adapters.cosine(whole, resumed) > 0.9999


def test_folders_read_by_the_package_give_the_same_deltas(trained):
    root, _ = trained
    for name in TOY:
        folder = root / "adapters" / "shared" / name
        read = formats.read_adapter(folder)
        assert all(name.startswith("model.layers.1.") for name in read.a)
        through = stores.deltas_of({module: (read.a[module], read.b[module]) for module in read.a})
        direct = adapters.load_deltas(folder)
        for module in model.MODULES:
            np.testing.assert_allclose(through[module], direct[module], atol=1e-6)


def whole_logits(lower, sequences):
    """Logits `[N, P, V]` of whole sequences, all layers run together."""
    tokens = pad(sequences, max(map(len, sequences)), lower.base.stop)
    params = lower.outer | {
        "layers": {k: jnp.concatenate([v, lower.upper[k]]) for k, v in lower.layers.items()}
    }
    return np.asarray(
        jax.jit(model.forward, static_argnames="config")(params, tokens, config=lower.base.config)
    )


def test_batches_of_cached_activations_give_the_logits_of_the_whole_model(trained):
    root, lower = trained
    sequences = load_sequences(TOY["turn"], root, lower.base.tokenizer, lower.base.stop)["dev"]
    hidden = hidden_of(lower, sequences, dtype=np.float32)
    whole = whole_logits(lower, [s.tokens[:-1] for s in sequences])
    for chosen, _, found in answer_logits(lower, lower.upper, sequences, hidden):
        start = 0
        for i in chosen:
            prompt, answer = sequences[i].prompt, sequences[i].answer
            expected = whole[i, len(prompt) - 1 : len(prompt) - 1 + len(answer)]
            np.testing.assert_allclose(found[start : start + len(answer)], expected, atol=1e-4)
            start += len(answer)


def test_moments_are_those_of_inputs_and_of_gradients_at_outputs(trained):
    root, lower = trained
    sequences = load_sequences(TOY["turn"], root, lower.base.tokenizer, lower.base.stop)["dev"][:2]
    batch = gather(sequences, hidden_of(lower, sequences, dtype=np.float32), [0, 1], 2)
    mask = jnp.asarray(np.arange(batch.hidden.shape[1]) < [[3], [5]], jnp.float32)
    given = {"config": lower.base.config}
    key, seen = jax.random.key(0), {}
    found = moments.moments_of_batch(lower.outer, lower.upper, batch, mask, key, **given)
    sizes = {name: lower.upper[name].shape[2] for name in model.MODULES}
    zeros = {name: jnp.zeros((*batch.hidden.shape[:2], size)) for name, size in sizes.items()}

    def loss(added):
        def change(name, x, layer):
            jax.debug.callback(lambda value: seen.update({name: np.asarray(value)}), x)
            return added[name]

        return moments.drawn_loss(lower.outer, lower.upper, batch, key, change, lower.base.config)

    gradients = jax.block_until_ready(jax.grad(loss)(zeros))
    jax.effects_barrier()
    for name in model.MODULES:
        for side, moment in zip((seen[name], gradients[name]), found[name], strict=True):
            expected = np.einsum("np,npi,npj->ij", mask, side, side)
            np.testing.assert_allclose(moment[0], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_the_teaching_forward_pass_gives_the_logits_of_the_adapted_model(trained):
    root, lower = trained
    sequences = load_sequences(TOY["turn"], root, lower.base.tokenizer, lower.base.stop)["train"][:2]
    batch = gather(sequences, hidden_of(lower, sequences, dtype=np.float32), [0, 1], 2)
    read = formats.read_adapter(root / "adapters" / "shared" / "turn")
    found = distill.bind(lower)({name: (read.a[name], read.b[name]) for name in read.a}, batch)
    upper = score.with_deltas(lower.upper, adapters.load_deltas(root / "adapters" / "shared" / "turn"))
    (_, same, expected), *_ = answer_logits(
        lower, upper, sequences, [batch.hidden[0], batch.hidden[1]], rows=2
    )
    np.testing.assert_allclose(
        found[: same.weights.sum().astype(int)], expected[: same.weights.sum().astype(int)], atol=1e-4
    )


def test_decoding_with_a_cache_takes_the_best_token_every_time(trained):
    root, lower = trained
    sequences = load_sequences(TOY["turn"], root, lower.base.tokenizer, lower.base.stop)["test"]
    labels = score.labels_of(TOY["turn"], root, lower)
    prompts = [s.prompt for s in sequences]
    answers = decode(lower, lower.upper, [(prompt, []) for prompt in prompts], labels)
    whole = whole_logits(lower, [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    for logits, prompt, answer in zip(whole, prompts, answers, strict=True):
        best = logits[len(prompt) - 1 : len(prompt) - 1 + len(answer)].argmax(-1)
        assert best.tolist() == answer


def test_classification_answers_are_labels(trained):
    _, lower = trained
    answers = json.loads(score.answers_path(lower.base.name, "first").read_text())
    texts = {lower.base.tokenizer.decode(answer) for answer in answers["test"]}
    assert texts <= set(WORDS)


@pytest.mark.parametrize("row", ["hydraopt-k-1-closed-form", "svd-rank-4-4-bits"])
def test_verified_drafts_give_the_answers_of_plain_decoding(trained, row):
    root, lower = trained
    result = json.loads((root / "results" / "stores-shared" / f"{row}.json").read_text())
    made = stores.plan(stores.read_collection(root / "adapters" / "shared", list(TOY)))[result["row"]]
    kept = made(root / "again" / row)
    for name, task in TOY.items():
        layers = score.with_deltas(lower.upper, stores.deltas_of(kept.tasks[name]))
        sequences = load_sequences(task, root, lower.base.tokenizer, lower.base.stop)["test"]
        labels = score.labels_of(task, root, lower)
        answers = decode(lower, layers, [(s.prompt, []) for s in sequences], labels)
        collection = stores.read_collection(root / "adapters" / "shared", list(TOY))
        found = json.loads(compare.stored_answers_path(collection, row, name).read_text())
        assert [answer[:-1] if answer[-1] == lower.base.stop else answer for answer in found] == answers
        assert result["tasks"][name]["items"] == score.item_scores(task, lower, answers, sequences)


def test_refined_stores_start_from_plain_and_from_calibrated_ones(trained, tmp_path, monkeypatch):
    collection = stores.read_collection(trained[0] / "adapters" / "shared", list(TOY))
    moments = {name: np.ones(len(a), np.float32) for name, a in collection[0].a.items()}
    seen = {}

    def refine(start, given, **options):
        seen.update(options, start=start)
        return (start,)

    monkeypatch.setattr(stores.refinement, "refine", refine)
    monkeypatch.setattr(stores, "BUDGETS", (0.95,))
    monkeypatch.setattr(stores, "REFINED", (0.95,))
    rows = stores.plan(collection, lambda: moments, lambda count: Teaching(None, [], None))
    for label, wanted in (("", None), (", calibrated", moments)):
        rows[f"budget 0.95{label}, refined"](tmp_path / f"refined{label}")
        assert seen["calibration"] is wanted
        assert seen["start"].report["options"]["calibrated"] == (wanted is not None)
    assert not any("calibrated" in name for name in stores.plan(collection))


def test_batches_that_mix_tasks_give_the_answers_of_the_compared_store(trained):
    root, _ = trained
    row = ["--row", "HydraOpt K = 1, closed form", "--tasks", *TOY]
    where = ["--adapters", str(root / "adapters"), "--results", str(root / "results")]
    base = ["--base", str(root / "base"), "--layers", str(UPPER)]
    serve.main(["--data", str(root), "--regime", "shared", *base, *row, *where])
    found = json.loads((root / "results" / "serving-shared.json").read_text())
    assert found["HydraOpt K = 1, closed form"]["items"] == 10
    assert found["HydraOpt K = 1, closed form"]["differing"] == 0


def test_what_was_made_otherwise_is_not_taken_for_this(trained, capsys):
    root, _ = trained
    base, folder = ["--base", str(root / "base"), "--layers", str(UPPER)], str(root / "adapters")
    common = ["--data", str(root), "--regime", "shared", *base, "--tasks", *TOY]
    asked = ["--steps", str(STEPS), "--rate", "0.02", "--plus", "1", "--rows", "8", "--out", folder]
    asked += ["--rank", str(RANK), "--alpha", str(ALPHA)]
    train.main([*common, *asked])
    assert capsys.readouterr().out.startswith(f"shared turn: is in {root}")
    with pytest.raises(SystemExit, match=f"made with steps {STEPS}, not 7: give another --out"):
        train.main([*common, *asked, "--steps", "7"])
    with pytest.raises(SystemExit, match=f"made with r {RANK}, not 4: give another --out"):
        train.main([*common, *asked, "--rank", "4"])
    score.main([*common, "--adapters", folder, "--results", str(root / "results")])
    assert "is in" in capsys.readouterr().out
    scores = ["--adapters", folder, "--results", str(root / "results")]
    with pytest.raises(SystemExit, match="made with test_items 100, not 3: give another --results"):
        compare.main([*common, *scores, "--only", "merged, linear", "--items", "3"])
    with pytest.raises(SystemExit, match=r"independent/turn: has no adapter_model.safetensors"):
        compare.main([*common, *scores, "--regime", "independent"])
    log = root / "adapters" / "shared" / "turn" / "log.json"
    said = log.read_text()
    log.write_text(json.dumps(json.loads(said) | {"base": "another"}))
    for main in (score.main, compare.main):
        with pytest.raises(SystemExit, match="made with base another"):
            main([*common, "--adapters", folder, "--results", str(root / "results")])
    log.write_text(said)
    with pytest.raises(SystemExit, match=r"run `python -m experiments.llm.compare --only 'share'` first"):
        compare.stored_answers(stores.read_collection(root / "adapters" / "shared", TOY), "share", "turn")


def test_scores_of_another_codec_are_made_again(tmp_path):
    path, facts = tmp_path / "row.json", {"row": "budget 0.1"}
    kept = facts | {"format": 7, "tasks": {"turn": {}}}
    path.write_text(json.dumps(kept))
    assert compare.start_result(path, facts, stores.Row(5, {}, 7), 9) == kept
    made = compare.start_result(path, facts, stores.Row(5, {}, 8), 9)
    assert made == facts | {"format": 8, "bytes": 5, "fp16_bytes": 9, "tasks": {}}


def test_tables_have_every_row_and_task(trained, capsys):
    root, _ = trained
    where = ["--results", str(root / "results"), "--adapters", str(root / "adapters"), "--tasks", *TOY]
    table.main(where)
    printed = capsys.readouterr().out
    for name in (*TOY, "SVD rank 4, 4 bits", "merged, linear", "HydraOpt K = 1, closed form"):
        assert f"| {name} |" in printed
    for row in table.load_rows(root / "results", "shared", list(TOY)):
        assert row.drop_interval[0] <= row.drop <= row.drop_interval[1]
        assert row.worst >= row.drop


def test_one_adapter_for_all_diverges_more_than_own_ones_at_four_bits(trained):
    root, _ = trained
    rows = [json.loads(path.read_text()) for path in (root / "results" / "stores-shared").glob("*.json")]
    found = {row["row"]: np.mean([x["kl"] for x in row["tasks"].values()]) for row in rows}
    assert 0 < found["SVD rank 4, 4 bits"] < found["merged, linear"]
