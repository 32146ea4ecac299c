"""Tokens, prompts and the files that hold them."""

import jax
import numpy as np
import pytest

from experiments.morphology import assets as written
from experiments.morphology.adapters import init_adapters
from experiments.morphology.pretrain import build_vocabulary, init_base
from hydraopt_jax import formats
from hydraopt_jax.demo import assets
from hydraopt_jax.demo.model import Config, modules
from hydraopt_jax.demo.tasks import Item, answer, characters, features, phonemes, prompt
from hydraopt_jax.demo.vocabulary import (
    END_ID,
    PAD_ID,
    SEPARATOR_ID,
    UNKNOWN_ID,
    encode_items,
    from_tokens,
    token_ids,
)

ITEMS = {
    "inflect-de": Item(characters("Öl") + features("N;DAT;PL"), characters("Ölen")),
    "analyse-pl": Item(characters("kaski"), features("N;VOC;PL")),
    "pronounce-it": Item(characters("l'età: |"), phonemes("l e t a ː")),
}


@pytest.mark.parametrize("name", list(ITEMS))
def test_tokens_survive_a_round_trip(name):
    vocabulary = build_vocabulary(ITEMS.values(), minimum=1)
    for tokens in (prompt(name, ITEMS[name]), ITEMS[name].output):
        assert tuple(vocabulary.tokens[i] for i in token_ids(vocabulary, tokens)) == tokens
    assert token_ids(vocabulary, answer(ITEMS[name])) == [*token_ids(vocabulary, ITEMS[name].output), END_ID]


def test_letters_and_phonemes_of_one_shape_differ():
    vocabulary = build_vocabulary([Item(("a",), ("phoneme:a",))], minimum=1)
    assert len(set(token_ids(vocabulary, ("a", "phoneme:a")))) == 2


def test_what_the_vocabulary_lacks_is_unknown_in_a_prompt_and_never_right_in_an_answer():
    vocabulary = build_vocabulary([Item(("a",), ("a",))], minimum=1)
    items = encode_items(vocabulary, {"correct-en": [Item(("z",), ("z",))], "correct-de": []})
    assert UNKNOWN_ID in items.prompts[0, 0]
    assert items.targets[0, 0, 0] == -1
    assert items.valid.tolist() == [[True], [False]]
    assert items.prompts[1, 0].tolist() == [SEPARATOR_ID, *[PAD_ID] * (items.prompts.shape[2] - 1)]


def test_decomposed_text_is_composed():
    assert characters("e\u0301") == ("é",)
    assert phonemes("a\u0303 b") == ("phoneme:ã", "phoneme:b")


def test_repeated_tokens_are_refused():
    with pytest.raises(ValueError, match="repeats"):
        from_tokens(["a", "a"])


def test_the_sample_file_keeps_items(tmp_path):
    items = {name: [item] for name, item in ITEMS.items()}
    written.save_sample(tmp_path / "a.gz", items)
    written.save_sample(tmp_path / "b.gz", items)
    assert assets.load_sample(tmp_path / "a.gz") == items
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


@pytest.mark.parametrize("name", ["adapters.zip", "folders"])
def test_adapters_come_back_with_the_scale_in_b(tmp_path, name):
    rng = np.random.default_rng(0)
    config = Config(9, layers=1, width=8, hidden=16)
    lora = {
        m: (rng.normal(size=(i, 4)).astype(np.float16), rng.normal(size=(4, o)).astype(np.float16))
        for m, (i, o) in modules(config).items()
    }
    written.save_adapters(tmp_path / name, {"inflect-de": lora, "analyse-pl": lora}, alpha=12.0)
    found = written.load_adapters(tmp_path / name)
    assert set(found) == {"inflect-de", "analyse-pl"}
    for module, (a, b) in lora.items():
        np.testing.assert_array_equal(found["inflect-de"][module][0], a.astype(np.float32))
        np.testing.assert_array_equal(found["inflect-de"][module][1], 3 * b.astype(np.float32))


def test_adapters_of_another_base_are_refused(tmp_path):
    own, other = (init_base(Config(9, layers=1, width=8, hidden=16), jax.random.key(k)) for k in (0, 1))
    lora = init_adapters(own.config, 1, 4, jax.random.key(2), shared=False)
    one = {name: (a[0], b[0]) for name, (a, b) in lora.items()}
    for place, revision in (("said", written.revision_of(own)), ("unsaid", None)):
        written.save_adapters(tmp_path / place, {"inflect-de": one}, 12.0, revision)
    said, unsaid = (formats.read_adapter(tmp_path / x / "inflect-de") for x in ("said", "unsaid"))
    written.check_base([said, unsaid], own)
    written.check_base([unsaid], other)
    with pytest.raises(SystemExit, match="inflect-de: trained on another base than --base: give that one"):
        written.check_base([said, unsaid], other)


def test_an_empty_folder_is_no_collection(tmp_path):
    with pytest.raises(FileNotFoundError, match="no PEFT folder"):
        written.load_adapters(tmp_path)


def test_the_base_keeps_its_sizes_and_its_vocabulary(tmp_path):
    base = init_base(Config(9, layers=1, width=8, hidden=16), jax.random.key(0))
    vocabulary = from_tokens("abcdefghi")
    written.save_base(tmp_path / "base.safetensors", base, vocabulary)
    found = assets.load_base(tmp_path / "base.safetensors")
    assert found.config == base.config
    assert assets.load_vocabulary(tmp_path / "base.safetensors") == vocabulary
    assert found.params.keys() == base.params.keys()


def test_the_archive_unpacks_to_peft_folders(tmp_path):
    folders = assets.unpack_adapters(assets.ADAPTERS_FILE, tmp_path)
    assert len(folders) == 40
    assert {p.name for p in folders[0].iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
