"""Load a store's tasks into a PEFT model of this process, without folders."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.errors import HydraOptError, one_line
from hydraopt_jax.formats import peft as peft_folders
from hydraopt_jax.formats import server
from hydraopt_jax.formats.adapter_folder import folder_name
from hydraopt_jax.formats.peft_config import PREFIX, base_name, check_base
from hydraopt_jax.store import Store, decode, task_index
from hydraopt_jax.store import open as open_store

# fields of a configuration that affect a module's output and do not follow from the tensors
_SCALES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def load_adapter(
    model: Any,
    store: Store | str | os.PathLike[str],
    task: str,
    *,
    name: str | None = None,
    rank: int | None = None,
    any_base: bool = False,
) -> Any:
    """A PEFT model with a task of a store as its active adapter.

    Outputs equal those with the exported folder.

    Args:
      model: a `peft.PeftModel`, whose other adapters stay, or a model without adapters, which is wrapped.
      store: an open store, or its path.
      task: its name.
      name: of the adapter in the model; None for `adapter_name(task)`. An existing adapter of this name is
        replaced, in place if modules and ranks are equal; it must not be merged.
      rank: pad or cut every module to this rank, so that tasks replace each other in place and a compiled
        model stays compiled.
      any_base: do not compare the base model's name with the store's.

    Returns:
      The PEFT model in evaluation mode; `model` itself if it was a PEFT model.

    Raises:
      HydraOptError: no such task, another base model, a name that PyTorch does not take, a merged adapter of
        this name, a model with adapters that is no `PeftModel`, or modules that the model lacks. The model is
        then unchanged.
    """
    peft = _peft()
    wrapped = isinstance(model, peft.PeftModel)
    if not wrapped:
        _check_plain(model)
    found = store if isinstance(store, Store) else open_store(store)
    own = base_name(found.sources[task_index(found.tasks, task)].config)
    served = getattr(getattr(model, "config", None), "name_or_path", "")
    if own and served and not any_base:
        advice = "use its own base model, or any_base=True if this is the same under another name"
        check_base(f"task {task!r}", own, served, advice)
    name = adapter_name(task) if name is None else name
    _check_name(name)
    if wrapped:
        _check_not_merged(model, name)
    adapter = server.fit_server(decode(found, task), rank=rank, padded=rank is not None).adapter
    base = model
    if wrapped:
        # PEFT's own way fails where the last adapter was unloaded
        base = model.get_base_model() if model.peft_config else model.base_model.model
    _check_modules(base, adapter)
    _check_full_tensors(base, adapter)
    fields, arrays = peft_folders.contents(adapter)
    # empty until it is filled, but for full tensors, which take the dtype of the module that they stand for
    empty = not adapter.extras
    return _put(model, name, peft.PeftConfig.from_peft_type(**fields), _tensors(arrays), empty).eval()


def unload_adapter(model: Any, task: str) -> None:
    """Remove a task's adapter from a PEFT model, which needs another one before it runs again.

    Raises:
      HydraOptError: the model has no adapter of this task, or it is merged.
    """
    name = adapter_name(task)
    if not isinstance(getattr(model, "_orig_mod", model), _peft().PeftModel):
        raise HydraOptError("the model has no adapters: pass the PEFT model that load_adapter returned")
    if name not in model.peft_config:
        loaded = ", ".join(map(repr, model.peft_config)) or "none"
        raise HydraOptError(f"task {task!r} is not loaded: the model's adapters are {loaded}")
    _check_not_merged(model, name)
    _delete(model, name)


def adapter_name(task: str) -> str:
    """The name of a task's adapter in a model, without dots, which PyTorch does not allow in module names.

    >>> adapter_name("legal"), adapter_name("v1.2/a")
    ('legal', 'v1%2E2%2Fa')
    """
    return folder_name(task).replace(".", "%2E")


def _peft() -> Any:
    """The package.

    Raises:
      HydraOptError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise HydraOptError("adapters in models need PEFT and PyTorch: install the peft extra") from None
    return peft


def _check_plain(model: Any) -> None:
    """Raise if a model that is no `PeftModel` cannot be wrapped."""
    import torch

    if hasattr(model, "_orig_mod"):
        raise HydraOptError("the model is compiled: pass the one that was compiled, model._orig_mod")
    if not isinstance(model, torch.nn.Module):
        raise HydraOptError(f"the model is a {type(model).__name__}: pass a PyTorch model")
    if any(type(x).__module__.startswith("peft.") for x in model.modules()):
        raise HydraOptError("this model already has adapters: pass the PEFT model that load_adapter returned")


def _check_name(name: str) -> None:
    import torch

    if not name or "." in name:
        raise HydraOptError(
            f"name {name!r}: PyTorch takes no dots and no empty name: leave it out, or give another"
        )
    if hasattr(torch.nn.ModuleDict(), name):
        raise HydraOptError(
            f"adapter {name!r}: PyTorch's modules have an attribute of this name: give another name="
        )


def _check_not_merged(model: Any, name: str) -> None:
    if any(name in getattr(x, "merged_adapters", ()) for x in model.modules()):
        raise HydraOptError(f"adapter {name!r} is merged into the model: call model.unmerge_adapter() first")


def _check_modules(base: Any, adapter: Adapter) -> None:
    """Raise if an adapter has modules that the model lacks or has in other sizes."""
    for module, a in adapter.a.items():
        try:
            layer = base.get_submodule(module)
        except AttributeError:
            raise HydraOptError(
                f"task {adapter.task!r} adapts {module}, which the model lacks: use its own base model"
            ) from None
        wanted = [a.shape[0], adapter.b[module].shape[1]]
        sizes = [getattr(layer, x, None) for x in ("in_features", "out_features")]
        if None in sizes and hasattr(layer, "nf"):
            # GPT-2's Conv1D, whose weight is `[in, out]`
            sizes = list(layer.weight.shape)
        if None not in sizes and sizes != wanted:
            raise HydraOptError(
                f"task {adapter.task!r} adapts {module} as [in, out] = {wanted}, which the model has as "
                f"{sizes}: use its own base model"
            )


def _check_full_tensors(base: Any, adapter: Adapter) -> None:
    """Raise if an adapter has a head that the model lacks, or full tensors of other shapes."""
    names = {x.rpartition(".")[2] for x, _ in base.named_modules()}
    heads = {x.rpartition(".")[2] for x in adapter.config.get("modules_to_save") or ()}
    # PEFT names heads that a model may have; what matters are those with tensors
    brought = {x.rpartition(".")[0].rpartition(".")[2] for x in adapter.extras}
    for head in sorted((heads & brought) - names):
        raise HydraOptError(
            f"task {adapter.task!r} brings a trained {head}, which the model lacks: use its own base model"
        )
    for key, x in adapter.extras.items():
        path, _, own = key.removeprefix(PREFIX).rpartition(".")
        try:
            layer = base.get_submodule(path)
        except AttributeError:
            continue
        # what PEFT has wrapped
        layer = getattr(layer, "original_module", layer)
        shape = getattr(getattr(layer, own, None), "shape", x.shape)
        if tuple(shape) != x.shape:
            raise HydraOptError(
                f"task {adapter.task!r} brings {path}.{own} as {list(x.shape)}, which the model has as "
                f"{list(shape)}: load its base model with this shape"
            )


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """PyTorch's tensors; factors in half precision as float32, as PEFT loads them."""
    import torch

    out = {}
    for key, x in arrays.items():
        if "lora_" in key and x.dtype in (np.float16, ml_dtypes.bfloat16):
            x = x.astype(np.float32)
        half = x.dtype == ml_dtypes.bfloat16
        found = torch.from_numpy(np.ascontiguousarray(x.view(np.int16) if half else x))
        out[key] = found.view(torch.bfloat16) if half else found
    return out


def _put(model: Any, name: str, config: Any, state: Mapping[str, Any], empty: bool) -> Any:
    """The PEFT model with an adapter, new or in the place of another, which is active.

    The model is as it was after an error.
    """
    import peft

    there, wrapped = {}, isinstance(model, peft.PeftModel)
    if wrapped and name in model.peft_config:
        there = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    with _restored_on_error(model, name, there):
        if there and _fits(model.peft_config[name], there, config, state):
            peft.set_peft_model_state_dict(model, state, adapter_name=name)
        else:
            if there:
                _delete(model, name)
            if wrapped:
                model.add_adapter(name, config, low_cpu_mem_usage=empty)
            else:
                model = peft.get_peft_model(model, config, adapter_name=name, low_cpu_mem_usage=empty)
            peft.set_peft_model_state_dict(model, state, adapter_name=name, low_cpu_mem_usage=empty)
            _restore_precision(model, name, state)
        model.set_adapter(name)
    return model


def _fits(old: Any, there: Mapping[str, Any], config: Any, state: Mapping[str, Any]) -> bool:
    """Whether an existing adapter has the shapes and scales of another."""
    shapes = [{k: tuple(v.shape) for k, v in x.items()} for x in (there, state)]
    return shapes[0] == shapes[1] and all(getattr(old, x) == getattr(config, x) for x in _SCALES)


@contextlib.contextmanager
def _restored_on_error(model: Any, name: str, there: Mapping[str, Any]) -> Iterator[None]:
    """Restore a model, and the tensors `there` of the adapter of this name, on any error."""
    restore, values = _snapshot(model), [(x, x.clone()) for x in there.values()]
    try:
        yield
    except BaseException as error:
        restore()
        for x, before in values:
            x.copy_(before)
        if isinstance(error, Exception):
            what = f"{type(error).__name__}: {one_line(error, 200)}"
            raise HydraOptError(f"adapter {name!r} cannot be loaded: {what}") from error
        raise


def _snapshot(model: Any) -> Callable[[], None]:
    """A function that restores layers, adapters, which of them are active or merged, and `requires_grad`.

    Values of parameters are not copied: adapters are replaced by others and stay as they are.
    """
    trained = [(x, x.requires_grad) for x in model.parameters()]
    merged = [(x, list(x.merged_adapters)) for x in model.modules() if getattr(x, "merged_adapters", None)]
    own = [vars(x) for x in model.modules()]
    held = [x for attributes in own for x in attributes.values() if isinstance(x, dict | list | set)]
    # contents alone: a model has tens of thousands of these, and most are empty
    copies = [(x, dict(x) if isinstance(x, dict) else list(x)) for x in (*own, *held)]

    def restore() -> None:
        unmerged = [(layer, names) for layer, names in merged if not layer.merged_adapters]
        for x, before in copies:
            x.clear()
            x.extend(before) if isinstance(x, list) else x.update(before)
        for x, before in trained:
            x.requires_grad_(before)
        for layer, names in unmerged:
            # PEFT unmerges adapters when it sets another one
            layer.merged_adapters.clear()
            layer.merge(adapter_names=names)

    return restore


def _restore_precision(model: Any, name: str, state: Mapping[str, Any]) -> None:
    """Factors as they are: PEFT rounds empty ones that it fills to the base model's dtype, a folder's not."""
    for key, parameter in model.named_parameters():
        before, found, after = key.rpartition(f".{name}")
        exact = state.get(before + after) if found and "lora_" in key else None
        if exact is not None and exact.dtype != parameter.dtype:
            parameter.data = exact.to(parameter.device)


def _delete(model: Any, name: str) -> None:
    with warnings.catch_warnings():
        # that another adapter, or none, is active now
        warnings.simplefilter("ignore")
        model.delete_adapter(name)
