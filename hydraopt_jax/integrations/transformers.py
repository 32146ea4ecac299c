"""Causal language models of transformers, with or without an adapter of PEFT's; PyTorch only when used."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hydraopt_jax import calibration
from hydraopt_jax.errors import HydraOptError, one_line, system_error


def open_model(place: str | os.PathLike[str]) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Args:
      place: folder or hub id (also `hf:ORG/NAME[@REVISION]`) of a model, or of a PEFT adapter, whose base
        model is loaded with it.

    Raises:
      HydraOptError: no such model, no tokenizer, or no extra to load it with.
    """
    try:
        import peft  # noqa: F401
        import torch
        import transformers
    except ImportError:
        raise HydraOptError(
            f"{place}: needs PyTorch, transformers and PEFT: install the peft extra"
        ) from None
    name, revision = os.fspath(place), "main"
    if name.startswith("hf:"):
        name, _, revision = name[3:].partition("@")
    at = {"revision": revision or "main"}
    try:
        with quiet(transformers.utils.logging):
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype="auto", **at)
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(name, **at)
            except (OSError, ValueError, KeyError):
                # an adapter without one of its own
                tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)
    except Exception as error:
        # of many classes, by what is missing
        raise HydraOptError(f"{place}: cannot be loaded: {one_line(error, 200)}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


@contextmanager
def quiet(log: Any) -> Iterator[None]:
    """Errors only, and no progress bars, of transformers; then what its user has set.

    Args:
      log: `transformers.utils.logging`.
    """
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def moments_of_text(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    length: int = 512,
    tokens: int = 16384,
    rank: int | None = None,
    outputs: bool = False,
) -> tuple[dict[str, np.ndarray], int]:
    """Second moments of a text, see `calibration.collect`, and how many of its tokens were read.

    Args:
      model, tokenizer: see `open_model`.
      text: what the model will see, from its beginning.
      length: tokens per sequence, fewer where the model takes fewer.
      tokens: the most that are read.
      rank, outputs: see `calibration.collect`.

    Raises:
      HydraOptError: a text of no tokens.
    """
    found = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0, :tokens]
    if not len(found):
        raise HydraOptError("the text has no tokens: give some thousand of what the model will see")
    length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
    batches = [{"input_ids": x[None].to(model.device)} for x in found.split(length)]
    return calibration.collect(model, batches, rank=rank, outputs=outputs), len(found)


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file.

    Raises:
      HydraOptError: no such file, or no UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise system_error(path, "read", error, ": give a text file in UTF-8") from None
