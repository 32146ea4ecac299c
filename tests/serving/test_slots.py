"""Slots: tasks of a store come and go on the device, without a new compilation and without a new answer."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from plain_stores import plain_store
from test_apply import term

import hydraopt_jax as hydra
from hydraopt_jax import serving, synthetic
from hydraopt_jax.serving import slots as slotting
from hydraopt_jax.serving.layers import Served

TASKS = tuple("abcdef")


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """A store on disk under a budget, of several tasks and one that was added."""
    modules = {"layers.0.q": (192, 128), "layers.1.q": (192, 128)}
    several = synthetic.collection(0, tasks=4, modules=modules, rank=4, likeness=0.9, dtype="float32")
    path = tmp_path_factory.mktemp("coded") / "store"
    hydra.save(path, hydra.add(hydra.compress(several[:3], budget=0.5), several[3]))
    return hydra.open(path)


def plain(forms=("heads", "separate"), tasks=6):
    """A store of plain factors, two terms in one module and one in another; the last task lacks the first."""
    each = np.arange(tasks)
    two = (term(forms[0], tasks=tasks), term(forms[1], 7, tasks=tasks, rank=2))
    one = term("separate", 3, tasks=tasks)
    return plain_store(
        tuple("abcdefghijklmnopqrstuvwxyz"[:tasks]), {"q": two, "v": (one._replace(a_of=each, b_of=each),)}
    )


def answers(modules, ids, seed=0, rows=24):
    """`apply` of every module to the same rows, row n for `ids[n % len(ids)]`."""
    out = {}
    for name, module in sorted(modules.items()):
        x = jax.random.normal(jax.random.key(seed), (rows, serving.shape(module)[1]))
        out[name] = served(x, module, jnp.resize(jnp.asarray(ids), rows))
    return out


served = jax.jit(serving.apply)


@pytest.mark.parametrize("forms", [("heads", "separate"), ("joint", "hydra"), ("coded", "separate")])
def test_a_slot_answers_as_the_store_loaded_whole(forms):
    kept = plain(forms)
    whole = serving.load(kept, dtype=jnp.float32)
    slots = serving.Slots(kept, 3, dtype=jnp.float32)
    state = slots.init()
    for names in (["a", "b", None], ["f", "a", "c"], ["d", "e", "e"], ["a", None, "f"]):
        state, ids = slots.load(state, names)
        want = answers(whole, [-1 if x is None else kept.tasks.index(x) for x in names])
        for name, got in answers(state.modules, ids).items():
            np.testing.assert_allclose(got, want[name], atol=2e-5 * np.abs(want[name]).max())


def test_a_coded_store_answers_alike_in_the_default_precision(coded):
    whole, slots = serving.load(coded), serving.Slots(coded, 2)
    state, ids = slots.load(slots.init(), [coded.tasks[3], coded.tasks[0]])
    want = answers(whole, [3, 0])
    exact = answers(serving.load(coded, dtype=jnp.float32), [3, 0])
    for name, got in answers(state.modules, ids).items():
        assert state.modules[name][0].a.dtype == jnp.bfloat16
        np.testing.assert_allclose(got, want[name], atol=1e-5 * np.abs(want[name]).max())
        # what bfloat16 costs is less than what the store does
        lost = np.linalg.norm(got - exact[name]) ** 2 / np.linalg.norm(exact[name]) ** 2
        assert lost < 0.1 * np.nanmin(coded.errors)


def test_tasks_come_and_go_without_a_new_trace(monkeypatch):
    kept, traces = plain(tasks=26), {"apply": 0, "put": 0}
    pure = slotting.put

    def counted(*given):
        traces["put"] += 1
        return pure(*given)

    monkeypatch.setattr(slotting, "put", counted)

    @jax.jit
    def forward(modules, ids, x):
        traces["apply"] += 1
        return serving.apply(x, modules["q"], ids)

    slots = serving.Slots(kept, 4)
    state, x = slots.init(), jnp.ones((8, 12))
    state, ids = slots.load(state, ["a"] * 8)
    forward(state.modules, ids, x)
    before = dict(traces)
    rng = np.random.default_rng(0)
    for _ in range(30):
        some = rng.choice(26, 4, replace=False)
        state, ids = slots.load(state, [kept.tasks[t] for t in rng.choice(some, 8)])
        forward(state.modules, ids, x)
    assert traces == before == {"apply": 1, "put": 1}


def test_the_task_used_longest_ago_makes_room_and_no_other_is_loaded(monkeypatch):
    kept = plain()
    decoded = []
    real = slotting.decode_terms
    monkeypatch.setattr(
        slotting, "decode_terms", lambda store, tasks: decoded.append(tasks) or real(store, tasks)
    )
    slots = serving.Slots(kept, 3)
    state = slots.init()
    for names, loaded in ((["a", "b"], "ab"), (["a"], ""), (["c"], "c"), (["d"], "d"), (["a", "c", "d"], "")):
        decoded.clear()
        state, ids = slots.load(state, names)
        assert decoded == ([list(loaded)] if loaded else [])
        assert [kept.tasks[state.tasks[k]] for k in ids] == names
    # b went for d
    assert sorted(kept.tasks[t] for t in state.tasks) == ["a", "c", "d"]


@pytest.mark.parametrize("seed", range(5))
def test_assignment_is_that_of_a_plain_cache(seed):
    rng = np.random.default_rng(seed)
    tasks, order, recent = np.full(4, -1), np.arange(4), []
    for _ in range(60):
        wanted = rng.choice(12, rng.integers(1, 5), replace=False).tolist()
        tasks, order, loads = slotting.assign(tasks, order, wanted)
        assert set(loads.values()) == set(wanted) - set(recent)
        recent = ([t for t in recent if t not in wanted] + wanted)[-4:]
        assert sorted(t for t in tasks.tolist() if t >= 0) == sorted(recent)
        assert sorted(order.tolist()) == [0, 1, 2, 3]
        assert [tasks[k] for k in order if tasks[k] >= 0] == recent


def test_what_cannot_be_served_leaves_the_slots_as_they_are(coded):
    kept = plain()
    slots = serving.Slots(kept, 2)
    state, ids = slots.load(slots.init(), ["a", "b"])
    want = answers(state.modules, ids)
    with pytest.raises(hydra.HydraOptError, match="3 different tasks in one batch, and 2 slots: split"):
        slots.load(state, ["a", "b", "c", "c"])
    with pytest.raises(hydra.HydraOptError, match="no task 'z' in the store: did you mean"):
        slots.load(state, ["a", "z"])
    with pytest.raises(hydra.HydraOptError, match=r"no task \"\['a'\]\" in the store"):
        slots.load(state, [["a"], "a"])
    with pytest.raises(hydra.HydraOptError, match="the state has 2 slots, these are 3"):
        serving.Slots(kept, 3).load(state, ["a"])
    with pytest.raises(hydra.HydraOptError, match="0 slots: make at least 1"):
        serving.Slots(kept, 0)
    large = plain_store(TASKS, {"q": (term("hydra", tasks=6)._replace(b=jnp.full((6, 3, 9), 1e6)),)})
    with pytest.raises(hydra.HydraOptError, match="q: values overflow float16"):
        serving.Slots(large, 2, dtype=jnp.float16).load(
            serving.Slots(large, 2, dtype=jnp.float16).init(), ["a"]
        )
    state, ids = slots.load(state, ["a", "b"])
    for name, got in answers(state.modules, ids).items():
        np.testing.assert_array_equal(got, want[name])


def test_a_store_of_another_base_model_is_refused_before_it_is_decoded(coded, monkeypatch):
    for place in ("loading.decode_terms", "slots.decode_terms", "layers.stores.decode"):
        monkeypatch.setattr(f"hydraopt_jax.serving.{place}", None)
    model = nnx.LoRALinear(4, 4, lora_rank=2, rngs=nnx.Rngs(0))
    task = coded.tasks[0]
    for act in (
        lambda base: serving.load(coded, base=base),
        lambda base: serving.load(coded, tasks=[task], base=base),
        lambda base: serving.Slots(coded, 2, base=base),
        lambda base: serving.load_task(model, coded, task, base=base),
    ):
        said = rf"task '{task}': names 'hydraopt-jax/synthetic', but the model is 'org/other'"
        with pytest.raises(hydra.HydraOptError, match=said):
            act("org/other")
    with pytest.raises(hydra.HydraOptError, match="no task 'nobody'"):
        serving.load(coded, tasks=["nobody"], base="synthetic")
    monkeypatch.undo()
    # an organization before the name is none of its own
    assert serving.Slots(coded, 2, base="mirror/synthetic").init()
    assert serving.load(coded, tasks=[task], base="synthetic")


@pytest.mark.parametrize(
    ("dtype", "named"),
    [
        (jnp.int8, "int8"),
        (np.int32, "int32"),
        ("bool", "bool"),
        ("complex64", "complex64"),
        (jnp.float8_e4m3fn, "float8_e4m3fn"),
        ("foo", "foo"),
    ],
)
def test_a_dtype_that_holds_no_factors_is_refused_before_anything_is_decoded(
    coded, monkeypatch, dtype, named
):
    monkeypatch.setattr("hydraopt_jax.serving.loading.decode_terms", None)
    for act in (serving.load, lambda store, dtype: serving.Slots(store, 2, dtype=dtype)):
        said = f"dtype {named}: give float32, bfloat16 or float16; load has bits=8 for smaller codes"
        with pytest.raises(hydra.HydraOptError, match=said):
            act(coded, dtype=dtype)


def test_a_row_of_no_task_and_a_module_that_a_task_lacks_are_exactly_zero():
    kept = plain()
    lacking = plain_store(TASKS, {"q": (term("separate", tasks=6),), "v": (term("separate", 1, tasks=6),)})
    for store, names, name in ((kept, [None], "q"), (lacking, ["f"], "q")):
        slots = serving.Slots(store, 2)
        state, _ = slots.load(slots.init(), ["a", "b"])
        state, ids = slots.load(state, names)
        assert not np.asarray(answers(state.modules, ids)[name]).any()


def test_a_module_wider_than_its_matrix_is_held_at_full_rank():
    """Two terms of rank 3 on a matrix of 4 outputs."""
    two = (term("separate", outputs=4), term("separate", 9, outputs=4))
    kept = plain_store(tuple("abcde"), {"q": two})
    slots = serving.Slots(kept, 2, dtype=jnp.float32)
    assert slots.shapes["q"].rank == 4
    state, ids = slots.load(slots.init(), ["b", "c"])
    want = answers(serving.load(kept, dtype=jnp.float32), [1, 2])["q"]
    np.testing.assert_allclose(answers(state.modules, ids)["q"], want, atol=1e-5 * np.abs(want).max())


def test_a_wrapped_model_takes_the_tasks_as_they_come():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.q = nnx.Linear(12, 9, rngs=rngs)

        def __call__(self, x):
            return self.q(x)

    kept = plain_store(tuple("abcde"), {"q": (term("separate"),)})
    slots = serving.Slots(kept, 2, dtype=jnp.float32)
    state = slots.init()
    model, base = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    serving.wrap(model, state.modules)
    x, traces = jax.random.normal(jax.random.key(1), (2, 12)), []

    @nnx.jit
    def forward(model, x):
        traces.append(1)
        return model(x)

    for names in (["a", "b"], ["c", "a"], ["d", "d"]):
        state, ids = slots.load(state, names)
        serving.set_modules(model, state.modules)
        serving.set_task_ids(model, ids)
        factors = [hydra.decode(kept, t) for t in names]
        want = jnp.stack([base(x)[n] + x[n] @ (f.a["q"] @ f.b["q"]) for n, f in enumerate(factors)])
        np.testing.assert_allclose(forward(model, x), want, atol=2e-5)
    assert len(traces) == 1
    with pytest.raises(hydra.HydraOptError, match="q: no such module: near names are 'v'"):
        serving.set_modules(model, {"v": state.modules["q"]})
    with pytest.raises(hydra.HydraOptError, match="serves no store: call serving"):
        serving.set_modules(base, state.modules)
    assert isinstance(model.q, Served)


def test_load_takes_half_precision_some_tasks_and_no_more_bytes_than_the_adapters(coded):
    modules = serving.load(coded)
    held = sum(x.nbytes for m in modules.values() for t in m for x in (t.a, t.b))
    # fp16 bytes of four adapters of rank 4
    assert held <= 2 * 4 * 2 * (192 + 128) * 4
    some = (coded.tasks[2], coded.tasks[0])
    few = serving.load(coded, tasks=some, dtype=jnp.float32)
    ids = serving.task_ids(some, [coded.tasks[0], coded.tasks[2]])
    want = answers(serving.load(coded, dtype=jnp.float32), [0, 2])
    for name, got in answers(few, ids).items():
        assert serving.shape(few[name])[0] == 2
        np.testing.assert_allclose(got, want[name], atol=2e-5 * np.abs(want[name]).max())
    with pytest.raises(hydra.HydraOptError, match="no task 'nobody'"):
        serving.load(coded, tasks=["nobody"])


@pytest.mark.parametrize(
    ("stored", "held"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
)
def test_half_precision_is_kept_as_it_is_stored(stored, held):
    rounded = term("separate")
    rounded = rounded._replace(a=rounded.a.astype(stored), b=rounded.b.astype(stored))
    kept = plain_store(tuple("abcde"), {"q": (rounded,)})
    slots = serving.Slots(kept, 2)
    state, _ = slots.load(slots.init(), ["a"])
    for module in (serving.load(kept)["q"], state.modules["q"]):
        assert {module[0].a.dtype.name, module[0].b.dtype.name} == {held}
    np.testing.assert_array_equal(state.modules["q"][0].a[0], serving.load(kept)["q"][0].a[0])


def test_eight_devices_hold_slots_and_stores_as_the_kernels_lie():
    program = """
        import sys
        sys.path[:0] = sys.argv[1:]
        import jax, jax.numpy as jnp, numpy as np, pytest
        import hydraopt_jax as hydra
        from hydraopt_jax import serving
        from plain_stores import plain_store
        from test_apply import term
        P = jax.P
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        on = lambda *axes: jax.sharding.NamedSharding(mesh, P(*axes))
        sizes = {"inputs": 16, "outputs": 8}
        up, down = term("hydra", **sizes), term("separate", 5, **sizes)
        kept = plain_store(tuple("abcde"), {"up": (up,), "down": (down,)})
        kernels = {"up": on(None, "model"), "down": on("model")}
        slots = serving.Slots(kept, 2, dtype=jnp.float32, shardings=kernels.get)
        alone = serving.load(kept, dtype=jnp.float32)
        traces = []
        @jax.jit
        def run(x, modules, ids):
            traces.append(1)
            return {name: serving.apply(x, module, ids) for name, module in modules.items()}
        x = jax.random.normal(jax.random.key(0), (32, 16))
        state = slots.init()
        for names in (["a", "b"], ["c", "a"], ["e", "d"]):
            state, ids = slots.load(state, names * 16)
            up, down = state.modules["up"][0], state.modules["down"][0]
            shard = lambda v: v.addressable_shards[0].data.shape
            assert shard(up.b) == (2, 3, 2) and shard(up.a) == (2, 16, 3), (shard(up.a), shard(up.b))
            assert shard(down.a) == (2, 4, 3) and shard(down.b) == (2, 3, 8), (shard(down.a), shard(down.b))
            got = run(jax.device_put(x, on("data")), state.modules, jax.device_put(ids, on("data")))
            ids = serving.task_ids(kept, names * 16)
            for name in alone:
                np.testing.assert_allclose(got[name], serving.apply(x, alone[name], ids), atol=2e-5)
        assert len(traces) == 1, len(traces)
        whole = serving.load(kept, dtype=jnp.float32, shardings=kernels.get)
        assert shard(whole["up"][0].b)[1:] == (3, 2) and shard(whole["down"][0].a)[1:] == (4, 3)
        ids = jnp.arange(32) % 5
        got = run(x, whole, ids)
        for name in alone:
            np.testing.assert_allclose(got[name], serving.apply(x, alone[name], ids), atol=2e-5)
        assert serving.load(kept, shardings=on())["up"][0].a.sharding.is_fully_replicated
        odd = plain_store(tuple("abcde"), {"q": (term("hydra", outputs=9),)})
        with pytest.raises(hydra.HydraOptError, match="q: its .in, out. = .12, 9. cannot be split as"):
            serving.load(odd, shardings=on(None, "model"))
        with pytest.raises(hydra.HydraOptError, match="q: its .in, out. = .12, 9. cannot be split as"):
            serving.Slots(odd, 2, shardings=on(None, "model")).init()
        print("eight agree")
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(here), str(here.parent)],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "eight agree\n", done.stderr[-3000:]
