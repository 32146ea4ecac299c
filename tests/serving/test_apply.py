"""Mixed batches against dense deltas: every form, method, dtype and transformation."""

import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from plain_stores import plain_store

import hydraopt_jax as hydra
from hydraopt_jax import forms, serving, synthetic
from hydraopt_jax.codec import fixed_rate
from hydraopt_jax.forms import Factors
from hydraopt_jax.serving import grouped
from hydraopt_jax.store import task_factors

T, I, O, S, N = 5, 12, 9, 3, 160
ALL = -1
# one compilation a case, where each operation alone would be one
apply = jax.jit(serving.apply, static_argnames=("method",))
# how many input and output factors, and the core
FORMS = {
    "hydra": (1, ALL, None),
    "heads": (1, 2, None),
    "output side": (ALL, 1, None),
    "separate": (ALL, ALL, None),
    "heads with cores": (1, 2, "full"),
    "joint": (1, 1, "full"),
    "joint diagonal": (1, 1, "diagonal"),
    "coded": (ALL, ALL, "diagonal"),
}


def term(form, seed=0, tasks=T, inputs=I, outputs=O, rank=S):
    """Random factors; the last task has no delta."""
    heads_a, heads_b, core = (tasks if x is ALL else x for x in FORMS[form])
    rng = np.random.default_rng(seed)
    index = [np.arange(tasks) % k for k in (heads_a, heads_b)]
    for of in index:
        of[-1] = -1
    shape = {None: None, "full": (tasks, rank, rank), "diagonal": (tasks, rank)}[core]
    draw = lambda *x: jnp.asarray(rng.normal(size=x), jnp.float32)  # noqa: E731
    return Factors(
        draw(heads_a, inputs, rank),
        draw(heads_b, rank, outputs),
        *(jnp.asarray(x, jnp.int32) for x in index),
        None if shape is None else draw(*shape),
    )


def dense(module):
    """Deltas `[T, I, O]` in float64."""
    pairs = [[np.asarray(x, np.float64) for x in forms.pair(t)] for t in module]
    return sum(a @ b for a, b in pairs)


def batch(rows=N, tasks=T, inputs=I, seed=1):
    """Rows and ids; some ids are of no task."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, tasks + 1, rows)
    return jnp.asarray(rng.normal(size=(rows, inputs)), jnp.float32), jnp.asarray(ids, jnp.int32)


def expected(x, module, ids):
    deltas = dense(module)
    deltas = np.concatenate([deltas, np.zeros((1, *deltas.shape[1:]))])
    ids = np.where((np.asarray(ids) >= 0) & (np.asarray(ids) < len(deltas) - 1), ids, len(deltas) - 1)
    return np.einsum("ni,nio->no", np.asarray(x, np.float64), deltas[ids])


@pytest.mark.parametrize("method", [None, *grouped.METHODS])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_method_is_the_dense_delta(form, method):
    module = (term(form),)
    x, ids = batch()
    got = apply(x, module, ids, method=method)
    want = expected(x, module, ids)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("form", FORMS)
def test_a_scalar_id_is_its_rows(form):
    module = (term(form), term("separate", 7))
    x, _ = batch(7)
    for task in range(-1, T + 1):
        want = expected(x, module, np.full(7, task))
        np.testing.assert_allclose(apply(x, module, jnp.int32(task)), want, atol=2e-5)


def test_ids_of_no_task_give_exactly_zero():
    module = (term("separate"), term("hydra", 3))
    x, _ = batch(80)
    for method in grouped.METHODS:
        got = apply(x, module, jnp.tile(jnp.array([-1, T, T - 1, -9]), 20), method=method)
        assert not np.asarray(got).any()


def test_a_row_does_not_leak_into_others():
    module = (term("separate"),)
    x, ids = batch()
    spoilt = x.at[3].set(jnp.nan)
    for method in grouped.METHODS:
        clean, dirty = (apply(v, module, ids, method=method) for v in (x, spoilt))
        np.testing.assert_array_equal(np.delete(dirty, 3, 0), np.delete(clean, 3, 0))


def test_sequences_take_one_id_each():
    module = (term("heads with cores"),)
    x = jax.random.normal(jax.random.key(0), (4, 30, I))
    ids = jnp.array([2, 0, -1, 1])
    got = apply(x, module, ids[:, None])
    want = expected(x.reshape(-1, I), module, np.repeat(np.asarray(ids), 30)).reshape(4, 30, O)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("method", grouped.METHODS)
def test_vmap_over_modules_and_batches(method):
    many = jax.tree.map(lambda *x: jnp.stack(x), *[(term("separate", seed),) for seed in range(3)])
    rows = [batch(70, seed=seed) for seed in range(3)]
    x, ids = (jnp.stack(v) for v in zip(*rows, strict=True))
    got = jax.vmap(functools.partial(serving.apply, method=method))(x, many, ids)
    for k in range(3):
        want = expected(x[k], jax.tree.map(lambda v, k=k: v[k], many), ids[k])
        np.testing.assert_allclose(got[k], want, atol=2e-5)


@pytest.mark.parametrize("method", grouped.METHODS)
def test_gradients_are_those_of_the_dense_delta(method):
    x, ids = batch(70)
    module = (term("heads with cores"), term("separate", 4))
    inside = jnp.where((ids >= 0) & (ids < T), ids, T - 1)

    def loss(run, x, a, b, core):
        return jnp.sum(jnp.sin(run(x, (module[0]._replace(core=core), module[1]._replace(a=a, b=b)))))

    def reference(x, module):
        deltas = sum(jnp.matmul(*forms.pair(t), precision="highest") for t in module)
        return jnp.einsum("ni,nio->no", x, deltas[inside], precision="highest")

    served = lambda x, module: serving.apply(x, module, ids, method=method)  # noqa: E731
    point = (x, module[1].a, module[1].b, module[0].core)
    grads = [jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2, 3))) for f in (served, reference)]
    for one, other in zip(*(f(*point) for f in grads), strict=True):
        assert np.abs(other).max() > 1
        np.testing.assert_allclose(one, other, atol=2e-4)


def intermediates(jaxpr):
    """Sizes of everything a computation makes, inner computations included."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(v.aval.shape)) for v in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            core = getattr(inner, "jaxpr", inner)
            if hasattr(core, "eqns"):
                yield from intermediates(core)


@pytest.mark.parametrize("method", grouped.METHODS)
@pytest.mark.parametrize("form", ["hydra", "separate", "heads with cores"])
@pytest.mark.parametrize("tasks", [8, 300])
def test_no_factor_is_gathered_for_each_row(form, method, tasks):
    rows, inputs, rank = 512, 448, 32
    padded = (rows + max(rows // tasks, 16) * tasks) * inputs
    allowed = {"mask": rows * tasks * rank, "blocks": max(rows * rank * inputs // 4, padded), "ragged": 0}
    module = (term(form, tasks=tasks, inputs=inputs, outputs=inputs, rank=rank),)
    x, ids = batch(rows, tasks, inputs)
    gathered = rows * rank * inputs
    parameters = max(v.size for v in jax.tree.leaves((x, module)))
    traced = jax.make_jaxpr(functools.partial(serving.apply, method=method))(x, module, ids)
    found = max(intermediates(traced.jaxpr))
    assert found <= max(parameters, allowed[method])
    naive = jax.make_jaxpr(lambda x, b, ids: jnp.einsum("ns,nso->no", x, b[ids]))
    assert max(intermediates(naive(x[:, :rank], jnp.ones((tasks, rank, inputs)), ids).jaxpr)) >= gathered


def test_the_shared_side_is_multiplied_once():
    x, ids = batch(300)
    module = (term("hydra"),)
    traced = jax.make_jaxpr(serving.apply)(x, module, ids)
    shapes = [
        tuple(v.aval.shape) for e in traced.jaxpr.eqns for v in e.invars if e.primitive.name == "dot_general"
    ]
    assert shapes.count((300, I)) == 1


def test_one_trace_per_shape():
    traces = []

    @jax.jit
    def served(x, module, ids):
        traces.append(1)
        return serving.apply(x, module, ids)

    for seed in range(3):
        served(batch(seed=seed)[0], (term("hydra", seed),), batch(seed=seed)[1])
    assert len(traces) == 1
    served(batch(8)[0], (term("hydra"),), batch(8)[1])
    assert len(traces) == 2


@pytest.mark.parametrize("method", grouped.METHODS)
def test_half_precision_accumulates_in_float32(method):
    """Ones summed past 256, where bfloat16 itself would stop counting."""
    wide = 4096
    module = (Factors(jnp.ones((2, wide, 1)), jnp.ones((2, 1, 1)), jnp.arange(2), jnp.arange(2)),)
    module = jax.tree.map(lambda v: v.astype(jnp.bfloat16) if v.dtype == jnp.float32 else v, module)
    got = apply(jnp.ones((100, wide), jnp.bfloat16), module, jnp.arange(100) % 2, method=method)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), wide)


def test_half_precision_is_near_the_dense_delta():
    module = (term("hydra"),)
    half = (module[0]._replace(a=module[0].a.astype(jnp.bfloat16), b=module[0].b.astype(jnp.bfloat16)),)
    x, ids = batch()
    got = apply(x.astype(jnp.bfloat16), half, ids).astype(jnp.float32)
    want = expected(x, module, ids)
    assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)


def test_checked_ids_raise_and_name_the_id():
    module = (term("hydra"),)
    x, _ = batch(4)
    checked = jax.jit(checkify.checkify(functools.partial(serving.apply, checked=True)))
    error, _ = checked(x, module, jnp.array([0, T - 1, 1, 2]))
    assert error.get() is None
    error, _ = checked(x, module, jnp.array([0, 77, 1, 2]))
    assert "task id 77 is outside 0..4" in error.get()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint32, np.int64])
def test_ids_of_every_integer_type_are_those_tasks(dtype):
    many = 300
    module = (term("hydra", tasks=many),)
    x, _ = batch(4, tasks=many)
    ids = np.array([5, 60, 120, 0], dtype)
    for given in (ids, jnp.asarray(ids)):
        np.testing.assert_allclose(apply(x, module, given), expected(x, module, ids), rtol=1e-4, atol=1e-5)
    if dtype is np.int64:
        assert not serving.apply(x, module, ids + 2**32).any()


@pytest.mark.parametrize("method", [*grouped.METHODS, None])
def test_an_empty_batch_is_an_empty_result(method):
    module = (term("separate"),)
    nothing = np.zeros((0, I), np.float32), module, np.zeros(0, np.int32)
    assert apply(*nothing, method=method).shape == (0, O)
    checked = checkify.checkify(functools.partial(serving.apply, checked=True, method=method))
    assert checked(*nothing)[0].get() is None


@pytest.mark.parametrize(
    ("shape", "ids", "options", "named"),
    [
        ((4, I + 1), np.zeros(4, int), {}, r"x has shape \[4, 13\]: .* 12 inputs"),
        ((4, I), np.zeros(3, int), {}, r"task_ids has shape \[3\]: it must broadcast to \[4\]"),
        ((4, I), np.zeros((1, 4), int), {}, "must broadcast"),
        ((4, I), np.zeros(4, np.float32), {}, "task_ids has dtype float32"),
        ((4, I), np.zeros(4, int), {"method": "gather"}, "method = 'gather': must be one of mask"),
    ],
)
def test_bad_input_is_named(shape, ids, options, named):
    with pytest.raises(hydra.HydraOptError, match=named):
        serving.apply(jnp.zeros(shape), (term("hydra"),), ids, **options)


def compare(kept, served, tolerance):
    count = len(kept.tasks)
    factors = [task_factors(kept, task) for task in kept.tasks]
    ids = jnp.arange(90) % count
    for name, module in served.items():
        x = jax.random.normal(jax.random.key(1), (90, serving.shape(module)[1]))
        got = np.asarray(apply(x, module, ids))
        want = np.zeros_like(got)
        for t in range(count):
            a, b = factors[t][name]
            want[t::count] = np.asarray(x)[t::count] @ a @ b
        assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def test_a_store_serves_what_it_exports(tmp_path):
    """Heads beside what each task has of its own, through files."""
    every = np.arange(T)
    terms = (
        term("heads")._replace(a_of=every * 0, b_of=every % 2),
        term("separate")._replace(a_of=every, b_of=every),
    )
    hydra.save(tmp_path / "store", plain_store("abcde", {"q": terms}))
    kept = hydra.open(tmp_path / "store")
    compare(kept, serving.load(kept, dtype=jnp.float32), 1e-5)


def test_a_store_under_a_budget_serves_what_it_decodes_to(tmp_path):
    # shapes that the tests of navigation compile too
    modules = {"layers.0.q": (192, 128), "layers.1.q": (192, 128)}
    several = synthetic.collection(0, tasks=3, modules=modules, rank=4, likeness=0.9, dtype="float32")
    hydra.save(tmp_path / "store", hydra.compress(several, budget=0.5))
    kept = hydra.open(tmp_path / "store")
    compare(kept, serving.load(kept, dtype=jnp.float32), 1e-5)


def test_codes_are_dequantized_on_the_fly_or_once():
    kept = plain_store("abcde", {"q": (term("hydra", inputs=16),)})
    x, ids = jax.random.normal(jax.random.key(2), (40, 16)), jnp.arange(40) % T
    want = apply(x, serving.load(kept, dtype=jnp.float32)["q"], ids)
    coded = serving.load(kept, bits=4)["q"]
    fly = apply(x, coded, ids)
    assert 0 < np.linalg.norm(fly - want) < 0.25 * np.linalg.norm(want)
    once = serving.dequantize(coded)
    np.testing.assert_allclose(apply(x, once, ids), fly, atol=1e-5)
    np.testing.assert_allclose(apply(x[0], coded, 0), fly[0], atol=1e-5)
    held = sum(v.nbytes for v in jax.tree.leaves(coded) if v.dtype == jnp.uint8)
    # the last task has no delta, hence no factor of its own
    assert held == S * 8 + (T - 1) * S * 5


@pytest.mark.parametrize("bits", fixed_rate.WIDTHS)
def test_unpacking_in_jax_is_unpacking_in_numpy(bits):
    top = 2 ** (bits - 1) - 1
    codes = np.random.default_rng(bits).integers(-top, top + 1, (2, 3, 21)).astype(np.int8)
    data = np.stack([[fixed_rate.pack_codes(row, bits) for row in rows] for rows in codes])
    held = fixed_rate.Packed(jnp.asarray(data), jnp.full((2, 3, 1), 0.5, jnp.float16), bits, 21)
    np.testing.assert_array_equal(jax.jit(fixed_rate.unpacked)(held), codes / 2)


def test_load_refuses_what_it_cannot_hold():
    large = term("hydra")._replace(b=jnp.full((T, S, O), 1e6))
    kept = plain_store("abcde", {"q": (large,)})
    with pytest.raises(hydra.HydraOptError, match="q: values overflow float16; choose bfloat16"):
        serving.load(kept, dtype=jnp.float16)
    with pytest.raises(hydra.HydraOptError, match="dtype and bits: give one"):
        serving.load(kept, dtype=jnp.float16, bits=4)


def test_eight_devices_share_the_rows_or_the_outputs():
    program = """
        import jax, jax.numpy as jnp, numpy as np, sys
        sys.path[:0] = sys.argv[1:]
        from test_apply import batch, expected, term
        from hydraopt_jax import serving
        from hydraopt_jax.forms import Factors
        P = jax.P
        mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        module = (term("heads with cores", outputs=16), term("separate", 5, outputs=16))
        x, ids = batch(1024)
        want = expected(x, module, ids)
        whole = jax.tree.map(lambda v: P(), module)
        wide = tuple(t._replace(b=P(None, None, "d")) for t in whole)
        by_rows, by_outputs = ((P("d"), whole, P("d")), P("d")), ((P(), wide, P()), P(None, "d"))
        cases = ("mask", by_rows), ("blocks", by_rows), ("ragged", by_rows), (None, by_outputs)
        for method, (specs, out) in cases:
            run = lambda x, m, i: serving.apply(x, m, i, method=method)
            split = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out))
            got = split(x, module, ids)
            assert len(got.addressable_shards) == 8
            np.testing.assert_allclose(got, want, atol=2e-5)
        print("eight agree")
    """
    eight = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    flags = {"XLA_FLAGS": eight, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(program),
            str(Path(__file__).parent),
            str(Path(__file__).parents[1]),
        ],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "eight agree\n", done.stderr[-2000:]
