"""JSON objects that are static data of a pytree."""

from typing import Any


class Static(dict):
    """A mapping that is compared and hashed by value, so that `jax.jit` can take it as static.

    It is not to be changed: what holds it is replaced instead. Values may be lists and mappings, which have
    no hash; equal mappings have equal keys, which is what the hash is of.

    >>> Static(a=[1, 2]) == Static(a=[1, 2]), hash(Static(a=[1])) == hash(Static(a=[2]))
    (True, True)
    """

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self))

    def replace(self, **changes: Any) -> "Static":
        """The same with other values for some keys."""
        return Static({**self, **changes})
