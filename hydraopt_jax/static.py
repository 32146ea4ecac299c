"""JSON objects that are static data of a pytree."""

from typing import Any


class Static(dict):
    """A mapping that is compared and hashed by value, so that `jax.jit` accepts it as static.

    Do not change it; replace the object that holds it. Values may be lists and mappings, which have no hash,
    so the hash is that of the keys.

    >>> Static(a=[1, 2]) == Static(a=[1, 2]), hash(Static(a=[1])) == hash(Static(a=[2]))
    (True, True)
    """

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self))

    def replace(self, **changes: Any) -> "Static":
        """A copy with other values for some keys."""
        return Static({**self, **changes})
