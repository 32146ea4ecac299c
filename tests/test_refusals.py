"""Refusals that no other test asks for: each names the thing and the way out, in one line."""

import gzip
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import hydraopt_jax as hydra
from hydraopt_jax import HydraOptError, calibration, deferred, formats, locks, provenance, synthetic
from hydraopt_jax.adapters import check_headers
from hydraopt_jax.cli import common
from hydraopt_jax.cli.merging import parse_scale
from hydraopt_jax.demo import main as demo
from hydraopt_jax.formats import model_maps, patterns, peft, peft_config, tensor_files, trees
from hydraopt_jax.forms import Gradient, Hydra
from hydraopt_jax.forms.hyperparameters import check_form
from hydraopt_jax.linalg import decompose
from hydraopt_jax.merging import activations, compressors, registry, whole_adapters
from hydraopt_jax.rate_control import distortion, options
from hydraopt_jax.store import checks, files, folder, manifest, portable, tensors
from hydraopt_jax.store.decoding import decode_all
from hydraopt_jax.store.removal import select

ONES = np.ones((2, 3, 3), np.float32)
DELTAS = decompose.svd(jnp.asarray(ONES), jnp.asarray(ONES))
PAIR = synthetic.collection(tasks=2, modules={"q": (8, 6)}, rank=2)
TERMS = {"q": ()}
STORE = hydra.compress(PAIR, budget=1)
TREE = {"q": {"kernel_lora_a": np.ones((4, 2), np.int32), "kernel_lora_b": np.ones((2, 4), np.int32)}}
RECIPE = {"recipe": provenance.RECIPE}
TASKS = ["legal", "medical"]
EXISTS = "exists: choose another path, or replace what is there (--overwrite, overwrite=True)"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with a store, as a folder and as a file, and what else the cases name."""
    home = tmp_path_factory.mktemp("refusals")
    hydra.save(home / "store", STORE)
    hydra.save(home / "one.safetensors", STORE)
    shutil.copytree(home / "store", home / "torn")
    for x in (home / "torn" / "segments").iterdir():
        shutil.rmtree(x)
    (home / "short.safetensors").write_bytes((home / "one.safetensors").read_bytes()[:-1])
    (home / "empty").mkdir()
    (home / "text").write_text("no store")
    formats.write_adapter(home / "peft", PAIR[0])
    formats.write_checkpoint(home / "tree", PAIR[0], "flax_nnx", scale=1.0)
    return home


def changed(**sides):
    """The first adapter with a factor of `q` replaced."""
    shapes = {"a": (8, 2), "b": (2, 6)}
    return PAIR[0].replace(**{k: {"q": np.full(shapes[k], v)} for k, v in sides.items()})


PURE = [
    (lambda: check_headers([("a", "", {}, {"q": (2, 3)}), ("b", "", {}, {"q": (2, 4)})]), "one base model"),
    (lambda: common.parse_numbers("--weight", ["legal"]), "--weight legal: give NAME=NUMBER"),
    (lambda: common.parse_numbers("--weight", ["legal=1", "legal=2"]), "legal=2: was given before"),
    (lambda: common.parse_numbers("--weight", ["legal=1e300"]), "--weight legal=1e300: is not a number that"),
    (lambda: common.parse_numbers("--weight", ["legal=nan"]), "--weight legal=nan: is not a number that"),
    (lambda: parse_scale("1e300"), "--scale 1e300: is not a number that float32 holds"),
    (lambda: parse_scale("1e-300"), "--scale 1e-300: is not a number that float32 holds"),
    (
        lambda: common.parse_files("--moments", ["file"], TASKS),
        "file: give NAME=VALUE, NAME one of",
    ),
    (lambda: common.parse_files("--moments", ["lega=x"], TASKS), "no task 'lega': did you mean 'legal'?"),
    (lambda: model_maps.table_of("nope", "tunix"), "family 'nope': must be one of"),
    (lambda: patterns.compile_key(patterns._DIFFERENT[0]), "is not supported: name the modules"),
    (lambda: peft_config.check_config({"peft_type": "LORA", "rank_pattern": [1]}, "x"), "x: rank_pattern is"),
    (
        lambda: formats.write_trained("x", PAIR[0], "gemma", "gemma", scale=2.0),
        "gemma has no scale: leave",
    ),
    (lambda: trees.read_tree(TREE, "qwix", task="t", scale=1.0), "a LoRA factor must be floating"),
    (
        lambda: tensor_files.disk_array("k", np.array([np.nan]), np.dtype("f2")),
        "k: has NaN or infinite",
    ),
    (lambda: hydra.forms.hydra(DELTAS, heads=1, rank=0), "rank = 0: must be at least 1"),
    (lambda: check_form(Hydra(rank=0), 2), "rank = 0: must be at least 1"),
    (lambda: check_form(Hydra(heads=2.0), 2), "heads = 2.0: give a whole number"),
    (lambda: check_form(Hydra(rank=2.5), 2), "rank = 2.5: give a whole number"),
    (lambda: check_form(Hydra(solver=Gradient(steps=None)), 2), "steps = None: give a whole number"),
    (lambda: check_form(Hydra(side="up"), 2), "side = 'up': must be one of in, out, auto"),
    (lambda: check_form(Hydra(solver=Gradient(start="x")), 2), "start = 'x': must be one of closed, mean"),
    (
        lambda: activations.regmean(ONES, ONES, np.ones(2), moments=[np.eye(3)], rank=1),
        "tasks: give one each",
    ),
    (lambda: compressors.k_merge_slots(jnp.eye(2), 0), "slots = 0: must be at least 1"),
    (lambda: registry.method_of("tie"), "method 'tie': did you mean 'ties'?"),
    (lambda: registry.check_options("ties", {"keep": 1}), "keep: ties takes"),
    (lambda: registry.check_options("tsv-m", {"keep": 0}), "keep = 0: must be at least 1"),
    (lambda: registry.check_options("ties", {"density": 2.0}), "density = 2: must lie in (0, 1]"),
    (lambda: registry.check_options("regmean", {}), "regmean needs moments: give them"),
    (
        lambda: whole_adapters.check_weights([1.0], registry.METHODS["ties"], 2),
        "1 weights for 2 adapters",
    ),
    (lambda: whole_adapters.check_weights([np.nan], registry.METHODS["ties"], 1), "weights = [nan]: must be"),
    (
        lambda: options.check_options(options.Options(max_error=0)),
        "an error of 0 is had with --budget 1",
    ),
    (lambda: options.check_options(options.Options(budget=-1.0)), "must be positive"),
    (
        lambda: options.check_options(options.Options(budget=0.5, weights={"a": 0})),
        "weight of 'a' = 0: must",
    ),
    (lambda: options.check_options(options.Options(budget=0.5, share="no")), "share = 'no': give True or"),
    (lambda: hydra.compress(PAIR, form="hydra"), "form = 'hydra': give a form of hydraopt_jax.forms"),
    (lambda: hydra.compress(PAIR, budget=0.5, weights=[1, 2]), "weights = [1, 2]: give task name -> weight"),
    (lambda: hydra.serving.Slots(STORE, 1).load(None, "x"), "names = 'x': one name, not one per row"),
    (lambda: hydra.compress(PAIR, budget=1e-9), "below the smallest store of this collection"),
    (lambda: select(STORE, []), "select: name at least one task"),
    (lambda: select(STORE, ["task-01", "task-00", "task-01"]), "select: 'task-01' is named twice"),
    (
        lambda: hydra.refine(STORE, PAIR, forward=None, batches=[0]),
        "refine: the store keeps the adapters bit for bit",
    ),
    (lambda: hydra.measure(STORE, [changed(a=np.nan)]), "q has NaN or infinite values in its input-side"),
    (lambda: options.relative_weights(TASKS, options.Options(weights={"x": 1})), "weights: no task 'x'"),
    (lambda: tensors.check_dtype("int8"), "dtype = 'int8': must be one of"),
    (lambda: manifest.gunzipped("s", b"no gzip at all"), "s: damaged store: its manifest does not match"),
    (
        lambda: manifest.parse("s", json.dumps({"format": manifest.FORMAT, "version": 0}).encode()),
        "version 0",
    ),
]


@pytest.mark.parametrize(("call", "words"), PURE, ids=[words for _, words in PURE])
def test_values_are_refused_in_one_line(call, words):
    with pytest.raises(HydraOptError) as refused:
        call()
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


UNPAIRED = [
    ({"b": {}}, "q has one factor: give both"),
    ({"a": {}}, "q has one factor: give both"),
    ({"a": {"q": np.ones((8, 1))}}, "q has factors of shapes [8, 1] and [2, 6]: give a [in, rank] and b"),
    ({"b": {"q": np.ones((1, 6))}}, "q has factors of shapes [8, 2] and [1, 6]"),
    ({"a": {"q": np.ones((1, 8, 2))}}, "q has factors of shapes [1, 8, 2] and [2, 6]"),
    ({"a": {"q": np.ones((8, 2), complex)}}, "q has factors of complex128: give real numbers"),
]


@pytest.mark.parametrize(("given", "words"), UNPAIRED, ids=[words for _, words in UNPAIRED])
def test_factors_that_do_not_belong_together_are_refused_everywhere(given, words):
    bad = PAIR[0].replace(**given)
    for call in (
        lambda: hydra.compress([bad], budget=1),
        lambda: hydra.compress([bad], max_error=0.1),
        lambda: hydra.add(STORE, bad.replace(task="new")),
        lambda: hydra.similarity([bad, PAIR[1]]),
        lambda: hydra.measure(STORE, [bad]),
    ):
        with pytest.raises(HydraOptError, match=re.escape(words)):
            call()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (PAIR[0], "task-00: one adapter, not a sequence: give [adapter]"),
        ({x.task: x for x in PAIR}, "adapters: dict, not a sequence: give list(adapters.values())"),
        ("adapters/*", "adapters: 'adapters/*' is not an Adapter: hydraopt_jax.read reads folders"),
        ([PAIR[0], "legal"], "adapters: 'legal' is not an Adapter"),
        (iter(PAIR), "adapters: list_iterator, not a sequence: give list(adapters)"),
        (3, "adapters: 3 is not an Adapter"),
    ],
)
def test_what_is_no_sequence_of_adapters_is_refused_everywhere(given, words):
    for call in (
        lambda: hydra.compress(given, budget=0.5),
        lambda: hydra.similarity(given),
        lambda: hydra.frontier(given),
        lambda: hydra.merge(given, "linear"),
        lambda: hydra.measure(STORE, given),
        lambda: hydra.refine(STORE, given, forward=lambda lora, x: x, batches=[1]),
    ):
        with pytest.raises(HydraOptError, match=re.escape(words)):
            call()
    with pytest.raises(HydraOptError, match="is not an Adapter"):
        hydra.add(STORE, [PAIR[0]])


@pytest.mark.parametrize("call", [select, decode_all, hydra.serving.load], ids=lambda x: x.__name__)
def test_names_of_tasks_are_a_sequence_and_a_store_is_one(call):
    with pytest.raises(HydraOptError, match=re.escape("one name, not a sequence: give ['task-00']")):
        dict(call(STORE, tasks="task-00"))
    with pytest.raises(HydraOptError, match=r"'store': not a Store: hydraopt_jax\.open opens a folder or"):
        dict(call("store", tasks=["task-00"]))


def unbelievable(at):
    with checks.believing(at, "its manifest"):
        raise KeyError("tasks")


def shortened(at):
    (at / "short").write_bytes(b"12")
    np.asarray(deferred.in_file(str(at / "short"), 0, (4,), "f4"))


def cut(at):
    whole = portable.source_of(at / "one.safetensors")
    short = whole._replace(label="s", read=lambda *x: whole.read(*x) if x[0] <= 8 else b"")
    hydra.decode(portable.open_source(short), "task-00")


FILES = [
    (cut, "s: damaged store: it ends too early: restore it from a copy"),
    (lambda at: files.save(at / "new", hydra.open(at / "store"), limit=1), "bytes, its input takes 1"),
    (
        lambda at: files.save(at / "n.safetensors", hydra.open(at / "store"), limit=1),
        "bytes, its input takes 1",
    ),
    (lambda at: formats.read_trained(at / "tree", "llama", scale=1.0), "of no library of family 'llama'"),
    (
        lambda at: formats.read_trained(at / "tree", "llama", "maxtex"),
        "library 'maxtex' has no table of family",
    ),
    (lambda at: calibration.read_moments(at / "none"), "none: no such file: `hydraopt calibrate"),
    (lambda at: calibration.read_moments(at / "text"), "text: no readable calibration file"),
    (lambda at: calibration.write_moments(at / "text" / "x", {"q": np.eye(2)}), "x: cannot be written"),
    (lambda at: shortened(at), "is incomplete: delete"),
    (lambda at: demo.run_demo(at / "store"), "store: exists; choose another --out"),
    (lambda at: peft.fetch_folder(str(at / "none")), "none: no such folder: pass a folder that"),
    (lambda at: peft.fetch_folder(str(at / "text")), "text: is not a folder: pass a folder that"),
    (
        lambda at: formats.write_adapter(at / "peft", PAIR[0]),
        f"peft: {EXISTS}",
    ),
    (
        lambda at: formats.write_checkpoint(at / "tree", PAIR[0], "qwix", scale=1.0),
        f"tree: {EXISTS}",
    ),
    (lambda at: locks.locked(at / "text" / "x").__enter__(), "x: cannot be written"),
    (lambda at: provenance.write_recipe(at / "text", RECIPE), "text: exists; choose another file"),
    (lambda at: provenance.write_recipe(at / "none" / "x", RECIPE), "x: cannot be written"),
    (lambda at: provenance.read_recipe(at / "none", []), "none: cannot be read"),
    (lambda at: provenance.read_recipe(at / "text", []), "text: not JSON"),
    (lambda at: unbelievable(at), "damaged store: its manifest cannot be right ('tasks')"),
    (lambda at: files.check_output(at / "store", False), f"store: {EXISTS}"),
    (lambda at: folder.read_manifest(at / "none"), "none: no store there: look for a wrong name"),
    (
        lambda at: folder.read_manifest(at / "empty"),
        "empty: not a store (it has no manifest.json.gz",
    ),
    (lambda at: folder.read_file(at / "store", "none"), "damaged store: none is missing or cannot be read"),
    (lambda at: hydra.decode(hydra.open(at / "torn"), "task-00"), "is missing: restore it from a copy"),
    (lambda at: portable.source_of(at / "none"), "none: no store there: look for a wrong name"),
    (
        lambda at: portable.read_header(portable.source_of(at / "text")),
        "text: damaged store: not a complete safetensors file",
    ),
    (lambda at: hydra.open(at / "short.safetensors"), "damaged store: not a complete safetensors file"),
    (
        lambda at: distortion.measure(
            hydra.open(at / "store"), synthetic.collection(tasks=2, modules={"q": (8, 7)}, rank=2)
        ),
        "'task-00': q has another shape in the store: it is of another base model",
    ),
]


@pytest.mark.parametrize(("call", "words"), FILES, ids=[words for _, words in FILES])
def test_files_are_refused_in_one_line(kept, call, words):
    with pytest.raises(HydraOptError) as refused:
        call(kept)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"recipe": 0}, "not a recipe of this version"),
        ({**RECIPE, "option": {}}, "option: did you mean 'options'?"),
        ({**RECIPE, "options": []}, "options are a mapping, adapters a list"),
        ({**RECIPE, "options": {"budge": 1}}, "options: budge: did you mean 'budget'?"),
        ({**RECIPE, "options": {"budget": {"a": 1}}}, "options: budget: give one value, not {'a': 1}"),
        ({**RECIPE, "options": {"budget": [1]}}, "options: budget: give one value"),
        ({**RECIPE, "options": {"weights": {"a": 1}}}, "options: weights: give a list of values"),
    ],
)
def test_recipes_are_refused_by_the_field(tmp_path, said, words):
    (tmp_path / "r.json").write_text(json.dumps(said))
    with pytest.raises(HydraOptError, match=words.replace("?", r"\?")) as refused:
        provenance.read_recipe(tmp_path / "r.json", ["budget", "weights"], ["weights"])
    assert str(refused.value).startswith(f"{tmp_path / 'r.json'}: ")


def test_a_manifest_of_another_checksum_is_refused(kept, tmp_path):
    shutil.copytree(kept / "store", tmp_path / "s")
    at = tmp_path / "s" / "manifest.json.gz"
    at.write_bytes(gzip.compress(at.read_bytes())[:-4] + b"\0\0\0\0")
    with pytest.raises(HydraOptError, match="does not match its checksum: restore it"):
        hydra.open(tmp_path / "s")
