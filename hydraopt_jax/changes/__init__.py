"""Tasks that come and go: a store with one task more or less, the others bit for bit as they were.

`addition` appends a segment, coded or plain (`joining`); `store.removal` drops what nobody else needs and
says what is left, `purging` is rid of that; `refitting` fits all tasks anew.
"""

from hydraopt_jax.changes.addition import add
from hydraopt_jax.changes.purging import purge
from hydraopt_jax.changes.refitting import estimate_refit, refit
from hydraopt_jax.store.removal import held, remove

__all__ = ["add", "estimate_refit", "held", "purge", "refit", "remove"]
