"""Random adapters of small models of the families that the trainers have, under Hugging Face's names."""

import numpy as np

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.formats import families, trees

HEAD_DIM, WIDTH, HIDDEN, HEADS = 8, 16, 24, 4


def adapter(layers=2, kv_heads=2, rank=3, seed=0, task="one"):
    """Factors of every linear layer."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    query, keys = HEADS * HEAD_DIM, kv_heads * HEAD_DIM
    sizes = {
        "self_attn.q_proj": (WIDTH, query),
        "self_attn.k_proj": (WIDTH, keys),
        "self_attn.v_proj": (WIDTH, keys),
        "self_attn.o_proj": (query, WIDTH),
        "mlp.gate_proj": (WIDTH, HIDDEN),
        "mlp.up_proj": (WIDTH, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDTH),
    }
    names = {f"model.layers.{n}.{m}": s for n in range(layers) for m, s in sizes.items()}
    a = {name: draw(i, rank) for name, (i, _) in names.items()}
    return Adapter(task, a, {name: draw(rank, o) for name, (_, o) in names.items()})


def known(one, family, library):
    """Those modules that a library adapts in a family: all but experts and what stands in their place."""
    modules = {x.module for x in families.FAMILIES[family][library].rows}
    kept = [x for x in one.a if x.split(".", 3)[3] in modules]
    return one.replace(a={x: one.a[x] for x in kept}, b={x: one.b[x] for x in kept})


def shapes(tree):
    """Path of a factor -> its shape."""
    return {trees.path_text(path): list(x.shape) for path, x in trees.flatten(tree)}


def check_same(found, want, rtol=1e-5):
    """The same modules with the same deltas."""
    assert set(found.a) == set(want.a)
    for name, a in want.a.items():
        np.testing.assert_allclose(found.a[name] @ found.b[name], a @ want.b[name], rtol=rtol, atol=rtol)
