"""A small decoder-only character transformer, with LoRA factors as an argument.

Each block is `x + attention(norm(x))` then `x + mlp(norm(x))`, with RMS norms, rotary positions (Su et al.
2021, arXiv 2104.09864) and tied embeddings. Every projection is `y = x @ w + (x @ a) @ b`. The LoRA pair
(Hu et al. 2021, arXiv 2106.09685) is an argument and may be absent: one function serves the base, one
adapter, and, under `vmap`, a stack of adapters.

Letters: N batch, L length, V vocabulary, D width, H heads, C columns of a cache, I/O in/out, S stored rank.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

PROJECTIONS: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
Lora = dict[str, tuple[Array, Array]]
# module -> LoRA pair, or a function of the module's input whose value is added to its output
Branches = Mapping[str, tuple[Array, Array] | Callable[[Array], Array]]
Cache = list[tuple[Array, Array]]


class Config(NamedTuple):
    """Sizes of the transformer; hashable, so that it can be static under `jit`."""

    vocabulary: int
    layers: int = 3
    width: int = 128
    heads: int = 4
    hidden: int = 512


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
class Base:
    """A trained transformer: flat parameters `{"layers.0.q_proj.kernel": [I, O], ...}` and its sizes."""

    def __init__(self, params: dict[str, Array], config: Config):
        self.params = params
        self.config = config


def modules(config: Config) -> dict[str, tuple[int, int]]:
    """Adapted module -> (I, O).

    >>> modules(Config(10, layers=1, width=8, hidden=16))["layers.0.up_proj"]
    (8, 16)
    """
    d, h = config.width, config.hidden
    shapes = dict.fromkeys(PROJECTIONS, (d, d)) | {"up_proj": (d, h), "down_proj": (h, d)}
    return {f"layers.{i}.{name}": shapes[name] for i in range(config.layers) for name in PROJECTIONS}


def low_rank(x: Array, a: Array, b: Array) -> Array:
    """`(x @ a) @ b` [..., O] of x [..., I], a [I, S], b [S, O]."""
    return jnp.dot(jnp.dot(x, a, precision="highest"), b, precision="highest")


def rotate(x: Array, positions: Array) -> Array:
    """`x` with rotary position embedding.

    Args:
        x: [N, L, H, E] with E even.
        positions: [N, L].
    """
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    u, v = x[..., :half], x[..., half:]
    return jnp.concatenate([u * cos - v * sin, u * sin + v * cos], -1)


class Block(nnx.Module):
    """One transformer block; its projections have the names that are usual in PEFT."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d, h = config.width, config.hidden
        init = nnx.initializers.normal(0.02)
        small = nnx.initializers.normal(0.02 / (2 * config.layers) ** 0.5)
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs, precision="highest")
        self.heads = config.heads
        self.attention_norm = nnx.RMSNorm(d, rngs=rngs)
        self.q_proj = linear(d, d, kernel_init=init)
        self.k_proj = linear(d, d, kernel_init=init)
        self.v_proj = linear(d, d, kernel_init=init)
        self.o_proj = linear(d, d, kernel_init=small)
        self.mlp_norm = nnx.RMSNorm(d, rngs=rngs)
        self.up_proj = linear(d, h, kernel_init=init)
        self.down_proj = linear(h, d, kernel_init=small)

    def _project(self, name: str, x: Array, lora: Branches) -> Array:
        y = getattr(self, name)(x)
        if name not in lora:
            return y
        branch = lora[name]
        if callable(branch):
            return y + branch(x)
        return y + low_rank(x, *branch)

    def __call__(
        self,
        x: Array,
        positions: Array,
        mask: Array,
        lora: Branches,
        cache: tuple[Array, Array] | None = None,
        column: Array | int = 0,
    ) -> tuple[Array, tuple[Array, Array]]:
        """The new x [N, L, D], and this block's keys and values [N, C, H, E].

        With a cache the L new keys and values are written at `column`; `mask` is [N, L, C].
        """
        n, length, d = x.shape
        split = (n, length, self.heads, d // self.heads)
        y = self.attention_norm(x)
        q = rotate(self._project("q_proj", y, lora).reshape(split), positions)
        k = rotate(self._project("k_proj", y, lora).reshape(split), positions)
        v = self._project("v_proj", y, lora).reshape(split)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, column, 1)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, column, 1)
        scores = jnp.einsum("nqhe,nkhe->nhqk", q, k, precision="highest") * split[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e9), -1)
        y = jnp.einsum("nhqk,nkhe->nqhe", weights, v, precision="highest").reshape(n, length, d)
        x = x + self._project("o_proj", y, lora)
        y = jax.nn.gelu(self._project("up_proj", self.mlp_norm(x), lora))
        return x + self._project("down_proj", y, lora), (k, v)


class CharTransformer(nnx.Module):
    """The character transformer."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(config.vocabulary, config.width, embedding_init=init, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.final_norm = nnx.RMSNorm(config.width, rngs=rngs)

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        mask: Array,
        lora: Branches,
        cache: Cache | None = None,
        column: Array | int = 0,
    ) -> tuple[Array, Cache]:
        """The final hidden states [N, L, D], and the keys and values of every block."""
        x = self.embed(tokens)
        kept: Cache = []
        for i, block in enumerate(self.layers):
            own = {p: lora[f"layers.{i}.{p}"] for p in PROJECTIONS if f"layers.{i}.{p}" in lora}
            x, kv = block(x, positions, mask, own, None if cache is None else cache[i], column)
            kept.append(kv)
        return self.final_norm(x), kept

    def readout(self, x: Array) -> Array:
        """Logits [..., V] of hidden states [..., D]; the output matrix is the embedding."""
        return jnp.dot(x, self.embed.embedding[...].T, precision="highest")


@functools.cache
def _structure(config: Config) -> tuple[Any, tuple[tuple[Any, ...], ...]]:
    """The model's graph definition and parameter paths, computed without allocating parameters."""
    shape = nnx.eval_shape(lambda: CharTransformer(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(shape, nnx.Param)
    return graph, tuple(tuple(path) for path, _ in nnx.to_flat_state(state))


def name_of(path: tuple[Any, ...]) -> str:
    """A parameter's flat name.

    >>> name_of(("layers", 0, "q_proj", "kernel"))
    'layers.0.q_proj.kernel'
    """
    return ".".join(map(str, path))


def bind(base: Base) -> CharTransformer:
    """The NNX module that holds the given parameters."""
    graph, paths = _structure(base.config)
    flat = [(path, nnx.Param(base.params[name_of(path)])) for path in paths]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def forward(base: Base, lora: Branches, tokens: Array) -> Array:
    """Logits of the next token at every position.

    Args:
        base: the transformer.
        lora: module -> `(a [I, S], b [S, O])`, scale folded in; `{}` for the base alone. S may differ between
            modules, and modules may be missing.
        tokens: [N, L], padded on the right.

    Returns:
        Logits [N, L, V], undefined at padding.

    >>> from hydraopt_jax.demo.assets import load_base
    >>> forward(load_base(), {}, jnp.ones((2, 5), int)).shape[:2]
    (2, 5)
    """
    model = bind(base)
    n, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (n, length))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (n, length, length))
    hidden, _ = model(tokens, positions, mask, lora)
    return model.readout(hidden)
