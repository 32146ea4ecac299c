"""Load a store's tasks into a PEFT model of this process, without folders."""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.errors import HydraOptError, one_line
from hydraopt_jax.formats import peft as peft_folders
from hydraopt_jax.formats import server
from hydraopt_jax.formats.adapter_folder import folder_name
from hydraopt_jax.formats.peft_config import base_name, check_base
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
        replaced, in place if modules and ranks are equal.
      rank: pad or cut every module to this rank, so that tasks replace each other in place and a compiled
        model stays compiled.
      any_base: do not compare the base model's name with the store's.

    Returns:
      The PEFT model in evaluation mode; `model` itself if it was a PEFT model.

    Raises:
      HydraOptError: no such task, another base model, a name with dots, or modules that the model lacks. The
        model is then unchanged.
    """
    try:
        import peft
    except ImportError:
        raise HydraOptError("load_adapter needs PEFT and PyTorch: install the peft extra") from None
    if name is not None and (not name or "." in name):
        raise HydraOptError(
            f"name {name!r}: PyTorch takes no dots and no empty name: leave it out, or give another"
        )
    found = store if isinstance(store, Store) else open_store(store)
    own = base_name(found.sources[task_index(found.tasks, task)].config)
    served = getattr(getattr(model, "config", None), "name_or_path", "")
    if own and served and not any_base:
        check_base(f"task {task!r}", own, served)
    adapter = server.fit_server(decode(found, task), rank=rank, padded=rank is not None).adapter
    wrapped = isinstance(model, peft.PeftModel)
    base = model
    if wrapped:
        # PEFT's own way fails where the last adapter was unloaded
        base = model.get_base_model() if model.peft_config else model.base_model.model
    _check_modules(base, adapter)
    fields, arrays = peft_folders.contents(adapter)
    config, state = peft.PeftConfig.from_peft_type(**fields), _tensors(arrays)
    name = adapter_name(task) if name is None else name
    # empty until it is filled, but for full tensors, which take the dtype of the module that they stand for
    empty = not adapter.extras
    if not wrapped:
        model = _wrap(model, name, config, state, empty)
    elif name not in model.peft_config:
        _try_to_add(model, name, config, state, empty)
    elif _fits(model, name, config, state):
        peft.set_peft_model_state_dict(model, state, adapter_name=name)
    else:
        _replace(model, name, config, state, empty)
    model.set_adapter(name)
    return model.eval()


def unload_adapter(model: Any, task: str) -> None:
    """Remove a task's adapter from a PEFT model, which needs another one before it runs again.

    Raises:
      HydraOptError: the model has no adapter of this task.
    """
    name = adapter_name(task)
    if name not in model.peft_config:
        loaded = ", ".join(map(repr, model.peft_config)) or "none"
        raise HydraOptError(f"task {task!r} is not loaded: the model's adapters are {loaded}")
    _delete(model, name)


def adapter_name(task: str) -> str:
    """The name of a task's adapter in a model, without dots, which PyTorch does not allow in module names.

    >>> adapter_name("legal"), adapter_name("v1.2/a")
    ('legal', 'v1%2E2%2Fa')
    """
    return folder_name(task).replace(".", "%2E")


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
    names = {x.rpartition(".")[2] for x, _ in base.named_modules()}
    heads = {x.rpartition(".")[2] for x in adapter.config.get("modules_to_save") or ()}
    # PEFT names heads that a model may have; what matters are those with tensors
    brought = {x.rpartition(".")[0].rpartition(".")[2] for x in adapter.extras}
    for head in sorted((heads & brought) - names):
        raise HydraOptError(
            f"task {adapter.task!r} brings a trained {head}, which the model lacks: use its own base model"
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


def _fits(model: Any, name: str, config: Any, state: Mapping[str, Any]) -> bool:
    """Whether an existing adapter has the shapes and scales of another."""
    import peft

    there = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    shapes = [{k: tuple(v.shape) for k, v in x.items()} for x in (there, state)]
    old = model.peft_config[name]
    return shapes[0] == shapes[1] and all(getattr(old, x) == getattr(config, x) for x in _SCALES)


def _cannot(name: str, error: Exception) -> HydraOptError:
    return HydraOptError(f"adapter {name!r} cannot be loaded: {one_line(error, 200)}")


def _wrap(base: Any, name: str, config: Any, state: Mapping[str, Any], empty: bool) -> Any:
    """A PEFT model around a base model, which is as it was after a failure."""
    import peft

    try:
        model = peft.get_peft_model(base, config, adapter_name=name, low_cpu_mem_usage=empty)
        peft.set_peft_model_state_dict(model, state, adapter_name=name, low_cpu_mem_usage=empty)
        _restore_precision(model, name, state)
    except Exception as error:
        _unwrap(base)
        raise _cannot(name, error) from error
    return model


def _unwrap(base: Any) -> None:
    """Put the layers of a base model back in the place of those that PEFT has put around them."""
    vars(base).pop("peft_config", None)
    for path, layer in list(base.named_modules()):
        inner = getattr(layer, "original_module", None)
        inner = getattr(layer, "base_layer", None) if inner is None else inner
        if inner is not None and type(layer).__module__.startswith("peft."):
            parent, _, own = path.rpartition(".")
            setattr(base.get_submodule(parent), own, inner)


def _try_to_add(model: Any, name: str, config: Any, state: Mapping[str, Any], empty: bool) -> None:
    """`_add`; after a failure the adapters are those of before."""
    active = list(model.active_adapters) if model.peft_config else []
    try:
        _add(model, name, config, state, empty)
    except Exception as error:
        if name in model.peft_config:
            _delete(model, name)
        if active:
            model.base_model.set_adapter(active)
        raise _cannot(name, error) from error


def _add(model: Any, name: str, config: Any, state: Mapping[str, Any], empty: bool) -> None:
    import peft

    model.add_adapter(name, config, low_cpu_mem_usage=empty)
    peft.set_peft_model_state_dict(model, state, adapter_name=name, low_cpu_mem_usage=empty)
    _restore_precision(model, name, state)


def _restore_precision(model: Any, name: str, state: Mapping[str, Any]) -> None:
    """Factors as they are: PEFT rounds empty ones that it fills to the base model's dtype, a folder's not."""
    for key, parameter in model.named_parameters():
        before, found, after = key.rpartition(f".{name}")
        exact = state.get(before + after) if found and "lora_" in key else None
        if exact is not None and exact.dtype != parameter.dtype:
            parameter.data = exact.to(parameter.device)


def _replace(model: Any, name: str, config: Any, state: Mapping[str, Any], empty: bool) -> None:
    """Replace an existing adapter; after a failure the former one is restored."""
    import peft

    old = model.peft_config[name]
    kept = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    _delete(model, name)
    try:
        _add(model, name, config, state, empty)
    except Exception as error:
        if name in model.peft_config:
            _delete(model, name)
        _add(model, name, old, kept, False)
        model.set_adapter(name)
        raise _cannot(name, error) from error


def _delete(model: Any, name: str) -> None:
    with warnings.catch_warnings():
        # that another adapter, or none, is active now
        warnings.simplefilter("ignore")
        model.delete_adapter(name)
