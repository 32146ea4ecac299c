"""Refinement with the rounding in the loop: it gains, never loses, keeps its bytes, goes on after a stop."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hydraopt_jax as hydra
from hydraopt_jax import HydraOptError, refinement, synthetic
from hydraopt_jax.calibration import moments
from hydraopt_jax.codec import encode
from hydraopt_jax.explicit import group_loop
from hydraopt_jax.formats.memory_collection import in_memory
from hydraopt_jax.rate_control import engine
from hydraopt_jax.rate_control.options import Options
from hydraopt_jax.refinement import rounding
from hydraopt_jax.store import decode_terms, select
from hydraopt_jax.store.sizes import measure_size

NAMES = ["one", "two", "three"]
MODULES = ["k", "o", "q", "v"]
# inputs live in few dimensions, which an error of the weights cannot know
ROOT = np.random.default_rng(0).normal(size=(8, 256)).astype(np.float32)
BASE = 0.3 * np.random.default_rng(1).normal(size=(256, 48)).astype(np.float32)


@pytest.fixture(scope="module")
def many():
    shapes = dict.fromkeys(MODULES, (256, 48))
    made = synthetic.collection(tasks=NAMES, modules=shapes, rank=4, likeness=0.5, dtype="float32")
    return [x.replace(b={n: b / np.linalg.norm(x.a[n] @ b) for n, b in x.b.items()}) for x in made]


@pytest.fixture(scope="module")
def coded(many):
    return hydra.compress(many, max_error=0.05)


def batch(step, size=32):
    rng = np.random.default_rng(step)
    return jnp.asarray(rng.normal(size=(len(NAMES), size, 8)).astype(np.float32) @ ROOT)


def forward(lora, x):
    return x @ BASE + sum((x @ a) @ b for a, b in lora.values())


def payload(store):
    return sum(v.nbytes for x in store.segments for v in x.leaves.values())


def refine(store, many, **options):
    """The same batch again and again, so that every step is one down."""
    options = {
        "forward": forward,
        "steps": 16,
        "optimizer": refinement.default_optimizer(16, 0.03),
        "batches": [batch(0)],
    } | options
    return refinement.refine(store, many, **options)


def test_outputs_of_a_coded_store_gain_at_no_more_bytes(coded, many, tmp_path):
    # at three kilobytes a few decisions are much of the loss: enough steps for the tables to settle
    found, info = refine(coded, many, steps=32, optimizer=refinement.default_optimizer(32))
    assert info.after < 0.8 * info.before
    assert payload(found) <= payload(coded)
    assert measure_size(found) <= measure_size(coded)
    hydra.save(tmp_path / "store", found)
    back = hydra.open(tmp_path / "store")
    loss = refinement.divergence(forward)
    measured = loss(refinement.stacked(decode_terms(back)), refinement.originals(many), batch(0))
    np.testing.assert_allclose(measured, info.after, rtol=1e-3)
    assert back.report["refinement"]["steps"] == 32
    claimed = dict(zip(NAMES, back.errors.mean(0), strict=True))
    assert hydra.measure(back, many) == pytest.approx(claimed, rel=0.01)


@pytest.mark.parametrize("at_once", [1, None])
def test_divergence_is_that_of_the_distributions(coded, many, at_once):
    x, counts = batch(3), jnp.arange(32) < 5
    loss = refinement.divergence(forward, lambda x: counts, at_once=at_once)
    found = loss(refinement.stacked(decode_terms(coded)), refinement.originals(many), x)
    wanted = []
    for t, adapter in enumerate(many):
        fits = refinement.stacked(decode_terms(coded))
        true = sum(np.asarray(adapter.a[n], np.float64) @ adapter.b[n] for n in MODULES)
        fit = sum(np.asarray(fits[n][0][t], np.float64) @ np.asarray(fits[n][1][t]) for n in MODULES)
        scores = [np.asarray(x[t], np.float64) @ (BASE + delta) for delta in (true, fit)]
        logs = [np.log(np.exp(z) / np.exp(z).sum(-1, keepdims=True)) for z in scores]
        wanted.append((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)[:5].mean())
    np.testing.assert_allclose(found, np.mean(wanted), rtol=1e-3)


def test_a_bound_model_is_an_argument_of_the_loss_and_not_a_constant(coded, many):
    def bound(base, lora, x):
        return x @ base + sum((x @ a) @ b for a, b in lora.values())

    loss = refinement.divergence(jax.tree_util.Partial(bound, BASE))
    (leaf,) = jax.tree.leaves(loss)
    np.testing.assert_array_equal(leaf, BASE)
    given = refinement.stacked(decode_terms(coded)), refinement.originals(many), batch(3)
    np.testing.assert_allclose(loss(*given), refinement.divergence(forward)(*given), rtol=1e-6)
    consts = jax.make_jaxpr(lambda loss, *given: loss(*given))(loss, *given).consts
    assert not any(np.shape(x) == BASE.shape for x in consts)
    _, found = refine(coded, many, steps=3)
    _, same = refine(coded, many, steps=3, forward=jax.tree_util.Partial(bound, BASE))
    np.testing.assert_allclose(same.trace, found.trace, rtol=1e-4)


def test_plain_store_of_one_head_gains_and_keeps_its_dtype(many):
    plain = hydra.compress(many, form=hydra.forms.Hydra(heads=1), dtype="float16")
    found, info = refine(plain, many, optimizer=refinement.default_optimizer(16, 0.5))
    assert info.after < 0.95 * info.before
    (term,), (before,) = (decode_terms(x)["q"] for x in (found, plain))
    assert (term.a.dtype, term.a.shape) == (np.float16, before.a.shape)


def test_plain_store_of_all_heads_gains_on_other_inputs_by_the_default_optimizer(many):
    plain = hydra.compress(many, form=hydra.forms.Hydra(heads=3, side="in"), dtype="float16")
    batches = [batch(seed) for seed in range(8)]
    _, info = refine(plain, many, steps=40, batches=batches, check=batch(9), optimizer=None)
    assert info.after < 0.8 * info.before


def test_order_of_the_adapters_given_does_not_matter(coded, many):
    one, _ = refine(coded, many, steps=4)
    other, _ = refine(coded, many[::-1], steps=4)
    np.testing.assert_array_equal(one.errors, other.errors)


def test_the_price_of_a_bit_follows_factors_that_grow(coded):
    """What is refined is then a store that fits, not one that the last rounding makes smaller."""
    segment = coded.segments[0]
    kept = rounding.coded_terms(segment)
    grown = {n: tuple(x._replace(a=2 * x.a, b=2 * x.b) for x in terms) for n, terms in kept.items()}
    found = rounding.coded_rounding(segment, kept)
    tables = found.tables
    for _ in range(80):
        tables = found.round(grown, tables, False).tables
    fits = rounding.quantized(grown, segment.modules, tables)
    gains = rounding.gains_of(fits, grown, len(NAMES))
    size = sum(map(len, encode.serialize(fits, gains).values()))
    limit = sum(v.nbytes for k, v in segment.leaves.items() if k.startswith(("shared", "task_", "head_")))
    assert 0.9 * limit < size < 1.02 * limit


def test_bytes_go_where_the_loss_sees_them(coded, many):
    """Two of four modules do not reach the outputs: their factors shrink, and the others have the bytes."""

    def half(lora, x):
        return x @ BASE + sum((x @ a) @ b for n, (a, b) in lora.items() if n in ("q", "v"))

    before = coded.errors
    found, info = refine(coded, many, forward=half, steps=60, optimizer=refinement.default_optimizer(60, 0.1))
    assert info.after < 0.6 * info.before
    assert payload(found) <= payload(coded)
    unseen = [n in ("k", "o") for n in found.segments[0].modules]
    assert (found.errors[unseen] > 2 * before[unseen]).all()


def test_a_bad_optimizer_never_makes_it_worse(coded, many):
    found, info = refine(coded, many, steps=3, optimizer=optax.sgd(1e6))
    assert found is coded
    assert info.after == info.before


def test_a_store_with_a_basis_of_all_gains():
    """No task reads the basis for itself; the segment holds it, and what is predicted from it moves."""
    many = synthetic.collection(tasks=6, modules=dict.fromkeys(MODULES, (384, 96)), rank=4, likeness=0.95)
    kept = hydra.compress(many, max_error=0.05)
    assert "joint basis" in kept.report["forms"]
    rng = np.random.default_rng(0)
    x = jnp.asarray((rng.normal(size=(6, 64, 8)) @ rng.normal(size=(8, 384))).astype(np.float32))
    run, own = (lambda lora, x: sum(x @ a @ b for a, b in lora.values())), refinement.originals(many)
    found, info = refinement.refine(
        kept,
        many,
        forward=run,
        batches=[x],
        steps=24,
        optimizer=refinement.default_optimizer(24, 0.01),
    )
    assert info.after < 0.95 * info.before
    measured = refinement.divergence(run)(refinement.stacked(decode_terms(found)), own, x)
    np.testing.assert_allclose(measured, info.after, rtol=1e-3)
    assert len(info.trace) == 24
    assert found.tasks == kept.tasks


# as if inputs had more dimensions than they have: with the true ones noise shaping leaves nothing to gain
MOMENTS = dict.fromkeys(MODULES, ROOT.T @ ROOT + 16 * np.eye(256, dtype=np.float32))


def in_parts(many, **options):
    """A store of a module or two of one or two tasks per segment."""
    return engine.compress_to_target(in_memory(many), Options(max_error=0.05, **options), segment_bytes=6000)


@pytest.mark.parametrize("calibration", [None, MOMENTS], ids=["weights", "calibrated"])
def test_a_store_of_several_segments_gains_at_no_more_bytes(many, calibration, tmp_path):
    kept = in_parts(many, calibration=calibration)
    assert sorted(x.tasks for x in kept.segments) == 4 * [("one", "two")] + 2 * [("three",)]
    # at the low price that shaped codes begin with it takes long to settle: in 64 steps of these few bytes
    # nothing is gained
    steps = 16 if calibration is None else 128
    optimizer = refinement.default_optimizer(steps, 0.03 if calibration is None else 0.05)
    found, info = refine(kept, many, calibration=calibration, steps=steps, optimizer=optimizer)
    assert info.after < 0.8 * info.before
    assert len(found.segments) == 6
    assert payload(found) <= payload(kept)
    hydra.save(tmp_path / "store", found)
    back = hydra.open(tmp_path / "store")
    loss, decoded = refinement.divergence(forward), [hydra.decode(back, x) for x in NAMES]
    measured = loss(refinement.originals(decoded), refinement.originals(many), batch(0))
    np.testing.assert_allclose(measured, info.after, rtol=1e-3)
    claimed = dict(zip(NAMES, back.errors.mean(0), strict=True))
    assert hydra.measure(back, many) == pytest.approx(claimed, rel=0.01)
    assert (back.output_errors is None) == (calibration is None)


def test_plain_segments_are_refined_together(many, monkeypatch):
    monkeypatch.setattr(group_loop, "TOGETHER", 0)
    form = hydra.forms.Hydra(heads=1)
    plain = group_loop.compress_in_form(in_memory(many), form, dtype="float16", group_bytes=1)
    found, info = refine(plain, many, optimizer=refinement.default_optimizer(16, 0.5))
    assert info.after < 0.95 * info.before
    assert len(found.segments) == len(plain.segments) > 1


def test_tasks_in_another_order_are_refined_alike(coded, many):
    turned = select(coded, NAMES[::-1])
    there = [jnp.flip(batch(0), 0)]
    one, two = (refine(x, many, steps=4, batches=y)[1] for x, y in ((coded, [batch(0)]), (turned, there)))
    np.testing.assert_allclose(two.trace, one.trace, rtol=1e-3)


def damped_energy(moment, delta):
    """What outputs of a module count, with the share of the identity."""
    flat = np.trace(moment) / len(moment) * np.eye(len(moment))
    return np.trace(delta.T @ ((1 - moments.DAMPING) * moment + moments.DAMPING * flat) @ delta)


def test_calibration_states_the_errors_of_outputs_anew(coded, many):
    moment = ROOT.T @ ROOT
    found, _ = refine(coded, many, steps=4, calibration=dict.fromkeys(MODULES, moment))
    stated = dict(zip(found.segments[0].modules, found.output_errors, strict=True))
    for t, adapter in enumerate(many):
        for n in MODULES:
            a, b = (np.asarray(y[t], np.float64) for y in refinement.stacked(decode_terms(found))[n])
            true = adapter.a[n].astype(np.float64) @ adapter.b[n]
            lost, all_of_it = (damped_energy(moment, y) for y in (true - a @ b, true))
            assert stated[n][t] == pytest.approx(lost / all_of_it, rel=0.01)


def test_accumulated_batches_move_once(coded, many):
    seen = []
    refine(coded, many, steps=4, accumulate=4, check=batch(0), batches=lambda i: seen.append(i) or batch(i))
    assert seen == [0, 1, 2, 3]


def test_a_stopped_run_goes_on_to_the_same_end(coded, many, tmp_path):
    whole, _ = refine(coded, many, steps=6, batches=batch)
    stop = iter(range(4))

    def stopping(step):
        next(stop)
        return batch(step)

    with pytest.raises(StopIteration):
        refine(coded, many, steps=6, save=3, folder=tmp_path / "b", batches=stopping, check=batch(0))
    found, info = refine(coded, many, steps=6, save=3, folder=tmp_path / "b", batches=batch)
    assert len(info.trace) == 6
    np.testing.assert_allclose(found.errors, whole.errors, rtol=0.05)


def test_a_stop_between_the_batches_of_a_step_changes_nothing(coded, many, tmp_path):
    whole = refine(coded, many, steps=8, accumulate=4, batches=batch)[1].trace
    stop = iter(range(7))
    stopping = lambda step: (next(stop), batch(step))[1]  # noqa: E731
    with pytest.raises(StopIteration):
        refine(coded, many, steps=8, accumulate=4, save=2, folder=tmp_path, batches=stopping, check=batch(0))
    assert {x.name for x in tmp_path.iterdir()} == {"4", "refinement.json"}
    again = refine(coded, many, steps=8, accumulate=4, save=2, folder=tmp_path, batches=batch)[1].trace
    np.testing.assert_allclose(again, whole, rtol=1e-6)


def test_a_damaged_step_is_named(coded, many, tmp_path):
    refine(coded, many, steps=3, folder=tmp_path)
    shutil.rmtree(tmp_path / "3")
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "_METADATA").write_bytes(b"not a checkpoint")
    with pytest.raises(HydraOptError, match="3: no saved step"):
        refine(coded, many, steps=3, folder=tmp_path)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_for_steps_is_made_or_named(coded, many, tmp_path, kind):
    refine(coded, many, steps=1, folder=kind(tmp_path / "new" / "run"))
    assert (tmp_path / "new" / "run" / "1").is_dir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(HydraOptError, match=r"file/run: cannot be written: [^\n]*$"):
        refine(coded, many, steps=1, folder=kind(tmp_path / "file" / "run"))


def test_steps_of_another_refinement_are_not_taken(coded, many, tmp_path):
    refine(coded, many, steps=3, folder=tmp_path)
    other = hydra.compress(many, max_error=0.06)
    for store, options in ((other, {}), (coded, {"steps": 4}), (coded, {"accumulate": 3})):
        with pytest.raises(HydraOptError, match="steps of another refinement"):
            refine(store, many, **({"steps": 3, "folder": tmp_path} | options))
    assert len(refine(coded, many, steps=3, folder=tmp_path)[1].trace) == 3


def test_a_module_that_is_zero_for_all_tasks_stays_so(many):
    given = [x.replace(b={**x.b, "q": 0 * x.b["q"]}) for x in many]
    kept = hydra.compress(given, max_error=0.05)
    moments = dict.fromkeys(MODULES, ROOT.T @ ROOT)
    found, info = refine(
        kept, given, calibration=moments, steps=32, optimizer=refinement.default_optimizer(32)
    )
    assert info.after < info.before
    assert set(found.shapes) == set(kept.shapes)
    assert "q" not in decode_terms(found)
    indexed = lambda lora, x: x @ BASE + sum((x @ lora[n][0]) @ lora[n][1] for n in MODULES)  # noqa: E731
    assert refine(kept, given, forward=indexed, steps=1)[1].before == pytest.approx(info.before, rel=1e-3)


def test_masked_tokens_do_not_count():
    def masked(lora, x):
        return forward(lora, x).at[..., 3:].set(-jnp.inf)

    some = {"k": (jnp.ones((1, 256, 1)), jnp.ones((1, 1, 48)))}
    other = {"k": (2 * some["k"][0], some["k"][1])}
    whole = lambda lora, x: forward(lora, x)[..., :3]  # noqa: E731
    found, wanted = (
        jax.value_and_grad(refinement.divergence(f))(some, other, batch(0)[:1]) for f in (masked, whole)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for one, two in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batches": ()}, "needs batches"),
        ({"drop": 1}, "no adapter for the task 'three'"),
        ({"accumulate": 0}, "accumulate and save must be at least 1"),
        ({"without": "q"}, "q of the adapter 'one' is not that of the store"),
        ({"narrow": "q"}, "q of the adapter 'one' is not that of the store"),
    ],
)
def test_bad_input_is_one_line(coded, many, options, words):
    kept = many[: len(many) - options.pop("drop", 0)]
    gone, narrow = options.pop("without", None), options.pop("narrow", None)
    kept = [x.replace(a={n: a[n == narrow :] for n, a in x.a.items() if n != gone}) for x in kept]
    with pytest.raises(HydraOptError, match=words):
        refinement.refine(coded, kept, forward=forward, **({"batches": batch} | options))
