"""Turns checkpoints that torch pickled into safetensors. Meant to run in a confined process: torch reads tensors alone, but it reads a pickle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nightpress.core.compress.model.checkpoint import SAFETENSORS_DTYPES, tensor_info, write_index, write_tensors
from nightpress.core.errors import ErrorCode, NightpressError

SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})
#: What trainers save beside a model.
_NOT_WEIGHTS = ("optimizer", "scheduler", "scaler", "training_args", "rng_state")
_ADAPTER = "adapter_model"  #: what the name of an adapter's weights begins with
#: Keys below which a checkpoint of a trainer has its weights.
_INSIDE = ("state_dict", "model_state_dict", "model", "module")
#: Words in the name of a table of embeddings: of two names for the same tensor, that of the table stays.
_TABLES = ("embed", "wte", "shared")


def pickled_weights(names: list[str]) -> list[str]:
    """Select the files that torch pickled and that may hold a model's weights."""
    return sorted(name for name in names if Path(name).suffix in SUFFIXES and not name.startswith(_NOT_WEIGHTS))


def unpickle(source: Path, target: Path) -> None:
    """Write a safetensors file to `target` for each checkpoint in `source`, and the index of a model. One checkpoint is in memory at a time.

    Raises NightpressError(unsupported_format) for a file that holds more than tensors, or none.
    """
    names = pickled_weights([path.name for path in source.iterdir()])
    for number, name in enumerate(names, start=1):
        tensors = _distinct(_state(source / name))
        if name.startswith(_ADAPTER):
            written = "adapter_model.safetensors"
        else:
            written = "model.safetensors" if len(names) == 1 else f"model-{number:05}-of-{len(names):05}.safetensors"
        infos = [
            tensor_info(key, SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()
        ]
        write_tensors(target / written, infos, tensors.items())
    if not any(name.startswith(_ADAPTER) for name in names):  # an index says that a folder has a model's own weights
        write_index(target)


def _state(path: Path) -> dict[str, Tensor]:
    try:
        try:
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # a checkpoint from before torch 1.6 can't be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader of pickles raises many kinds
        raise _not_tensors(
            path,
            f"torch refuses it ({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no reason'})",
        ) from error
    while isinstance(loaded, Mapping) and not any(isinstance(value, Tensor) for value in loaded.values()):
        inner: Any = next((loaded[key] for key in _INSIDE if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    found = (
        {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
        if isinstance(loaded, Mapping)
        else {}
    )
    if not found:
        raise _not_tensors(path, "it has no tensors by name")
    if odd := next(
        (
            key
            for key, tensor in found.items()
            if tensor.dtype not in SAFETENSORS_DTYPES or tensor.layout != torch.strided
        ),
        None,
    ):
        raise _not_tensors(path, f"{odd[:200]} is of a kind that safetensors does not have")
    prefix = "module." if all(key.startswith("module.") for key in found) else ""
    return {key.removeprefix(prefix): tensor for key, tensor in found.items()}


def _distinct(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out tensors that are another tensor under a second name, e.g. an output head that is the table of embeddings."""
    seen: set[tuple[Any, ...]] = set()
    kept: dict[str, Tensor] = {}
    for key in sorted(tensors, key=lambda key: (not any(word in key for word in _TABLES), key)):
        tensor = tensors[key]
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        kept[key] = tensor
    return kept


def _not_tensors(path: Path, why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.UNSUPPORTED_FORMAT,
        f"{path.name} can't be converted: {why}.",
        hint="Save the model's `state_dict()` alone, or convert it with the program that wrote it, where you trust it.",
        file=path.name,
    )
