"""Calibration: second moments that turn errors of weights into errors of the model's outputs.

`moments` is what they are and the file that they are kept in; `tap` gathers them from a Flax NNX model,
and `hooks` from one of PyTorch.
"""

from typing import Any

from hydraopt_jax.calibration.moments import (
    OUTPUT,
    Moment,
    accumulate,
    digest,
    matrix_of,
    mean,
    read_moments,
    reduced,
    start,
    width,
    write_moments,
)

__all__ = [
    "OUTPUT",
    "Moment",
    "accumulate",
    "collect",
    "digest",
    "matrix_of",
    "mean",
    "read_moments",
    "reduced",
    "start",
    "width",
    "write_moments",
]


def __getattr__(name: str) -> Any:
    # Flax is loaded by those who have a model of it
    if name == "collect":
        from hydraopt_jax.calibration.tap import collect

        return collect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
