"""Calibration: second moments that turn errors of weights into errors of the model's outputs.

`moments` is what they are and the file that they are kept in; `tap` gathers them from a Flax NNX model.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax import Array

from hydraopt_jax.calibration.moments import OUTPUT, Moment, accumulate, digest, load, mean, save, start

__all__ = ["OUTPUT", "Moment", "accumulate", "collect", "digest", "load", "mean", "save", "start"]


def collect(
    model: Any,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
    mask: Callable[[Any], Array] | None = None,
    modules: Iterable[str] | None = None,
    rename: Callable[[str], str] = lambda path: path,
    diagonal: bool = False,
    outputs: bool = False,
    key: Array | None = None,
) -> dict[str, np.ndarray]:
    """Second moments of the inputs of a Flax NNX model's layers, for `save` and `compress(calibration=)`.

    The model is not changed. Its `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Einsum` layers are looked at;
    each costs `[I, I]` float32 on the device, `[I]` with `diagonal`, and with `outputs` as much for O.

    Args:
      model: in the mode that it is served in: no dropout, and caches of a size that its batches fit in.
      batches: what `forward` takes; each shape is compiled once. Some thousand tokens of what the model will
        see, labels not needed.
      forward: `(model, batch) -> logits`, traced by jit.
      mask: batch -> `[...]`, which of its tokens count, as the leading axes of the layers' inputs; None for
        all.
      modules: names of the modules to look at, such as an adapter's or a store's; None for every layer.
      rename: the model's path of a layer (`"layers.0.q_proj"`) -> the adapters' name of the module.
      diagonal: only variances: much smaller, and errors then count each input alone.
      outputs: gather `NAME:output` as well: gradients of the log-likelihood of labels that are drawn from the
        model's predictions, so that errors count by what they do to the model's outputs. `forward` returns
        logits then.
      key: draws the labels; that of seed 0 where not given.

    Returns:
      Module's name -> second moment. A layer that `forward` never called is left out, unless it was named.

    Raises:
      HydraOptError: a module without a layer (near paths are listed), a mask that does not fit, no batches.
    """
    # Flax is loaded by those who have a model of it
    from hydraopt_jax.calibration import tap

    return tap.collect(
        model,
        batches,
        forward=forward,
        mask=mask,
        modules=modules,
        rename=rename,
        diagonal=diagonal,
        outputs=outputs,
        key=jax.random.key(0) if key is None else key,
    )
