"""A store inside JAX: `x[n] @ delta[task[n]]` for batches that mix tasks.

A module is a tuple of `forms.Factors` or `PackedFactors` on the device, a pytree to pass through `jit`:
`delta[t] = sum of a[a_of[t]] @ core[t] @ b[b_of[t]]`. The two products are computed per factor, not per task:
a side with one factor (HydraOpt's shared one) is one matmul for the whole batch, a side with K heads is a
product in K groups (`grouped`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import checkify

from hydraopt_jax import factors, pytrees  # noqa: F401  (what is served here may be traced)
from hydraopt_jax.codec import fixed_rate
from hydraopt_jax.codec.fixed_rate import Packed
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import Factors
from hydraopt_jax.serving.grouped import by_blocks, check_method, choose_method, common_dtype, dot, product


class PackedFactors(NamedTuple):
    """`Factors` whose vectors are codes of a fixed rate: `a: [A, S, I]`, `b: [B, S, O]`, the vectors last."""

    a: Packed
    b: Packed
    a_of: Array
    b_of: Array
    core: Array | None = None


# one module on the device
Term = Factors | PackedFactors
Module = tuple[Term, ...]


def dequantize(module: Module, dtype: Any = jnp.float32) -> tuple[Factors, ...]:
    """The module with plain factors instead of codes: more memory, less work per step."""
    return tuple(
        Factors(_dense(term.a, True).astype(dtype), _dense(term.b, False).astype(dtype), *term[2:])
        for term in module
    )


def _dense(factor: factors.Array | Packed, inputs: bool) -> Array:
    if not isinstance(factor, Packed):
        return jnp.asarray(factor)
    x = fixed_rate.unpacked(factor)
    return x.mT if inputs else x


def _pick(factor: factors.Array | Packed, index: Array) -> Any:
    return jax.tree.map(lambda x: x[index], factor)


def shape(module: Module) -> tuple[int, int, int]:
    """T, I and O of a module."""
    term = module[0]
    a = jax.eval_shape(functools.partial(_dense, inputs=True), term.a)
    b = jax.eval_shape(functools.partial(_dense, inputs=False), term.b)
    return term.a_of.shape[0], a.shape[-2], b.shape[-1]


def apply(
    x: Array,
    module: Module,
    task_ids: Any,
    *,
    method: str | None = None,
    precision: Any = "highest",
    checked: bool = False,
) -> Array:
    """`x[n] @ delta[task_ids[n]]`, to be added to the projection `x @ kernel`.

    Neither `[N, I, S]` nor `[N, S, O]` is formed. It may be jitted, vmapped, differentiated (for `x` and the
    factors) and called in `shard_map`, with `x` and ids split over rows or `b` split over outputs.

    Args:
      x: `[..., I]` rows or tokens.
      module: one module of `load`.
      task_ids: integers that broadcast to `x.shape[:-1]`: `[N]` for tokens `[N, I]`, `[B, 1]` for sequences
        `[B, L, I]`. A scalar serves one task without sorting or masking.
      method: of the product on a side with several factors, see `grouped`; None to choose by shape.
      precision: of the products; by default float32 operands keep full precision.
      checked: raise through `jax.experimental.checkify` for an id outside 0..T-1.

    Returns:
      `[..., O]` in the dtype of `x`, accumulated in float32. An id outside 0..T-1, such as -1, gives exactly
      zero, so the row is that of the base model. So does a task that lacks the module.

    Raises:
      HydraOptError: shapes that disagree, ids that are not integers, an unknown method.

    >>> two = Factors(jnp.ones((1, 2, 1)), jnp.array([[[1.0]], [[10.0]]]), jnp.zeros(2, int), jnp.arange(2))
    >>> print(apply(jnp.ones((3, 2)), (two,), jnp.array([1, 0, -1])).ravel())
    [20.  2.  0.]
    """
    check_method(method)
    tasks, inputs, outputs = shape(module)
    x, ids = jnp.asarray(x), _as_ids(task_ids)
    lead = x.shape[:-1]
    if x.shape[-1:] != (inputs,):
        raise HydraOptError(f"x has shape {list(x.shape)}: its last axis must be the {inputs} inputs")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise HydraOptError(f"task_ids has dtype {ids.dtype}: give integers")
    fits = (n in (1, m) for n, m in zip(ids.shape[::-1], lead[::-1], strict=False))
    if ids.ndim > len(lead) or not all(fits):
        raise HydraOptError(f"task_ids has shape {list(ids.shape)}: it must broadcast to {list(lead)}")
    if checked and ids.size:
        inside = (ids >= 0) & (ids < tasks)
        wrong = ids.ravel()[jnp.argmin(inside)]
        checkify.check(jnp.all(inside), f"task id {{id}} is outside 0..{tasks - 1}", id=wrong)
    if ids.ndim == 0 and method is None:
        total = sum(_one(x, term, ids, precision) for term in module)
        return jnp.asarray(total).astype(x.dtype)
    rows = x.reshape(-1, inputs)
    flat = jnp.broadcast_to(ids, lead).reshape(-1)
    total = sum(_mixed(rows, term, flat, method, precision) for term in module)
    return jnp.asarray(total).reshape(*lead, outputs).astype(x.dtype)


def _as_ids(given: Any) -> Array:
    """Ids of tasks in 32 bits: narrower integers cannot hold the number of tasks, wider ones would wrap."""
    wide = isinstance(given, np.ndarray | np.integer) and given.dtype.kind in "iu"
    if wide:
        low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
        given = np.clip(given.astype(np.int64), low, high).astype(np.int32)
    ids = jnp.asarray(given)
    narrow = jnp.issubdtype(ids.dtype, jnp.integer) and ids.dtype.itemsize < 4
    return ids.astype(jnp.int32) if narrow else ids


def _indices(term: Term, ids: Array) -> tuple[Array, Array, Array, Array]:
    """Task, input factor and output factor of each id (0 for none); and whether the id has a delta."""
    tasks = term.a_of.shape[0]
    task = jnp.clip(ids, 0, tasks - 1)
    a, b = term.a_of[task], term.b_of[task]
    present = (task == ids) & (a >= 0) & (b >= 0)
    return task, jnp.maximum(a, 0), jnp.maximum(b, 0), present


def _one(x: Array, term: Term, task_id: Array, precision: Any) -> Array:
    task, a, b, present = _indices(term, task_id)
    alone = term._replace(a_of=jnp.zeros_like(term.a_of), b_of=jnp.zeros_like(term.b_of))
    left, right = _dense(_pick(term.a, a), True)[None], _dense(_pick(term.b, b), False)[None]
    y = _block(x, task, term=alone, left=left, right=right, precision=precision)
    return jnp.where(present, y, 0.0)


def _mixed(x: Array, term: Term, ids: Array, method: str | None, precision: Any) -> Array:
    task, a, b, present = _indices(term, ids)
    left, right = _dense(term.a, True), _dense(term.b, False)
    kind = common_dtype(x, right)
    many = min(left.shape[0], right.shape[0]) > 1
    if many and (method or choose_method(x.shape[0], left.shape[0], left.shape[2])) == "blocks":
        # sorted once, by task, for both sides
        one = functools.partial(_block, term=term, left=left, right=right, precision=precision)
        return jnp.where(present[:, None], by_blocks(x, task, term.a_of.shape[0], one), 0.0)
    multiply = functools.partial(product, method=method, precision=precision)
    h = multiply(x, left, a)
    if term.core is not None:
        core = jnp.asarray(term.core)
        h = h * core[task] if core.ndim == 2 else multiply(h, core, task)
    h = jnp.where(present[:, None], h, 0.0)
    return multiply(h.astype(kind), right, b)


def _block(x: Array, task: Array, *, term: Term, left: Array, right: Array, precision: Any) -> Array:
    """Rows of one task through its own factors."""
    h = dot(x, left[jnp.maximum(term.a_of[task], 0)], precision)
    if term.core is not None:
        core = term.core[task]
        h = h * core if core.ndim == 1 else dot(h, core, precision)
    kind = common_dtype(x, right)
    return dot(h.astype(kind), right[jnp.maximum(term.b_of[task], 0)], precision)


def branches(
    modules: Mapping[str, Module], task_ids: Any, *, method: str | None = None
) -> dict[str, Callable[[Array], Array]]:
    """`apply` of every module for one batch, module name -> function of its input.

    They are for models that take one function per projection, such as `demo.model.forward`.
    """
    return {
        name: functools.partial(apply, module=module, task_ids=task_ids, method=method)
        for name, module in modules.items()
    }
