"""Adapters, collections and stores are pytrees: arrays are leaves, names and shapes are static."""

import copy
import pickle
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import hydraopt_jax as hydra
from hydraopt_jax import synthetic
from hydraopt_jax.factors import Factors, LazyFactors
from hydraopt_jax.linalg.decompose import HostSvd, Svd
from hydraopt_jax.serving.mixed_tasks import PackedFactors
from hydraopt_jax.serving.slots import SlotRow, SlotState
from hydraopt_jax.store import Segment, Store

FORM = hydra.forms.Hydra(heads=2)
EXTRAS = {"score.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}


@pytest.fixture(scope="module")
def collection():
    made = synthetic.collection(tasks=3, modules={"q": (24, 16), "v": (24, 8)}, rank=2, dtype="float32")
    return [made[0].replace(extras=EXTRAS), *made[1:]]


@pytest.fixture(scope="module")
def plain(collection):
    return hydra.compress(collection, form=FORM)


@pytest.fixture(scope="module")
def coded(collection):
    return hydra.compress(collection, max_error=0.1)


@pytest.fixture(params=["one adapter", "adapters", "plain", "coded"])
def tree(request, collection):
    if request.param == "one adapter":
        return collection[0]
    return collection if request.param == "adapters" else request.getfixturevalue(request.param)


def same(one, other):
    """Whether two trees are of one structure, leaf for leaf."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_leaves_are_arrays(tree):
    leaves = jax.tree.leaves(tree)
    assert leaves
    assert all(isinstance(x, np.ndarray) for x in leaves)


def test_leaves_hold_all_the_numbers(collection, plain, coded):
    assert len(jax.tree.leaves(collection[0])) == 2 * 2 + len(EXTRAS)
    assert len(jax.tree.leaves(collection)) == 3 * 2 * 2 + len(EXTRAS)
    for store in (plain, coded):
        assert sum(x.nbytes for x in jax.tree.leaves(store)) == sum(
            v.nbytes for s in store.segments for v in s.leaves.values()
        )
        assert {x.dtype for x in jax.tree.leaves(store)} == {np.dtype(np.uint8)}


def test_jit_takes_and_returns_them(tree):
    same(jax.jit(lambda x: x)(tree), tree)


def test_a_second_tree_of_the_same_kind_is_not_traced_again(tree):
    traces = []
    count = jax.jit(lambda x: traces.append(1) or sum(jnp.sum(y) for y in jax.tree.leaves(x)))
    count(tree)
    count(jax.tree.map(lambda x: x.copy(), tree))
    assert len(traces) == 1


def test_map_keeps_names_and_changes_numbers(tree):
    zeros = jax.tree.map(np.zeros_like, tree)
    assert jax.tree.structure(zeros) == jax.tree.structure(tree)
    assert not any(x.any() for x in jax.tree.leaves(zeros))


def test_paths_name_the_leaves(collection, coded):
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(collection[0])]
    assert {".a['q']", ".b['v']", ".extras['score.weight']"} <= set(paths)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(coded)]
    assert ".segments[0].leaves['shared']" in paths


def test_orbax_saves_and_loads_them(tree, tmp_path):
    ocp.save(tmp_path / "checkpoint", tree)
    abstract = jax.tree.map(np.empty_like, tree)
    same(ocp.load(tmp_path / "checkpoint", abstract), tree)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)
    placed = ocp.load(tmp_path / "checkpoint", abstract)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(placed))
    same(placed, tree)


def test_a_store_from_an_orbax_checkpoint_decodes_as_before(coded, collection, tmp_path):
    ocp.save(tmp_path / "checkpoint", coded)
    back = ocp.load(tmp_path / "checkpoint", jax.tree.map(jnp.zeros_like, coded))
    for x in collection:
        same(hydra.decode(back, x.task).replace(extras={}), hydra.decode(coded, x.task).replace(extras={}))
    np.testing.assert_array_equal(
        hydra.decode(back, "task-00").extras["score.weight"], EXTRAS["score.weight"]
    )


def test_a_decoded_adapter_is_one_too(coded):
    found = hydra.decode(coded, "task-00")
    assert all(hasattr(x, "dtype") for x in jax.tree.leaves(found))
    same(jax.tree.map(lambda x: x, found), found)


def test_a_store_that_is_not_read_yet_is_read_by_load(coded, tmp_path):
    hydra.save(tmp_path / "store", coded)
    lazy = hydra.open(tmp_path / "store")
    assert "on disk" in repr(lazy)
    read = lazy.load()
    assert "on disk" not in repr(read)
    for x, y in zip(jax.tree.leaves(read), jax.tree.leaves(coded), strict=True):
        np.testing.assert_array_equal(x, y)
    same(jax.jit(lambda s: s)(read), read)


@pytest.mark.parametrize("kind", ["plain", "coded"])
def test_a_store_is_shown_in_a_few_lines(request, kind):
    text = repr(request.getfixturevalue(kind))
    assert len(text.splitlines()) <= 4
    assert max(map(len, text.splitlines())) < 120
    assert "3 tasks: 'task-00', 'task-01', 'task-02'" in text
    assert "2 modules" in text
    assert "mean error" in text


WAYS = {
    "a name of the face": "import hydraopt_jax as hydra; x = hydra.Adapter('x', {}, {})",
    "a module of the face": "import hydraopt_jax as hydra; x = hydra.formats.peft.Adapter('x', {}, {})",
    "from the face": "from hydraopt_jax import formats; x = formats.peft.Adapter('x', {}, {})",
    "synthetic": "from hydraopt_jax.synthetic import collection; x = collection(tasks=1)[0]",
    "compression": "from hydraopt_jax.compression import Adapter; x = Adapter('x', {}, {})",
    "serving": "from hydraopt_jax.serving.loading import Store; x = Store((), (), (), {})",
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_they_are_registered_however_they_are_reached(way):
    program = f"{way}; import jax; assert all(y is not x for y in jax.tree.leaves(x))"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    "kind", [Factors, LazyFactors, PackedFactors, Svd, HostSvd, SlotState, SlotRow, Segment, Store], ids=str
)
def test_fields_of_a_pytree_have_types(kind):
    """Nothing passes as an array that is none: shardings, lists and codes have types of their own."""
    fields = typing.get_type_hints(kind, {"jax": jax})
    assert fields
    assert [name for name, declared in fields.items() if declared is typing.Any] == []


def test_an_opened_store_goes_to_another_process(tmp_path, collection):
    made = hydra.compress(collection, max_error=0.02)
    hydra.save(tmp_path / "s", made)
    opened = hydra.open(tmp_path / "s")
    for copied in (pickle.loads(pickle.dumps(opened)), copy.deepcopy(opened)):
        assert copied.tasks == made.tasks
        np.testing.assert_array_equal(copied.errors, made.errors)
        one, two = (hydra.decode(x, made.tasks[0]) for x in (copied, made))
        np.testing.assert_array_equal(one.a["q"], two.a["q"])
