"""Patterns of a configuration: as Python's `re` reads them, in time linear in the name."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_folders import adapter, folder, linear

from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import patterns, peft_config, read_adapter, write_adapter

NAMES = st.lists(
    st.sampled_from(["layers", "0", "1", "11", "q", "qq", "k_proj", "q-proj", "a1", ""]),
    min_size=1,
    max_size=4,
).map(".".join)
ATOMS = st.sampled_from(
    ["layers", "q", "k_proj", "1", ".", r"\.", r"\d", r"\w", r"[01]", r"[^k]", r"\-", "^", "$", "a?", r"\b"]
)
KEYS = st.recursive(
    ATOMS,
    lambda x: (
        st.lists(x, min_size=1, max_size=4).map("".join)
        | st.lists(x, min_size=1, max_size=3).map(lambda y: f"({'|'.join(y)})")
        | st.tuples(
            st.lists(x, max_size=2).map("".join), st.sampled_from(["*", "+", "?", "*?", "{1,2}", "{2}"])
        ).map(lambda y: f"(?:{y[0]}){y[1]}")
    ),
    max_leaves=8,
)


def python_matches(keys, name):
    """What PEFT does."""
    return next((n for n, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", name)), None)


@settings(max_examples=500, deadline=None)
@given(keys=st.lists(KEYS | NAMES | NAMES.map(lambda x: "^" + re.escape(x)), max_size=4), name=NAMES)
def test_first_match_is_that_of_python(keys, name):
    assert patterns.first_match(tuple(keys), name) == python_matches(keys, name)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "key",
    [
        "(a|aa)" * 30 + "b",
        "a?" * 30 + "a" * 30,
        "(.*a)(.*a)(.*a)x",
        "((a|b)*a)" + "(a|b)" * 20,
        "(?:a{1,9}){9}b",
    ],
)
def test_no_key_takes_long(tmp_path, field, key):
    """Each of the first three runs for ever, or for seconds, under Python's `re`."""
    name = ".".join(["a" * 60] * 5)
    path = folder(tmp_path, linear(name), **{field: {key: 2}})
    start = time.process_time()
    assert set(read_adapter(path).a) == {name}
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "key", [r"(q)\1", "(?=q)q", "(?<!k)q", "(?!k).*", "[[:alpha:]]q", "q{,2}", "q" * 1001, "q)|(k"]
)
def test_what_linear_time_has_not_is_refused_by_name(tmp_path, field, key):
    with pytest.raises(HydraOptError) as caught:
        read_adapter(folder(tmp_path, linear(), **{field: {key: 2}}))
    text = str(caught.value)
    assert "\n" not in text
    assert all(x in text for x in ("adapter_config.json", field, repr(key)[1:40], "name the modules"))


def test_too_many_keys_are_refused(tmp_path):
    many = {f"(a|b|c){n}{'x' * 500}": 2 for n in range(200)}
    with pytest.raises(HydraOptError, match="rank_pattern its keys are too large together"):
        read_adapter(folder(tmp_path, linear(), rank_pattern=many))


def test_a_key_a_module_is_fast():
    """As EVA writes them: one of 882 full names, dots not escaped."""
    names = tuple(f"model.layers.{n}.self_attn.{x}_proj" for n in range(126) for x in "qkvoudg")
    start = time.process_time()
    assert [patterns.first_match(names, x) for x in names] == list(range(len(names)))
    assert time.process_time() - start < 20


@pytest.mark.parametrize(("name", "key"), [("q\nq", "q"), ("ä", r"\w"), ("x" * 401, "q"), ("Ä", "(?i:ä)")])
def test_names_that_would_be_read_differently_are_refused(name, key):
    with pytest.raises(HydraOptError, match="name the modules"):
        patterns.first_match((key,), name)


def test_odd_names_of_ours_are_read_back(tmp_path):
    """Ranks are written by full name, whatever characters it has and however long it is."""
    ranks = {"a b": 1, "ä.x": 2, "q-#~&": 3, "x" * 600: 4}
    write_adapter(tmp_path / "out", adapter(ranks))
    assert {n: a.shape[1] for n, a in read_adapter(tmp_path / "out").a.items()} == ranks


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(a|aa)*q"},
        {"exclude_modules": "(a|aa)*k"},
        {"layers_pattern": "(a|aa)*", "layers_to_transform": [0]},
    ],
)
def test_patterns_of_targets_are_not_passed_on(tmp_path, fields):
    """PEFT matches them by `re`; which modules they mean is known."""
    read = read_adapter(folder(tmp_path / "in", linear(), **fields))
    assert read.config.items() >= fields.items()
    written = peft_config.unit_scale_config(read.config, {"layers.0.q": 2})
    assert written["target_modules"] == ["layers.0.q"]
    assert not any(written[k] for k in ("exclude_modules", "layers_pattern", "layers_to_transform"))


def test_targets_by_name_are_passed_on():
    fields = {"target_modules": ["q", "v"], "layers_pattern": "layers", "layers_to_transform": [1]}
    assert peft_config.unit_scale_config(fields, {"layers.1.q": 2}).items() >= fields.items()
    assert (
        peft_config.unit_scale_config({"target_modules": "all-linear"}, {"q": 2})["target_modules"]
        == "all-linear"
    )
