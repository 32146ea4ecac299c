"""Products of rows with the matrix of their group: `y[n] = x[n] @ w[group[n]]` for N rows and G matrices.

No method gathers a matrix per row. With P inputs, Q outputs and S = min(P, Q), the costs are:

| method | multiply-adds | largest temporary |
|---|---|---|
| `mask`: one matmul with all matrices side by side, the others' part masked | N G P Q | N G S |
| `blocks`: rows sorted into blocks of K rows of one group, a batched matmul | (N + G K) P Q | N P Q / 4 |
| `ragged`: rows sorted, `jax.lax.ragged_dot` | N P Q where the platform has a kernel | N (P + Q) |

On a CPU `ragged_dot` is a masked matmul over `[G, N, P]`, hence `blocks` there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hydraopt_jax import devices
from hydraopt_jax.errors import HydraOptError

METHODS = ("mask", "blocks", "ragged")
# limits on rows, and on columns G * S, up to which a masked matmul is as fast as sorting (two CPU cores)
FEW_ROWS = 64
FEW_COLUMNS = 128
# rows of a block: a power of two near the rows per group
BLOCKS = (16, 32, 64)


def choose_method(rows: int, groups: int, rank: int) -> str:
    """The method for N rows, G groups and matrices whose smaller side is S, by static shape.

    >>> choose_method(512, 4, 32), choose_method(16, 40, 16), choose_method(4096, 40, 32)
    ('mask', 'mask', 'blocks')
    """
    if rows <= FEW_ROWS or groups * rank <= FEW_COLUMNS:
        return "mask"
    return "ragged" if devices.platform() == "tpu" else "blocks"


def check_method(method: str | None) -> None:
    """Raise for an unknown method."""
    if method is not None and method not in METHODS:
        raise HydraOptError(f"method = {method!r}: must be one of {', '.join(METHODS)}, or None")


def common_dtype(x: Array, w: Array) -> jnp.dtype:
    """Dtype of a product's operands, also where JAX promotes nothing implicitly.

    >>> print(common_dtype(jnp.ones(1, jnp.float16), jnp.ones(1, jnp.bfloat16)))
    float32
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(x.dtype, w.dtype)


def dot(x: Array, w: Array, precision: Any) -> Array:
    """`x @ w` accumulated in float32: `[..., P]`, `[P, Q]`."""
    kind = common_dtype(x, w)
    return jnp.dot(x.astype(kind), w.astype(kind), precision=precision, preferred_element_type=jnp.float32)


def product(
    x: Array, w: Array, group: Array, *, method: str | None = None, precision: Any = "highest"
) -> Array:
    """`y[n] = x[n] @ w[group[n]]`, accumulated in float32.

    Args:
      x: `[N, P]`.
      w: `[G, P, Q]`.
      group: `[N]` int, each in 0..G-1.
      method: "mask", "blocks" or "ragged"; None for `choose_method`.
      precision: of the matrix products.

    Returns:
      `[N, Q]` float32.

    Raises:
      HydraOptError: an unknown method.

    >>> w = jnp.array([[[1.0]], [[10.0]]])
    >>> print(product(jnp.array([[1.0], [2.0]]), w, jnp.array([1, 0])).ravel())
    [10.  2.]
    """
    check_method(method)
    groups, inputs, outputs = w.shape
    if groups == 1:
        return dot(x, w[0], precision)
    method = method or choose_method(x.shape[0], groups, min(inputs, outputs))
    kind = common_dtype(x, w)
    compute: dict[str, Callable[..., Array]] = {"mask": masked, "blocks": blocked, "ragged": ragged}
    return compute[method](x.astype(kind), w.astype(kind), group, precision)


def masked(x: Array, w: Array, group: Array, precision: Any) -> Array:
    """All groups in one matmul; the mask is on the narrow side, before or after it."""
    groups, inputs, outputs = w.shape
    if inputs >= outputs:
        every = dot(x, jnp.moveaxis(w, 0, 1).reshape(inputs, -1), precision).reshape(-1, groups, outputs)
        return jnp.take_along_axis(every, group[:, None, None], 1)[:, 0]
    member = group[:, None] == jnp.arange(groups)
    spread = jnp.where(member[..., None], x[:, None, :], 0).reshape(-1, groups * inputs)
    return dot(spread, w.reshape(-1, outputs), precision)


def ragged(x: Array, w: Array, group: Array, precision: Any) -> Array:
    """Rows sorted by group, `jax.lax.ragged_dot`, and back."""
    order = jnp.argsort(group)
    sizes = jnp.bincount(group, length=w.shape[0]).astype(jnp.int32)
    y = jax.lax.ragged_dot(x[order], w, sizes, precision=precision, preferred_element_type=jnp.float32)
    return y[jnp.argsort(order)]


def blocked(x: Array, w: Array, group: Array, precision: Any) -> Array:
    """Rows sorted into blocks of K rows of one group each, the matrix of each block gathered."""
    return by_blocks(x, group, w.shape[0], lambda rows, owner: dot(rows, w[owner], precision))


def by_blocks(x: Array, group: Array, groups: int, multiply: Callable[[Array, Array], Array]) -> Array:
    """Apply `multiply(rows: [K, P], group) -> [K, Q]` to blocks of rows of one group each.

    Args:
      x: `[N, P]`.
      group: `[N]` int, each in 0..G-1.
      groups: G.
      multiply: function of one block. It is vmapped over at most N / 4 blocks at a time, so that gathering
        one matrix per block takes less memory than one per row.

    Returns:
      `[N, Q]`, rows in the order of `x`.
    """
    rows = x.shape[0]
    if not rows:
        one = jax.eval_shape(multiply, x, jax.ShapeDtypeStruct((), jnp.int32))
        return jnp.zeros((0, one.shape[-1]), one.dtype)
    size = next((k for k in BLOCKS if k * groups >= rows), BLOCKS[-1])
    # each group leaves at most one block partly filled
    count = rows // size + min(groups, rows)
    slot, owner = arrange(group, groups, size, count)
    # unused places of a block read the first row and are not written back
    source = jnp.zeros(count * size, slot.dtype).at[slot].set(jnp.arange(rows), unique_indices=True)
    y = jax.lax.map(
        lambda block: multiply(x[block[0]], block[1]),
        (source.reshape(count, size), owner),
        batch_size=max(rows // 4, 1),
    )
    return y.reshape(count * size, -1)[slot]


def arrange(group: Array, groups: int, size: int, count: int) -> tuple[Array, Array]:
    """Where each row lies among `count` blocks of `size` rows, and which group owns each block.

    >>> slot, owner = arrange(jnp.array([1, 0, 1, 1]), 2, 2, 4)
    >>> print(slot, owner)
    [2 0 3 4] [0 1 1 1]
    """
    sizes = jnp.bincount(group, length=groups)
    blocks = -(-sizes // size)
    end = jnp.cumsum(blocks)
    order = jnp.argsort(group)
    of = group[order]
    rank = jnp.arange(group.shape[0]) - (jnp.cumsum(sizes) - sizes)[of]
    slot = jnp.zeros_like(order).at[order].set((end - blocks)[of] * size + rank, unique_indices=True)
    owner = jnp.searchsorted(end, jnp.arange(count), side="right")
    return slot, jnp.minimum(owner, groups - 1)
