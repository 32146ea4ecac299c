"""Compiled computations kept between runs, in a folder of the user's cache. Off unless asked for."""

import os
import sys
from pathlib import Path

# seconds that a compilation must take to be kept
LEAST = 0.05


def keep(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Let JAX keep compiled computations in a folder and find them there in later runs.

    The command does this; from Python call it once, before or after JAX is imported. A folder that the user
    has given JAX by `JAX_COMPILATION_CACHE_DIR` stays.

    Args:
      folder: made where it is missing; None for `hydraopt_jax` in the user's cache.

    Returns:
      The folder; None where it cannot be written, and then nothing is kept.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") and folder is None:
        return Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(cache) / "hydraopt_jax" if folder is None else Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(path, os.W_OK):
        return None
    # read when JAX is imported, which a verb may never do
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(path)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(LEAST)
    if sys.modules.get("jax") is not None:
        import jax

        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST)
    return path
