"""Add and remove tasks of a store; the other tasks stay bit for bit.

`addition` appends a segment, coded or plain (`joining`). `store.removal` drops the data that no other task
needs and lists the rest, `purging` removes the rest. `refitting` fits all tasks again.
"""

from hydraopt_jax.changes.addition import add
from hydraopt_jax.changes.purging import purge
from hydraopt_jax.changes.refitting import estimate_refit, refit
from hydraopt_jax.store.removal import held, remove

__all__ = ["add", "estimate_refit", "held", "purge", "refit", "remove"]
