"""Named tensors of weight files from PyTorch programs: safetensors, and with torch also pickles."""

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from hydraopt_jax.errors import HydraOptError, one_line, system_error
from hydraopt_jax.factors import FLOATS


def read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a weights file, one at a time.

    Args:
      path: a .safetensors file, or a .bin pickle, for which torch must be installed.

    Yields:
      Name and array, in the dtype on disk.

    Raises:
      HydraOptError: the file is damaged, of another kind, has entries that are not tensors, or a dtype that
        NumPy cannot represent.
    """
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        # The header is parsed, and checked against the file's size, on opening.
        file = safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        raise HydraOptError(
            f"{path}: is not a complete safetensors file ({one_line(error)}): copy it again"
        ) from None
    except OSError as error:
        raise system_error(path, "read", error) from None
    with file:
        for key in file.keys():  # noqa: SIM118 - no mapping
            try:
                tensor = file.get_tensor(key)
            except (safetensors.SafetensorError, AttributeError, TypeError, KeyError, OSError) as error:
                raise HydraOptError(
                    f"{path}: {key} cannot be read by NumPy ({one_line(error)}): save it as bfloat16"
                ) from None
            yield key, tensor


def names_and_metadata(path: Path) -> tuple[list[str], Mapping[str, str]]:
    """Names of the tensors of a safetensors file and its metadata; both empty if it is not one."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return list(file.keys()), file.metadata() or {}
    except (safetensors.SafetensorError, OSError):
        return [], {}


def _read_pickle(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        import torch
    except ImportError:
        raise HydraOptError(
            f"{path}: a .bin file is a pickle and needs torch: install the torch extra, or save the adapter "
            "again as safetensors"
        ) from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # the unpickler raises whatever a damaged stream leads it to
        if "allocate memory" in str(error):
            raise MemoryError(f"{path}: {one_line(error, 120)}") from None
        raise HydraOptError(
            f"{path}: refused, not a pickle of plain tensors ({one_line(error, 120)}): ask for safetensors"
        ) from None
    if not isinstance(tensors, Mapping):
        raise HydraOptError(f"{path}: holds a {type(tensors).__name__}, not named tensors: save a state dict")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise HydraOptError(f"{path}: entry {key!r} is no named tensor: save a state dict")
        try:
            values = tensor.detach().contiguous()
            if values.dtype == torch.bfloat16:  # NumPy has no such dtype of its own: pass the bits
                array = values.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            else:
                array = values.numpy()
        except (TypeError, RuntimeError) as error:
            raise HydraOptError(f"{path}: {key} cannot be read by NumPy ({one_line(error)})") from None
        yield key, array


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with default permissions, or those of the file that it replaces.

    safetensors itself would write a file that only its owner may read.
    """
    there = path.exists()
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except BaseException:
        if not there:
            path.unlink(missing_ok=True)
        raise
    path.chmod(mode)


def disk_dtype(name: str) -> np.dtype:
    """The dtype of a name, if factors may have it on disk."""
    for dtype in FLOATS:
        if dtype.name == name:
            return dtype
    raise HydraOptError(f"dtype {name!r}: choose one of {', '.join(x.name for x in FLOATS)}")


def disk_array(key: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in its dtype on disk and in C order: safetensors ignores the strides of a transposed view."""
    with np.errstate(over="ignore"):
        result = np.array(values, dtype=dtype, order="C")
    if not np.isfinite(result).all():
        if np.isfinite(values).all():
            raise HydraOptError(f"{key}: its values overflow {dtype.name}: write bfloat16 instead")
        raise HydraOptError(f"{key}: has NaN or infinite values: leave this adapter out or retrain it")
    return result
