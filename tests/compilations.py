"""What JAX compiles in a block of a test."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


@contextmanager
def compiled() -> Iterator[list[str]]:
    """Names of the functions that are compiled within, or found in the cache on disk, each time."""
    names: list[str] = []

    def note(event: str, seconds: float, **said: str | int) -> None:
        if event == EVENT:
            names.append(str(said.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
