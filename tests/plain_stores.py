"""Stores of plain factors that no solver made."""

import numpy as np

from hydraopt_jax.factors import Factors
from hydraopt_jax.static import Static
from hydraopt_jax.store import Source, Store, plain
from hydraopt_jax.store.store import make_segment


def plain_store(tasks, modules):
    """A store of one segment that claims no error: module -> terms of all the tasks."""
    schema, leaves = plain.to_leaves(modules)
    segment = make_segment(tasks, schema, leaves, np.zeros((len(modules), len(tasks))))
    sources = tuple(Source("float32", Static(), Static(), "", "") for _ in tasks)
    return Store((segment,), tuple(tasks), sources, Static())


def store_of(loras):
    """A store of plain factors: task -> module -> (a, b)."""
    tasks = tuple(loras)
    modules = {}
    for name in loras[tasks[0]]:
        a, b = (np.stack([loras[t][name][k] for t in tasks]) for k in (0, 1))
        index = np.arange(len(tasks))
        modules[name] = (Factors(a, b, index, index),)
    return plain_store(tasks, modules)
