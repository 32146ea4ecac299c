"""Adapters for inference servers: one rank, one scale, no patterns, no tensors that a server ignores.

vLLM makes slots of a fixed rank and reads `r`, `lora_alpha` and `use_rslora`; most of its versions ignore
`rank_pattern` and `alpha_pattern`. SGLang compares every tensor's shape with `r`. A folder that both load,
and PEFT too, therefore has rank `r` in every module. Narrower modules are padded with zeros, which is exact.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.factors import svd
from hydraopt_jax.formats.lora_keys import DIALECT
from hydraopt_jax.formats.peft_config import PREFIX, module_rank

PROFILES = ("vllm",)
# maximum number of tensor names in a message
SHOWN = 3
# fields that only name the full tensors
_OF_TENSORS = {"modules_to_save": None, "trainable_token_indices": None, "bias": "none"}


class Fitted(NamedTuple):
    """An adapter with the requested ranks.

    Attributes:
      adapter: ready for `write_adapter`.
      errors: module -> relative squared error of its delta, for modules whose rank was cut.
    """

    adapter: Adapter
    errors: Mapping[str, float]


def cut(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Balanced factors of the nearest product of a rank, and its relative squared error (Eckart-Young).

    Args:
      a, b: `[I, S]` and `[S, O]`.
      rank: of the result, at most S.

    >>> a, b, error = cut(np.eye(2), np.diag([3.0, 1.0]), 1)
    >>> a.shape, b.shape, (a @ b).round(6).tolist(), round(error, 6)
    ((2, 1), (1, 2), [[3.0, 0.0], [0.0, 0.0]], 0.1)
    """
    u, s, v = svd(a, b)
    root = np.sqrt(s[:rank])
    energy = float((s**2).sum())
    error = float((s[rank:] ** 2).sum()) / energy if energy else 0.0
    return (u[:, :rank] * root).astype(np.float32), (root[:, None] * v[:rank]).astype(np.float32), error


def pad_ranks(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the same product, padded with zero directions up to a rank.

    >>> [x.shape for x in pad_ranks(np.ones((4, 2)), np.ones((2, 3)), 5)]
    [(4, 5), (5, 3)]
    """
    more = rank - a.shape[1]
    return np.pad(a, ((0, 0), (0, more))), np.pad(b, ((0, more), (0, 0)))


def original_rank(adapter: Adapter) -> int | None:
    """The widest rank that the adapter was trained with; None without a PEFT configuration."""
    if adapter.config.get("peft_type") != "LORA":
        return None
    return max(module_rank(adapter.config, name) for name in adapter.a)


def _one_rank(adapter: Adapter) -> bool:
    """Whether a lossless adapter has one rank and one scale in all modules."""
    config = adapter.config
    if not adapter.raw or config.get("rank_pattern") or config.get("alpha_pattern"):
        return False
    return {x.shape[1] for x in adapter.a.values()} == {config.get("r")}


def check_served(
    profile: str | None,
    task: str,
    extras: Iterable[str],
    config: Mapping[str, Any],
    layout: Mapping[str, Mapping[str, Any]],
) -> None:
    """Raise for parts of a task that a server refuses or ignores; the message names them.

    `extras` are the names of its full tensors, `config` and `layout` as in `Adapter`; None is no server.
    """
    if profile is None:
        return

    def refuse(what: str, way: str) -> None:
        raise HydraOptError(f"task {task!r} {what}: {way}, or leave out the profile {profile}")

    if config.get(DIALECT):
        refuse("is of an image model", "serve it with diffusers")
    names = [x.removeprefix(PREFIX) for x in extras]
    if names:
        shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        saved = ", ".join(config.get("modules_to_save") or ())
        which = f"modules_to_save ({saved})" if saved else "full tensors"
        refuse(
            f"has {which} beside its factors, {shown}, which vLLM refuses or ignores",
            "merge them into the base model that is served",
        )
    if config.get("use_dora"):
        refuse("is DoRA, which vLLM refuses", "retrain it as plain LoRA")
    bent = [n for n, x in layout.items() if x.get("kind") == "convolution"]
    if bent:
        refuse(f"adapts the convolution {bent[0]}, which vLLM cannot", "retrain it without that module")


def check_ranks(rank: int | None, profile: str | None) -> None:
    """Raise for a rank below 1 and for an unknown profile."""
    if profile is not None and profile not in PROFILES:
        raise HydraOptError(f"profile = {profile!r}: choose one of {', '.join(PROFILES)}")
    if rank is not None and rank < 1:
        raise HydraOptError(f"rank = {rank}: give at least 1")


def fit_server(
    adapter: Adapter, *, rank: int | None = None, padded: bool = False, profile: str | None = None
) -> Fitted:
    """The adapter with ranks that a server accepts, and the errors of modules whose rank was cut.

    Args:
      adapter: of any ranks.
      rank: maximum rank; wider modules are cut to the nearest product of this rank. None for no maximum; with
        a profile None means the original's widest rank.
      padded: pad every module with zeros to `rank`, or to the widest module's rank if `rank` is None.
      profile: "vllm" for one rank in all modules, no patterns, and only tensors that vLLM accepts; None for
        none.

    Raises:
      HydraOptError: no such profile, a rank below 1, or a part that the profile does not allow (it is named).
    """
    check_ranks(rank, profile)
    if rank is None and profile is None and not padded:
        return Fitted(adapter, {})
    config: dict[str, Any] = dict(adapter.config)
    if profile is not None:
        check_served(profile, adapter.task, adapter.extras, adapter.config, adapter.layout)
        config |= {k: v for k, v in _OF_TENSORS.items() if k in config}
    limit = original_rank(adapter) if rank is None and profile is not None else rank
    widest = max(x.shape[1] for x in adapter.a.values())
    if (
        _one_rank(adapter)
        and (limit is None or widest <= limit)
        and (not padded or widest == (rank or widest))
    ):
        return Fitted(adapter.replace(config=config), {})
    errors: dict[str, float] = {}
    factors = {name: (a, adapter.b[name]) for name, a in adapter.a.items()}
    for name, (a, b) in factors.items():
        if limit is not None and a.shape[1] > limit:
            a, b, errors[name] = cut(a, b, limit)
            factors[name] = a, b
    if padded or profile is not None:
        width = rank if padded and rank is not None else max(1, *(x[0].shape[1] for x in factors.values()))
        factors = {name: pad_ranks(*pair, width) for name, pair in factors.items()}
    return Fitted(
        adapter.replace(
            a={n: x[0] for n, x in factors.items()},
            b={n: x[1] for n, x in factors.items()},
            config=config,
            raw={},
        ),
        errors,
    )
