"""A tap on a PyTorch model: what `tap` gathers, by forward hooks. PyTorch only when used."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from hydraopt_jax.calibration.moments import Seen, Watch, aligned, averaged, chosen, probes, width
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats.peft_config import PREFIX


def is_torch(model: Any) -> bool:
    """Whether a model is PyTorch's."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def is_linear(layer: Any) -> bool:
    """Whether a layer, or the one that it adapts, is one matrix: `nn.Linear`, quantized, or GPT-2's."""
    base = getattr(layer, "base_layer", layer)
    sizes = getattr(base, "in_features", None), getattr(base, "out_features", None)
    return all(isinstance(n, int) for n in sizes) or (hasattr(base, "nf") and base.weight.ndim == 2)


def layers_of(model: Any, every: bool) -> dict[str, Any]:
    """Linear layers by path, without what PEFT has inside of them.

    Args:
      model: of PyTorch.
      every: all of them; else those that PEFT has adapted, or all but the output head where there are none.
    """
    found: dict[str, Any] = {}
    inside: tuple[str, ...] = ()
    for path, layer in model.named_modules():
        if path.startswith(inside) and inside:
            continue
        if hasattr(layer, "base_layer"):
            inside = (*inside, f"{path}.")
        if is_linear(layer):
            found[path.removeprefix(PREFIX)] = layer
    adapted = {path: x for path, x in found.items() if hasattr(x, "lora_A")}
    if every or adapted:
        return found if every else adapted
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {path: x for path, x in found.items() if x is not head}


class Tap:
    """The sums of one layer.

    Attributes:
      name: the layer's path.
      counted: which inputs of the batch count, `[...]` float32; None for all.
      probes: size and device -> `moments.probes` there, for all layers.
    """

    def __init__(self, name: str, rank: int | None, outputs: bool, probes: dict[Any, Any]) -> None:
        self.name, self.rank, self.outputs, self.probes = name, rank, outputs, probes
        self.counted: Any = None
        self.total: Any = 0.0
        self.cell: Any = 0.0
        self.count = 0.0

    def __call__(self, layer: Any, args: tuple[Any, ...], options: Mapping[str, Any], y: Any) -> Any:
        """A forward hook: add the inputs, and have the output's gradient added when it is known."""
        import torch

        x = args[0] if args else next(iter(options.values()))
        weights = weigh(self.counted, x, self.name)
        self.total = self.total + self.second(x, weights)
        self.count += float(weights.sum())
        if not self.outputs:
            return None
        if not y.requires_grad:
            # nothing before it is differentiated
            y = y.detach().requires_grad_().clone()

        def note(gradient: Any) -> None:
            with torch.no_grad():
                self.cell = self.cell + self.second(gradient, weights)

        y.register_hook(note)
        return y

    def second(self, rows: Any, weights: Any) -> Any:
        """`second` of rows `[..., n]` at the rank that is asked for."""
        import torch

        size, place = rows.shape[-1], rows.device
        if (size, place) not in self.probes:
            vectors = probes(size, width(size, self.rank))
            self.probes[size, place] = None if vectors is None else torch.tensor(vectors, device=place)
        # whatever the model's forward runs in
        with torch.autocast(place.type, enabled=False):
            return second(rows, weights, self.probes[size, place])

    def seen(self) -> Seen:
        """What the layer has seen."""
        if not self.count:
            return Seen(np.zeros(()), 0.0)
        cell = self.cell.cpu().numpy() if self.outputs and not isinstance(self.cell, float) else None
        return Seen(self.total.cpu().numpy(), self.count, cell)


def weigh(counted: Any, x: Any, name: str) -> Any:
    """Which rows of an input `[..., I]` count, `[...]` float32, from what says it for a batch."""
    import torch

    if counted is None:
        return torch.ones(x.shape[:-1], device=x.device)
    shape = aligned(tuple(counted.shape), tuple(x.shape[:-1]), name)
    return counted.to(x.device).reshape(shape).broadcast_to(x.shape[:-1])


def second(rows: Any, weights: Any, vectors: Any) -> Any:
    """As `moments.second`."""
    keep = weights.reshape(-1, 1)
    flat = rows.detach().reshape(-1, rows.shape[-1]).float().masked_fill(keep <= 0, 0.0)
    weighted = flat * keep
    if vectors is None:
        return flat.T @ weighted
    out = flat.new_empty(flat.shape[1], 1 + vectors.shape[1])
    out[:, 0], out[:, 1:] = (flat * weighted).sum(0), weighted.T @ (flat @ vectors)
    return out


def collect(
    model: Any,
    batches: Iterable[Any],
    forward: Callable[[Any, Any], Any] | None,
    mask: Callable[[Any], Any] | None,
    watch: Watch,
    seed: int,
) -> dict[str, np.ndarray]:
    """See `tap.collect`."""
    import torch

    layers = layers_of(model, watch.modules is not None)
    names = chosen(layers, watch)
    known: dict[Any, Any] = {}
    taps = {path: Tap(path, watch.rank, watch.outputs, known) for path in names}
    handles = [layers[path].register_forward_hook(x, with_kwargs=True) for path, x in taps.items()]
    draw = torch.Generator().manual_seed(seed)
    empty = True
    try:
        for batch in batches:
            empty = False
            counted = (mask or attention_mask)(batch)
            if counted is not None:
                counted = torch.as_tensor(counted).float()
            for x in taps.values():
                x.counted = counted
            with frozen(model), torch.set_grad_enabled(watch.outputs):
                found = (forward or call)(model, batch)
                if watch.outputs:
                    likelihood(getattr(found, "logits", found), counted, draw).backward()
    finally:
        for handle in handles:
            handle.remove()
    if empty:
        raise HydraOptError("there are no batches: give at least one")
    return averaged({path: x.seen() for path, x in taps.items()}, names, watch)


def call(model: Any, batch: Any) -> Any:
    """What a model says to a batch."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def attention_mask(batch: Any) -> Any:
    """The mask that a batch of transformers has."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """A model in evaluation mode whose parameters take no gradients, as it was afterwards."""
    training = [x for x in model.modules() if x.training]
    trained = [x for x in model.parameters() if x.requires_grad]
    model.eval()
    for x in trained:
        x.requires_grad_(False)
    try:
        yield
    finally:
        for x in training:
            x.training = True
        for x in trained:
            x.requires_grad_(True)


def likelihood(logits: Any, counted: Any, draw: Any) -> Any:
    """Sum of the log-likelihoods of labels drawn from the model's own predictions, `[..., V]`."""
    import torch

    scores = logits.float().log_softmax(-1)
    if scores.isnan().any():
        raise HydraOptError("the model's output: its numbers are not finite")
    with torch.no_grad():
        chances = scores.exp().reshape(-1, scores.shape[-1]).cpu()
        drawn = torch.multinomial(chances, 1, generator=draw).to(scores.device)
    picked = scores.gather(-1, drawn.reshape(*scores.shape[:-1], 1))[..., 0]
    return (picked * weigh(counted, scores, "the model's output")).sum()
