"""Load a store's factors onto devices, with a chosen precision and sharding."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hydraopt_jax import devices
from hydraopt_jax.codec import fixed_rate, lanes, rans
from hydraopt_jax.errors import HydraOptError, one_line
from hydraopt_jax.factors import to_dtype
from hydraopt_jax.formats.peft_config import base_name, check_base
from hydraopt_jax.forms import Factors
from hydraopt_jax.serving.mixed_tasks import Module, PackedFactors, Term
from hydraopt_jax.store import Store, decode_terms, task_index
from hydraopt_jax.store.decoding import named_tasks
from hydraopt_jax.store.store import cut_to

# shardings of kernels as matrices `[I, O]`: one for all modules, or a function of the name; None: one device
Shardings: TypeAlias = NamedSharding | Callable[[str], NamedSharding | None] | None


def load(
    store: Store,
    *,
    tasks: Sequence[str] | None = None,
    base: str | None = None,
    dtype: Any = None,
    bits: int | None = None,
    shardings: Shardings = None,
    on_device: bool | None = None,
) -> dict[str, Module]:
    """A store's modules as factors on the device, for `apply` and `wrap`.

    Entropy-coded factors are decoded once, on the host or by JAX, to the same numbers. `bits` quantizes the
    factors again at a fixed rate and keeps packed codes in device memory. `apply` dequantizes them on the
    fly, `dequantize` once.

    Args:
      store: from `compress` or `open`.
      tasks: names of the tasks to load; ids are then positions among these names. None for all.
      base: name of the served base model; tasks of another one are refused. None: do not compare names.
      dtype: of the factors. None for the store's dtype if that takes two bytes, else bfloat16: coded factors
        are integers (numbers of quantizer steps), which bfloat16 represents exactly up to 256. Cores, which
        have the steps, stay float32.
      bits: 2 to 8 for codes of so many bits with a half-precision scale per vector; None for no codes.
      shardings: of the layers' kernels as matrices `[I, O]`, one for all modules or by name. `a` is split
        over inputs and `b` over outputs like the kernel. None for one device.
      on_device: decode entropy-coded factors by JAX, the lanes of all tasks at once; None for True if this
        thread computes on an accelerator.

    Returns:
      Module name -> its terms; modules that none of the tasks has are left out.

    Raises:
      HydraOptError: an unknown task, one of another base model, a dtype that is no float of two bytes or
        more, values that overflow it, a sharding that does not fit, options that exclude each other, an
        unknown width.
    """
    if bits is not None and dtype is not None:
        raise HydraOptError("dtype and bits: give one; dequantize takes the dtype of quantized factors")
    if bits is not None and shardings is not None:
        raise HydraOptError("shardings and bits: give one; packed codes are not split over devices")
    check_serving_dtype(dtype)
    if on_device is None:
        on_device = devices.platform() != "cpu"
    decode_lanes = lanes.decode if on_device else rans.decode
    names = named_tasks(store, tasks)
    check_base_of(store, names, base)
    chosen = store if tasks is None else cut_to(store, names)
    out = {}
    for name, terms in decode_terms(chosen, decode_lanes=decode_lanes).items():
        used = [x for x in terms if np.any((np.asarray(x.a_of) >= 0) & (np.asarray(x.b_of) >= 0))]
        if used:
            split = kernel_sharding(shardings, name)
            out[name] = tuple(_device(name, term, dtype, bits, split) for term in used)
    return out


def check_base_of(store: Store, tasks: Sequence[str], base: str | None) -> None:
    """Raise if a task was trained on a base model of another name; None: do not compare. Decodes nothing."""
    for task in tasks if base is not None else ():
        own = base_name(store.sources[task_index(store.tasks, task)].config)
        check_base(f"task {task!r}", own, base or "")


def _device(name: str, term: Factors, dtype: Any, bits: int | None, kernel: NamedSharding | None) -> Term:
    a, b = np.asarray(term.a), np.asarray(term.b)
    a_of, b_of = np.asarray(term.a_of, np.int32), np.asarray(term.b_of, np.int32)
    core = None if term.core is None else np.asarray(term.core, np.float32)
    if bits is None:
        a, b = (to_dtype(name, x, serving_dtype(x.dtype, dtype)) for x in (a, b))
        return place_term(name, Factors(a, b, a_of, b_of, core), kernel)
    low, high = (fixed_rate.packed(jnp.asarray(x, jnp.float32), bits) for x in (a.swapaxes(1, 2), b))
    rest = None if core is None else jnp.asarray(core)
    return PackedFactors(low, high, jnp.asarray(a_of), jnp.asarray(b_of), rest)


def serving_dtype(stored: Any, asked: Any = None) -> np.dtype:
    """The dtype of factors on the device, from the store's dtype and the requested one.

    >>> serving_dtype("float32").name, serving_dtype("float16").name, serving_dtype("float16", "float32").name
    ('bfloat16', 'float16', 'float32')
    """
    stored = np.dtype(stored)
    return jnp.dtype(asked if asked is not None else stored if stored.itemsize <= 2 else jnp.bfloat16)


def check_serving_dtype(asked: Any) -> None:
    """Raise unless a requested dtype is None or a float of two bytes or more."""
    try:
        kind = jnp.dtype(jnp.float32 if asked is None else asked)
    except TypeError:
        kind = None
    if kind is None or not jnp.issubdtype(kind, jnp.floating) or kind.itemsize < 2:
        name = asked if kind is None else kind.name
        raise HydraOptError(
            f"dtype {name}: give float32, bfloat16 or float16; load has bits=8 for smaller codes"
        )


def kernel_sharding(shardings: Shardings, name: str) -> NamedSharding | None:
    """The sharding of a module's kernel."""
    return shardings(name) if callable(shardings) else shardings


def place_term(name: str, term: Factors, kernel: NamedSharding | None) -> Factors:
    """A term on the devices of a layer's kernel, with matching shardings.

    Args:
      name: of the module.
      term: on the host, or as shapes and dtypes only.
      kernel: sharding of `[I, O]`; None for one device.

    Raises:
      HydraOptError: a sharding that does not divide the axes, or has more than two.
    """
    if kernel is None:
        return jax.tree.map(jnp.asarray, term)
    return jax.tree.map(jax.device_put, term, shardings_of(name, term, kernel))


def shardings_of(name: str, term: Factors, kernel: NamedSharding) -> Any:
    """A pytree like the term, of the shardings of its arrays, from that of its layer's kernel `[I, O]`."""
    size = term.a.shape[-2], term.b.shape[-1]
    try:
        kernel.shard_shape(size)
    except ValueError as error:
        what = f"cannot be split as {kernel.spec}: {one_line(error, 160)}"
        raise HydraOptError(f"{name}: its [in, out] = {list(size)} {what}") from None
    inputs, outputs = (*kernel.spec, None, None)[:2]
    on = lambda *axes: NamedSharding(kernel.mesh, PartitionSpec(*axes))  # noqa: E731
    a, b = (
        on(*[None] * (x.ndim - 2), *axes) for x, axes in ((term.a, (inputs, None)), (term.b, (None, outputs)))
    )
    every = (a, b, on(), on(), *([] if term.core is None else [on()]))
    return jax.tree.unflatten(jax.tree.structure(term), every)
