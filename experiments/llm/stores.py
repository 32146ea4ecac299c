"""The rows of the table: named stores of a collection, their bytes, and what each task gets back.

What is asked of hydraopt_jax is asked here (second moments in `moments`). A row is written to disk where the
package has a format for it, and read back; of methods without one the bytes are those of their numbers alone,
which flatters them.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.llm.adapters import check_there
from experiments.llm.distill import Teaching
from experiments.llm.model import MODULES
from hydraopt_jax import adapters, calibration, formats, merging, refinement, serving, store, tradeoff
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.codec import fixed_rate
from hydraopt_jax.compression import compress
from hydraopt_jax.explicit import fitting
from hydraopt_jax.forms import Gradient, Hydra
from hydraopt_jax.linalg import decompose
from hydraopt_jax.merging import compressors, whole_adapters
from hydraopt_jax.store import manifest

BUDGETS = (0.25, 0.125, 0.0625, 0.03, 0.015)
# budgets that are also refined
REFINED = (0.0625, 0.03, 0.015)
# the budget and the ranks at which moments of low rank are compared with whole ones, 0 for variances only
LOW_RANK, MOMENT_RANKS = 0.03, (64, 16, 0)
# of a refinement: steps, and the batches that they go through; tasks computed side by side
CODED, PLAIN = (40, 32), (300, 100)
AT_ONCE = 8
# multiples of the scale of least weight error at which one adapter for all tasks is tried on dev items
SCALES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
# directions of the plain SVDs that are compared with
SVD_RANKS = (8, 4, 3, 2, 1)
SINGLE = ("linear", "ties", "dare-ties", "knots", "tsv-m", "iso-c", "core-space")
Pair = tuple[np.ndarray, np.ndarray]
Moments = Callable[[], Mapping[str, np.ndarray]]


class Row(NamedTuple):
    """A stored collection: its bytes and, per task, module name -> factors `([in, S], [S, out])`; and the
    version of the format of a coded store, whose factors change with the codec."""

    bytes: int
    tasks: Mapping[str, Mapping[str, Pair]]
    format: int | None = None


def read_collection(folder: Path, tasks: Sequence[str]) -> list[Adapter]:
    """The adapters of one regime, in the order of `tasks`."""
    for task in tasks:
        check_there(folder / task)
    return [formats.read_adapter(folder / task) for task in tasks]


def digest(collection: Sequence[Adapter]) -> str:
    """Short name of the weights of a collection, to know what was made of them."""
    return hashlib.sha256(" ".join(f"{x.task} {x.digest}" for x in collection).encode()).hexdigest()[:12]


def fp16_bytes(collection: Sequence[Adapter]) -> int:
    """Bytes of all factors in half precision: what shares are counted against."""
    return 2 * sum(x.a[name].size + x.b[name].size for x in collection for name in x.a)


def scaled(row: Row, factor: float) -> Row:
    """`row` with every weight change times `factor`."""
    tasks = {task: {name: (a, factor * b) for name, (a, b) in x.items()} for task, x in row.tasks.items()}
    return Row(row.bytes, tasks)


def deltas_of(factors: Mapping[str, Pair]) -> dict[str, np.ndarray]:
    """Weight changes `[L, in, out]` per projection, layers in order; absent modules change nothing."""
    found: dict[str, dict[int, np.ndarray]] = {module: {} for module in MODULES}
    for name, (a, b) in factors.items():
        layer, module = re.fullmatch(r".*layers\.(\d+)\.\w+\.(\w+)", name).groups()  # type: ignore[union-attr]
        found[module][int(layer)] = np.asarray(a, np.float32) @ np.asarray(b, np.float32)
    layers = sorted({layer for by_layer in found.values() for layer in by_layer})
    return {
        module: np.stack([by_layer.get(i, np.zeros_like(next(iter(by_layer.values())))) for i in layers])
        for module, by_layer in found.items()
        if by_layer
    }


def export(folder: Path, task: str, target: Path) -> None:
    """Writes one task of a store as a PEFT folder."""
    formats.write_adapter(target, store.decode(store.open(folder), task))


def load_served(folder: Path, tasks: Sequence[str]) -> tuple[dict[str, Any], list[int]]:
    """A store's modules on the device, for `serve`, and the ids of `tasks` in it."""
    kept = store.open(folder)
    return serving.load(kept, dtype=jnp.float32), [kept.tasks.index(task) for task in tasks]


def serve(x: jax.Array, modules: Mapping[str, Any], name: str, ids: jax.Array) -> jax.Array:
    """What the stored adapters of `ids` `[N, 1]` add to the projection `name` of `x` `[N, P, in]`."""
    return serving.apply(x, modules[name], ids)


def plan(
    collection: list[Adapter],
    moments: Moments | None = None,
    teach: Callable[[int], Teaching] | None = None,
) -> dict[str, Callable[[Path], Row]]:
    """Name of each row -> what makes it, given a folder for it.

    Args:
        collection: the adapters.
        moments: what gives second moments for the calibrated rows; without it there are none.
        teach: what gives the model and so many batches for the refined rows; without it there are none.
    """
    tasks = len(collection)
    rows: dict[str, Callable[[Path], Row]] = {}
    for heads in dict.fromkeys((tasks, max(tasks // 2, 1), max(tasks // 4, 1), 1)):
        adam = Hydra(heads=heads, side="in", solver=Gradient(start="mean", steps=300))
        for label, form in (("closed form", Hydra(heads=heads)), ("Adam from the mean", adam)):
            made = partial(compress, collection, form=form, dtype="float16")
            rows[f"HydraOpt K = {heads}, {label}"] = partial(_stored, made)
            if teach is not None and heads == tasks and form is adam:
                refined = partial(_refined, collection, made, teach, PLAIN, None)
                rows[f"HydraOpt K = {heads}, {label}, refined"] = refined
    for budget in BUDGETS:
        for measured in dict.fromkeys((None, moments)):
            name = f"budget {budget:g}{', calibrated' if measured else ''}"
            made = partial(_budgeted, collection, budget, measured)
            rows[name] = partial(_stored, made)
            if teach is not None and budget in REFINED:
                rows[f"{name}, refined"] = partial(_refined, collection, made, teach, CODED, measured)
    for rank in MOMENT_RANKS if moments is not None else ():
        few = partial(reduced, moments, rank)  # type: ignore[arg-type]
        made = partial(_budgeted, collection, LOW_RANK, few)
        rows[f"budget {LOW_RANK:g}, calibrated at rank {rank}"] = partial(_stored, made)
    for rank in SVD_RANKS:
        rows[f"SVD rank {rank}, 4 bits"] = partial(_separate_svd, collection, rank, 4)
    rows["SVD two-level, 2 and 1 bits"] = lambda folder: two_level(collection, 4)
    for name, options in (
        ("k-merge", {"slots": max(tasks // 4, 1)}),
        ("jd-full", {"rank": 16}),
        ("share", {"rank": 16}),
    ):
        rows[name] = partial(_kept, collection, name, options)
    for name in SINGLE:
        rows[f"merged, {name}"] = partial(_merged, collection, name)
    return rows


def reduced(moments: Moments, rank: int) -> dict[str, np.ndarray]:
    """Second moments at a rank."""
    return {name: np.asarray(calibration.reduced(x, rank)) for name, x in moments().items()}


def _budgeted(collection: list[Adapter], budget: float, moments: Moments | None) -> Any:
    """A store under `budget`, whose errors count as second moments say if there are any."""
    return compress(collection, budget=budget, calibration=moments() if moments else None)


def _refined(
    collection: list[Adapter],
    start: Callable[[], Any],
    teach: Callable[[int], Teaching],
    effort: tuple[int, int],
    moments: Moments | None,
    folder: Path,
) -> Row:
    """The store that `start` makes, moved until its adapters' answers come nearest to the own adapters'."""

    def make() -> Any:
        steps, count = effort
        given = teach(count)
        return refinement.refine(
            start(),
            collection,
            calibration=moments() if moments else None,
            forward=given.forward,
            batches=given.batches,
            mask=given.mask,
            at_once=AT_ONCE,
            steps=steps,
            folder=folder.with_name(f"{folder.name}-steps"),
        )[0]

    return _stored(make, folder)


def _stored(make: Callable[[], Any], folder: Path) -> Row:
    """A store of the package, from disk where it was made before."""
    if not folder.exists():
        store.save(folder, make())
    kept = store.open(folder)
    found = {task: store.decode(kept, task) for task in kept.tasks}
    tasks = {task: {name: (x.a[name], x.b[name]) for name in x.a} for task, x in found.items()}
    coded = any(x.coded for x in kept.segments)
    return Row(store.size_on_disk(folder), tasks, manifest.VERSION if coded else None)


def _by_task(
    collection: Sequence[Adapter], stacked: Any, factors: Sequence[Any]
) -> dict[str, dict[str, Pair]]:
    """Task -> module -> factors, from one `(a: [M, T, I, S], b: [M, T, S, O])` per bucket."""
    return {
        adapter.task: {
            name: (a[m, t], b[m, t])
            for bucket, (a, b) in zip(stacked.buckets, factors, strict=True)
            for m, name in enumerate(bucket.modules)
        }
        for t, adapter in enumerate(collection)
    }


def _separate_svd(collection: Sequence[Adapter], rank: int, bits: int, folder: Path) -> Row:
    """Every delta's first `rank` singular directions at `bits`, a scale per vector."""
    stacked = adapters.stack(collection)
    size, factors = 0.0, []
    for bucket in stacked.buckets:
        deltas = decompose.batched_svd(jnp.asarray(bucket.a), jnp.asarray(bucket.b))
        x, y = tradeoff.rounded_directions(deltas, bits)
        factors.append((np.asarray(x)[..., :rank], np.asarray(y)[..., :rank, :]))
        vectors = bucket.a.shape[0] * bucket.a.shape[1] * min(rank, x.shape[-1])
        size += sum(fixed_rate.size(vectors, n, bits) for n in (bucket.a.shape[2], bucket.b.shape[3]))
    return Row(int(size), _by_task(collection, stacked, factors))


def two_level(collection: Sequence[Adapter], first: int) -> Row:
    """Two-level quantization after LoRAQuant (arXiv 2510.26690): some directions at 2 bits, others as signs.

    The `first` directions have 2 bits, of four levels; the published method also tunes them by gradients. A
    sign vector keeps its mean magnitude as its scale; every vector has one fp16 scale.
    """
    stacked = adapters.stack(collection)
    size, factors = 0, []
    for bucket in stacked.buckets:
        deltas = decompose.batched_svd(jnp.asarray(bucket.a), jnp.asarray(bucket.b))
        root = jnp.sqrt(deltas.s)
        x, y = deltas.u * root[..., None, :], deltas.v * root[..., None]
        fine = four_levels(x, -2), four_levels(y, -1)
        signs = [jnp.sign(v) * jnp.mean(jnp.abs(v), axis, keepdims=True) for v, axis in ((x, -2), (y, -1))]
        factors.append(
            (
                np.concatenate([fine[0][..., :first], signs[0][..., first:]], -1),
                np.concatenate([fine[1][..., :first, :], signs[1][..., first:, :]], -2),
            )
        )
        count = bucket.a.shape[0] * bucket.a.shape[1]
        for width in (bucket.a.shape[2], bucket.b.shape[3]):
            for vectors, bits in ((first, 2), (x.shape[-1] - first, 1)):
                size += count * vectors * (-(-width * bits // 8) + 2)
    return Row(int(size), _by_task(collection, stacked, factors))


def four_levels(x: jax.Array, axis: int) -> jax.Array:
    """Vectors along an axis at 2 bits: 1/2 or 3/2 of a half-precision scale, with a sign.

    The scale is that of least squared error among some shares of the largest entry.

    >>> print(four_levels(jnp.array([[-3.0, -1.0, 1.0, 3.0]]), -1)[0])
    [-3. -1.  1.  3.]
    """
    peak = jnp.max(jnp.abs(x), axis, keepdims=True)
    best, least = jnp.zeros_like(x), jnp.full_like(peak, jnp.inf)
    for share in fixed_rate.CLIPS:
        scale = (peak * share / 1.5).astype(jnp.float16).astype(jnp.float32)
        near = jnp.clip(jnp.floor(x / jnp.where(scale > 0, scale, 1.0)) + 0.5, -1.5, 1.5) * scale
        error = jnp.sum((x - near) ** 2, axis, keepdims=True)
        best, least = jnp.where(error < least, near, best), jnp.minimum(error, least)
    return best


def _kept(collection: Sequence[Adapter], name: str, options: Mapping[str, Any], folder: Path) -> Row:
    """What a merging method keeps of every task, in half precision."""
    found = merging.merge_modules(collection, name, **options)
    ranks = {module: max(x.a[module].shape[1] for x in collection) for module in found}
    size = 2 * sum(compressors.entries(factors, ranks[module]) for module, factors in found.items())
    tasks: dict[str, dict[str, Pair]] = {x.task: {} for x in collection}
    for module, factors in found.items():
        half = fitting.cast(fitting.scale(factors), "float16", module)
        left, right = fitting.stacked(half)
        for t, adapter in enumerate(collection):
            tasks[adapter.task][module] = (left[t], right[t])
    return Row(size, tasks)


def _merged(collection: Sequence[Adapter], name: str, folder: Path) -> Row:
    """One adapter for all tasks, at the scale of least weight error, see `SCALES`."""
    found = merging.merge_modules(collection, name)
    scale = np.float32(whole_adapters.least_error_scale(collection, found)[0])
    pairs = {
        module: (np.asarray(a, np.float16), np.asarray(scale * b, np.float16))
        for module, (a, b) in found.items()
    }
    size = sum(2 * (a.size + b.size) for a, b in pairs.values())
    return Row(size, {x.task: pairs for x in collection})
