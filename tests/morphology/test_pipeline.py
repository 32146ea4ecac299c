"""The whole experiment in small, on generated words."""

import importlib
import itertools
import random

import jax
import numpy as np
import pytest

from experiments.morphology import dataset, stores, summary
from experiments.morphology.adapters import init_adapters, scaled, train_adapters
from experiments.morphology.assets import save_adapters
from experiments.morphology.config import Adapting, Data, Pretraining, Refining
from experiments.morphology.pretrain import pretrain, vocabulary_of
from hydraopt_jax import formats
from hydraopt_jax.demo.assets import unpack_adapters
from hydraopt_jax.demo.evaluate import evaluate
from hydraopt_jax.demo.model import Config
from hydraopt_jax.demo.tasks import LANGUAGES
from hydraopt_jax.demo.vocabulary import encode_items

DATA = Data(minimum=1, held_out=20)
ADAPTING = Adapting(rank=4, steps=24, batch=16, peak=1e-2, warmup=2, chunk=6, save=12)
TASKS, SPOKEN = ("inflect", "pronounce"), ("en", "de")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Words of open syllables that take an ending by their features, and sound as they are written."""
    root = tmp_path_factory.mktemp("data")
    (root / "sigmorphon2018").mkdir()
    (root / "wikipron").mkdir()
    syllables = ["".join(pair) for pair in itertools.product("bdklmt", "aeo")]
    for code in SPOKEN:
        rng = random.Random(code)
        words = ["".join(rng.choices(syllables, k=rng.randint(2, 3))) for _ in range(400)]
        endings = {"V;PST": "id", "V;PRS": "in"}
        rows = []
        for word in words:
            bundle = rng.choice(list(endings))
            rows.append(f"{word}\t{word}{endings[bundle]}\t{bundle}\n")
        cuts = {"train-high": rows[:320], "dev": rows[320:360], "test": rows[360:]}
        for file, part in cuts.items():
            (root / "sigmorphon2018" / f"{LANGUAGES[code]}-{file}").write_text("".join(part), "utf-8")
        sounds = [f"{word}\t{' '.join(word)}\n" for word in words] + ["dodo\tx y\n", "dodo\tx z\n", "b\tb\n"]
        (root / "wikipron" / f"{dataset.PRONUNCIATIONS[code]}.tsv").write_text("".join(sounds), "utf-8")
    return root


@pytest.fixture(scope="module")
def items(folder):
    return dataset.load_items(folder, DATA, tasks=TASKS, languages=SPOKEN)


def test_no_word_is_on_two_sides(folder):
    made = dataset.load_items(folder, DATA, languages=SPOKEN)
    assert len(made) == 10
    forms: dict[str, dict[str, set]] = {
        code: {"train": set(), "dev": set(), "test": set()} for code in SPOKEN
    }
    for name, splits in made.items():
        asked = {split: {item.input for item in rows} for split, rows in splits.items()}
        assert not asked["test"] & (asked["train"] | asked["dev"])
        assert not asked["dev"] & asked["train"]
        task, code = name.split("-")
        for split, rows in splits.items():
            own = {"inflect": 1, "correct": 1, "lemmatise": 0, "analyse": 0}
            forms[code][split] |= {item[own[task]] for item in rows if task in own}
    for sides in forms.values():
        assert not sides["test"] & (sides["train"] | sides["dev"])
        assert not sides["dev"] & sides["train"]


def test_words_of_several_pronunciations_are_left_out(items):
    spoken = {item.input for rows in items["pronounce-en"].values() for item in rows}
    assert tuple("dodo") not in spoken
    assert tuple("b") not in spoken


def test_items_are_the_same_each_time(folder, items):
    assert dataset.load_items(folder, DATA, tasks=TASKS, languages=SPOKEN) == items


def test_a_bad_line_is_named(tmp_path):
    (tmp_path / "x").write_text("a\tb\na\n", "utf-8")
    with pytest.raises(ValueError, match=r"x:2: 1 columns where 2 are expected"):
        dataset.read_table(tmp_path / "x", 2)


@pytest.mark.parametrize("shared", [True, False])
def test_fresh_adapters_share_their_input_factor_or_do_not(shared):
    config = Config(9, layers=1, width=8, hidden=16)
    lora = init_adapters(config, 3, 2, jax.random.key(0), shared=shared)
    a, b = lora["layers.0.down_proj"]
    assert bool((a[0] == a[1]).all()) == shared
    assert not b.any()


@pytest.fixture(scope="module")
def trained(items, tmp_path_factory):
    """A small base, and adapters of one initialization trained on it without a stop, with both traces."""
    vocabulary = vocabulary_of(items, DATA)
    rows = dataset.training_rows(items, vocabulary, DATA)
    config = Config(len(vocabulary.tokens), layers=1, width=32, heads=2, hidden=64)
    first = Pretraining(steps=60, batch=32, peak=5e-3, warmup=5, decay=10, chunk=20, save=20)
    base, losses = pretrain(rows, config, first, tmp_path_factory.mktemp("base"))
    whole, trace = train_adapters(base, rows, ADAPTING, tmp_path_factory.mktemp("whole"), shared=True)
    return vocabulary, rows, base, losses, whole, trace


def test_the_whole_pipeline_learns_resumes_and_repeats(items, trained, tmp_path):
    vocabulary, rows, base, losses, whole, trace = trained
    assert losses[-1] < 0.8 * losses[0]
    _, before = train_adapters(base, rows, ADAPTING, tmp_path, shared=True, stop=12)
    resumed, after = train_adapters(base, rows, ADAPTING, tmp_path, shared=True)
    np.testing.assert_allclose(before + after, trace, rtol=1e-5)
    for name, (a, b) in whole.items():
        np.testing.assert_allclose(resumed[name][0], a, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(resumed[name][1], b, rtol=1e-4, atol=1e-6)

    held = encode_items(vocabulary, {t: s["test"] for t, s in items.items()}, limit=20)
    scale = ADAPTING.alpha / ADAPTING.rank
    zero, own = evaluate(base, {}, held), evaluate(base, scaled(whole, scale), held)
    assert own.error.mean() < zero.error.mean()


def test_every_kind_of_row_is_scored_and_a_second_run_adds_nothing(items, trained, tmp_path):
    vocabulary, _, base, _, whole, _ = trained
    one = {t: {n: (a[k], b[k]) for n, (a, b) in whole.items()} for k, t in enumerate(items)}
    save_adapters(tmp_path / "adapters.zip", one, ADAPTING.alpha)
    folders = unpack_adapters(tmp_path / "adapters.zip", tmp_path / "in")
    collection = [formats.read_adapter(p) for p in folders]
    small = Refining((0.9,), (3,), (0.05,), prompts=(8,), check=2, moments=4, batch=2, seeds=(0,), save=2)
    given = base, vocabulary, collection, items, small, tmp_path / "result.json", tmp_path / "out"
    stores.run(*given, count=20, only=["budget 0.9, output gradients*"])
    found = stores.run(*given, count=20, only=["merged, linear"])
    assert stores.run(*given, count=20, only=["merged, linear"]) == found
    with pytest.raises(SystemExit, match="no row is called 'merged, none'; the rows are: budget 0"):
        stores.run(*given, count=20, only=["merged, linear", "merged, none"])
    done = found["rows"]
    own, kept = (np.array(done[x]["test_cer"]) for x in ("own adapters", "budget 0.9, output gradients"))
    assert set(done) - {"zero-shot", "own adapters", "merged, linear"} == {
        "budget 0.9, output gradients",
        "budget 0.9, output gradients, refined",
    }
    np.testing.assert_allclose(kept, own, atol=0.05)
    assert np.mean(done["merged, linear"]["test_cer"]) > own.mean()
    assert done["merged, linear"]["bytes"] < done["budget 0.9, output gradients"]["bytes"]


def test_one_command_goes_through_all_steps(monkeypatch, tmp_path):
    said = []
    for name in ("download", "pretrain", "adapters", "stores", "summary"):
        module = importlib.import_module(f"experiments.morphology.{name}")
        monkeypatch.setattr(module, "main", lambda argv, name=name: said.append((name, argv)))
    whole = importlib.import_module("experiments.morphology.__main__")
    whole.main(["--data", "D", "--out", str(tmp_path)])
    order = ["download", "pretrain", "adapters", "stores", "adapters", "stores", "summary"]
    assert [name for name, _ in said] == order
    regimes = [argv[argv.index("--regime") + 1] for name, argv in said if name == "stores"]
    assert sorted(regimes) == ["independent", "shared"]


def test_the_summary_draws_only_where_it_is_asked(capsys, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(summary.report, "plot_tradeoff", lambda path, *rest, **words: drawn.append(path))
    summary.main([])
    assert "## shared" in capsys.readouterr().out
    assert drawn == []
    summary.main(["--plots", str(tmp_path)])
    assert [x.parent for x in drawn] == [tmp_path, tmp_path]
