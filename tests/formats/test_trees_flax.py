"""LoRA factors in the parameter trees that Flax makes, in memory and in Orbax checkpoints."""

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as orbax
import pytest
from flax import linen, nnx
from orbax.checkpoint import v1 as ocp

import hydraopt_jax as hydra
from hydraopt_jax import formats
from hydraopt_jax.formats import orbax_trees, trees

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


class Adapted(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        init = {"lora_rank": 3, "rngs": rngs, "b_initializer": nnx.initializers.normal(1.0)}
        wrapped = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
        self.layers = nnx.List(
            [nnx.LoRALinear(5, 6, **init), nnx.LoRA(6, 3, 4, base_module=wrapped, rngs=rngs)]
        )

    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.layers[0](x)))


def test_flax_s_own_parameters_come_back_from_a_store():
    models = [Adapted(seed) for seed in (1, 2)]
    adapters = [formats.read_tree(m, "flax_nnx", task=str(n), scale=1.0) for n, m in enumerate(models)]
    assert set(adapters[0].a) == {"layers.0", "layers.1"}
    states = [nnx.state(m, nnx.LoRAParam) for m in models]
    same = formats.read_tree(states[1], "flax_nnx", task="1", scale=1.0)
    np.testing.assert_array_equal(same.a["layers.0"], adapters[1].a["layers.0"])
    x = draw(7, 5)
    wanted = [m(x) for m in models]
    fresh = nnx.clone(models[0])
    state = nnx.state(fresh, nnx.LoRAParam)
    nnx.replace_by_pure_dict(state, formats.write_tree(adapters[1], "flax_nnx", scale=1.0))
    nnx.update(fresh, state)
    base = nnx.state(models[1], nnx.Not(nnx.LoRAParam))
    nnx.update(fresh, base)
    np.testing.assert_allclose(fresh(x), wanted[1], atol=1e-6)


def test_boxed_leaves_of_linen_are_opened():
    boxed = {"q": {"kernel_lora_a": linen.Partitioned(draw(3, 2), (None, None)), "kernel_lora_b": draw(2, 4)}}
    assert formats.read_tree(boxed, "qwix", task="one", scale=1.0).a["q"].shape == (3, 2)


@pytest.mark.parametrize("interface", ["v0", "v1"])
def test_an_orbax_checkpoint_gives_its_lora_alone(interface, tmp_path):
    model = Adapted(1)
    path = tmp_path / "run"
    state = nnx.state(model)
    save = {"v0": orbax.PyTreeCheckpointer().save, "v1": ocp.save}
    save[interface](path, state)
    read = orbax_trees.load_factors(path)
    assert {trees.path_text(p) for p, _ in trees.flatten(read)} == {
        "layers/0/lora/lora_a",
        "layers/0/lora/lora_b",
        "layers/1/lora_a",
        "layers/1/lora_b",
    }
    adapter = formats.read_checkpoint(path, "flax_nnx", scale=1.0)
    assert (adapter.task, len(adapter.digest), adapter.source) == ("run", 64, str(path))
    direct = formats.read_tree(model, "flax_nnx", task="run", scale=1.0)
    for name, a in direct.a.items():
        np.testing.assert_array_equal(adapter.a[name], a)

    formats.write_checkpoint(tmp_path / "out", adapter, "flax_nnx", scale=1.0)
    other = Adapted(2)
    abstract = nnx.state(other, nnx.LoRAParam)
    nnx.update(other, ocp.load(tmp_path / "out", abstract))
    nnx.update(other, nnx.state(model, nnx.Not(nnx.LoRAParam)))
    x = draw(3, 5)
    np.testing.assert_allclose(other(x), model(x), atol=1e-6)
    with pytest.raises(hydra.HydraOptError, match="out: exists"):
        formats.write_checkpoint(tmp_path / "out", adapter, "flax_nnx", scale=1.0)


def test_checkpoints_that_do_not_serve_are_named(tmp_path):
    ocp.save(tmp_path / "plain", {"kernel": np.ones(3)})
    with pytest.raises(hydra.HydraOptError, match="plain: the checkpoint holds no LoRA factor"):
        formats.read_checkpoint(tmp_path / "plain", "qwix", scale=1.0)
    with pytest.raises(hydra.HydraOptError, match="nothing: no readable Orbax checkpoint"):
        formats.read_checkpoint(tmp_path / "nothing", "qwix", scale=1.0)
    pair = {"q": {"lora_a": np.ones((3, 2), jnp.bfloat16), "lora_b": np.ones((2, 4), jnp.bfloat16)}}
    ocp.save(tmp_path / "state", {"params": pair, "opt_state": {"mu": pair}})
    with pytest.raises(hydra.HydraOptError, match="within='params'"):
        formats.read_checkpoint(tmp_path / "state", "easydel", scale=1.0)
    adapter = formats.read_checkpoint(tmp_path / "state", "easydel", scale=1.0, within="params")
    assert (list(adapter.a), adapter.dtype) == (["q"], "bfloat16")
