"""Llama-architecture forward passes in plain JAX: `lax.scan` over stacked layers, optional biases, LoRA on
any of the projections.

Weights are `[L, in, out]` per projection (`x @ w`), norms `[L, D]`; biases (Qwen2.5) exist where the tree
has them. A forward pass over some of the layers is the unit: the layers below the adapters are run once and
cached. Batch
letters: N sequences, P positions, D width, H heads, G key-value heads, C head width, L layers, R rank, V
vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUPS = dict.fromkeys(MODULES[:4], "self_attn") | dict.fromkeys(MODULES[4:], "mlp")

Tree = dict[str, Any]
Change = Callable[[str, jax.Array, Tree], jax.Array]


class Config(NamedTuple):
    """Shape of a Llama-architecture model; `rope_scaling` holds Llama 3's four numbers, or is empty."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    theta: float
    eps: float
    rope_scaling: tuple[float, ...] = ()


class Cache(NamedTuple):
    """Keys and values of past positions: `[L, N, P, G, C]` each."""

    keys: jax.Array
    values: jax.Array


def frequencies(config: Config) -> jax.Array:
    """Rotary frequencies `[C / 2]`, `theta^(-2i / C)`, rescaled by Llama 3's rule if the model has it."""
    raw = config.theta ** (-jnp.arange(0, config.head_width, 2, dtype=jnp.float32) / config.head_width)
    if not config.rope_scaling:
        return raw
    factor, low, high, original = config.rope_scaling
    turns = original * raw / (2 * math.pi)
    smooth = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return raw * (smooth + (1 - smooth) / factor)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`x` `[N, P, H, C]` rotated by angles `[N or 1, P, 1, C / 2]`, halves paired as Hugging Face does."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalization of `x` `[..., D]`, times `weight` `[D]`."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _project(
    x: jax.Array, layer: Tree, lora: Tree, name: str, scale: float, change: Change | None
) -> jax.Array:
    """`x @ w`, plus the bias, `scale * x @ a @ b` and `change(name, x, layer)` where there are any."""
    out = x @ layer[name]
    if f"{name}.bias" in layer:
        out = out + layer[f"{name}.bias"]
    if name in lora:
        out = out + scale * ((x @ lora[name]["a"]) @ lora[name]["b"])
    return out if change is None else out + change(name, x, layer)


def run_layers(
    layers: Tree,
    x: jax.Array,
    *,
    config: Config,
    lora: Tree | None = None,
    scale: float = 1.0,
    change: Change | None = None,
    positions: jax.Array | None = None,
    cache: Cache | None = None,
) -> tuple[jax.Array, Cache]:
    """Activations after `layers`, and the keys and values.

    Args:
        layers: Stacked weights, leading axis L (any number of consecutive layers).
        x: `[N, P, D]` activations that enter the first of them.
        config: Shape of the model.
        lora: Per projection `{"a": [L, in, R], "b": [L, R, out]}`; absent projections have none.
        scale: Factor of every LoRA product (alpha / R).
        change: What else is added to a projection, given its name, its input `[N, P, in]` and the layer's
            weights.
        positions: `[N, P]` positions of the tokens; 0, 1, ... where absent.
        cache: Past keys and values with room for the new ones, which are written at `positions`. Without it
        the
            tokens attend to each other, causally. Padding belongs on the right: it changes nothing before it.

    Returns:
        `[N, P, D]` activations and the cache (of these tokens alone where none was given).
    """
    n, p, _ = x.shape
    at = jnp.arange(p)[None] if positions is None else positions
    angles = at[..., None, None] * frequencies(config)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    length = p if cache is None else cache.keys.shape[2]
    visible = jnp.arange(length)[None, None] <= at[..., None]
    shared = config.heads // config.kv_heads

    def step(x: jax.Array, inputs: tuple[Tree, Tree, Any]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        layer, low, past = inputs
        h = _norm(x, layer["input_layernorm"], config.eps)
        q = _project(h, layer, low, "q_proj", scale, change).reshape(n, p, config.heads, config.head_width)
        k = _project(h, layer, low, "k_proj", scale, change).reshape(n, p, config.kv_heads, config.head_width)
        v = _project(h, layer, low, "v_proj", scale, change).reshape(n, p, config.kv_heads, config.head_width)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if past is not None:
            rows = jnp.arange(n)[:, None]
            k, v = past.keys.at[rows, at].set(k), past.values.at[rows, at].set(v)
        q = q.reshape(n, p, config.kv_heads, shared, config.head_width)
        weights = jnp.einsum("npgsc,nmgc->ngspm", q, k) / math.sqrt(config.head_width)
        weights = jax.nn.softmax(jnp.where(visible[:, None, None], weights, -1e30), axis=-1)
        h = jnp.einsum("ngspm,nmgc->npgsc", weights, v).reshape(n, p, -1)
        x = x + _project(h, layer, low, "o_proj", scale, change)
        h = _norm(x, layer["post_attention_layernorm"], config.eps)
        gate = jax.nn.silu(_project(h, layer, low, "gate_proj", scale, change))
        h = gate * _project(h, layer, low, "up_proj", scale, change)
        return x + _project(h, layer, low, "down_proj", scale, change), (k, v)

    x, (keys, values) = jax.lax.scan(step, x, (layers, lora or {}, cache))
    return x, Cache(keys, values)


def embed(params: Tree, tokens: jax.Array) -> jax.Array:
    """Activations `[..., D]` of `tokens` before the first layer."""
    return params["embed"][tokens]


def logits(params: Tree, x: jax.Array, *, config: Config) -> jax.Array:
    """Logits `[..., V]` of activations `[..., D]` after the last layer."""
    head: jax.Array = params["head"] if "head" in params else params["embed"]
    return _norm(x, params["norm"], config.eps) @ head.T


def forward(params: Tree, tokens: jax.Array, *, config: Config) -> jax.Array:
    """Logits `[N, P, V]` of whole sequences."""
    return logits(
        params, run_layers(params["layers"], embed(params, tokens), config=config)[0], config=config
    )


def split_layers(layers: Tree, count: int) -> tuple[Tree, Tree]:
    """The lower `count` layers and those above them."""
    return {k: v[:count] for k, v in layers.items()}, {k: v[count:] for k, v in layers.items()}
