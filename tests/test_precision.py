"""Base vectors have the precision of least cost, and references keep directions that help others."""

from pathlib import Path

import numpy as np
import pytest

from hydraopt_jax import adapters, formats
from hydraopt_jax.codec import encode
from hydraopt_jax.codec.contexts import COUNT, SYMBOLS
from hydraopt_jax.codec.encode import DISTORTION
from hydraopt_jax.rate_control import coding, mode_decision, precision
from hydraopt_jax.rate_control.problem import prepare


def paid(noise, along, rest, center, own):
    """Nats of a base vector's entry and of those of all predicted ones, with its own distortion."""
    users = np.log(rest + DISTORTION + along / center * noise).sum(-1)
    return own * noise / DISTORTION - np.log(noise) + users


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("remainder", [0.05, 1.0, 4.0])
def test_a_base_vector_has_the_precision_of_least_cost(own, remainder):
    rng = np.random.default_rng(0)
    along, rest = rng.uniform(1, 30, 6), remainder * rng.uniform(0.5, 2, 6)
    center = 20.0 if own else along.sum()
    scale = precision.base_scales(along[:, None], rest, np.array([center]), own=own)[0]
    tried = np.geomspace(precision.LEAST, precision.MOST, 400)
    costs = np.array([paid(DISTORTION / x**2, along, rest, center, own) for x in tried])
    assert paid(DISTORTION / scale**2, along, rest, center, own) < costs.min() + 2e-3
    assert (scale > 1) == own or remainder < 0.1


SHARED = Path(__file__).parents[1] / "experiments" / "llm" / "adapters" / "shared"


@pytest.fixture(scope="module")
def alike():
    """Two modules of the sixteen adapters of a language model with one initialization."""
    found = [formats.read_adapter(x) for x in sorted(SHARED.iterdir()) if x.is_dir()]
    names = [n for n in found[0].a if n.endswith(("24.self_attn.q_proj", "27.self_attn.o_proj"))]
    few = [x.replace(a={n: x.a[n] for n in names}, b={n: x.b[n] for n in names}, extras={}) for x in found]
    return prepare(adapters.stack(few), names, np.ones(len(few)))


def cost(problem, step):
    trial = coding.encode_at_step(problem, step)
    return np.nansum(trial.errors) / step**2 + encode.MULTIPLIER * 8 * trial.bytes


def test_each_lowers_the_cost_of_alike_tasks(alike, monkeypatch):
    step = 0.0017
    both = cost(alike, step)
    monkeypatch.setattr(precision, "LEAST", 1.0)
    monkeypatch.setattr(precision, "MOST", 1.0)
    one_precision = cost(alike, step)
    monkeypatch.setattr(
        mode_decision, "helpful", lambda of, energy, keep, *_: keep[np.arange(len(energy)), of.task]
    )
    neither = cost(alike, step)
    assert both < 0.997 * one_precision
    assert one_precision < 0.997 * neither


def test_a_direction_that_helps_others_is_kept():
    """Its own energy is below its cost; eleven others have most of theirs along it."""
    energy = np.full((1, 12, 1), 4000.0)
    energy[0, 0] = 30.0
    cosines = np.full((1, 12, 1, 1), 0.97)
    alone = np.full(energy.shape, 500.0)
    alone[0, 0] = 60.0
    keep = energy > alone
    of = mode_decision.Reference(np.zeros(1, int), cosines, cosines)
    assert not keep[0, 0, 0]
    assert mode_decision.helpful(of, energy, keep, alone, (128, 96)).tolist() == [[True]]
    unlike = mode_decision.Reference(np.zeros(1, int), 0 * cosines, 0 * cosines)
    assert mode_decision.helpful(unlike, energy, keep, alone, (128, 96)).tolist() == [[False]]
    alone[0, 0] = 1e6
    assert mode_decision.helpful(of, energy, keep, alone, (128, 96)).tolist() == [[False]]


def test_bits_of_a_context_are_those_given_the_quantizer():
    """Each quantizer has one magnitude, so only the sign of the second one's is unknown."""
    counts = np.zeros((COUNT, 2, SYMBOLS))
    counts[5, 0, 0], counts[5, 1, 1] = 30, 10
    bits = encode.context_bits(counts)
    assert bits[5] == pytest.approx(0.25)
    assert not np.delete(bits, 5).any()
