"""Second moments of a model's layer inputs, and of the gradients at the layer outputs.

This module is for Flax NNX; `hooks` does the same for PyTorch.

The model is copied; the copy shares its arrays. In the copy each layer is replaced by one that also adds
`x.T @ x` to a sum, or, for a moment of low rank, its diagonal and its products with a few vectors. For output
gradients, each layer also passes its output through an identity whose second argument is a matrix of zeros
and whose derivative with respect to that argument is the same sum of `g.T @ g`. One backward pass then gives
the sums of all layers, for any shapes and any number of calls per layer.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from hydraopt_jax.calibration import hooks
from hydraopt_jax.calibration.moments import (
    Seen,
    Watch,
    aligned,
    averaged,
    chosen,
    probes,
    second,
    start,
    width,
)
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats.families import Name
from hydraopt_jax.nnx_layers import (
    contraction,
    dotted,
    is_layer,
    kernel_of,
    kernel_shape,
    matrix,
    replace,
)


class Sum(nnx.Variable):
    """The sum over a layer's inputs, see `Moment`, and their number."""


class Cell(nnx.Variable):
    """Zeros, whose gradient is the sum over a layer's output gradients."""


class Counted(nnx.Variable):
    """Weights of the inputs, shared by all layers: `[...]` like the leading axes of a batch, or a scalar."""


class Probes(nnx.Variable):
    """What moments of a size are multiplied with, see `moments.probes`; shared by all layers."""


class Tapped(nnx.Module):
    """A layer that also accumulates the second moment of its inputs."""

    def __init__(
        self, base: nnx.Module, name: str, counted: Counted, watch: Watch, probes_of: Callable[[int], Any]
    ):
        inputs, features = matrix(base)
        self.base, self.name, self.counted = base, name, counted
        self.sum, self.input_probes = Sum(tuple(start(inputs, watch.rank))), probes_of(inputs)
        self.cell = Cell(start(features, watch.rank).total) if watch.outputs else None
        self.output_probes = probes_of(features) if watch.outputs else None

    def __call__(self, x: Array, *args: Any, **options: Any) -> Array:
        """The output of the original layer."""
        equation = next((a for a in (*args, options.get("einsum_str")) if isinstance(a, str)), None)
        rows, restore = contraction(self.base, x, equation)
        weights = weigh(self.counted.get_value(), rows.shape[:-1], self.name)
        total, count = self.sum.get_value()
        seen = jax.lax.stop_gradient(rows)
        self.sum.set_value(
            (total + second(seen, weights, value_of(self.input_probes)), count + weights.sum())
        )
        y = self.base(x, *args, **options)
        if self.cell is None:
            return y
        made = jax.ShapeDtypeStruct((*weights.shape, y.size // max(weights.size, 1)), y.dtype)
        # the inverse of what only reorders entries
        rows_of = jax.linear_transpose(restore, made)
        return note(lambda g: rows_of(g)[0], y, self.cell.get_value(), weights, value_of(self.output_probes))


def value_of(variable: Probes | None) -> Array | None:
    """The vectors of a variable, if there are any."""
    return None if variable is None else variable.get_value()


def weigh(counted: Array, lead: tuple[int, ...], name: str) -> Array:
    """Weights of rows, `[*lead]` float32, from the weights of a batch.

    Raises:
      HydraOptError: the leading axes of the rows are not those of the batch.
    """
    counted = jnp.asarray(counted, jnp.float32)
    return jnp.broadcast_to(counted.reshape(aligned(counted.shape, lead, name)), lead)


def note(
    rows_of: Callable[[Array], Array], y: Array, cell: Array, weights: Array, vectors: Array | None
) -> Array:
    """`y`; the derivative for `cell` is the sum over the gradients at y."""

    @jax.custom_vjp
    def identity(y: Array, cell: Array, seen: Any) -> Array:
        return y

    def forward(y: Array, cell: Array, seen: Any) -> tuple[Array, Any]:
        return y, seen

    def backward(seen: Any, g: Array) -> tuple[Array, Array, Any]:
        return g, second(rows_of(g), *seen), jax.tree.map(jnp.zeros_like, seen)

    identity.defvjp(forward, backward)
    return identity(y, cell, (weights, vectors))


def tapped(model: nnx.Module, watch: Watch) -> tuple[nnx.Module, dict[str, Name]]:
    """A copy of a model with accumulating layers, arrays shared; and path -> module name of each layer.

    Raises:
      HydraOptError: a module without a layer, no layer at all, or a stacked layer.
    """
    copy = nnx.merge(*nnx.split(model), copy=True)
    layers = {dotted(path): (path, x) for path, x in nnx.iter_modules(copy) if is_layer(x)}
    names = chosen(layers, watch)
    counted = Counted(jnp.ones(()))

    @functools.cache
    def probes_of(size: int) -> Probes | None:
        vectors = probes(size, width(size, watch.rank))
        return None if vectors is None else Probes(jnp.asarray(vectors))

    for path in names:
        keys, base = layers[path]
        shape = kernel_of(base).get_value().shape
        if len(shape) != kernel_axes(base):
            raise HydraOptError(
                f"{path}: its kernel has shape {list(shape)}, layers stacked by scan or vmap: collect "
                "from the model with its layers one by one"
            )
        replace(copy, keys, Tapped(base, path, counted, watch, probes_of))
    return copy, names


def kernel_axes(base: Any) -> int:
    """Number of axes of the kernel of a layer that is not stacked."""
    if hasattr(base, "axis"):
        return len(base.in_features) + len(base.out_features)
    return len(kernel_shape(base)) if hasattr(base, "einsum_str") else 2


def collect(
    model: Any,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    modules: Iterable[str] | None = None,
    rename: Callable[[str], Name] = lambda path: path,
    rank: int | None = None,
    outputs: bool = False,
    key: Array | None = None,
) -> dict[str, np.ndarray]:
    """Second moments of the inputs of a model's layers, for `write_moments` and `compress(calibration=)`.

    The model is not changed. Of a Flax NNX model the `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Einsum`
    layers are observed; of a PyTorch model the layers that PEFT adapts, or, without any, all linear layers
    except the output head. Each takes `[I, I]` float32 on the device (`[I, 1 + 2 K]` with `rank=K`), with
    `outputs` also `[O, O]` (or `[O, 1 + 2 K]`).

    More than eight arguments: each says something else of a foreign model; all but two have a default.

    Args:
      model: a Flax NNX model in inference mode: no dropout, and caches large enough for the batches. Or a
        PyTorch model, such as one of PEFT or transformers, which is evaluated without dropout.
      batches: inputs of `forward`; Flax compiles each shape once. Some thousand tokens that are typical of
        use suffice; labels are not needed. With PyTorch the iterator may call `model.set_adapter` between
        batches, so that each task's text is seen with its own adapter.
      forward: `(model, batch) -> logits`, in Flax traced by jit. None: `model(batch)`, in PyTorch
        `model(**batch)` if the batch is a mapping.
      mask: batch -> `[...]` bool, the tokens that count, with the leading axes of the layers' inputs. None:
        all tokens, in PyTorch those of a mapping's `attention_mask`.
      modules: names of the modules to observe, such as those of an adapter or a store; None for every layer.
      rename: the model's path of a layer (`"layers.0.q_proj"`) -> the adapters' name of the module, or a
        tuple of names if modules share the kernel, see `serving.wrap`. Layers that PEFT wraps already have
        the names of its adapters.
      rank: K of a matrix that stands, with a diagonal, for each moment: `[I, 1 + K]` in place of `[I, I]`. 0
        keeps variances only, which ignores correlations between inputs; None the whole moments.
      outputs: gather `NAME:output` as well: gradients of the log-likelihood of labels that are drawn from the
        model's predictions, so that errors are weighted by their effect on the model's outputs. `forward`
        must then return logits.
      key: PRNG key that draws the labels; None for seed 0.

    Returns:
      Module name -> second moment. A layer that `forward` never called is left out, unless `modules` names
      it.

    Raises:
      HydraOptError: a module without a layer (near paths are listed), a mask that does not fit, no batches, a
        negative rank.
    """
    # refuses a negative rank before anything runs
    width(1, rank)
    key = jax.random.key(0) if key is None else key
    watch = Watch(None if modules is None else tuple(modules), rename, rank, outputs)
    if hooks.is_torch(model):
        seed = int(jax.random.bits(key))
        return hooks.collect(model, batches, forward, mask, watch, seed)
    run_model = forward or (lambda model, batch: model(batch))
    copy, names = tapped(model, watch)
    graph, *states = nnx.split(copy, Cell, Sum, ...)
    cells, sums, rest = states

    def run(cells: Any, sums: Any, rest: Any, batch: Any, counts: Array, key: Array) -> Any:
        again = nnx.merge(graph, cells, sums, rest, copy=True)
        for _, x in nnx.iter_modules(again):
            if isinstance(x, Tapped):
                x.counted.set_value(counts)
        logits = run_model(again, batch)
        value = likelihood(logits, counts, key) if outputs else jnp.zeros(())
        return value, nnx.state(again, Sum)

    @jax.jit
    def step(found: Any, sums: Any, rest: Any, batch: Any, counts: Array, key: Array) -> Any:
        if not outputs:
            return found, run(cells, sums, rest, batch, counts, key)[1]
        gradients, sums = jax.grad(run, has_aux=True)(cells, sums, rest, batch, counts, key)
        return jax.tree.map(jnp.add, found, gradients), sums

    found, seen = cells, 0
    for n, batch in enumerate(batches):
        counts = jnp.ones(()) if mask is None else jnp.asarray(mask(batch), jnp.float32)
        found, sums = step(found, sums, rest, batch, counts, jax.random.fold_in(key, n))
        seen += 1
    if not seen:
        raise HydraOptError("there are no batches: give at least one")
    return averaged(sums_of(nnx.merge(graph, found, sums, rest, copy=True)), names, watch)


def likelihood(logits: Array, counts: Array, key: Array) -> Array:
    """Sum of the log-likelihoods of labels drawn from the model's own predictions, `[..., V]`."""
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    drawn = jax.random.categorical(key, jax.lax.stop_gradient(scores))
    picked = jnp.take_along_axis(scores, drawn[..., None], -1)[..., 0]
    return (picked * weigh(counts, picked.shape, "the model's output")).sum()


def sums_of(model: nnx.Module) -> dict[str, Seen]:
    """Path -> accumulated sums, of the layers of a tapped model."""
    out = {}
    for path, x in nnx.iter_modules(model):
        if isinstance(x, Tapped):
            total, count = x.sum.get_value()
            outputs = None if x.cell is None else np.asarray(x.cell.get_value())
            out[dotted(path)] = Seen(np.asarray(total), float(count), outputs)
    return out
