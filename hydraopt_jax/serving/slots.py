"""A fixed number of slots on the device for the tasks of a store, with least-recently-used replacement.

Every module has one pair of factors per slot, `a: [K, I, S]` and `b: [K, S, O]`. The rank S is the widest of
any task of the store, so a new task has the same shape and nothing is compiled again. `apply`, `branches` and
`wrap` accept these modules like those of `load`; ids are slots.

Reference: Sheng et al., S-LoRA: serving thousands of concurrent LoRA adapters, 2023, arXiv 2311.03285.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hydraopt_jax import factors
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.factors import parts_of_task, times, to_dtype
from hydraopt_jax.formats.server import cut, pad_ranks
from hydraopt_jax.forms import Factors
from hydraopt_jax.serving.loading import (
    Shardings,
    check_base_of,
    check_serving_dtype,
    kernel_sharding,
    place_term,
    serving_dtype,
    shardings_of,
)
from hydraopt_jax.store import Store, decode_terms, task_index
from hydraopt_jax.store.schema import PlainShape

EMPTY = -1


class SlotState(NamedTuple):
    """Content of the slots: a pytree of arrays with constant structure and shapes.

    Attributes:
      modules: module name -> one term of K pairs of factors, for `apply`, `branches` and `wrap`.
      tasks: `[K]` int32, position in the store of the task in each slot, -1 for none.
      order: `[K]` int32, slots from the one used longest ago to the one used last.
    """

    modules: Mapping[str, tuple[Factors]]
    tasks: factors.Array
    order: factors.Array


class SlotShape(NamedTuple):
    """Shapes and dtype of one module in a slot.

    Attributes:
      inputs, rank, outputs: I, S, O.
      dtype: of the factors in the store.
      steps: whether each direction has a float32 scale, such as a quantizer step.
    """

    inputs: int
    rank: int
    outputs: int
    dtype: np.dtype
    steps: bool


class SlotRow(NamedTuple):
    """One task in one module.

    Attributes:
      a, b: `[I, S]`, `[S, O]`, padded with zeros.
      core: `[S]` float32, or None.
      present: whether the task has the module.
    """

    a: factors.Array
    b: factors.Array
    core: factors.Array | None
    present: factors.Array | np.bool_


def slot_shapes(store: Store) -> dict[str, SlotShape]:
    """Module -> `SlotShape` of a slot, the widest of any task, computed from the store's schema only."""
    out: dict[str, SlotShape] = {}
    ranks: dict[str, dict[str, int]] = {}
    for x in store.segments:
        for name, terms in x.modules.items():
            for term in terms:
                plain = isinstance(term, PlainShape)
                kind = np.dtype(term.b_dtype if plain and term.a_dtype == term.b_dtype else np.float32)
                steps = not plain or term.core in ("diagonal", "scale")
                known = out.get(name, SlotShape(term.inputs, 0, term.outputs, kind, False))
                # float16 and bfloat16 have no common half precision
                kind = kind if kind == known.dtype else np.dtype(np.float32)
                out[name] = known._replace(dtype=kind, steps=known.steps or steps)
                mine = ranks.setdefault(name, {})
                for k in x.live:
                    if term.a_of[k] >= 0 and term.b_of[k] >= 0:
                        mine[x.tasks[k]] = mine.get(x.tasks[k], 0) + term.rank
    for name, mine in ranks.items():
        widest = max(mine.values(), default=0)
        out[name] = out[name]._replace(rank=min(widest, out[name].inputs, out[name].outputs))
    return {name: out[name] for name in store.shapes if out[name].rank}


def row_of(name: str, terms: Sequence[Factors], place: int, shape: SlotShape, dtype: np.dtype) -> SlotRow:
    """The task at a place of some terms in the layout of a slot: terms concatenated, without zero directions.

    `terms` are empty if the task lacks the module; `dtype` is that of the factors on the device.
    """
    left, right, steps = [], [], []
    for a, b, own in parts_of_task(terms, place):
        step = np.ones(a.shape[1], np.float32)
        if own is not None and own.ndim == 1:
            step = own.astype(np.float32)
        elif own is not None:
            b = times(own.astype(np.float32), b.astype(np.float32))
        used = (step != 0) & a.any(0) & b.any(1)
        left.append(a[:, used])
        right.append(b[used])
        steps.append(step[used])
    a, b, core = (
        np.concatenate([zero, *parts], axis)
        for zero, parts, axis in (
            (np.zeros((shape.inputs, 0), np.float32), left, 1),
            (np.zeros((0, shape.outputs), np.float32), right, 0),
            (np.zeros(0, np.float32), steps, 0),
        )
    )
    if a.shape[1] > shape.rank:
        # more directions than the rank of the matrix
        a, b, _ = cut(a, core[:, None] * b, shape.rank)
        core = np.ones(shape.rank, np.float32)
    core = np.pad(core, (0, shape.rank - len(core)))
    a, b = pad_ranks(a, b, shape.rank)
    if not shape.steps:
        b = core[:, None] * b
    return SlotRow(
        to_dtype(name, a, dtype),
        to_dtype(name, b, dtype),
        core if shape.steps else None,
        np.bool_(bool(left)),
    )


def put(
    modules: Mapping[str, tuple[Factors]], slot: Array, rows: Mapping[str, SlotRow]
) -> dict[str, tuple[Factors]]:
    """The modules of a `SlotState` with another task in a slot; pure, with equal shapes for all tasks."""
    out: dict[str, tuple[Factors]] = {}
    for name, (term,) in modules.items():
        row = rows[name]
        a, b, of, _, core = jax.tree.map(jnp.asarray, term)
        of = of.at[slot].set(jnp.where(row.present, slot, EMPTY))
        core = None if core is None else core.at[slot].set(row.core)
        out[name] = (Factors(a.at[slot].set(row.a), b.at[slot].set(row.b), of, of, core),)
    return out


def assign(
    tasks: np.ndarray, order: np.ndarray, wanted: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    """The assignment of tasks to slots for a batch; pure, on the host.

    Args:
      tasks: `[K]` the task in each slot, -1 for none.
      order: `[K]` slots, the one used longest ago first.
      wanted: tasks of one batch; -1 for none.

    Returns:
      New `tasks` and `order`, and slot -> task for the tasks to load. Empty slots are taken first, then the
      least recently used ones; slots in use by the batch are never taken.

    Raises:
      HydraOptError: more different tasks than slots.

    >>> tasks, order, loads = assign(np.array([7, 8, -1]), np.array([0, 2, 1]), [8, 5, 9])
    >>> tasks.tolist(), order.tolist(), loads
    ([9, 8, 5], [1, 2, 0], {2: 5, 0: 9})
    """
    distinct = [t for t in dict.fromkeys(wanted) if t != EMPTY]
    if len(distinct) > len(tasks):
        raise HydraOptError(
            f"{len(distinct)} different tasks in one batch, and {len(tasks)} slots: split the batch, or make "
            "more slots"
        )
    place = {int(t): k for k, t in enumerate(tasks) if t != EMPTY}
    kept = {place[t] for t in distinct if t in place}
    # stable sort: the least recently used slot comes first among empty slots, and among others
    free = iter(sorted((int(k) for k in order if k not in kept), key=lambda k: tasks[k] != EMPTY))
    loads = {next(free): t for t in distinct if t not in place}
    after = tasks.copy()
    for slot, task in loads.items():
        after[slot] = task
    slot_of = {int(t): k for k, t in enumerate(after)}
    now = [slot_of[t] for t in distinct]
    return after, np.array([*(k for k in order if k not in now), *now], np.int32), loads


@dataclasses.dataclass(frozen=True, eq=False)
class Slots:
    """Slots for some of a store's tasks at a time; their content is a `SlotState`.

    Attributes:
      store: from `compress` or `open`; a task is decoded on the host when a batch first needs it.
      count: K, the number of different tasks that a batch may mix.
      base: name of the served base model, see `load`.
      dtype: of the factors, see `load`.
      shardings: of the layers' kernels, see `load`.

    Raises:
      HydraOptError: a count below 1, tasks of another base model, or a dtype that `load` refuses.
    """

    store: Store
    count: int
    _: dataclasses.KW_ONLY
    base: str | None = None
    dtype: Any = None
    shardings: Shardings = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise HydraOptError(f"{self.count} slots: make at least 1")
        check_serving_dtype(self.dtype)
        check_base_of(self.store, self.store.tasks, self.base)

    @functools.cached_property
    def shapes(self) -> dict[str, SlotShape]:
        """Module -> `SlotShape` of a slot."""
        return slot_shapes(self.store)

    def init(self) -> SlotState:
        """The state with empty slots, in which every row is computed by the base model.

        Raises:
          HydraOptError: a sharding that does not fit a module.
        """
        modules = {
            name: (place_term(name, self._empty(name), kernel_sharding(self.shardings, name)),)
            for name in self.shapes
        }
        return SlotState(modules, np.full(self.count, EMPTY, np.int32), np.arange(self.count, dtype=np.int32))

    def load(self, state: SlotState, names: Sequence[str | None]) -> tuple[SlotState, np.ndarray]:
        """The state with the tasks of a batch in it, and the slot of each row.

        The arrays of `state` are donated to the new state: do not use `state` again.

        Args:
          state: of `init` or `load`.
          names: task of each row of the batch; None for the base model.

        Returns:
          The state, and `[N]` int32 ids for `apply`, -1 where there is no task.

        Raises:
          HydraOptError: an unknown task (similar names are listed), more different tasks than slots, or a
            task that cannot be decoded. `state` is then unchanged.
        """
        if isinstance(names, str):
            raise HydraOptError(f"names = {names!r}: one name, not one per row: give [{names!r}]")
        if len(state.tasks) != self.count:
            raise HydraOptError(f"the state has {len(state.tasks)} slots, these are {self.count}")
        place = {t: k for k, t in enumerate(self.store.tasks)}
        asked = [None if x is None else str(x) for x in names]
        wanted = [
            EMPTY if x is None else place[x] if x in place else task_index(self.store.tasks, x) for x in asked
        ]
        tasks, order, loads = assign(np.asarray(state.tasks), np.asarray(state.order), wanted)
        rows = self._rows(list(loads.values()))
        modules = state.modules
        for slot, mine in zip(loads, rows, strict=True):
            modules = self._put(modules, np.int32(slot), mine)
        slot_of = {int(t): k for k, t in enumerate(tasks) if t != EMPTY}
        ids = np.array([slot_of.get(t, EMPTY) for t in wanted], np.int32)
        return SlotState(modules, tasks, order), ids

    def _rows(self, tasks: Sequence[int]) -> list[dict[str, SlotRow]]:
        """Rows of tasks in the layout of the slots; all are decoded before any is loaded."""
        terms = decode_terms(self.store, [self.store.tasks[t] for t in tasks]) if tasks else {}
        dtypes = {name: serving_dtype(x.dtype, self.dtype) for name, x in self.shapes.items()}
        return [
            {name: row_of(name, terms.get(name, ()), k, x, dtypes[name]) for name, x in self.shapes.items()}
            for k in range(len(tasks))
        ]

    @functools.cached_property
    def _put(self) -> Any:
        """`put`, compiled once; factors keep their shardings."""
        shardings = None
        if self.shardings is not None:
            kernels = {name: kernel_sharding(self.shardings, name) for name in self.shapes}
            shardings = {
                name: (None if kernel is None else shardings_of(name, self._empty(name), kernel),)
                for name, kernel in kernels.items()
            }
        return jax.jit(put, donate_argnums=0, out_shardings=shardings)

    def _empty(self, name: str) -> Factors:
        """The arrays of a module in empty slots, on the host."""
        shape = self.shapes[name]
        dtype = serving_dtype(shape.dtype, self.dtype)
        none: np.ndarray = np.full(self.count, EMPTY, np.int32)
        core = np.zeros((self.count, shape.rank), np.float32) if shape.steps else None
        return Factors(
            np.zeros((self.count, shape.inputs, shape.rank), dtype),
            np.zeros((self.count, shape.rank, shape.outputs), dtype),
            none,
            none.copy(),
            core,
        )
