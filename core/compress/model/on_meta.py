"""Builds a model on the meta device from its config, with transformers, and finds the name of each of its parameters in the files."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from nightpress.core.compress.model.experts import take_apart
from nightpress.core.errors import ErrorCode, NightpressError


@dataclass(frozen=True)
class Built:
    """A model without weights."""

    model: Any
    names: Mapping[str, str]  #: parameter of the model → its name in the files
    tied: Mapping[str, str]  #: parameter → the parameter whose values it has


def build(folder: Path, stored: Collection[str], dtype: torch.dtype) -> Built:
    """Build the model without its head. stored: the names of the tensors in the files. With its head, if the files' names can be told only so.

    Raises NightpressError(unsupported_architecture) if transformers can't build it.
    """
    import transformers
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_built(error) from error
    named = (config.architectures or [""])[0]
    makers = [AutoModel.from_config]
    if hasattr(transformers, named):
        makers.append(getattr(transformers, named)._from_config)
    best: Built | None = None
    failed: Exception | None = None
    for make in makers:
        try:
            found = _built(make, config, stored, dtype)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            failed = error
            continue
        if best is None or _fit(found) > _fit(best):
            best = found
        if lacking(best) is None:
            break
    if best is None:
        assert failed is not None
        raise _not_built(failed) from failed
    return best


def _built(make: Any, config: Any, stored: Collection[str], dtype: torch.dtype) -> Built:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), WithoutWeights():
        model: Any = make(config, dtype=dtype)
    model.eval().requires_grad_(False)
    take_apart(model, stored)
    return Built(model, names_in_files(model, stored), getattr(model, "all_tied_weights_keys", None) or {})


def _fit(built: Built) -> tuple[bool, int]:
    return lacking(built) is None, len(set(built.names.values()))


def lacking(built: Built) -> str | None:
    """A parameter of the model's numbered blocks that has no name in the files; None: all have."""
    return next(
        (
            name
            for name, _ in built.model.named_parameters()
            if any(part.isdigit() for part in name.split(".")) and name not in built.names and name not in built.tied
        ),
        None,
    )


def names_in_files(model: nn.Module, stored_names: Iterable[str]) -> dict[str, str]:
    """Parameter of the model → its name in the files, by transformers' own rules for old and other names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [renaming for renaming in get_model_conversion_mapping(model) if isinstance(renaming, WeightRenaming)]
    known = dict(model.named_parameters(remove_duplicate=False))
    names: dict[str, str] = {}
    for stored in stored_names:
        for name in (rename_source_key(stored, renamings, [], model.base_model_prefix, known)[0], stored):
            if name in known:
                names[name] = stored
                break
    return names


#: Names of a tensor's methods, and of the functions of torch.nn.init, by which transformers draws each weight. On the meta device they change
#: nothing, and take most of the time in which a model is built.
_DRAWING = {"normal_", "uniform_", "kaiming_uniform_"}


class WithoutWeights(TorchFunctionMode):
    """Makes weights on the meta device, and draws none. Layers make weights with `torch.empty`; buffers are made with values and are not affected.

    Making and dropping a weight per layer would be enough, but malloc does not return freed chunks to the system. The process would take as
    much address space as the whole model, and a limit on the address space may be lower.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _DRAWING:
            drawn = args[0] if args else (kwargs or {})["tensor"]
            if drawn.is_meta:
                return drawn
        elsewhere = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **{**(kwargs or {}), **elsewhere})


def _not_built(error: Exception) -> NightpressError:
    return NightpressError(
        ErrorCode.UNSUPPORTED_ARCHITECTURE,
        f"transformers can't build the model from its config.json: {type(error).__name__}: {str(error)[:300]}",
        hint="Save it once with a current transformers.",
    )
