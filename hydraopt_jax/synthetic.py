"""Seeded collections of adapters with the spectra of trained ones, for demos, tests and measurements."""

import zlib
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from hydraopt_jax import pytrees  # noqa: F401  (what is made here is traced)
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.errors import HydraOptError

BASE = "hydraopt-jax/synthetic"
SPREAD = 0.3
"""Standard deviation of the logarithm of a delta's norm over modules and tasks."""


def transformer_modules(
    layers: int, width: int, kv: int | None = None, *, mlp: int | None = None
) -> dict[str, tuple[int, int]]:
    """Names and shapes of the adapted modules of a decoder with grouped-query attention.

    Args:
      layers: count of layers.
      width: model width.
      kv: outputs of the key and value projections; `width` where None.
      mlp: hidden width of the gated feed-forward block; its three modules are left out where None.

    Returns:
      Module name -> (I, O), layer by layer.

    >>> list(transformer_modules(1, 8, 2).items())[1]
    ('model.layers.0.self_attn.k_proj', (8, 2))
    """
    kv = width if kv is None else kv
    block = {f"self_attn.{x}_proj": (width, kv if x in "kv" else width) for x in "qkvo"}
    if mlp is not None:
        block |= {"mlp.gate_proj": (width, mlp), "mlp.up_proj": (width, mlp), "mlp.down_proj": (mlp, width)}
    return {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in block.items()}


def power_law(rank: int, decay: float) -> np.ndarray:
    """Singular values with energies `s[j]^2 ~ (j + 1)^-decay` and unit total energy, `[rank]`.

    The default decay of 3.1 puts 0.85, 0.95, 0.99 of the energy in the first 1, 2, 4 of 16 directions;
    trained rank-8 GPT-2 adapters were measured at 0.85, 0.94, 0.98.

    >>> print((power_law(16, 3.1)[0] ** 2).round(2))
    0.85
    """
    energy = np.arange(1, rank + 1, dtype=np.float64) ** -decay
    return np.sqrt(energy / energy.sum())


def _mixed(name: str, seed: int, task: int, correlation: float, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Standard normal arrays, correlated between the tasks of one module but independent between modules."""
    # Keyed by name and task, so that a longer collection begins with the shorter one.
    key = [seed, zlib.crc32(name.encode())]
    common, own = np.random.default_rng([*key, 0]), np.random.default_rng([*key, task + 1])
    shared, private = np.sqrt(correlation), np.sqrt(1.0 - correlation)
    return [
        shared * common.standard_normal(x, np.float32) + private * own.standard_normal(x, np.float32)
        for x in shapes
    ]


def _factors(
    name: str, shape: tuple[int, int], task: int, *, seed: int, rank: int, likeness: float, decay: float
) -> tuple[np.ndarray, np.ndarray]:
    """One task's `a: [I, R]` (orthonormal where R <= I, O) and `b: [R, O]`."""
    inputs, outputs = shape
    n = min(inputs, outputs, rank)
    left, right, size = _mixed(name, seed, task, np.sqrt(likeness), (inputs, n), (outputs, n), ())
    # One rotation for all tasks: training moves the factors' frame little from the shared initialization.
    (turn,) = _mixed(name, seed, 0, 1.0, (n, rank))
    u, v, w = _orthonormal(left), _orthonormal(right), _orthonormal(turn.T)
    return u @ w.T, (w * power_law(n, decay) * np.exp(SPREAD * size)) @ v.T


def _orthonormal(x: np.ndarray) -> np.ndarray:
    """Orthonormal columns that span those of `x`, in order (QR, positive diagonal: continuous in `x`)."""
    q, r = np.linalg.qr(x)
    return q * np.where(np.diagonal(r) < 0, -1.0, 1.0).astype(x.dtype)


def collection(
    seed: int = 0,
    *,
    tasks: int | Sequence[str] = 8,
    modules: Mapping[str, tuple[int, int]] | None = None,
    rank: int = 8,
    likeness: float = 0.5,
    decay: float = 3.1,
    dtype: str = "bfloat16",
) -> list[Adapter]:
    """A seeded collection from unrelated adapters (likeness 0) to copies of one (likeness 1).

    `a[t] = u[t] @ w.T` and `b[t] = w @ diag(s) @ v[t].T`, where w is one rotation for all tasks and u, v are
    `common * likeness^(1/4) + own[t] * (1 - likeness^(1/2))^(1/2)`, Gaussian and made orthonormal. Factors of
    two tasks then have a cosine near the root of `likeness`, as if trained from one shared initialization,
    and deltas one near `likeness`.

    Args:
      seed: equal seeds give equal collections; a longer collection begins with the shorter one.
      tasks: how many ("task-00", ...) or their names.
      modules: module name -> (I, O); two layers of width 64 where None.
      rank: LoRA rank R.
      likeness: in [0, 1].
      decay: exponent of the energies of the singular directions, see `power_law`.
      dtype: what the factors are rounded to and stored as: "bfloat16", "float16" or "float32".

    Returns:
      One Adapter per task, with a PEFT config (scale 2, folded into `b`); factors float32, rounded to
      `dtype`.

    Raises:
      HydraOptError: a likeness outside [0, 1], a rank or count below 1, an unknown dtype.

    >>> [x.task for x in collection(tasks=2)]
    ['task-00', 'task-01']
    """
    names = [f"task-{t:02d}" for t in range(tasks)] if isinstance(tasks, int) else list(tasks)
    modules = transformer_modules(2, 64) if modules is None else modules
    if not 0.0 <= likeness <= 1.0:
        raise HydraOptError(f"likeness: {likeness} is outside [0, 1]")
    if rank < 1 or not names or not modules:
        raise HydraOptError("tasks, modules and rank: give at least 1 of each")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise HydraOptError(f"dtype: {dtype!r} is not one of bfloat16, float16, float32")
    stored = jnp.dtype(dtype)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in modules}),
    }
    out = []
    for t, task in enumerate(names):
        a, b = {}, {}
        for name, shape in modules.items():
            factors = _factors(name, shape, t, seed=seed, rank=rank, likeness=likeness, decay=decay)
            a[name], b[name] = (x.astype(np.float32).astype(stored).astype(np.float32) for x in factors)
        out.append(Adapter(task, a, b, dtype=dtype, config=dict(config), source=f"synthetic seed {seed}"))
    return out
