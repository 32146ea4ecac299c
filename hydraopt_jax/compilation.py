"""A persistent cache of compiled computations, in the user's cache folder. Off by default."""

import os
import sys
from pathlib import Path

# shortest compilation, in seconds, that is kept
LEAST = 0.05


def keep_compiled(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Make JAX keep compiled computations in a folder and reuse them in later runs.

    The command does this. From Python call it once, before or after JAX is imported. A folder given by
    `JAX_COMPILATION_CACHE_DIR` takes precedence.

    Args:
      folder: created if missing; None for `hydraopt_jax` in the user's cache.

    Returns:
      The folder; None if it cannot be written, and nothing is kept.
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
    # JAX reads it when it is imported; some verbs never import JAX
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(path)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(LEAST)
    if sys.modules.get("jax") is not None:
        import jax

        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST)
    return path
