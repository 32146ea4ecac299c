"""The frontier: plain curves against direct computation, rates against known answers."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.frontier import symbols
from hydraopt_jax import HydraOptError, adapters, report, synthetic, tradeoff
from hydraopt_jax.codec.contexts import COUNT, SYMBOLS, WIDE
from hydraopt_jax.linalg import decompose
from hydraopt_jax.rate_control import coding, problem
from hydraopt_jax.tradeoff import Curve, Point

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def many():
    return synthetic.collection(
        tasks=["a", "b", "c"], modules={"q": (192, 128), "k": (192, 128)}, rank=4, likeness=0.7
    )


@pytest.fixture(scope="module")
def found(many):
    return tradeoff.frontier(many, np.array([0.9, 0.5]), heads=(1, 3))


def test_an_untrained_adapter_has_a_place_in_every_curve():
    """Relative to a delta of zero there is no error: one adapter for all tasks is not judged by it."""
    many = synthetic.collection(tasks=3, modules={"q": (48, 32), "score": (48, 1)}, rank=4)
    many[2] = many[2].replace(b={k: 0 * v for k, v in many[2].b.items()})
    found = tradeoff.frontier(many, (0.9, 1e-9))
    text = json.dumps(tradeoff.as_dict(found), allow_nan=False)
    assert "merged (mean delta)" in text
    merged = next(x for x in found.curves if x.label == "merged (mean delta)").points[0]
    two = tradeoff.merged(adapters.stack(many[:2])).points[0]
    assert 0 < merged.mean < 1
    # the mean of three, of which one is zero, is two thirds of that of the two
    assert merged.mean > two.mean


def line(factor, slope=2.0):
    return Curve("", tuple(Point("", factor * 2.0**-k, slope**k, 0.0) for k in range(5)))


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_delta_rate_of_a_scaled_curve_is_its_factor(factor):
    assert tradeoff.bjontegaard(line(factor), line(1.0)) == pytest.approx(100 * (factor - 1), abs=1e-6)


def test_delta_rate_needs_errors_in_common():
    far = Curve("", tuple(p._replace(mean=p.mean * 1e6) for p in line(1.0).points))
    assert tradeoff.bjontegaard(far, line(1.0)) is None


LOSSLESS = (Point("", 100.0, 0.0, 0.0), Point("", 50.0, 0.1, 0.2), Point("", 25.0, 0.4, 0.5))


def test_a_lossless_point_reaches_every_error():
    """Between 1e-6 and 1e-2 the other curve takes 40 to 20 bytes, this one its lossless 100."""
    other = Curve("", (Point("", 40.0, 1e-6, 0.0), Point("", 20.0, 1e-2, 0.0)))
    rate = tradeoff.bjontegaard(other, Curve("", LOSSLESS))
    assert rate == pytest.approx(100 * (np.sqrt(800) / 100 - 1))
    back = tradeoff.bjontegaard(Curve("", LOSSLESS), other)
    assert (1 + rate / 100) * (1 + back / 100) == pytest.approx(1)


def test_lossless_curves_are_compared_where_they_are_lossless():
    half = Curve("", (Point("", 50.0, 0.0, 0.0),))
    assert tradeoff.bjontegaard(half, Curve("", LOSSLESS)) == pytest.approx(-50)
    assert tradeoff.bjontegaard(half, line(1.0)) is None


@pytest.mark.parametrize("bytes_at_zero", [60.0, 20.0])
def test_a_rate_is_a_number_with_lossless_points_on_either_side(bytes_at_zero):
    one = Curve("", (Point("", bytes_at_zero, 0.0, 0.0), Point("", 15.0, 1e-3, 0.0)))
    for pair in ((one, Curve("", LOSSLESS)), (Curve("", LOSSLESS), one), (one, one)):
        assert np.isfinite(tradeoff.bjontegaard(*pair))


def test_rounded_directions_are_measured_without_cancellation(many):
    """Half-precision rounding of full-rank factors, in float64: of the order of 1e-8, never 0."""
    bucket = adapters.stack(many).buckets[0]
    deltas = decompose.batched_svd(jnp.asarray(bucket.a), jnp.asarray(bucket.b))
    x, y = tradeoff.rounded_directions(deltas, 16)
    found = tradeoff.prefix_errors(deltas, x, y)
    u, s, v, x, y = (np.asarray(z, np.float64) for z in (*deltas, x, y))
    for rank in (1, 4):
        lost = (u * s[..., None, :]) @ v - x[..., :rank] @ y[..., :rank, :]
        np.testing.assert_allclose(found[..., rank - 1], (lost**2).sum((-2, -1)), rtol=1e-2)


def test_dominated_points_are_no_part_of_a_curve():
    points = [Point("", 4.0, 0.1, 0), Point("", 5.0, 0.2, 0), Point("", 2.0, 0.3, 0)]
    assert [p.bytes for p in tradeoff.lower_envelope(points)] == [4.0, 2.0]


def separate(many):
    """The curve of plain SVDs in half precision."""
    stacked = adapters.stack(many)
    deltas = [decompose.batched_svd(x.a, x.b) for x in stacked.buckets]
    return tradeoff.separate_curves(stacked, deltas, (16,))[0]


def test_full_rank_svd_at_16_bits_is_the_rounding_of_half_precision(many):
    last = separate(many).points[-1]
    assert last.mean < 1e-6
    assert last.bytes == 2 * adapters.stack(many).size


def test_truncation_error_is_the_tail_of_the_singular_values(many):
    first = separate(many).points[0]
    tails = []
    for x in many:
        for name, a in x.a.items():
            s = np.linalg.svd(a.astype(np.float64) @ x.b[name], compute_uv=False)
            tails.append((s[1:] ** 2).sum() / (s**2).sum())
    assert first.mean == pytest.approx(np.mean(tails), rel=1e-3)


def test_merged_error_is_that_of_the_mean_cut_to_the_rank(many):
    lost = []
    for name in ("q", "k"):
        deltas = [x.a[name].astype(np.float64) @ x.b[name] for x in many]
        u, s, v = np.linalg.svd(np.mean(deltas, 0))
        mean = (u[:, :4] * s[:4]) @ v[:4]
        lost += [((d - mean) ** 2).sum() / (d**2).sum() for d in deltas]
    assert tradeoff.merged(adapters.stack(many)).points[0].mean == pytest.approx(np.mean(lost), rel=1e-3)


def test_navigated_curve_beats_the_paper_s_form(found):
    assert found.delta_rate["separate SVD, 16 bits"] < -10
    paper = found.curves[[c.label for c in found.curves].index("HydraOpt, fp16")]
    for point in paper.points:
        cheaper = [p.mean for p in found.curves[0].points if p.bytes <= point.bytes]
        assert min(cheaper, default=0.0) < point.mean
    assert set(found.delta_rate) == {c.label for c in found.curves[1:]}
    assert all(x is None or np.isfinite(x) for x in found.delta_rate.values())
    for fraction, point in zip((0.9, 0.5), found.curves[0].points, strict=True):
        assert point.bytes <= fraction * found.reference


def test_frontier_as_plot_and_tables(found, tmp_path):
    report.plot_frontier(tmp_path / "f.svg", found)
    text = (tmp_path / "f.svg").read_text()
    assert text.count("<path") > 20
    every = (*found.curves, *found.estimates)
    assert report.frontier_table(found).row_count == len(every)
    assert report.points_table(found).row_count == sum(len(c.points) for c in every)
    said = json.loads(json.dumps(tradeoff.as_dict(found), allow_nan=False))
    assert said["curves"]["HydraOpt, fp16"][0]["setting"] == "K = 1"
    assert set(said["estimates"]) == {"Gaussian estimate, separate", "Gaussian estimate, joint"}


def test_lossless_points_in_plot_and_table(tmp_path):
    curves = (Curve("a", LOSSLESS), Curve("b", LOSSLESS), Curve("c", LOSSLESS))
    rates = {"b": None, "c": -5.0}
    exact = tradeoff.Frontier(100, (1.0, 0.5, 0.1), curves, (Curve("e", LOSSLESS),), rates)
    report.plot_frontier(tmp_path / "f.svg", exact)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.points_table(exact))
    assert console.export_text().count("lossless") == 8
    console.print(report.frontier_table(exact))
    rows = [x.split() for x in console.export_text().splitlines()]
    assert ["b", "0%", "10%", "-", "-"] in rows
    assert ["c", "0%", "10%", "-", "-5.0%"] in rows


def test_more_budgets_than_a_line_holds_are_named():
    shares = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.001)
    points = tuple(Point("", 1000 * f, 1.23e-4 / f, 0.0) for f in shares)
    curves = tuple(Curve(x, points) for x in ("ours", "another method of a long name"))
    found = tradeoff.Frontier(1000, shares, curves, (), {curves[1].label: -12.3})
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.frontier_table(found))
    text = console.export_text()
    assert "0.00…" not in text
    assert [f"{x}%" in text for x in (90, 50, 40, 0.1)] == [True, True, False, False]
    assert report.shares_left_out(found) == "With --verbose and --json only: 40%, 0.1%"
    assert report.shares_left_out(found._replace(fractions=shares[:5])) is None


def test_curves_that_meet_at_one_error_are_compared_there():
    single = Curve("", (Point("", 8.0, 1.0, 0.0),))
    assert tradeoff.bjontegaard(line(1.0), single) == pytest.approx(100 * (1 / 8 - 1))


def test_budgets_beside_the_paper_s_errors_still_have_a_rate(many):
    """At a budget of 0.9 this package's only error is far below all of HydraOpt's."""
    alone = tradeoff.frontier(many, (0.9,), heads=(1,))
    assert alone.delta_rate[tradeoff.HYDRAOPT] < 0
    assert [len(c.points) for c in alone.curves[:1]] == [1]


def test_budgets_must_be_positive(many):
    for fractions in ((0.5, 0.0), (), np.array([]), np.array([0.5, -0.1])):
        with pytest.raises(HydraOptError, match="positive fractions"):
            tradeoff.frontier(many, fractions)


def test_the_study_of_symbols_sees_every_code_and_its_neighbors(many):
    found = problem.prepare(adapters.stack(many), ["q", "k"], np.ones(3))
    trial = coding.encode_at_step(found, 0.05)
    x = symbols.codes_of(trial.coded)
    counts = np.bincount(x.row * SYMBOLS + x.symbol, minlength=2 * COUNT * SYMBOLS).reshape(COUNT, 2, SYMBOLS)
    np.testing.assert_array_equal(counts[~WIDE], trial.coded.counts[~WIDE])
    # vectors of a module are of 192 or of 128 entries
    back = (np.arange(len(x.above)) - x.above)[x.above >= 0]
    assert set(back) <= {128, 192}
    assert x.first.sum() == sum(np.count_nonzero(c) for c in trial.coded.contexts)
    assert x.direction.max() < 4


def test_an_adaptive_coder_learns_what_it_is_told_of_and_pays_for_what_tells_nothing():
    rng = np.random.default_rng(0)
    symbol, nothing = rng.integers(0, 2, 4000), rng.integers(0, 2, 4000)
    row, prior = np.zeros(4000, int), np.full((1, 2), 0.5)
    plain = symbols.adaptive_bits(symbol, row, prior)
    np.testing.assert_allclose(plain, 4000, rtol=0.01)
    assert symbols.adaptive_bits(symbol, row, prior, symbol) < 0.1 * plain
    assert plain < symbols.adaptive_bits(symbol, row, prior, nothing) < 1.01 * plain
