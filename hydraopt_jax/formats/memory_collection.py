"""A collection of adapters in memory, and their factors as a file of theirs would have them."""

from collections.abc import Sequence

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

from hydraopt_jax import adapters
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.collection import Card, Collection, ModuleEntry, Pair
from hydraopt_jax.formats.peft_config import module_scale
from hydraopt_jax.store.lossless import Raw, is_of, same_bits, unfold


def in_memory(given: Sequence[Adapter]) -> Collection:
    """Adapters in memory as a collection.

    Raises:
      HydraOptError: see `adapters.check`.
    """
    shapes = adapters.check(given)
    cards = []
    for x in given:
        modules = {
            n: ModuleEntry("", "", a.shape[0], x.b[n].shape[1], a.shape[1], 1.0)
            for n, a in x.a.items()
            if a.shape[1]
        }
        extras = [[n, np.asarray(v).dtype.name, list(np.shape(v))] for n, v in x.extras.items()]
        cards.append(Card(x.task, modules, extras, x.dtype, x.config, x.layout, x.source, x.digest))

    def read(task: int, names: Sequence[str]) -> list[Pair]:
        return [(given[task].a[n].T, given[task].b[n].T, 1.0) for n in names]

    entries = sum(e.rank * (e.inputs + e.outputs) for x in cards for e in x.modules.values())
    return Collection(
        tuple(cards),
        shapes,
        read,
        lambda task: given[task].extras,
        lambda task, module: raw_of(given[task], module),
        2 * entries,
    )


def raw_of(adapter: Adapter, module: str) -> Raw:
    """A module's factors as they came, or else in the narrowest dtype that restores `a` and `b` bit for bit.

    A reader folds the scale into `b`; what came is had by `unfold`, or else kept by the reader.
    """
    a, b = np.asarray(adapter.a[module]), np.asarray(adapter.b[module])
    came = adapter.raw.get(module)
    # the factors may have been replaced since
    if came is not None and is_of(Raw(*came), a, b):
        return Raw(*came)
    kept = narrow(a, adapter.dtype)
    # an adapter of another format has its scale nowhere else than in b
    said = [module_scale(adapter.config, module)] if adapter.config.get("peft_type") == "LORA" else []
    for scale in (*said, 1.0):
        own = unfold(b, scale, adapter.dtype)
        if own is not None:
            return Raw(kept, own, float(np.float32(scale)))
    return Raw(kept, b, 1.0)


def narrow(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x` in a narrower dtype if that is lossless, else unchanged."""
    if np.dtype(dtype).itemsize >= x.dtype.itemsize:
        return x
    with np.errstate(all="ignore"):
        small = x.astype(dtype)
    return small if same_bits(small.astype(x.dtype), x) else x
